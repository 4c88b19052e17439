"""A benchmark's record for a terminal: the lines before the tables, every column, and what is left out."""

from __future__ import annotations

import dataclasses
import re

import pytest

from engines.bench import lines_from_record
from engines.bench.record import Bound, Parity
from engines.bench.statistics import Estimate
from tests.engines.bench_records import FILE, ROW, record_of

TELEMETRY = {
    "sm_clock_mhz": 2040.2, "memory_clock_mhz": 6251.0, "temperature_c": 61.0, "power_w": 71.62,
    "joules_per_image": 0.012345, "throttled": [],
}  # fmt: skip


def cells(row):
    """Of the record's only row, by the column's heading."""
    lines = lines_from_record(record_of(row))
    start = next(index for index, line in enumerate(lines) if line.startswith("batch "))
    heading, found = (re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 : start + 3])
    return dict(zip(heading, found, strict=True))


@pytest.mark.parametrize(
    ("machine", "shown"),
    [
        ({}, "Some CPU, 2 cores, load 0.5"),
        ({"load": None}, "Some CPU, 2 cores"),
        ({"cores": None, "load": 0.0}, "Some CPU, load 0.0"),
        ({"gpu": "NVIDIA L4", "driver": "580.65"}, "NVIDIA L4, driver 580.65; Some CPU, 2 cores, load 0.5"),
        ({"gpu": "NVIDIA L4"}, "NVIDIA L4; Some CPU, 2 cores, load 0.5"),
        ({"driver": "580.65"}, "driver 580.65; Some CPU, 2 cores, load 0.5"),
    ],
)
def test_the_machine_is_told_as_far_as_it_is_known(machine, shown):
    assert lines_from_record(record_of(ROW, **machine))[0] == f"machine: {shown}"


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"bytes": 10_432_100}, "fp32, 10.4 MB, opened in 123 ms, 2.72 GFLOP an image; parity ok: found"),
        (
            {"precision": "", "operations_per_image": None},
            "no precision named, 1e-05 MB, opened in 123 ms; parity ok: found",
        ),
        ({"passed": False}, "fp32, 1e-05 MB, opened in 123 ms, 2.72 GFLOP an image; parity FAIL: found"),
        ({"passed": None}, "fp32, 1e-05 MB, opened in 123 ms, 2.72 GFLOP an image; parity not checked: found"),
    ],
)
def test_a_file_is_told_in_a_line(changes, shown):
    passed = changes.pop("passed", True)
    file = dataclasses.replace(FILE, parity=Parity(passed, "found"), **changes)
    assert lines_from_record(record_of(ROW, files=(file,)))[3] == f"file a.onnx: {shown}"


def test_versions_and_settings_are_told_in_a_line_each():
    assert lines_from_record(record_of(ROW))[1:3] == [
        "versions: python 3.11.7, onnxruntime 1.31.1",
        "settings: batch 8 (--batch)",
    ]


def test_every_figure_stands_in_its_column():
    row = dataclasses.replace(
        ROW,
        latency_ms={50: Estimate(2.5, 2, 3), 90: Estimate(99.94, 99, 101), 95: Estimate(99.96, 99, 101), 99: None},
        parts_ms={"h2d": 0.0123, "compute": 1234.5, "d2h": 1.0},
        bound=Bound("NVIDIA L4", 1.2, "memory", 61.7),
        telemetry=TELEMETRY,
        speedup=Estimate(1.4231, 1.3849, 1.45),
        against="b.onnx",
    )
    assert cells(row) == {
        "file": "a.onnx", "way": "numpy to numpy", "images/s (95 %)": "33.46 (33.10 to 33.94)", "queries/s": "4.18",
        "p50 ms": "2.50", "p90": "99.9", "p95": "100", "h2d": "0.0123", "compute": "1234", "d2h": "1.00",
        "first ms": "250", "MHz": "2040", "C": "61", "W": "71.62", "J/image": "0.01235",
        "speed-up": "1.42x (1.38 to 1.45)", "% of the bound": "62 % (memory)",
    }  # fmt: skip


def test_what_the_card_does_not_tell_has_no_column():
    found = cells(dataclasses.replace(ROW, telemetry=dict.fromkeys(TELEMETRY)))
    assert list(found) == ["file", "way", "images/s (95 %)", "queries/s", "p50 ms", "p90", "first ms"]


@pytest.mark.parametrize(
    ("rate", "images", "queries"),
    [(9.99949, "10.00", "9.999"), (99.994, "99.99", "99.99"), (100.2, "100", "100.2"), (12345.6, "12346", "12346")],
)
def test_rates_are_plain_numbers(rate, images, queries):
    estimate = Estimate(rate, rate, rate)
    found = cells(dataclasses.replace(ROW, images_per_second=estimate, queries_per_second=estimate))
    assert found["images/s (95 %)"] == f"{images} ({images} to {images})"
    assert found["queries/s"] == queries


def test_a_table_says_whether_all_its_rows_settled():
    unsettled = dataclasses.replace(ROW, batch=1, settled=False, windows=(33.0,) * 9)
    lines = lines_from_record(record_of(unsettled, dataclasses.replace(ROW, batch=1, windows=(33.0,) * 9), ROW))
    assert "batch 1: 9 windows, not settled" in lines
    assert "batch 8: 3 windows, the last 3 agree" in lines
