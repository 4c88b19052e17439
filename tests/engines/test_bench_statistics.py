"""A benchmark's figures against their plain definitions, and how often their intervals hold what is true."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.bench import statistics
from engines.bench.statistics import (
    AGREEMENT,
    FEWEST,
    PERCENTILES,
    Estimate,
    Slices,
    agree,
    latency_percentiles,
    queries_per_second,
    speed_up,
    variation,
)

SECONDS = st.integers(1, 10**9).map(lambda nanoseconds: nanoseconds / 1e9)
ROUNDS = st.lists(st.lists(SECONDS, min_size=1, max_size=20), min_size=1, max_size=12)


def slices(rounds, gap=0.0):
    """From the latencies of each round, with ``gap`` seconds a round in which nothing was computed."""
    return Slices(
        np.array([len(latencies) for latencies in rounds]),
        np.array([sum(latencies) + gap for latencies in rounds]),
        np.concatenate([np.asarray(latencies, np.float64) for latencies in rounds]),
    )


def width(estimate):
    return (estimate.high - estimate.low) / estimate.value


# --- the figures


@settings(max_examples=60, deadline=None)
@given(ROUNDS, st.sampled_from(PERCENTILES))
def test_a_percentile_is_the_smallest_latency_that_so_many_do_not_exceed(rounds, percent):
    latencies = [latency for round_ in rounds for latency in round_]
    found = latency_percentiles(slices(rounds))[percent]
    if len(latencies) < FEWEST[percent]:
        assert found is None
        return
    reaching = [
        seen for seen in latencies if 100 * sum(other <= seen for other in latencies) >= percent * len(latencies)
    ]
    assert found.value == min(reaching)
    assert min(latencies) <= found.low <= found.value <= found.high <= max(latencies)


@pytest.mark.parametrize(("percent", "fewest", "rank"), [(50, 1, 1), (90, 10, 9), (95, 20, 19), (99, 100, 99)])
def test_a_percentile_is_told_of_as_many_as_it_takes_not_to_be_the_largest(percent, fewest, rank):
    latencies = np.random.default_rng(0).permutation(np.arange(1.0, fewest + 1))
    assert latency_percentiles(slices([[latency] for latency in latencies]))[percent].value == rank
    if fewest > 1:
        assert rank < fewest
        assert latency_percentiles(slices([[latency] for latency in latencies[1:]]))[percent] is None


@settings(max_examples=60, deadline=None)
@given(ROUNDS, st.floats(0, 2))
def test_a_rate_is_all_queries_over_all_seconds_gaps_included(rounds, gap):
    found = queries_per_second(slices(rounds, gap))
    seconds = math.fsum(latency for round_ in rounds for latency in round_) + gap * len(rounds)
    assert found.value == pytest.approx(sum(map(len, rounds)) / seconds, rel=1e-12)
    rates = [len(round_) / (sum(round_) + gap) for round_ in rounds]
    assert min(rates) * (1 - 1e-12) <= found.low <= found.value <= found.high <= max(rates) * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(ROUNDS, st.integers(0, 15))
def test_the_last_rounds_are_those_at_the_end(rounds, count):
    found, kept = slices(rounds).last(count), rounds[max(0, len(rounds) - count) :]
    assert found.counts.tolist() == [len(round_) for round_ in kept]
    assert found.walls.tolist() == [sum(round_) for round_ in kept]
    assert found.latencies.tolist() == [latency for round_ in kept for latency in round_]
    assert found.queries == sum(map(len, kept))
    assert found.rounds.tolist() == [index for index, round_ in enumerate(kept) for _ in round_]


@pytest.mark.parametrize(("latencies", "expected"), [([1, 3], 0.5), ([2, 2, 2], 0), ([1, 1, 4], math.sqrt(2) / 2)])
def test_the_variation_is_the_deviation_over_the_mean_in_any_unit(latencies, expected):
    assert variation(np.array(latencies, np.float64)) == pytest.approx(expected, abs=1e-15)
    assert variation(np.array(latencies) * 1e-6) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([100, 100, 100], True),
        ([97.5, 100, 102.5], True),
        ([97.4, 100, 102.5], False),
        ([100, 100, 106], False),
        ([100, 94, 100], False),
        ([1e-3, 1e-3, 1.06e-3], False),
        ([100, math.nan, 100], False),
        ([math.nan, 100, 100], False),
        ([100], True),
    ],
)
def test_windows_agree_within_a_twentieth_of_their_mean(rates, expected):
    assert AGREEMENT == 0.05
    assert agree(rates) is expected


# --- the intervals


def test_intervals_of_two_rounds_are_the_rounds_themselves():
    """A quarter of all draws of two rounds are the first twice, another the second twice."""
    found = slices([[0.010] * 4, [0.020] * 2])
    rate = queries_per_second(found)
    assert (rate.low, rate.high) == (pytest.approx(50), pytest.approx(100))
    median = latency_percentiles(found)[50]
    assert (median.low, median.value, median.high) == (0.010, 0.010, 0.020)
    ratio = speed_up(found, slices([[0.010] * 4, [0.010] * 4]))
    assert (ratio.low, ratio.high) == (pytest.approx(0.5), pytest.approx(1))


def test_one_round_or_rounds_that_are_all_alike_leave_no_room():
    for found in (slices([[0.010, 0.030]]), slices([[0.010, 0.030]] * 20)):
        rate = queries_per_second(found)
        assert rate.low == pytest.approx(rate.high) == pytest.approx(50)
        assert latency_percentiles(found)[50].high == 0.010


def test_an_interval_holds_its_value_also_where_rounding_would_put_it_outside():
    generator = np.random.default_rng(0)
    for _ in range(200):
        found = queries_per_second(slices([[0.1] * generator.integers(1, 9) for _ in range(generator.integers(3, 40))]))
        assert found.low <= found.value <= found.high


def simulated(generator, rounds, queries=10, shared=0.1, own=0.02, mean=0.010):
    """Latencies of which those of a round share most of their noise; the truth is ``mean``."""
    moments = 1 + shared * generator.standard_normal((rounds, 1))
    return list(mean * moments * (1 + own * generator.standard_normal((rounds, queries))))


def test_intervals_are_seeded_and_shrink_as_the_root_of_the_rounds():
    few, many = (slices(simulated(np.random.default_rng(1), rounds)) for rounds in (40, 640))
    assert queries_per_second(few) == queries_per_second(few)
    assert latency_percentiles(few)[90] == latency_percentiles(few)[90]
    assert width(queries_per_second(few)) / width(queries_per_second(many)) == pytest.approx(4, rel=0.3)
    assert width(latency_percentiles(few)[50]) > 2 * width(latency_percentiles(many)[50])


def test_intervals_are_as_wide_as_the_textbook_says_where_rounds_have_nothing_in_common():
    """Then the deviation of a mean is that of one round over the root of their number; 95 % are 1.96 of it."""
    simulations = [simulated(np.random.default_rng(seed), 300, queries=1, shared=0.1, own=0) for seed in range(10)]
    found = np.mean([width(queries_per_second(slices(simulation))) for simulation in simulations])
    assert found == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(300), rel=0.07)


def test_every_round_is_drawn_as_often_as_any_other():
    """Blocks that begin at the end go on at the beginning."""
    rounds = [[0.005 if place == 29 else 0.010] for place in range(30)]
    at_the_end = queries_per_second(slices(rounds))
    for place in (0, 15):
        rolled = queries_per_second(slices(rounds[29 - place :] + rounds[: 29 - place]))
        assert dataclasses.astuple(rolled) == pytest.approx(dataclasses.astuple(at_the_end), rel=1e-9)


@pytest.mark.parametrize(("groups", "low", "high"), [(statistics.GROUPS, 0.489, 0.510), (10, 0.5, 0.6), (1, 0.5, 1.0)])
def test_the_ends_of_a_percentile_are_the_largest_of_their_groups(monkeypatch, groups, low, high):
    """Of a thousand latencies, all different, over rounds that are alike."""
    monkeypatch.setattr(statistics, "GROUPS", groups)
    latencies = np.arange(1, 1001) / 1000
    median = latency_percentiles(slices([latencies[start::40] for start in range(40)]))[50]
    assert dataclasses.astuple(median) == pytest.approx((0.5, low, high), abs=0.002)


def coverage(estimate, truth, runs=200, simulation=simulated, rounds=30):
    """The part of simulated benchmarks of so many rounds whose interval holds the truth."""
    generator = np.random.default_rng(5)
    found = [estimate(simulation(generator, rounds)) for _ in range(runs)]
    return sum(interval.low <= truth <= interval.high for interval in found) / runs


def by_rounds(rounds):
    return queries_per_second(slices(rounds))


def as_if_independent(rounds):
    """What the textbook says of so many queries that have nothing in common."""
    latencies = np.concatenate(rounds)
    reach = 1.96 * latencies.std() / math.sqrt(len(latencies))
    return Estimate(1 / latencies.mean(), 1 / (latencies.mean() + reach), 1 / (latencies.mean() - reach))


@pytest.mark.parametrize("rounds", [9, 30, 60])
def test_the_interval_of_a_rate_holds_the_truth_in_nineteen_of_twenty_benchmarks(rounds):
    """Also of the fewest rounds that there are, where a slice is a single slow query."""
    assert 0.92 <= coverage(by_rounds, 100, runs=400, rounds=rounds) <= 0.99


def lingering(generator, rounds, share=0.5):
    """What slows a round down still slows the next one, by half as much."""
    moments = [generator.standard_normal()]
    for _ in range(rounds - 1):
        moments.append(share * moments[-1] + math.sqrt(1 - share**2) * generator.standard_normal())
    return [[0.010 * (1 + 0.05 * moment)] * 3 for moment in moments]


def test_rounds_that_are_like_the_ones_before_them_widen_the_interval():
    """Taken for independent, the intervals of such rounds hold the truth in seven of ten benchmarks."""
    assert coverage(by_rounds, 100, runs=400, simulation=lingering, rounds=60) >= 0.82


def test_queries_taken_for_independent_would_claim_far_too_much():
    assert coverage(as_if_independent, 100) < 0.6


def test_the_interval_of_a_median_holds_the_truth_as_often():
    short = functools.partial(simulated, queries=4)
    assert 0.90 <= coverage(lambda rounds: latency_percentiles(slices(rounds))[50], 0.010, simulation=short) <= 0.985


@pytest.mark.parametrize(("rounds", "most", "together"), [(64, 16, 4), (65, 16, 5), (16, 16, 1), (5, 16, 1)])
def test_of_more_rounds_than_are_drawn_from_neighbours_are_taken_for_one(monkeypatch, rounds, most, together):
    """The memory that the intervals take is bounded by it, also for an hour, or for a receipt from anywhere."""
    own, other = (simulated(np.random.default_rng(seed), rounds, queries=3) for seed in (1, 2))
    by_hand = [
        slices([np.concatenate(found[start : start + together]) for start in range(0, rounds, together)])
        for found in (own, other)
    ]
    monkeypatch.setattr(statistics, "MOST_ROUNDS", most)
    found = [slices(own), slices(other)]
    assert len(found[0].joined().counts) == len(by_hand[0].counts) <= most
    assert latency_percentiles(found[0]) == latency_percentiles(by_hand[0])
    for one, same in [(queries_per_second(found[0]), queries_per_second(by_hand[0])),
                      (speed_up(*found), speed_up(*by_hand))]:  # fmt: skip
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(same), rel=1e-12)


# --- speed-ups


def drifting(rounds, mean, drift, seed):
    generator = np.random.default_rng(seed)
    return [mean * drift[index] * (1 + 0.01 * generator.standard_normal(5)) for index in range(rounds)]


def test_drift_that_hits_both_alike_leaves_the_speed_up_sharp():
    drift = 1 + 0.5 * np.sin(np.arange(60) / 5)
    fast, slow = (slices(drifting(60, mean, drift, seed)) for mean, seed in ((0.010, 1), (0.020, 2)))
    paired = speed_up(fast, slow)
    assert paired.low <= 2 <= paired.high
    assert width(paired) < 0.01
    assert width(queries_per_second(fast)) > 0.1
    order = np.random.default_rng(3).permutation(60)
    elsewhen = slices([drifting(60, 0.020, drift, 2)[index] for index in order])
    assert width(speed_up(fast, elsewhen)) > 20 * width(paired)


@settings(max_examples=40, deadline=None)
@given(ROUNDS, st.integers(0, 2**32 - 1))
def test_a_speed_up_is_the_ratio_of_the_rates_and_turns_over(rounds, seed):
    generator = np.random.default_rng(seed)
    other = slices([generator.uniform(0.001, 0.1, size=3) for _ in rounds])
    own = slices(rounds)
    forth, back = speed_up(own, other), speed_up(other, own)
    assert forth.value == pytest.approx(queries_per_second(own).value / queries_per_second(other).value, rel=1e-12)
    assert back.value == pytest.approx(1 / forth.value, rel=1e-12)
    assert forth.low <= forth.value <= forth.high


def test_rounds_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match="2 rounds cannot be paired with 3"):
        speed_up(slices([[1.0]] * 2), slices([[1.0]] * 3))
