"""Holds the exported files against the checkpoint, with the fixture that repvgg-exporter brings to pytest.

Copy it to the top of a repository whose ``model.pt`` was exported with ``--onnx --trt fp16 --out exported``; CHECKPOINT
in the environment names another file. ``pytest --parity-report parity.md`` writes down what was found.
"""

from __future__ import annotations

import os
import pathlib

import pytest

from exporter.pytest_plugin import AssertParity

CHECKPOINT = pathlib.Path(os.environ.get("CHECKPOINT", "model.pt"))
EXPORTED = pathlib.Path("exported")


@pytest.mark.parametrize("suffix", [".onnx", ".fp16.onnx"])
def test_each_graph_is_the_checkpoint(assert_parity: AssertParity, suffix: str) -> None:
    """Within the gate of its precision, on seeded noise."""
    assert_parity(CHECKPOINT, EXPORTED / f"{CHECKPOINT.stem}{suffix}", name=f"checkpoint and {suffix}")


def test_half_precision_costs_little(assert_parity: AssertParity) -> None:
    """A gate of one's own: the largest relative error of the outputs."""
    float32, half = (EXPORTED / f"{CHECKPOINT.stem}{suffix}" for suffix in (".onnx", ".fp16.onnx"))
    parity = assert_parity(float32, half, gate=5e-3, name="float32 and half")
    if parity.rows[-1].comparison.flips:
        pytest.fail("half precision names another class")
