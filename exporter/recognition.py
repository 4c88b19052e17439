"""The network that a set of canonical tensors makes, inferred from their names and shapes.

    depths, widths, classes     from the tensors
    groups                      in / weight.shape[1], with in = the previous block's out
    branches, SE                from which tensors exist; branches win over a fused kernel beside them
    stride                      1 where there is an identity branch; 2 where in == out, other blocks have an identity
                                branch and this one does not; otherwise not in the file: 2 for the first block of a
                                stage, as an assumption that is reported and that ``--strides`` overrides
    identity without tensors    where the lineage's code has one: in == out and stride 1, so it hangs on the strides
    batch norm epsilon          not in the file: the lineage's, as an assumption that ``--eps`` overrides
    outputs                     the classifier's; without one in the file, the last feature map; with ``--features``,
                                the feature maps of the stages that are named, and nothing behind the last of them

Everything that is missing or left over is reported at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from torch import Tensor

from exporter.architecture import IN_CHANNELS, Architecture, Block, Position, joined, stage_of
from exporter.errors import ArchitectureRejected, UsageError, listed
from exporter.lineages.lineage import (
    BRANCH_TENSORS,
    DENSE_BRANCHES,
    HEAD_TENSORS,
    POST_TENSORS,
    SE_TENSORS,
    Lineage,
    branch_tensors,
)
from exporter.required import required_names
from exporter.variants import VARIANTS, Variant


def architecture_from_tensors(
    tensors: Mapping[str, Tensor],
    lineage: Lineage,
    *,
    unexpected: Sequence[str],
    where: str,
    strides: Sequence[int] | None,
    eps: float | None,
) -> Architecture:
    """Infers the network from canonical tensors.

    Args:
        tensors: by canonical name.
        lineage: whose names the messages use, and whose epsilon is assumed.
        unexpected: names that nothing uses, reported together with what is missing.
        where: the file, for messages.
        strides: the first block's stride of every stage, or None to infer them.
        eps: the batch norms' epsilon, or None for the lineage's.

    Raises:
        ArchitectureRejected: tensors are missing, left over, or contradict each other or ``strides``.
        UsageError: ``strides`` has another length than there are stages.
    """
    branches = _branches_by_position(tensors)
    _check_names(tensors, branches, lineage, unexpected, where)
    shapes = _Shapes(tensors, lineage, where)
    blocks: list[Block] = []
    told: dict[Position, bool] = {}
    has_identity = any("identity" in present for present in branches.values())
    stages = max(stage for stage, _ in branches) + 1
    if strides is not None and len(strides) != stages:
        raise UsageError(f"--strides: {len(strides)} numbers for {stages} stages; give one for each, stage0 first")
    assumed = [2] * (stages - 1) + [lineage.last_stride if stages > 1 else 2]
    channels = shapes.in_channels(branches[0, 0])
    for position in sorted(branches):
        stage, index = position
        block = shapes.block(position, channels, branches[position])
        given = strides[stage] if strides is not None and index == 0 else None
        stride, told[position] = _stride(
            block, assumed[stage] if index == 0 else 1, given, has_identity=has_identity, where=where
        )
        bare = "bare_pointwise" in block.branches and not has_identity
        blocks.append(dataclasses.replace(block, skips_without_tensors=bare).at_stride(stride))
        channels = block.out_channels
    firsts = {stage_of(block): block for block in reversed(blocks)}
    architecture = Architecture(
        blocks=tuple(blocks),
        classes=shapes.classes(channels),
        bn_eps=lineage.bn_eps if eps is None else eps,
        lineage=lineage.name,
        variant=None,
        stage_strides=tuple(firsts[stage].stride for stage in range(stages)),
        told_strides=tuple(told[stage, 0] for stage in range(stages)),
        family=lineage.family,
    )
    return dataclasses.replace(architecture, variant=_variant_name(architecture))


def check_variant(architecture: Architecture, variant: Variant, where: str) -> None:
    """Raises ``ArchitectureRejected`` unless ``architecture`` is ``variant`` but for its input and output."""
    if not _is_variant(architecture, variant):
        found = f"{architecture.family}-{architecture.variant}" if architecture.variant else "no published variant"
        raise ArchitectureRejected(
            f"{where}: not {variant.title} (depths {joined(variant.depths)}, widths {joined(variant.widths)}) "
            f"but {found} (depths {joined(architecture.depths)}, widths {joined(architecture.widths)}); "
            f"leave --arch out to infer it"
        )


def _variant_name(architecture: Architecture) -> str | None:
    return next((variant.name for variant in VARIANTS if _is_variant(architecture, variant)), None)


def _is_variant(architecture: Architecture, variant: Variant) -> bool:
    """Whether every block is the variant's. A QARepVGG has the shapes of the RepVGG of its name."""
    family = "RepVGG" if architecture.family == "QARepVGG" else architecture.family
    usual = set(architecture.stage_strides[:-1]) <= {2}
    if family != variant.family or architecture.depths != variant.depths or not usual:
        return False
    return all(
        (block.out_channels, block.groups, block.kernel, block.se_channels)
        == (expected.out_channels, expected.groups, expected.kernel, expected.se_channels)
        for block, expected in zip(architecture.blocks, variant.blocks, strict=True)
    )


def _branches_by_position(tensors: Mapping[str, Tensor]) -> dict[Position, tuple[str, ...]]:
    """Which branches each block has: the live ones, else fused; empty where a block has neither."""
    modules: dict[Position, set[str]] = {}
    for name in tensors:
        if name not in HEAD_TENSORS:
            stage, index, module, _ = name.split(".", 3)
            modules.setdefault((int(stage.removeprefix("stage")), int(index)), set()).add(module)
    return {
        position: tuple(b for b in BRANCH_TENSORS if b in found) or (("fused",) if "fused" in found else ())
        for position, found in modules.items()
    }


