"""Rows measured side by side, in turns of short slices, so that what else the machine does hits all of them alike.

    warm-up   each row alone, WARM_UP seconds, after its first query, which is timed apart
    slice     about SLICE seconds of one row's queries, at least one; as long as the slowest row's single query
    round     a slice of every row, in another order each, so that none always follows the same one
    window    rounds in which every row was measured for a third of the duration
    settled   the rates of the last WINDOWS windows agree (``engines.bench.statistics.agree``)

Rounds go on until every row is settled, or MOST_WINDOWS were measured. Only the last WINDOWS windows count: before
them the machine was still getting warm, or busy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.bench.statistics import Slices, agree
from engines.timing import Clock, Queries, Timing

NANOSECONDS = 1e9
SEED = 0
WARM_UP, FEWEST_WARM_UPS = 0.2, 3
SLICE = 0.05
FEWEST_ROUNDS = 3
"""Of a window."""
WINDOWS, MOST_WINDOWS = 3, 9


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of one row: every round of it, of which ``counted`` are those that its figures are made of.

    ``parts`` are those of the latencies, as in ``engines.timing.Timing``.
    """

    slices: Slices
    parts: Mapping[str, NDArray[np.float64]]
    rounds_per_window: int

    @property
    def counted(self) -> Slices:
        """The last WINDOWS windows."""
        return self.slices.last(WINDOWS * self.rounds_per_window)

    def counted_part(self, name: str) -> NDArray[np.float64]:
        """A part of the latencies, in the last WINDOWS windows."""
        return self.parts[name][len(self.parts[name]) - self.counted.queries :]

    @property
    def windows(self) -> tuple[float, ...]:
        """Queries per second in each window."""
        starts = range(0, len(self.slices.counts), self.rounds_per_window)
        return tuple(
            float(self.slices.counts[start:stop].sum() / self.slices.walls[start:stop].sum())
            for start in starts
            for stop in (start + self.rounds_per_window,)
        )

    @property
    def settled(self) -> bool:
        """Whether the windows that count agree."""
        return agree(self.windows[-WINDOWS:])


def measured(rows: Sequence[Queries], duration: float, clock: Clock) -> list[Measurement]:
    """Measures the rows in rounds.

    Args:
        rows: each of which has computed its first query before.
        duration: seconds that each is measured for, if its windows agree at once.
        clock: gives seconds; that of the host.
    """
    latencies = [warmed_up(queries, clock) for queries in rows]
    length = max(SLICE, *latencies)
    counts = [max(1, round(length / latency)) for latency in latencies]
    per_window = max(FEWEST_ROUNDS, math.ceil(duration / WINDOWS / length))
    timings: list[list[Timing]] = [[] for _ in rows]
    orders = np.random.default_rng(SEED)
    found: list[Measurement] = []
    for window in range(1, MOST_WINDOWS + 1):
        for _ in range(per_window):
            for place in orders.permutation(len(rows)):
                with _undisturbed():
                    timings[place].append(rows[place].run(counts[place]))
        if window >= WINDOWS:
            found = [_measurement(timed, per_window) for timed in timings]
            if all(measurement.settled for measurement in found):
                break
    return found


def warmed_up(queries: Queries, clock: Clock) -> float:
    """Runs for WARM_UP seconds; returns the median latency in seconds."""
    started = clock()
    latencies = list(queries.run(FEWEST_WARM_UPS).latencies)
    while clock() - started < WARM_UP:
        latencies += list(queries.run(max(1, len(latencies))).latencies)
    return max(float(np.median(latencies)), 1e-9)


def _measurement(timings: Sequence[Timing], per_window: int) -> Measurement:
    slices = Slices(
        np.array([len(timing.latencies) for timing in timings], np.int64),
        np.array([timing.wall for timing in timings], np.float64),
        _whole_nanoseconds([timing.latencies for timing in timings]),
    )
    parts = {name: _whole_nanoseconds([timing.parts[name] for timing in timings]) for name in timings[0].parts}
    return Measurement(slices, parts, per_window)


def _whole_nanoseconds(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Seconds in a row, as they can be written down and read again without a difference."""
    return np.asarray(np.rint(np.concatenate(parts) * NANOSECONDS) / NANOSECONDS, np.float64)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without Python's collector of cycles, which would stop whichever query it pleases."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
