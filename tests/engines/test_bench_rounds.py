"""Rounds: rows take turns for equal times until their windows agree, on a clock that only the rows move."""

from __future__ import annotations

import gc
import itertools
import math

import numpy as np
import pytest

from engines.bench.contenders import HostQueries
from engines.bench.rounds import (
    FEWEST_ROUNDS,
    FEWEST_WARM_UPS,
    MOST_WINDOWS,
    SLICE,
    WARM_UP,
    WINDOWS,
    Measurement,
    measured,
    warmed_up,
)
from engines.bench.rows import row_from_measurement
from engines.bench.statistics import Slices
from engines.bench.workload import Workload
from engines.timing import Timing
from tests.engines.bench_files import VirtualClock


class Row:
    """Queries on a virtual clock; ``latency`` gives the seconds of the next one from how many there were, and when."""

    def __init__(self, clock, latency, *, name="row", journal=None, gap=0.0, parts=()):
        self._clock, self._latency, self._gap, self._parts = clock, latency, gap, parts
        self._journal = [] if journal is None else journal
        self.name, self.runs, self.timings, self.collecting = name, 0, [], []

    def run(self, count):
        self._journal.append((self.name, count))
        self.collecting.append(gc.isenabled())
        latencies = np.empty(count)
        for index in range(count):
            given = self._latency
            latencies[index] = given(self.runs, self._clock.now) if callable(given) else given
            self._clock.now += latencies[index]
            self.runs += 1
        self._clock.now += self._gap
        parts = {name: latencies * share for name, share in self._parts}
        self.timings.append(Timing(latencies, float(latencies.sum()) + self._gap, parts))
        return self.timings[-1]

    def results(self):
        return {}

    def close(self):
        pass


@pytest.fixture
def clock():
    return VirtualClock()


def turns(journal, names, rounds):
    """The names of the measured rounds, which come after the warm-up."""
    told = [name for name, _ in journal[len(journal) - rounds * len(names) :]]
    return [told[start : start + len(names)] for start in range(0, len(told), len(names))]


# --- turns


def test_no_row_is_measured_twice_before_all_others(clock):
    journal, names = [], ["a", "b", "c"]
    rows = [Row(clock, 0.001 * (place + 1), name=name, journal=journal) for place, name in enumerate(names)]
    measurement = measured(rows, 1.0, clock)[0]
    rounds = len(measurement.slices.counts)
    assert rounds == WINDOWS * measurement.rounds_per_window == 21
    found = turns(journal, names, rounds)
    assert all(sorted(turn) == names for turn in found)
    followed = {pair for turn in found for pair in itertools.pairwise(turn)}
    assert followed == set(itertools.permutations(names, 2))  # none always comes after the same one
    before = [name for name, _ in journal[: len(journal) - rounds * len(names)]]
    assert list(dict.fromkeys(before)) == [name for name, _ in itertools.groupby(before)] == names


@pytest.mark.parametrize("latencies", [(0.00005, 0.001, 0.007), (0.0201, 0.033, 0.05), (0.04, 0.001, 0.3)])
def test_rows_of_very_different_latency_are_measured_for_the_same_time(clock, latencies):
    found = measured([Row(clock, latency) for latency in latencies], 0.5, clock)
    length = max(SLICE, *latencies)
    for latency, measurement in zip(latencies, found, strict=True):
        counts = measurement.slices.counts
        assert set(counts) == {counts[0]}
        assert counts[0] >= 1
        assert abs(counts[0] * latency - length) <= latency / 2 + 1e-9


def test_a_slice_has_at_least_one_query(clock):
    slow, fast = measured([Row(clock, 0.4), Row(clock, 0.001)], 0.1, clock)
    assert slow.slices.counts.tolist() == [1] * 9
    assert fast.slices.counts.tolist() == [400] * 9


@pytest.mark.parametrize(
    ("duration", "latency", "expected"),
    [(3, 0.001, 20), (0.05, 0.001, FEWEST_ROUNDS), (3.1, 0.001, 21), (3, 0.5, FEWEST_ROUNDS), (9, 0.5, 6)],
)
def test_a_window_is_a_third_of_the_duration(clock, duration, latency, expected):
    (found,) = measured([Row(clock, latency)], duration, clock)
    assert found.rounds_per_window == expected
    assert len(found.slices.counts) == WINDOWS * expected
    assert found.slices.walls.sum() >= duration - 1e-6


# --- warm-up


def test_the_warm_up_is_not_measured_and_the_median_of_it_tells_how_many_queries_a_slice_has(clock):
    row = Row(clock, lambda runs, now: 5.0 if runs == 0 else 0.010 if now < 5 + WARM_UP else 0.001)
    (found,) = measured([row], 0.1, clock)
    assert 5.0 not in found.slices.latencies
    warm = row.runs - found.slices.queries
    assert warm == sum(len(timing.latencies) for timing in row.timings) - found.slices.counts.sum() > 0
    assert not any(row.collecting[len(row.collecting) - 9 :])