def _check_names(
    tensors: Mapping[str, Tensor],
    branches: Mapping[Position, tuple[str, ...]],
    lineage: Lineage,
    unexpected: Sequence[str],
    where: str,
) -> None:
    required = required_names(tensors, branches, lineage)
    missing = [*lineage.absent, *(lineage.foreign(name) for name in sorted(required) if name not in tensors)]
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"missing: {listed(missing)}")
    if unexpected:
        parts.append(f"unexpected: {listed(sorted(unexpected))} (where they can go unused: --ignore-keys GLOB)")
    raise ArchitectureRejected(f"{where}: not a whole {lineage.title} checkpoint; {'; '.join(parts)}")


def _stride(block: Block, assumed: int, given: int | None, *, has_identity: bool, where: str) -> tuple[int, bool]:
    """The block's stride, and whether the tensors tell it."""
    if "identity" in block.branches:
        if given not in (None, 1):
            raise ArchitectureRejected(
                f"{where}: --strides gives {block.name} stride {given}, but its identity branch allows only 1"
            )
        return 1, True
    if given is not None:
        return given, False
    if block.name.endswith(".0"):
        same_width = block.in_channels == block.out_channels
        told = same_width and has_identity and not block.deployed
        return (2, True) if told else (assumed, False)
    return 1, False


class _Shapes:
    """Reads sizes off tensors' shapes; every contradiction names the tensor in the lineage's own words."""

    def __init__(self, tensors: Mapping[str, Tensor], lineage: Lineage, where: str) -> None:
        self.tensors, self.lineage, self.where = tensors, lineage, where

    def in_channels(self, branches: tuple[str, ...]) -> int:
        """Channels of the images, from the first kernel."""
        name = f"stage0.0.{'fused' if branches == ('fused',) else 'dense'}.weight"
        shape = self._shape(name)
        if len(shape) != 4 or shape[1] not in IN_CHANNELS:
            self._reject(name, f"an image has {' or '.join(map(str, IN_CHANNELS))} channels")
        return shape[1]

    def block(self, position: Position, channels: int, branches: tuple[str, ...]) -> Block:
        """The block at ``position`` with ``channels`` coming in; its stride is not known yet (0)."""
        name = f"stage{position[0]}.{position[1]}"
        kernel = f"{name}.{'fused' if branches == ('fused',) else 'dense'}.weight"
        shape = self._shape(kernel)
        sizes = [(size, size) for size in self.lineage.kernels]
        if len(shape) != 4 or shape[2:] not in sizes or 0 in shape:
            self._reject(kernel, f"expected {' or '.join(f'(out, in, {size}, {size})' for size, _ in sizes)}")
        out, inner = shape[:2]
        if channels % inner or out % (channels // inner):
            self._reject(kernel, f"it does not fit the {channels} channels that come in")
        if "identity" in branches and out != channels:
            self._reject(kernel, f"an identity branch needs {channels} outputs")
        for tensor, expected in self._expected(name, branches, shape):
            if self._shape(tensor) != expected:
                self._reject(tensor, f"expected {expected}, from {self.lineage.foreign(kernel)} {shape}")
        se = self.tensors.get(f"{name}.se.reduce.weight")
        if se is not None and se.shape[0] == 0:
            self._reject(f"{name}.se.reduce.weight", "it has no channels")
        return Block(
            name,
            channels,
            out,
            0,
            channels // inner,
            branches,
            None if se is None else se.shape[0],
            kernel=shape[2],
            se_after_activation=se is not None and self.lineage.se_after_activation,
            post_batch_norm=f"{name}.{POST_TENSORS[0]}" in self.tensors,
        )

    def classes(self, channels: int) -> int | None:
        """Outputs of the classifier, which must take the last block's ``channels``; None where there is none."""
        if not any(name in self.tensors for name in HEAD_TENSORS):
            return None
        weight, bias = (self._shape(name) for name in HEAD_TENSORS)
        if len(weight) != 2 or weight[1] != channels or weight[0] < 1:
            self._reject(HEAD_TENSORS[0], f"expected (classes, {channels})")
        if bias != weight[:1]:
            self._reject(HEAD_TENSORS[1], f"expected {weight[:1]}")
        return weight[0]

    def _expected(
        self, name: str, branches: tuple[str, ...], kernel: tuple[int, ...]
    ) -> Iterable[tuple[str, tuple[int, ...]]]:
        out, inner = kernel[:2]
        post = POST_TENSORS if f"{name}.{POST_TENSORS[0]}" in self.tensors else ()
        for tensor in (*(own for branch in branches for own in branch_tensors(branch)), *post):
            if tensor in ("pointwise.weight", "bare_pointwise.weight"):
                yield f"{name}.{tensor}", (out, inner, 1, 1)
            elif tensor.removesuffix(".weight") in (*DENSE_BRANCHES, "fused"):
                yield f"{name}.{tensor}", kernel
            else:
                yield f"{name}.{tensor}", (out,)
        if f"{name}.{SE_TENSORS[0]}" in self.tensors:
            reduced = self._shape(f"{name}.{SE_TENSORS[0]}")[:1]
            shapes = ((*reduced, out, 1, 1), reduced, (out, *reduced, 1, 1), (out,))
            yield from zip((f"{name}.{tensor}" for tensor in SE_TENSORS), shapes, strict=True)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def _reject(self, name: str, reason: str) -> NoReturn:
        raise ArchitectureRejected(
            f"{self.where}: {self.lineage.foreign(name)} has shape {self._shape(name)}: {reason}; "
            f"the checkpoint contradicts itself or is another network"
        )
