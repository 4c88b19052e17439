"""A record's images/s and latency against batch, as curves; and how to call their files."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from engines.bench.record import Row
from engines.bench.statistics import PERCENTILES, Estimate
from engines.markdown_text import LARGEST_CELL

LEFT_OUT = "..."


@dataclasses.dataclass(frozen=True)
class Curve:
    """One file, run in one way: its figures by batch, from the smallest up."""

    file: str
    way: str
    estimates: Mapping[int, Estimate]


def throughput_curves(rows: Sequence[Row]) -> tuple[Curve, ...]:
    """Images per second."""
    return _curves([(row, row.images_per_second) for row in rows])


def latency_curves(rows: Sequence[Row]) -> tuple[int | None, tuple[Curve, ...]]:
    """The highest percentile that every row has, and the latencies in ms; None, and no curve, where there is none."""
    for percent in reversed(PERCENTILES):
        found = [(row, latency) for row in rows if (latency := row.latency_ms[percent]) is not None]
        if len(found) == len(rows):
            return percent, _curves(found)
    return None, ()


def short_names(files: Sequence[str], longest: int = LARGEST_CELL) -> dict[str, str]:
    """A name to show for each file: without directories, which are nobody's business, and with a number if it must be.

    Files that have one name are numbered in their order. Of more than ``longest`` characters the middle is left out.
    """
    names = {file: _shortened(plain_line(pathlib.PurePosixPath(file).name), longest) for file in files}
    shared = [name for name in names.values() if list(names.values()).count(name) > 1]
    counts = dict.fromkeys(shared, 0)
    for file, name in names.items():
        if name in counts:
            counts[name] += 1
            names[file] = f"{name} ({counts[name]})"
    return names


def plain_line(text: str) -> str:
    """One line of characters that can be seen, which every reader of XML takes."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def _shortened(name: str, longest: int) -> str:
    end = (longest - len(LEFT_OUT)) // 2
    return name if len(name) <= longest else f"{name[:end]}{LEFT_OUT}{name[-end:]}"


def _curves(figures: Sequence[tuple[Row, Estimate]]) -> tuple[Curve, ...]:
    """Rows, each with the figure to draw, as curves in the order in which they begin."""
    found: dict[tuple[str, str], dict[int, Estimate]] = {}
    for row, estimate in figures:
        found.setdefault((row.file, row.way), {})[row.batch] = estimate
    return tuple(Curve(file, way, dict(sorted(estimates.items()))) for (file, way), estimates in found.items())
