"""The network that a set of canonical tensors makes, inferred from their names and shapes.

    depths, widths, classes     from the tensors
    groups                      in / weight.shape[1], with in = the previous block's out
    branches, SE                from which tensors exist; branches win over a fused kernel beside them
    stride                      1 where there is an identity branch; 2 where in == out, other blocks have an identity
                                branch and this one does not; otherwise not in the file: 2 for the first block of a
                                stage, as an assumption that is reported and that ``--strides`` overrides
    batch norm epsilon          not in the file: the lineage's, as an assumption that ``--eps`` overrides

Everything that is missing or left over is reported at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from torch import Tensor

from exporter.errors import ArchitectureRejected, UsageError, listed
from exporter.lineages.lineage import BRANCH_TENSORS, FUSED_TENSORS, HEAD_TENSORS, SE_TENSORS, Lineage
from exporter.variants import SE_RATIO, VARIANTS, Variant

Position = tuple[int, int]
KERNEL = 3
IN_CHANNELS = (1, 3)


@dataclasses.dataclass(frozen=True)
class Block:
    """One block: ``branches`` are of dense, pointwise, identity; or only fused, in the deployed form."""

    name: str
    in_channels: int
    out_channels: int
    stride: int
    groups: int
    branches: tuple[str, ...]
    se_channels: int | None

    @property
    def deployed(self) -> bool:
        """Whether the block is one convolution already."""
        return self.branches == ("fused",)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A RepVGG: stage0, stages, global average pooling, one linear layer. ``variant`` is its published name, if any."""

    blocks: tuple[Block, ...]
    classes: int
    bn_eps: float
    lineage: str
    variant: str | None
    stage_strides: tuple[int, ...]
    told_strides: tuple[bool, ...]
    """Per stage, whether the tensors tell the stride of its first block; otherwise it is assumed or given."""

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.blocks[0].in_channels

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per stage, stage0 first."""
        stages = [stage_of(block) for block in self.blocks]
        return tuple(stages.count(stage) for stage in range(len(self.stage_strides)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Output channels of each stage's last block, stage0 first."""
        last = {stage_of(block): block.out_channels for block in self.blocks}
        return tuple(last[stage] for stage in range(len(self.stage_strides)))

    @property
    def form(self) -> str:
        """``training``, ``deployed``, or ``partly deployed``."""
        deployed = sum(block.deployed for block in self.blocks)
        return "training" if deployed == 0 else "deployed" if deployed == len(self.blocks) else "partly deployed"


def stage_of(block: Block) -> int:
    """The stage's number, 0 for the stem."""
    return int(block.name.partition(".")[0].removeprefix("stage"))


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
    channels = shapes.in_channels(branches[0, 0])
    for position in sorted(branches):
        block = shapes.block(position, channels, branches[position])
        given = strides[position[0]] if strides is not None and position[1] == 0 else None
        stride, told[position] = _stride(block, position, given, has_identity=has_identity, where=where)
        blocks.append(dataclasses.replace(block, stride=stride))
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
    )
    return dataclasses.replace(architecture, variant=_variant_name(architecture))


def check_variant(architecture: Architecture, variant: Variant, where: str) -> None:
    """Raises ``ArchitectureRejected`` unless ``architecture`` is ``variant`` but for its input and output."""
    if not _is_variant(architecture, variant):
        found = f"RepVGG-{architecture.variant}" if architecture.variant else "no published variant"
        raise ArchitectureRejected(
            f"{where}: not RepVGG-{variant.name} (depths {joined(variant.depths)}, widths {joined(variant.widths)}) "
            f"but {found} (depths {joined(architecture.depths)}, widths {joined(architecture.widths)}); "
            f"leave --arch out to infer it"
        )


def joined(numbers: Iterable[int]) -> str:
    """As in ``2,2,1``."""
    return ",".join(str(number) for number in numbers)


def _variant_name(architecture: Architecture) -> str | None:
    return next((variant.name for variant in VARIANTS if _is_variant(architecture, variant)), None)


