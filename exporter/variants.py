"""The named RepVGG networks, as published by the authors (``repvgg.py``) and in the paper's table 2.

Widths are min(64, 64 a), 64 a, 128 a, 256 a, 512 b. The variants g2 and g4 have groups in every block of even position,
counted over the whole network from stage0 = 0. D2se has squeeze-and-excitation with a sixteenth of the channels.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

from exporter.errors import UsageError

SE_RATIO = 16


@dataclasses.dataclass(frozen=True)
class Variant:
    """A published network: ``depths`` and ``widths`` of stages 0 to 4, ``groups`` of its even blocks."""

    name: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    groups: int
    se: bool

    def block_groups(self, position: int) -> int:
        """Groups of the block at ``position``, counted over the whole network from 0."""
        return self.groups if position % 2 == 0 and position > 0 else 1


def _variant(name: str, a: float, b: float, groups: int = 1) -> Variant:
    depths = {"A": (1, 2, 4, 14, 1), "B": (1, 4, 6, 16, 1), "D": (1, 8, 14, 24, 1)}[name[0]]
    widths = (min(64, int(64 * a)), int(64 * a), int(128 * a), int(256 * a), int(512 * b))
    return Variant(name, depths, widths, groups, name.endswith("se"))


VARIANTS: tuple[Variant, ...] = (
    _variant("A0", 0.75, 2.5),
    _variant("A1", 1, 2.5),
    _variant("A2", 1.5, 2.75),
    _variant("B0", 1, 2.5),
    _variant("B1", 2, 4),
    _variant("B1g2", 2, 4, 2),
    _variant("B1g4", 2, 4, 4),
    _variant("B2", 2.5, 5),
    _variant("B2g2", 2.5, 5, 2),
    _variant("B2g4", 2.5, 5, 4),
    _variant("B3", 3, 5),
    _variant("B3g2", 3, 5, 2),
    _variant("B3g4", 3, 5, 4),
    _variant("D2se", 2.5, 5),
)


def variant_from_name(name: str) -> Variant:
    """The variant called ``name``, in any of the usual spellings (``A0``, ``RepVGG-A0``, ``repvgg_a0``).

    Raises:
        UsageError: there is none; the message has the nearest name.
    """
    plain = re.sub(r"^repvgg[-_]?", "", name.strip(), flags=re.IGNORECASE).lower()
    by_name = {variant.name.lower(): variant for variant in VARIANTS}
    if plain in by_name:
        return by_name[plain]
    near = difflib.get_close_matches(plain, by_name, n=1, cutoff=0.0)
    names = ", ".join(variant.name for variant in VARIANTS)
    raise UsageError(f"--arch {name}: unknown; did you mean {by_name[near[0]].name}? Known: {names}")
