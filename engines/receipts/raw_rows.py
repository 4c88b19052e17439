"""The raw data of a benchmark's row as JSON and back: what every figure of it can be made of again.

    rounds, walls        queries and seconds of every round, from which the rate of each window follows
    rounds_per_window    of which the last WINDOWS count
    latencies, parts     every query's of the windows that count, in whole nanoseconds

Earlier windows are those in which a machine was still getting warm, and may be two thirds of all queries. Of them
nothing but the rates is told, so their latencies are left out; when read, they are zeros that nothing looks at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bench.record import packed, unpacked
from engines.bench.rounds import MOST_WINDOWS, WINDOWS, Measurement
from engines.bench.statistics import Slices
from engines.json_value import Value
from engines.timing import COMPUTE, D2H, H2D

SHORTEST, LONGEST = 1e-9, 1e6
"""Seconds of a round, far beyond what any takes."""


def raw_from_measurement(measurement: Measurement) -> dict[str, Any]:
    """What ``measurement_from_raw`` reads."""
    return {
        "rounds": measurement.slices.counts.tolist(),
        "walls": measurement.slices.walls.tolist(),
        "rounds_per_window": measurement.rounds_per_window,
        "latencies": packed(measurement.counted.latencies),
        "parts": {name: packed(measurement.counted_part(name)) for name in measurement.parts},
    }


def queries_of(raw: Value) -> tuple[int, int]:
    """How many queries there were, and how many of them count; nothing is unpacked for it.

    Raises:
        Malformed: that cannot be told.
    """
    counts = raw.field("rounds").whole_numbers(least=1)
    counted = counts[-WINDOWS * raw.field("rounds_per_window").whole_number(least=1) :]
    return sum(counts), sum(counted)


def measurement_from_raw(raw: Value) -> Measurement:
    """Unpacks a row, and no more of it than its rounds say.

    Raises:
        Malformed: it is damaged, or no such row can have been measured.
    """
    fields = raw.fields("rounds", "walls", "rounds_per_window", "latencies", "parts")
    counts = np.array(fields["rounds"].whole_numbers(least=1), np.int64)
    walls = np.array(fields["walls"].numbers(len(counts)), np.float64)
    per_window = fields["rounds_per_window"].whole_number(least=1)
    windows, rest = divmod(len(counts), per_window)
    if rest or not WINDOWS <= windows <= MOST_WINDOWS:
        raise fields["rounds"].wrong(f"queries of each round of {WINDOWS} to {MOST_WINDOWS} whole windows")
    if not ((walls >= SHORTEST) & (walls <= LONGEST)).all():
        raise fields["walls"].wrong(f"seconds from {SHORTEST:g} to {LONGEST:g}")
    counted = int(counts[-WINDOWS * per_window :].sum())
    skipped = int(counts.sum()) - counted
    parts = {name: _seconds(part, skipped, counted) for name, part in fields["parts"].items().items()}
    if parts.keys() - {H2D, COMPUTE, D2H}:
        raise fields["parts"].wrong(f"{H2D}, {COMPUTE} and {D2H}")
    latencies = _seconds(fields["latencies"], skipped, counted)
    if not parts.get(COMPUTE, latencies).any():
        raise fields["latencies"].wrong("times above 0")
    return Measurement(Slices(counts, walls, latencies), parts, per_window)


def _seconds(value: Value, skipped: int, counted: int) -> NDArray[np.float64]:
    """So many zeros, which take no memory until somebody reads them, and so many times."""
    if not isinstance(value.value, str):
        raise value.wrong("times in base64")
    seconds = np.zeros(skipped + counted)
    try:
        seconds[skipped:] = unpacked(value.value, counted)
    except ValueError as error:
        raise value.wrong(f"{counted} times, deflated, in base64") from error
    return seconds