def _is_variant(architecture: Architecture, variant: Variant) -> bool:
    if architecture.depths != variant.depths or set(architecture.stage_strides) != {2}:
        return False
    stages = [stage_of(block) for block in architecture.blocks]
    return all(
        block.out_channels == variant.widths[stage]
        and block.groups == variant.block_groups(position)
        and block.se_channels == (block.out_channels // SE_RATIO if variant.se else None)
        for position, (block, stage) in enumerate(zip(architecture.blocks, stages, strict=True))
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
    missing = sorted(name for name in _required(tensors, branches) if name not in tensors)
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"missing: {listed([lineage.foreign(name) for name in missing])}")
    if unexpected:
        parts.append(f"unexpected: {listed(sorted(unexpected))} (where they can go unused: --ignore-keys GLOB)")
    raise ArchitectureRejected(f"{where}: not a whole {lineage.title} checkpoint; {'; '.join(parts)}")


def _required(tensors: Mapping[str, Tensor], branches: Mapping[Position, tuple[str, ...]]) -> set[str]:
    """The canonical names that must exist, given those that do. A branch that its siblings have must not be missing."""
    required = set(HEAD_TENSORS)
    depths = {stage: max(i for s, i in branches if s == stage) + 1 for stage, _ in branches}
    trained = {position: present for position, present in branches.items() if present not in (("fused",), ())}
    everywhere = ["dense", *(["pointwise"] if any("pointwise" in present for present in trained.values()) else [])]
    identities = any("identity" in present for present in trained.values())
    for stage in range(max(depths, default=0) + 1):
        for index in range(depths.get(stage, 1)):
            present, prefix = branches.get((stage, index), ()), f"stage{stage}.{index}"
            if present == ("fused",):
                required |= {f"{prefix}.{name}" for name in FUSED_TENSORS}
            else:
                expected = {*everywhere, *present, *(["identity"] if identities and index > 0 else [])}
                if "identity" in expected and "identity" not in present and _changes_width(tensors, prefix):
                    expected.discard("identity")
                required |= {f"{prefix}.{name}" for branch in expected for name in BRANCH_TENSORS[branch]}
            if any(f"{prefix}.{name}" in tensors for name in SE_TENSORS):
                required |= {f"{prefix}.{name}" for name in SE_TENSORS}
    return required


def _changes_width(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether the block's dense kernel has another number of outputs than the block before it."""
    stage, index = prefix.rsplit(".", 1)
    here = tensors.get(f"{prefix}.dense.weight")
    before = tensors.get(f"{stage}.{int(index) - 1}.dense.weight")
    return here is not None and before is not None and here.shape[:1] != before.shape[:1]


def _stride(block: Block, position: Position, given: int | None, *, has_identity: bool, where: str) -> tuple[int, bool]:
    """The block's stride, and whether the tensors tell it."""
    if "identity" in block.branches:
        if given not in (None, 1):
            raise ArchitectureRejected(
                f"{where}: --strides gives {block.name} stride {given}, but its identity branch allows only 1"
            )
        return 1, True
    if given is not None:
        return given, False
    if position[1] > 0:
        return 1, False
    same_width = block.in_channels == block.out_channels
    return 2, same_width and has_identity and not block.deployed


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
        if len(shape) != 4 or shape[2:] != (KERNEL, KERNEL) or 0 in shape:
            self._reject(kernel, f"expected (out, in, {KERNEL}, {KERNEL})")
        out, inner = shape[:2]
        if channels % inner or out % (channels // inner):
            self._reject(kernel, f"it does not fit the {channels} channels that come in")
        if "identity" in branches and out != channels:
            self._reject(kernel, f"an identity branch needs {channels} outputs")
        for tensor, expected in self._expected(name, branches, out, inner):
            if self._shape(tensor) != expected:
                self._reject(tensor, f"expected {expected}, from {self.lineage.foreign(kernel)} {shape}")
        se = self.tensors.get(f"{name}.se.reduce.weight")
        if se is not None and se.shape[0] == 0:
            self._reject(f"{name}.se.reduce.weight", "it has no channels")
        return Block(name, channels, out, 0, channels // inner, branches, None if se is None else se.shape[0])

    def classes(self, channels: int) -> int:
        """Outputs of the classifier, which must take the last block's ``channels``."""
        weight, bias = (self._shape(name) for name in HEAD_TENSORS)
        if len(weight) != 2 or weight[1] != channels or weight[0] < 1:
            self._reject(HEAD_TENSORS[0], f"expected (classes, {channels})")
        if bias != weight[:1]:
            self._reject(HEAD_TENSORS[1], f"expected {weight[:1]}")
        return weight[0]

    def _expected(
        self, name: str, branches: tuple[str, ...], out: int, inner: int
    ) -> Iterable[tuple[str, tuple[int, ...]]]:
        for branch in branches:
            for tensor in FUSED_TENSORS if branch == "fused" else BRANCH_TENSORS[branch]:
                if tensor == "pointwise.weight":
                    yield f"{name}.{tensor}", (out, inner, 1, 1)
                elif tensor not in ("dense.weight", "fused.weight"):
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
