"""A row's raw data: what is left out of them is what no figure is made of."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.bench.record import packed
from engines.bench.rounds import WINDOWS, Measurement
from engines.bench.rows import row_from_measurement
from engines.bench.statistics import Slices
from engines.bench.workload import Workload
from engines.json_value import Malformed, Value
from engines.receipts.raw_rows import measurement_from_raw, queries_of, raw_from_measurement


def measurement_of(seed, windows, per_window, queries):
    """A row that gets faster from round to round."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, queries + 1, windows * per_window)
    latencies = random.integers(1, 10**6, counts.sum()) / 1e9
    parts = {"compute": np.rint(latencies * 0.5e9) / 1e9, "h2d": np.zeros(counts.sum())}
    walls = np.add.reduceat(latencies, np.cumsum(counts) - counts) * np.linspace(2, 1.1, len(counts))
    return Measurement(Slices(counts, walls, latencies), parts, per_window)


def row_of(measurement):
    """Its figures, without the measurement itself."""
    row = row_from_measurement(
        measurement, file="a.engine", batch=2, way="by hand", first_seconds=1.0, workload=Workload((), "not counted"),
        card=None, telemetry=None,
    )  # fmt: skip
    return {name: value for name, value in vars(row).items() if name != "measurement"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(WINDOWS, 9), st.integers(1, 4), st.integers(1, 5))
def test_every_figure_comes_back(seed, windows, per_window, queries):
    measurement = measurement_of(seed, windows, per_window, queries)
    raw = Value(json.loads(json.dumps(raw_from_measurement(measurement))))
    assert row_of(measurement_from_raw(raw)) == row_of(measurement)
    assert queries_of(raw) == (measurement.slices.queries, measurement.counted.queries)


@pytest.mark.parametrize("windows", [WINDOWS, 9])
def test_only_the_windows_that_count_are_packed(windows):
    measurement = measurement_of(0, windows, 2, 5)
    raw = raw_from_measurement(measurement)
    counted = measurement.counted.latencies
    assert raw["latencies"] == packed(counted)
    assert len(counted) == sum(raw["rounds"][-2 * WINDOWS :])
    whole = {**raw, "latencies": packed(measurement.slices.latencies)}
    if windows == WINDOWS:
        assert whole == raw
        return
    with pytest.raises(Malformed, match=f"latencies: expected {len(counted)} times"):
        measurement_from_raw(Value(whole))


def test_other_queries_in_a_window_that_counts_are_found_out():
    raw = raw_from_measurement(measurement_of(0, 9, 2, 5))
    raw["rounds"][-1] += 1
    with pytest.raises(Malformed, match="expected"):
        measurement_from_raw(Value(raw))


def test_a_part_that_no_query_has_is_refused():
    raw = raw_from_measurement(measurement_of(0, 9, 2, 5))
    raw["parts"]["launch"] = raw["parts"].pop("h2d")
    with pytest.raises(Malformed, match="parts: expected h2d, compute and d2h"):
        measurement_from_raw(Value(raw))