@pytest.mark.parametrize("latency", [0.00001, 0.004, 0.9])
def test_a_row_is_warmed_up_for_long_enough_and_not_for_much_longer(clock, latency):
    row = Row(clock, latency)
    assert warmed_up(row, clock) == pytest.approx(latency)
    assert row.runs >= FEWEST_WARM_UPS
    assert clock.now >= min(WARM_UP, FEWEST_WARM_UPS * latency)
    assert clock.now <= max(2 * WARM_UP + 2 * latency, FEWEST_WARM_UPS * latency) + 1e-9


def test_one_slow_query_does_not_make_the_latency(clock):
    assert warmed_up(Row(clock, lambda runs, now: 1.0 if runs == 1 else 0.0), clock) == 1e-9
    assert warmed_up(Row(clock, lambda runs, now: 0.15 if runs == 0 else 0.01), clock) == pytest.approx(0.01)


# --- when to stop


def paced(clock, *rates):
    """A row that computes so many queries per second in each window, the last from then on; 100 in its warm-up.

    Where a slice has five queries and a window three rounds, as with a duration of 0.05 s.
    """
    queries = itertools.count()

    def latency(runs, now):
        return 0.010 if gc.isenabled() else 1 / rates[min(next(queries) // 15, len(rates) - 1)]

    return Row(clock, latency)


@pytest.mark.parametrize(
    ("rates", "count"),
    [
        ([100], 3),
        ([100, 102, 104], 3),
        ([90, 100, 100], 4),
        ([100, 100, 94, 94], 5),
        ([50, 60, 70, 80, 100], 7),
        ([200, 100, 200, 100, 200, 100], 8),
        ([200, 100, 200, 100, 200, 100, 200], 9),
    ],
)
def test_it_stops_as_soon_as_three_windows_agree(clock, rates, count):
    (found,) = measured([paced(clock, *rates)], 0.05, clock)
    assert found.windows == pytest.approx([rates[min(index, len(rates) - 1)] for index in range(count)])
    assert found.settled
    expected = [rates[min(index, len(rates) - 1)] for index in range(count - WINDOWS, count)]
    assert found.counted.queries == 45
    assert 45 / found.counted.walls.sum() == pytest.approx(3 / sum(1 / rate for rate in expected))


def test_a_row_that_gets_slower_and_slower_is_given_up_after_nine_windows(clock):
    (found,) = measured([paced(clock, *(100 * 0.9**window for window in range(20)))], 0.05, clock)
    assert len(found.windows) == MOST_WINDOWS == 9
    assert not found.settled


def test_agreement_that_was_lost_again_does_not_count(clock):
    """All rows must be settled at once: one was after three windows, when the other was not, and then is no more."""
    first, second = paced(clock, 100, 100, 100, 80), paced(clock, 50, 100)
    found = measured([first, second], 0.05, clock)
    assert [len(measurement.windows) for measurement in found] == [6, 6]
    assert all(measurement.settled for measurement in found)
    assert found[0].windows == pytest.approx([100] * 3 + [80] * 3)


def test_one_restless_row_leaves_only_itself_unsettled(clock):
    restless, steady = measured([paced(clock, *[100, 80] * 5), paced(clock, 100)], 0.05, clock)
    assert (restless.settled, steady.settled) == (False, True)
    assert len(restless.windows) == len(steady.windows) == MOST_WINDOWS


def test_a_row_that_settled_goes_on_with_those_that_have_not(clock):
    settled_late, steady = measured([paced(clock, 50, 60, 70, 80, 100), Row(clock, 0.002)], 0.05, clock)
    assert len(settled_late.windows) == len(steady.windows) == 7
    assert steady.settled
    assert len(steady.counted.counts) == len(settled_late.counted.counts) == 9


def test_a_slow_start_does_not_change_the_figures(clock):
    (found,) = measured([paced(clock, 20, 70, 100)], 0.05, clock)
    assert len(found.windows) == 5
    assert set(found.counted.latencies) == {0.010}
    assert found.slices.queries == 75
    assert set(found.slices.latencies) == {0.05, 0.014285714, 0.010}


# --- what is kept


def test_parts_stay_beside_their_latencies(clock):
    shares = (("h2d", 0.25), ("compute", 0.5), ("d2h", 0.25))
    row = Row(clock, lambda runs, now: (1 + runs % 7 + (30 if runs < 60 else 0)) * 1e-3, parts=shares)
    (found,) = measured([row], 0.3, clock)
    assert set(found.parts) == {name for name, _ in shares}
    for name, share in shares:
        assert len(found.parts[name]) == found.slices.queries
        np.testing.assert_allclose(found.parts[name], found.slices.latencies * share, atol=1e-9)
        np.testing.assert_allclose(found.counted_part(name), found.counted.latencies * share, atol=1e-9)
    assert len(set(found.counted.latencies)) > 1


def test_the_wall_is_that_of_the_queries_gaps_included(clock):
    (found,) = measured([Row(clock, 0.010, gap=0.050)], 0.1, clock)
    np.testing.assert_allclose(found.slices.walls, 0.100)
    assert found.windows == pytest.approx([50] * WINDOWS)


def test_latencies_are_whole_nanoseconds_and_stay_in_their_order(clock):
    row = Row(clock, lambda runs, now: 0.001 + runs * 1.23456789e-8)
    (found,) = measured([row], 0.1, clock)
    nanoseconds = found.slices.latencies * 1e9
    np.testing.assert_allclose(nanoseconds, np.rint(nanoseconds), rtol=0, atol=1e-5)
    assert (np.rint(nanoseconds) / 1e9 == found.slices.latencies).all()
    raw = np.concatenate([timing.latencies for timing in row.timings[-len(found.slices.counts) :]])
    np.testing.assert_allclose(found.slices.latencies, raw, rtol=0, atol=0.5e-9)
    assert (raw != found.slices.latencies).any()
    assert (np.diff(found.slices.latencies) > 0).all()


def test_the_windows_that_count_are_the_last_three():
    rates = [10, 40, 20, 20, 20]
    counts = np.repeat([2], 10)
    walls = np.repeat([2 / rate for rate in rates], 2)
    found = Measurement(Slices(counts, walls, np.arange(20.0)), {"compute": np.arange(20.0)}, 2)
    assert found.windows == pytest.approx(rates)
    assert found.counted.latencies.tolist() == found.counted_part("compute").tolist() == list(range(8, 20))
    assert found.settled
    assert not Measurement(Slices(counts[:8], walls[:8], np.arange(16.0)), {}, 2).settled


@pytest.mark.parametrize("parts", [{}, {"h2d": [0.003] * 10, "compute": [0.9] * 4 + [0.001, 0.002, 0.002] * 2}])
def test_the_figures_of_a_row_are_of_the_windows_that_count(parts):
    latencies = np.array([1.0] * 4 + [0.010, 0.030] * 3)
    timed = Slices(np.array([2] * 5), np.array([2.5] * 2 + [0.05] * 3), latencies)
    measurement = Measurement(timed, {name: np.array(values) for name, values in parts.items()}, 1)
    row = row_from_measurement(
        measurement,
        file="a",
        batch=4,
        way="somehow",
        first_seconds=7.0,
        workload=Workload((), "unknown"),
        card=None,
        telemetry=None,
    )
    assert row.queries == 6
    assert row.images_per_second.value == pytest.approx(4 * 6 / 0.15)
    assert row.queries_per_second.value == pytest.approx(6 / 0.15)
    assert {percent for percent, found in row.latency_ms.items() if found} == {50}
    assert row.latency_ms[50].value == pytest.approx(10)
    assert row.parts_ms == pytest.approx({"h2d": 3.0, "compute": 2.0} if parts else {})
    assert row.variation == pytest.approx(math.sqrt(2) / 5 if parts else 1 / 2)
    assert row.windows == pytest.approx([4 * 2 / 2.5] * 2 + [4 * 2 / 0.05] * 3)
    assert row.settled
    assert (row.bound, row.bytes_per_image) == (None, None)


# --- Python's collector


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_while_it_is_measured_and_is_as_before_afterwards(clock, enabled):
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        row = Row(clock, 0.001)
        (found,) = measured([row], 0.1, clock)
        assert gc.isenabled() is enabled
        assert row.collecting[len(row.collecting) - len(found.slices.counts) :] == [False] * len(found.slices.counts)
        assert row.collecting[0] is enabled
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_the_collector_is_back_after_a_failure(clock, failure):
    def latency(runs, now):
        if not gc.isenabled():
            raise failure("in the midst of it")
        return 0.001

    assert gc.isenabled()
    with pytest.raises(failure, match="in the midst"):
        measured([Row(clock, latency)], 0.1, clock)
    assert gc.isenabled()


# --- on the host's clock


class Computing:
    """A backend whose batches take these seconds, one after the other."""

    def __init__(self, clock, seconds):
        self._clock, self._seconds, self.fed = clock, iter(seconds), []

    def run(self, feeds):
        self.fed.append(feeds)
        self._clock.now += next(self._seconds)
        return {"output": np.array([len(self.fed)])}


def test_a_query_on_the_host_ends_where_the_next_begins(clock):
    backend = Computing(clock, [0.5, 0.25, 0.125, 2.0])
    clock.now = 7.0
    feeds = {"input": np.zeros((1, 3))}
    queries = HostQueries(backend, feeds, clock)
    timing = queries.run(3)
    assert timing.latencies.tolist() == [0.5, 0.25, 0.125]
    assert timing.wall == timing.latencies.sum() == 0.875
    assert timing.parts == {}
    assert clock.reads == 4
    assert all(fed is feeds for fed in backend.fed)
    assert queries.results()["output"].tolist() == [3]
    assert queries.run(1).latencies.tolist() == [2.0]
    assert queries.results()["output"].tolist() == [4]
