"""Every family's names for its tensors, and what its code does that no tensor says; what to build of each.

    Family     the key table, from the authors' code: branches, batch norms, the fused kernel, SE, the classifier
    Shape      how large, in terms that all families share
    Block      one block of a family's network of some shape, under its own prefix

Nothing here imports the exporter: these tables are what its own are held against.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What to build; the defaults are small, and have A0's trap: stage1.0 has as many inputs as outputs, and a stride.

    ``depths`` count blocks, in MobileOne pairs of a depthwise and a pointwise one. ``se`` are the reduced channels, in
    MobileOne of the last pairs only.
    """

    depths: tuple[int, ...] = (1, 2, 2, 2, 1)
    widths: tuple[int, ...] = (8, 8, 12, 16, 20)
    strides: tuple[int, ...] = (2, 2, 2, 2, 2)
    in_channels: int = 3
    outputs: int | None = 7
    even_groups: int = 1
    convs: int = 1
    se: int = 0


@dataclasses.dataclass(frozen=True)
class Block:
    """One block: its prefix in the state dict, and what no tensor tells; without ``skips`` it never has an identity."""

    prefix: str
    stage: int
    cin: int
    cout: int
    stride: int
    groups: int = 1
    kernel: int = 3
    convs: int = 1
    se: int = 0
    skips: bool = True

    @property
    def has_identity(self) -> bool:
        return self.skips and self.cin == self.cout and self.stride == 1


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's key table. ``{b}`` counts its k x k branches; a batch norm of None means that there is none.

    ``name`` is what the exporter calls it; ``place`` gives the prefix of (stage, index, depth of the stage).
    """

    name: str
    title: str
    place: Callable[[int, int, int], str]
    head: str | None
    dense: tuple[str, str]
    pointwise: tuple[str, str | None]
    identity: str | None
    fused: tuple[str, str]
    se: tuple[str, str] | None
    post: str | None = None
    se_after_relu: bool = False
    mobile: bool = False
    last_stride: int = 2
    eps: float = 1e-5

    def blocks(self, shape: Shape) -> list[Block]:
        """The network's blocks, in order."""
        blocks: list[Block] = []
        channels = shape.in_channels
        for stage, (depth, width, stride) in enumerate(zip(shape.depths, shape.widths, shape.strides, strict=True)):
            for index in range(depth):
                first = stride if index == 0 else 1
                if self.mobile and stage > 0:
                    blocks += self._pair(shape, stage, index, channels, first)
                else:
                    even = len(blocks) % 2 == 0 and len(blocks) > 0
                    groups = shape.even_groups if even else 1
                    prefix = self.place(stage, index, depth)
                    se = 0 if self.mobile else shape.se
                    blocks.append(Block(prefix, stage, channels, width, first, groups, se=se))
                channels = width
        return blocks

    def _pair(self, shape: Shape, stage: int, index: int, channels: int, stride: int) -> list[Block]:
        """A depthwise block and a pointwise one; SE in the second half of stage 3 and the whole of stage 4."""
        depth, width = shape.depths[stage], shape.widths[stage]
        se = shape.se if stage == 4 or (stage == 3 and index >= depth - depth // 2) else 0
        names = [self.place(stage, 2 * index + part, 2 * depth) for part in (0, 1)]
        return [
            Block(names[0], stage, channels, channels, stride, channels, 3, shape.convs, se),
            Block(names[1], stage, channels, width, 1, 1, 1, shape.convs, se),
        ]


def _official_place(stage: int, index: int, depth: int) -> str:
    return "stage0" if stage == 0 else f"stage{stage}.{index}"


def _timm_place(stage: int, index: int, depth: int) -> str:
    return "stem" if stage == 0 else f"stages.{stage - 1}.{index}"


def _mmpretrain_place(stage: int, index: int, depth: int) -> str:
    return "backbone.stem" if stage == 0 else f"backbone.stage_{stage}.{index}"


def _plus_place(stage: int, index: int, depth: int) -> str:
    """Stage 3 is kept in two halves, with an auxiliary classifier between them."""
    if stage == 0:
        return "stage0"
    if stage != 3:
        return f"stage{stage}.blocks.{index}"
    half = depth // 2
    return f"stage3_first.blocks.{index}" if index < half else f"stage3_second.blocks.{index - half}"


OFFICIAL = Family(
    name="official",
    title="official RepVGG",
    place=_official_place,
    head="linear",
    dense=("rbr_dense.conv", "rbr_dense.bn"),
    pointwise=("rbr_1x1.conv", "rbr_1x1.bn"),
    identity="rbr_identity",
    fused=("rbr_reparam.weight", "rbr_reparam.bias"),
    se=("se.down", "se.up"),
)
TIMM = Family(
    name="timm",
    title="timm",
    place=_timm_place,
    head="head.fc",
    dense=("conv_kxk.conv", "conv_kxk.bn"),
    pointwise=("conv_1x1.conv", "conv_1x1.bn"),
    identity="identity",
    fused=("reparam_conv.weight", "reparam_conv.bias"),
    se=("attn.fc1", "attn.fc2"),
)
MMPRETRAIN = Family(
    name="mmpretrain",
    title="mmpretrain, mmcls",
    place=_mmpretrain_place,
    head="head.fc",
    dense=("branch_3x3.conv", "branch_3x3.norm"),
    pointwise=("branch_1x1.conv", "branch_1x1.norm"),
    identity="branch_norm",
    fused=("branch_reparam.weight", "branch_reparam.bias"),
    se=("se_layer.conv1.conv", "se_layer.conv2.conv"),
)
PLUS = dataclasses.replace(
    OFFICIAL,
    name="RepVGGplus",
    title="official RepVGGplus",
    place=_plus_place,
    se=("post_se.down", "post_se.up"),
    se_after_relu=True,
)
QAREPVGG = dataclasses.replace(
    OFFICIAL, name="QARepVGG", title="QARepVGG", pointwise=("rbr_1x1", None), identity=None, post="bn", se=None
)
QAREPVGG_V1 = dataclasses.replace(OFFICIAL, name="QARepVGG", title="QARepVGG", post="bn", se=None)
FAST_REID = dataclasses.replace(
    OFFICIAL,
    name="fast-reid",
    title="fast-reid",
    place=lambda stage, index, depth: f"backbone.{_official_place(stage, index, depth)}",
    head=None,
    fused=("fused_weight", "fused_bias"),
    se=None,
    last_stride=1,
)
SIXD = dataclasses.replace(
    OFFICIAL,
    name="6DRepNet",
    title="6DRepNet",
    place=lambda stage, index, depth: _official_place(stage, index, depth).replace("stage", "layer"),
    head="linear_reg",
    se=None,
)
APPLE = dataclasses.replace(
    OFFICIAL,
    name="MobileOne",
    title="official MobileOne",
    dense=("rbr_conv.{b}.conv", "rbr_conv.{b}.bn"),
    pointwise=("rbr_scale.conv", "rbr_scale.bn"),
    identity="rbr_skip",
    fused=("reparam_conv.weight", "reparam_conv.bias"),
    se=("se.reduce", "se.expand"),
    mobile=True,
)
TIMM_MOBILEONE = dataclasses.replace(
    TIMM,
    name="timm MobileOne",
    title="timm MobileOne",
    dense=("conv_kxk.{b}.conv", "conv_kxk.{b}.bn"),
    pointwise=("conv_scale.conv", "conv_scale.bn"),
    mobile=True,
)
FAMILIES = {
    "official": (OFFICIAL, Shape(even_groups=2, se=3)),
    "RepVGGplus": (PLUS, Shape(depths=(1, 2, 2, 3, 1), se=3)),
    "QARepVGG": (QAREPVGG, Shape(even_groups=2)),
    "QARepVGG V1": (QAREPVGG_V1, Shape()),
    "timm": (TIMM, Shape(se=3, in_channels=1)),
    "timm MobileOne": (TIMM_MOBILEONE, Shape(depths=(1, 1, 2, 2, 1), convs=4, se=3)),
    "MobileOne": (APPLE, Shape(depths=(1, 1, 2, 3, 1), convs=2, se=3)),
    "MobileOne, one branch": (APPLE, Shape(depths=(1, 1, 2, 1, 1))),
    "mmpretrain": (MMPRETRAIN, Shape(even_groups=4)),
    "fast-reid": (FAST_REID, Shape()),
    "6DRepNet": (SIXD, Shape(outputs=6)),
}
"""Each with what it alone has: groups, SE in every block or in the last, several branches, one input channel."""
WITH_BN = "rbr_reparam.conv.weight", "rbr_reparam.bn"


def kernel_shapes(family: Family, block: Block) -> Iterable[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a block's kernels in the training form."""
    inner = block.cin // block.groups
    for b in range(block.convs):
        name = family.dense[0].format(b=b)
        yield f"{block.prefix}.{name}.weight", (block.cout, inner, block.kernel, block.kernel)
    if block.kernel > 1:
        yield f"{block.prefix}.{family.pointwise[0]}.weight", (block.cout, inner, 1, 1)


def batch_norms(family: Family, block: Block) -> Iterable[str]:
    """The names of a block's batch norms in the training form."""
    names = [family.dense[1].format(b=b) for b in range(block.convs)]
    if block.kernel > 1:
        names += [family.pointwise[1]] if family.pointwise[1] is not None else []
    if block.has_identity and family.identity is not None:
        names.append(family.identity)
    if family.post is not None:
        names.append(family.post)
    return [f"{block.prefix}.{name}" for name in names]
