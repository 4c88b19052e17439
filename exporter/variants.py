"""The named networks, as published by their authors.

RepVGG       widths min(64, 64 a), 64 a, 128 a, 256 a, 512 b; g2 and g4 have groups in every block of even position,
counted over the whole network from stage0 = 0; D2se has squeeze-and-excitation with a sixteenth of the
channels (Ding et al., CVPR 2021, table 2, and ``repvgg.py``)
RepVGGplus   squeeze-and-excitation with a quarter of the channels, behind the ReLU (``repvggplus.py``)
MobileOne    widths as RepVGG's with four factors; every step is a depthwise 3x3 and a pointwise 1x1 block; S4 has
squeeze-and-excitation in half of stage 3 and in stage 4 (Vasu et al., CVPR 2023, table 2)
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re

from exporter.errors import UsageError


@dataclasses.dataclass(frozen=True)
class VariantBlock:
    """What a block of a published network is; ``kernel`` is that of its largest branch."""

    stage: int
    out_channels: int
    groups: int
    kernel: int
    se_channels: int | None


@dataclasses.dataclass(frozen=True)
class Variant:
    """A published network: ``depths`` and ``widths`` of stages 0 to 4, ``groups`` of its even blocks.

    ``se_part`` is, per stage, the part of its blocks that have squeeze-and-excitation: the last ones. They have one of
    ``se_ratio`` channels.
    """

    name: str
    family: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    groups: int = 1
    se_part: tuple[float, ...] = (0, 0, 0, 0, 0)
    se_ratio: int = 16

    @property
    def title(self) -> str:
        """As in RepVGG-A0."""
        return f"{self.family}-{self.name}"

    @functools.cached_property
    def blocks(self) -> tuple[VariantBlock, ...]:
        """The blocks in order."""
        found: list[VariantBlock] = []
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for index in range(depth):
                has_se = index >= depth - round(self.se_part[stage] * depth)
                out, groups, kernel = self._convolution(stage, index, len(found), found[-1] if found else None, width)
                found.append(VariantBlock(stage, out, groups, kernel, out // self.se_ratio if has_se else None))
        return tuple(found)

    def _convolution(
        self, stage: int, index: int, position: int, before: VariantBlock | None, width: int
    ) -> tuple[int, int, int]:
        """Output channels, groups and kernel of a block."""
        if self.family != "MobileOne" or stage == 0 or before is None:
            return width, self.groups if position % 2 == 0 and position > 0 else 1, 3
        if index % 2 == 0:
            return before.out_channels, before.out_channels, 3
        return width, 1, 1


def _repvgg(name: str, a: float, b: float, groups: int = 1) -> Variant:
    depths = {"A": (1, 2, 4, 14, 1), "B": (1, 4, 6, 16, 1), "D": (1, 8, 14, 24, 1)}[name[0]]
    se_part = (1.0,) * 5 if name.endswith("se") else (0.0,) * 5
    return Variant(name, "RepVGG", depths, _widths(a, a, a, b), groups, se_part)


def _mobileone(name: str, *factors: float) -> Variant:
    se_part = (0, 0, 0, 0.5, 1) if name == "S4" else (0, 0, 0, 0, 0)
    return Variant(name, "MobileOne", (1, 4, 16, 20, 2), _widths(*factors), se_part=se_part)


def _widths(*factors: float) -> tuple[int, ...]:
    widths = [int(channels * factor) for channels, factor in zip((64, 128, 256, 512), factors, strict=True)]
    return (min(64, widths[0]), *widths)


VARIANTS: tuple[Variant, ...] = (
    _repvgg("A0", 0.75, 2.5),
    _repvgg("A1", 1, 2.5),
    _repvgg("A2", 1.5, 2.75),
    _repvgg("B0", 1, 2.5),
    _repvgg("B1", 2, 4),
    _repvgg("B1g2", 2, 4, 2),
    _repvgg("B1g4", 2, 4, 4),
    _repvgg("B2", 2.5, 5),
    _repvgg("B2g2", 2.5, 5, 2),
    _repvgg("B2g4", 2.5, 5, 4),
    _repvgg("B3", 3, 5),
    _repvgg("B3g2", 3, 5, 2),
    _repvgg("B3g4", 3, 5, 4),
    _repvgg("D2se", 2.5, 5),
    Variant("L2pse", "RepVGGplus", (1, 8, 14, 24, 1), _widths(2.5, 2.5, 2.5, 5), se_part=(1, 1, 1, 1, 1), se_ratio=4),
    _mobileone("S0", 0.75, 1, 1, 2),
    _mobileone("S1", 1.5, 1.5, 2, 2.5),
    _mobileone("S2", 1.5, 2, 2.5, 4),
    _mobileone("S3", 2, 2.5, 3, 4),
    _mobileone("S4", 3, 3.5, 3.5, 4),
)


def variant_from_name(name: str) -> Variant:
    """The variant called ``name``, in any of the usual spellings (``A0``, ``RepVGG-A0``, ``repvgg_a0``).

    Raises:
        UsageError: there is none; the message has the nearest name.
    """
    by_name = {spelling: variant for variant in VARIANTS for spelling in _spellings(variant)}
    plain = re.sub(r"[-_]", "", name.strip()).lower()
    if plain in by_name:
        return by_name[plain]
    near = difflib.get_close_matches(plain, by_name, n=1, cutoff=0.0)
    names = ", ".join(variant.name for variant in VARIANTS)
    raise UsageError(f"--arch {name}: unknown; did you mean {by_name[near[0]].name}? Known: {names}")


def _spellings(variant: Variant) -> tuple[str, ...]:
    """In small letters, without separators; a QARepVGG has the name of the RepVGG of its shapes."""
    families = ("repvgg", "qarepvgg") if variant.family == "RepVGG" else (variant.family.lower(),)
    return (variant.name.lower(), *(f"{family}{variant.name.lower()}" for family in families))
