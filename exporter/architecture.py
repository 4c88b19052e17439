"""What a network is: blocks, strides, outputs. Immutable values; nothing here looks at a tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from exporter.errors import UsageError

Position = tuple[int, int]
IN_CHANNELS = (1, 3)
OUTPUT = "output"


@dataclasses.dataclass(frozen=True)
class Block:
    """One block.

    ``branches`` are of ``BRANCH_TENSORS``; or only fused, in the deployed form. ``kernel`` is the size of the largest,
    padded by half of it. ``post_batch_norm`` says whether the sum of the branches goes through a batch norm, and
    ``skips_without_tensors`` whether the family's code has an identity wherever the shapes and the stride allow one.
    """

    name: str
    in_channels: int
    out_channels: int
    stride: int
    groups: int
    branches: tuple[str, ...]
    se_channels: int | None
    kernel: int = 3
    se_after_activation: bool = False
    post_batch_norm: bool = False
    skips_without_tensors: bool = False

    @property
    def deployed(self) -> bool:
        """Whether the block is one convolution already."""
        return self.branches == ("fused",)

    @property
    def padding(self) -> int:
        """Pixels of zeros on each side, so that stride 1 keeps the size."""
        return self.kernel // 2

    def at_stride(self, stride: int) -> Block:
        """This block with another stride; an identity without tensors is there only at stride 1."""
        branches = [branch for branch in self.branches if branch != "bare_identity"]
        if self.skips_without_tensors and stride == 1 and self.in_channels == self.out_channels:
            branches.append("bare_identity")
        return dataclasses.replace(self, stride=stride, branches=tuple(branches))


@dataclasses.dataclass(frozen=True)
class Output:
    """An output of the network: its ``name``, the ``block`` whose result it is, or None for the classifier's."""

    name: str
    block: str | None
    channels: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network of stage0, stages and, where ``classes`` is not None, global average pooling with one linear layer.

    ``features`` are the stages whose results are the outputs. ``variant`` is the network's published name, if any, in
    its ``family``.
    """

    blocks: tuple[Block, ...]
    classes: int | None
    bn_eps: float
    lineage: str
    variant: str | None
    stage_strides: tuple[int, ...]
    told_strides: tuple[bool, ...]
    """Per stage, whether the tensors tell the stride of its first block; otherwise it is assumed or given."""
    family: str = "RepVGG"
    features: tuple[int, ...] = ()
    cut_strides: tuple[int, ...] = ()
    """Of the stages behind the last of ``features``, which are no part of the network any more."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What the network gives, in order."""
        if self.features:
            last = {stage_of(block): block for block in self.blocks}
            return tuple(Output(f"stage{n}", last[n].name, last[n].out_channels) for n in self.features)
        if self.classes is not None:
            return (Output(OUTPUT, None, self.classes),)
        return (Output(OUTPUT, self.blocks[-1].name, self.blocks[-1].out_channels),)

    @functools.cached_property
    def tensor_names(self) -> dict[str, str]:
        """The name of each block's result in the graph: the output's where it is one, else the block's own."""
        outputs = {output.block: output.name for output in self.outputs}
        return {block.name: outputs.get(block.name, block.name) for block in self.blocks}

    def size_behind(self, block: str, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the result of the block of that name, for images of ``size``."""
        height, width = size
        for one in self.blocks:
            height, width = -(-height // one.stride), -(-width // one.stride)
            if one.name == block:
                break
        return height, width

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
        deployed = sum(block.deployed and not block.post_batch_norm for block in self.blocks)
        if deployed == len(self.blocks):
            return "deployed"
        return "partly deployed" if any(block.deployed for block in self.blocks) else "training"


def stage_of(block: Block) -> int:
    """The stage's number, 0 for the stem."""
    return int(block.name.partition(".")[0].removeprefix("stage"))


def with_features(architecture: Architecture, features: tuple[int, ...]) -> Architecture:
    """``architecture`` up to the last of the stages ``features``, whose results are its outputs.

    Raises:
        UsageError: there is no such stage.
    """
    stages = len(architecture.stage_strides)
    missing = [stage for stage in features if stage >= stages]
    if missing:
        raise UsageError(f"--features {joined(missing)}: the network has stages 0 to {stages - 1}")
    end = max(features) + 1
    return dataclasses.replace(
        architecture,
        blocks=tuple(block for block in architecture.blocks if stage_of(block) < end),
        classes=None,
        stage_strides=architecture.stage_strides[:end],
        told_strides=architecture.told_strides[:end],
        features=features,
        cut_strides=architecture.stage_strides[end:],
    )


def joined(numbers: Iterable[int]) -> str:
    """As in ``2,2,1``."""
    return ",".join(str(number) for number in numbers)
