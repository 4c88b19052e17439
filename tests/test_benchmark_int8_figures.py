"""The INT8 benchmark's arithmetic, and that its tables and its JSON say what was measured."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from benchmarks import int8_figures, int8_table
from benchmarks.int8_table import OURS, THEIRS, Row, TimingRow
from benchmarks.int8_worker import Cost

logits = arrays.arrays(np.float32, (6, 3), elements=st.floats(-100, 100, width=16))


@settings(max_examples=60, deadline=None)
@given(logits, logits, arrays.arrays(np.int64, 6, elements=st.integers(0, 2)))
def test_figures_are_those_of_the_definitions(float32, quantized, labels):
    signal = sum(float(y) ** 2 for y in float32.flat)
    noise = sum((float(y) - float(q)) ** 2 for y, q in zip(float32.flat, quantized.flat, strict=True))
    found = int8_figures.figures_from_logits(quantized, float32, labels)
    if noise == 0:
        assert found.sqnr_db == math.inf
    elif signal == 0:
        assert found.sqnr_db == -math.inf
    else:
        assert found.sqnr_db == pytest.approx(10 * math.log10(signal) - 10 * math.log10(noise), abs=1e-6)
    first, second = (
        [int(list(row).index(max(row)) == label) for row, label in zip(answers, labels, strict=True)]
        for answers in (float32, quantized)
    )
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / 6
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 5 / 6)
    assert found.float32_top1 == pytest.approx(100 * sum(first) / 6)
    assert found.top1 == pytest.approx(100 * sum(second) / 6)
    assert found.drop == pytest.approx(100 * mean)
    assert found.standard_error == pytest.approx(100 * error)


def test_answers_that_are_no_numbers_are_nobodys_best():
    float32 = np.eye(3, dtype=np.float32)
    broken = np.full((3, 3), np.nan, np.float32)
    found = int8_figures.figures_from_logits(broken, float32, np.arange(3))
    assert math.isnan(found.sqnr_db)
    rows = [row("Entropy", math.nan), row("MinMax", -0.5), row("Percentile", math.nan)]
    assert int8_table.best_of(rows).what == "MinMax"
    assert json.loads(int8_table.json_of_results("", rows, []))["figures"][0]["figures"]["sqnr_db"] is None


def cost(seconds: float = 2.0, peak: float = 300.0, digest: str = "a", images: int = 4) -> Cost:
    return Cost(seconds, 2 * seconds, 100.0, peak, images, digest)


def row(what: str, sqnr: float, side: str = THEIRS, form: str = "int8", seconds: float = 2.0, **kind: object) -> Row:
    figures = int8_figures.Figures(sqnr, 90.0, 89.5, 0.5, 0.25, 98.0)
    return Row(
        **{"network": "trained", "bits": 8, **kind},
        form=form,
        side=side,
        what=what,
        figures=figures,
        cost=cost(seconds),
    )


ROWS = [
    row("MinMax", 28.0),
    row("Percentile", 29.0, seconds=4.0),
    row("default", 33.0, OURS, seconds=6.0),
    row("MinMax", 40.0, form="int8.rtx"),
    row("MinMax", 50.0, network="rescaled"),
    row("MinMax", 60.0, bits=4),
    row("high", 35.0, OURS, form="int8.rtx", seconds=5.0),
]


def test_a_gain_is_against_the_best_of_the_same_network_form_and_bits():
    gains = [int8_table.gain_of(one, ROWS) for one in ROWS]
    assert gains[2] == int8_table.Gain("Percentile", 4.0, 1.5, 1.0)
    assert gains[6] == int8_table.Gain("MinMax", -5.0, 2.5, 1.0)
    assert [gain is None for gain in gains] == [True, True, False, True, True, True, False]


def test_the_tables_show_every_number_in_its_column():
    assert int8_table.figures_table(ROWS[1:3]).splitlines() == [
        "network  form  bits  side         what        SQNR dB  gain  float32  top-1  drop    +-  agree    s  ratio"
        "  peak MB  ratio",
        "trained  int8  W8A8  onnxruntime  Percentile     29.0     -    90.00  89.50  0.50  0.25  98.00  4.0      -"
        "      300      -",
        "trained  int8  W8A8  exporter     default        33.0  +4.0    90.00  89.50  0.50  0.25  98.00  6.0   1.50"
        "      300   1.00",
    ]
    timing = [
        TimingRow(512, THEIRS, "MinMax", (cost(2.0), cost(4.0), cost(3.0))),
        TimingRow(512, OURS, "default", (cost(5.0, 900), cost(6.0, 800), cost(9.0, 700))),
    ]
    assert int8_table.timing_ratios(timing[1], timing) == {
        "seconds": 2.0,
        "cpu_seconds": 2.0,
        "each_round": [2.5, 1.5, 3.0],
    }
    assert int8_table.timing_table(timing).splitlines()[2].split() == [
        *("512", "exporter", "default", "6.0", "5.0-9.0", "2.00", "12.0", "2.00", "800", "700")
    ]
