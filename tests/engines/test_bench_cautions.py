"""What is said beside a row's figures, and that nothing is said where there is nothing to say."""

from __future__ import annotations

import dataclasses

import pytest

from engines.bench.cautions import warnings_of_row
from tests.engines.bench_records import ROW

WHERE = "a.onnx, batch 8, numpy to numpy"
PARTS = {"h2d": 1.0, "compute": 1.0, "d2h": 1.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variation": 0.0251}, "latencies vary by 2.5%, more than 2.5%; stop what else runs on this machine"),
        (
            {"variation": 0.1, "parts_ms": PARTS},
            "latencies vary by 10.0%, more than 2.5%; lock the GPU's clocks (nvidia-smi -lgc)",
        ),
        (
            {"settled": False, "windows": (1.0,) * 9},
            "did not settle: the last 3 of 9 windows differ by more than 5%",
        ),
        ({"telemetry": {"throttled": ["heat", "power cap"]}}, "the card held its clocks back: heat, power cap"),
        ({"parts_ms": {**PARTS, "h2d": 1.1}}, "copying (h2d) takes longer than computing"),
        ({"parts_ms": {**PARTS, "d2h": 1.1}}, "copying (d2h) takes longer than computing"),
        ({"parts_ms": {**PARTS, "h2d": 1.1, "d2h": 1.2}}, "copying (d2h) takes longer than computing"),
    ],
)
def test_what_limits_a_row_s_figures_is_said(changes, said):
    assert warnings_of_row(dataclasses.replace(ROW, **changes)) == [f"{WHERE}: {said}"]


@pytest.mark.parametrize(
    "changes",
    [
        {"variation": 0.025},
        {"parts_ms": PARTS},
        {"parts_ms": {"compute": 1.0}},
        {"telemetry": {"throttled": []}},
        {"telemetry": {"throttled": None}},
    ],
)
def test_of_a_quiet_row_nothing_is_said(changes):
    assert warnings_of_row(dataclasses.replace(ROW, **changes)) == []


def test_everything_is_said_at_once():
    changes = {"variation": 0.5, "settled": False, "telemetry": {"throttled": ["heat"]}, "parts_ms": {"h2d": 1.0}}
    assert len(warnings_of_row(dataclasses.replace(ROW, **changes))) == 4
