"""What a row's slices say of it: rates, percentiles, and how sure they are.

A row is measured in slices, one a round; a slice is some queries one after the other. With q_k queries in w_k seconds:

    queries per second   sum q_k / sum w_k
    percentile p         the ceil(p n / 100)-th smallest of all n latencies: one that was seen
    variation            standard deviation of the latencies / their mean
    speed-up             one row's queries per second / another's, over the same rounds

Queries of one slice share what the machine did in that moment, so that they are no independent samples. Intervals are
therefore by the bootstrap over rounds: rounds are drawn with replacement, all rows' slices of a round together, and the
middle 95 % of what comes out is the interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13;
Kuensch, The Jackknife and the Bootstrap for General Stationary Observations, 1989, for blocks). It is seeded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 90, 95, 99)
RESAMPLES, SEED, COVERED = 1000, 0, 95.0
AGREEMENT = 0.05
"""Windows agree whose rates are all within this part of their mean."""
LARGEST_VARIATION = 0.025
"""Beyond it latencies are called noisy."""
FEWEST = {50: 1, 90: 10, 95: 20, 99: 100}
"""Queries below which a percentile is not told: it would be the largest one."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Slices:
    """A row's measurement: ``counts`` queries (rounds,), ``walls`` seconds (rounds,), ``latencies`` seconds (queries,).

    The latencies are those of the first round, then those of the second, and so on.
    """

    counts: NDArray[np.int64]
    walls: NDArray[np.float64]
    latencies: NDArray[np.float64]

    @property
    def queries(self) -> int:
        """All of them."""
        return len(self.latencies)

    @property
    def rounds(self) -> NDArray[np.int64]:
        """Of each latency, the round that it was measured in."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def last(self, rounds: int) -> Slices:
        """The last so many rounds."""
        first = max(0, len(self.counts) - rounds)
        return Slices(self.counts[first:], self.walls[first:], self.latencies[int(self.counts[:first].sum()) :])


def queries_per_second(slices: Slices) -> Estimate:
    """The rate, with its interval."""
    drawn = _drawn(len(slices.counts))
    return _estimate(slices.queries / float(slices.walls.sum()), _rates(slices, drawn))


def speed_up(slices: Slices, against: Slices) -> Estimate:
    """How many times the rate of ``against``, measured in the same rounds, with its interval.

    Raises:
        ValueError: there are not as many rounds.
    """
    if len(slices.counts) != len(against.counts):
        raise ValueError(f"{len(slices.counts)} rounds cannot be paired with {len(against.counts)}")
    drawn = _drawn(len(slices.counts))
    value = (slices.queries / slices.walls.sum()) / (against.queries / against.walls.sum())
    return _estimate(float(value), _rates(slices, drawn) / _rates(against, drawn))


def latency_percentile(slices: Slices, percent: int) -> Estimate | None:
    """A percentile of the latencies in seconds, with its interval; None where there are too few queries for it."""
    if slices.queries < FEWEST[percent]:
        return None
    order = np.argsort(slices.latencies, kind="stable")
    latencies, rounds = slices.latencies[order], slices.rounds[order]
    found = np.empty(RESAMPLES)
    for index, times in enumerate(_drawn(len(slices.counts))):
        reached = np.cumsum(times[rounds])
        found[index] = latencies[np.searchsorted(reached, _rank(int(reached[-1]), percent))]
    return _estimate(float(latencies[_rank(slices.queries, percent) - 1]), found)


def variation(latencies: NDArray[np.float64]) -> float:
    """Standard deviation / mean."""
    return float(np.std(latencies) / np.mean(latencies))


def agree(rates: Sequence[float]) -> bool:
    """Whether windows of these rates tell the same."""
    return max(rates) - min(rates) <= AGREEMENT * (sum(rates) / len(rates))


def _rank(count: int, percent: int) -> int:
    """Which of ``count`` sorted numbers a percentile is, from 1; in whole numbers, since 0.99 x 100 is not 99."""
    return max(1, -(-count * percent // 100))


def _drawn(rounds: int) -> NDArray[np.int64]:
    """How often each round is drawn (RESAMPLES, rounds); the same for every row of as many rounds."""
    return np.random.default_rng(SEED).multinomial(rounds, np.full(rounds, 1 / rounds), size=RESAMPLES)


def _rates(slices: Slices, drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray((drawn @ slices.counts) / (drawn @ slices.walls), np.float64)


def _estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    outside = (100 - COVERED) / 2
    low, high = np.percentile(resampled, (outside, 100 - outside))
    return Estimate(value, min(float(low), value), max(float(high), value))
