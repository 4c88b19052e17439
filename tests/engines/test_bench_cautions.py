"""What is said beside a row's figures, and that nothing is said where there is nothing to say."""

from __future__ import annotations

import dataclasses
import types

import pytest

from engines.bench.cautions import warnings_of_left_out, warnings_of_row
from engines.bench.contenders import ON_DEVICE
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


@pytest.mark.parametrize("lost", [("a.engine", 2), ("b.engine", 8)])
def test_a_way_that_one_file_lacks_at_one_batch_is_said_of_that_alone(lost):
    names = ["a.engine", "b.engine"]
    rows = [
        dataclasses.replace(ROW, file=name, batch=batch, way=way.title)
        for name in names
        for batch in (2, 8)
        for way in ON_DEVICE
        if (name, batch) != lost or not way.graph
    ]
    assert warnings_of_left_out([types.SimpleNamespace(ways=ON_DEVICE)] * 2, names, rows) == [
        f"{lost[0]}, batch {lost[1]}: left out, no CUDA graph could be recorded: CUDA graph, with transfers; "
        f"CUDA graph, compute alone"
    ]


def test_everything_is_said_at_once():
    changes = {"variation": 0.5, "settled": False, "telemetry": {"throttled": ["heat"]}, "parts_ms": {"h2d": 1.0}}
    assert len(warnings_of_row(dataclasses.replace(ROW, **changes))) == 4
