"""What a bench record's JSON value says of images/s and latency against batch, as curves; how to call their files."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from engines.json_value import Value

PERCENTILES = ("p99", "p95", "p90", "p50")


@dataclasses.dataclass(frozen=True)
class Point:
    """A figure at a batch, and its interval."""

    batch: int
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """The points of one file, run in one way, by batch."""

    file: str
    way: str
    points: tuple[Point, ...]


def throughput_curves(record: Mapping[str, Any]) -> tuple[Curve, ...]:
    """Images per second.

    Raises:
        Malformed: not a bench record.
    """
    return _curves([(row, row.field("images_per_second")) for row in _rows(record)])


def latency_curves(record: Mapping[str, Any]) -> tuple[str, tuple[Curve, ...]]:
    """The highest percentile that every row has, as in "p99", and the latencies in ms.

    The name is empty, and there is no curve, where the rows have none in common.

    Raises:
        Malformed: not a bench record.
    """
    rows = [(row, row.field("latency_ms").items()) for row in _rows(record)]
    for name in PERCENTILES:
        found = [(row, percentiles[name]) for row, percentiles in rows if name in percentiles]
        if len(found) == len(rows) and all(estimate.value is not None for _, estimate in found):
            return name, _curves(found)
    return "", ()


def short_names(files: Sequence[str]) -> dict[str, str]:
    """A name to show for each file: without directories, which are nobody's business, and with a number if it must be.

    Files that have one name are numbered in their order.
    """
    names = {file: plain_line(pathlib.PureWindowsPath(file).name) for file in files}
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


def _rows(record: Mapping[str, Any]) -> list[Value]:
    return Value(dict(record)).field("rows").entries()


def _curves(estimates: Sequence[tuple[Value, Value]]) -> tuple[Curve, ...]:
    """Rows of the record, each with the estimate to draw, as curves in the order in which they begin."""
    found: dict[tuple[str, str], list[Point]] = {}
    for row, estimate in estimates:
        batch = row.field("batch").whole_number(least=1)
        value, low, high = (estimate.field(name).number() for name in ("value", "low", "high"))
        key = row.field("file").text(), row.field("way").text()
        found.setdefault(key, []).append(Point(batch, value, low, high))
    return tuple(
        Curve(file, way, tuple(sorted(points, key=lambda point: point.batch))) for (file, way), points in found.items()
    )
