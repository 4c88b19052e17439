"""Which tensors a checkpoint must have, given those that it does: what its siblings have, a block must not lack.

    block of branches    every kind of branch that any trained block has, but where the block cannot have it: an
                         identity where the width changes or the stride may be 2, the 1x1 branch beside a 1x1 kernel,
                         further dense branches in the stem
    deployed block       the fused kernel and its bias
    batch norm behind    in every trained block, if in any
    SE                   all four tensors, in every block if in any; in a family that has it in part, in all blocks of a
                         stage from the first pair on that has it
    classifier           both tensors, or neither: then the network is a backbone

A part of a split stage without any block is a matter of names, not of canonical ones: see ``Lineage.absent``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from exporter.lineages.lineage import (
    DENSE_BRANCHES,
    HEAD_TENSORS,
    POST_TENSORS,
    SE_TENSORS,
    Lineage,
    branch_tensors,
)

Position = tuple[int, int]
PAIR = 2
"""A depthwise and a pointwise block, of which a family that has SE in part gives it to both."""
Branches = Mapping[Position, tuple[str, ...]]


def required_names(tensors: Mapping[str, Tensor], branches: Branches, lineage: Lineage) -> set[str]:
    """The canonical names that must exist; ``branches`` are those that each block has, with gaps where one is lost."""
    required = set(HEAD_TENSORS) if any(name in tensors for name in HEAD_TENSORS) else set()
    depths = {stage: max(i for s, i in branches if s == stage) + 1 for stage, _ in branches}
    positions = [(s, i) for s in range(max(depths, default=0) + 1) for i in range(depths.get(s, 1))]
    trained = {position: present for position, present in branches.items() if present not in (("fused",), ())}
    everywhere = {"dense"} | {branch for present in trained.values() for branch in present}
    post = any(f"{_prefix(position)}.{POST_TENSORS[0]}" in tensors for position in trained)
    for position in positions:
        prefix, present = _prefix(position), branches.get(position, ())
        if present == ("fused",):
            required |= {f"{prefix}.{name}" for name in branch_tensors("fused")}
        else:
            expected = set(_expected_branches(tensors, position, present, everywhere))
            required |= {f"{prefix}.{name}" for branch in expected for name in branch_tensors(branch)}
            required |= {f"{prefix}.{name}" for name in POST_TENSORS if post}
        if any(f"{prefix}.{name}" in tensors for name in POST_TENSORS):
            required |= {f"{prefix}.{name}" for name in POST_TENSORS}
    return required | set(_required_se(tensors, positions, lineage))


def _prefix(position: Position) -> str:
    return f"stage{position[0]}.{position[1]}"


def _expected_branches(
    tensors: Mapping[str, Tensor], position: Position, present: tuple[str, ...], everywhere: set[str]
) -> Iterator[str]:
    """The branches of a trained block."""
    yield from present
    kernels = (tensors.get(f"{_prefix(position)}.{branch}.weight") for branch in DENSE_BRANCHES)
    kernel = next((found for found in kernels if found is not None), None)
    further = set(DENSE_BRANCHES[1:])
    for branch in everywhere:
        if branch == "identity":
            if position[1] > 0 and not _changes_width(tensors, position):
                yield branch
        elif branch in further:
            if position != (0, 0) or further & set(present):
                yield branch
        elif branch != "pointwise" or kernel is None or kernel.shape[2:] != (1, 1):
            yield branch


def _changes_width(tensors: Mapping[str, Tensor], position: Position) -> bool:
    """Whether the block's dense kernel has another number of outputs than the block before it."""
    here = tensors.get(f"{_prefix(position)}.dense.weight")
    before = _kernel(tensors, (position[0], position[1] - 1))
    return here is not None and before is not None and here.shape[:1] != before.shape[:1]


def _kernel(tensors: Mapping[str, Tensor], position: Position) -> Tensor | None:
    dense = tensors.get(f"{_prefix(position)}.dense.weight")
    return dense if dense is not None else tensors.get(f"{_prefix(position)}.fused.weight")


def _required_se(tensors: Mapping[str, Tensor], positions: list[Position], lineage: Lineage) -> Iterator[str]:
    having = [p for p in positions if any(f"{_prefix(p)}.{name}" in tensors for name in SE_TENSORS)]
    first = {stage: index - index % PAIR for stage, index in reversed(having)}
    for stage, index in positions:
        if (index >= first.get(stage, index + 1)) if lineage.se_in_part else having:
            yield from (f"{_prefix((stage, index))}.{name}" for name in SE_TENSORS)
