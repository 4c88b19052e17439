"""What a row's slices say of it: rates, percentiles, and how sure they are.

A row is measured in slices, one a round; a slice is some queries one after the other. With q_k queries in w_k seconds:

    queries per second   sum q_k / sum w_k
    percentile p         the ceil(p n / 100)-th smallest of all n latencies: one that was seen
    variation            standard deviation of the latencies / their mean
    speed-up             one row's queries per second / another's, over the same rounds

Queries of one slice share what the machine did in that moment, and rounds that follow each other still share some of
it, so that they are no independent samples. Intervals are therefore by the bootstrap over blocks: as many rounds in a
row as the cube root of their number are drawn together, with replacement, all rows' slices of a round together, and the
middle of what comes out is the interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13;
Kuensch, The Jackknife and the Bootstrap for General Stationary Observations, 1989; Politis and Romano, A Circular
Block-Resampling Procedure for Stationary Data, 1992). The middle is wider than 95 %, by as much as Student's
distribution is wider than the normal one for so few blocks (Hesterberg, What Teachers Should Know About the Bootstrap,
2015). It is seeded.

Drift over many blocks is in no interval of a rate; in a speed-up's it does not matter, since it hits both rows alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 90, 95, 99)
RESAMPLES, SEED = 1000, 0
NORMAL = 1.959964
"""Standard deviations within which 95 % of a normal distribution lie."""
MOST_ROUNDS = 4096
"""That are drawn from; of more, neighbours are taken for one, which bounds the memory of the intervals."""
GROUPS = 4096
"""Of latencies, for the intervals of percentiles."""
AGREEMENT = 0.05
"""Windows agree whose rates differ by no more than this part of their mean."""
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

    def joined(self) -> Slices:
        """The same in no more than MOST_ROUNDS rounds."""
        starts = np.arange(0, len(self.counts), -(-len(self.counts) // MOST_ROUNDS))
        return Slices(np.add.reduceat(self.counts, starts), np.add.reduceat(self.walls, starts), self.latencies)


def queries_per_second(slices: Slices) -> Estimate:
    """The rate, with its interval."""
    slices = slices.joined()
    drawn = _drawn(len(slices.counts))
    return _estimate(slices.queries / float(slices.walls.sum()), _rates(slices, drawn), len(slices.counts))


def speed_up(slices: Slices, against: Slices) -> Estimate:
    """How many times the rate of ``against``, measured in the same rounds, with its interval.

    Raises:
        ValueError: there are not as many rounds.
    """
    if len(slices.counts) != len(against.counts):
        raise ValueError(f"{len(slices.counts)} rounds cannot be paired with {len(against.counts)}")
    slices, against = slices.joined(), against.joined()
    drawn = _drawn(len(slices.counts))
    value = (slices.queries / slices.walls.sum()) / (against.queries / against.walls.sum())
    return _estimate(float(value), _rates(slices, drawn) / _rates(against, drawn), len(slices.counts))


def latency_percentiles(slices: Slices) -> dict[int, Estimate | None]:
    """Each of PERCENTILES of the latencies in seconds, with its interval; None where there are too few queries for it.

    For the intervals latencies are counted in GROUPS groups of neighbours, each taken for its largest.
    """
    slices = slices.joined()
    count, rounds = slices.queries, len(slices.counts)
    order = np.argsort(slices.latencies, kind="stable")
    latencies = slices.latencies[order]
    groups = np.arange(count) * min(count, GROUPS) // count
    largest = latencies[np.searchsorted(groups, np.arange(groups[-1] + 1), side="right") - 1]
    in_group = np.zeros((rounds, len(largest)))
    np.add.at(in_group, (slices.rounds[order], groups), 1)
    told = [percent for percent in PERCENTILES if count >= FEWEST[percent]]
    reached = np.cumsum(_drawn(rounds) @ in_group, axis=1).astype(np.int64)
    found = {percent: largest[(reached < _rank(reached[:, -1:], percent)).sum(axis=1)] for percent in told}
    values = {percent: float(latencies[_rank(count, percent) - 1]) for percent in told}
    return {
        percent: _estimate(values[percent], found[percent], rounds) if percent in told else None
        for percent in PERCENTILES
    }


def variation(latencies: NDArray[np.float64]) -> float:
    """Standard deviation / mean."""
    return float(np.std(latencies) / np.mean(latencies))


def agree(rates: Sequence[float]) -> bool:
    """Whether windows of these rates tell the same."""
    return max(rates) - min(rates) <= AGREEMENT * (sum(rates) / len(rates))


def _rank(count: NDArray[np.int64] | int, percent: int) -> NDArray[np.int64]:
    """Which of ``count`` sorted numbers a percentile is, from 1; in whole numbers, since 0.99 x 100 is not 99."""
    return np.maximum(1, -(-count * percent // 100))


def _rounds_of_block(rounds: int) -> int:
    return max(1, round(math.cbrt(rounds)))


def _drawn(rounds: int) -> NDArray[np.int64]:
    """How often each round is drawn (RESAMPLES, rounds); the same for every row of as many rounds.

    A block that begins near the end goes on at the beginning, so that all rounds are drawn alike; the last one is cut.
    """
    length = _rounds_of_block(rounds)
    starts = np.random.default_rng(SEED).integers(rounds, size=(RESAMPLES, -(-rounds // length), 1))
    drawn = ((starts + np.arange(length)) % rounds).reshape(RESAMPLES, -1)[:, :rounds]
    places = drawn + rounds * np.arange(RESAMPLES)[:, None]
    return np.bincount(places.ravel(), minlength=RESAMPLES * rounds).reshape(RESAMPLES, rounds)


def _percent_outside(rounds: int) -> float:
    """On either side of an interval; 2.5 of very many rounds. Student's quantile is Abramowitz and Stegun's, 26.7.5."""
    blocks = rounds / _rounds_of_block(rounds)
    if blocks <= 1:
        return 0.0
    z, freedom = NORMAL, blocks - 1
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    student += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return 50 * math.erfc(math.sqrt(blocks / freedom) * student / math.sqrt(2))


def _rates(slices: Slices, drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray((drawn @ slices.counts) / (drawn @ slices.walls), np.float64)


def _estimate(value: float, resampled: NDArray[np.float64], rounds: int) -> Estimate:
    outside = _percent_outside(rounds)
    low, high = np.percentile(resampled, (outside, 100 - outside))
    return Estimate(value, min(float(low), value), max(float(high), value))
