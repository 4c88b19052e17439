"""The engine on a GPU as a check of an export, over a stand-in: no GPU is needed to see what is made of its answers."""

from __future__ import annotations

import numpy as np
import pytest

import exporter
from engines.runner import load
from exporter import processes, typed
from exporter.errors import DeviceFailed, SdkMissing, VerificationFailed

STAGE = "fp16, engine on its GPU against float64"


@pytest.fixture
def card(monkeypatch):
    """A GPU whose engines compute what their typed graph does, then harmed, or raise."""

    def install(harm=lambda outputs: outputs, error=None):
        class Card:
            def __init__(self, path):
                if error is not None:
                    raise error
                self.runner = load(path.with_suffix(".onnx"))

            def __enter__(self):
                return self

            def __exit__(self, *exception):
                self.runner.close()

            def run(self, feeds):
                return {name: np.asarray(harm(y)) for name, y in self.runner.run(feeds).items()}

        monkeypatch.setattr(typed, "load", Card)
        monkeypatch.setattr(typed, "gpu_compute_capability", lambda: 86)
        monkeypatch.setattr(processes, "gpu_compute_capability", lambda: 86)

    return install


def exported(checkpoint, tmp_path, **options):
    return exporter.export(checkpoint, tmp_path / "out", size=20, trt=["fp16"], sdk="tensorrt_rtx", **options)


def check_of(report):
    return next(check for check in report.checks if check.stage == STAGE)


def test_an_engine_that_computes_its_graph_passes_and_is_in_the_ledger(card, checkpoint, tmp_path):
    card()
    report = exported(checkpoint, tmp_path, require=["trt"])
    assert check_of(report).passed is True
    assert check_of(report).gate == 5e-3
    assert report.not_run == []
    row = report.ledger[-1]
    assert (row.stage, row.batches) == ("fp16, engine on its GPU", (1, 3, 32))


HARMS = {
    "mixed up": lambda y: y[::-1],
    "constant": lambda y: np.broadcast_to(y[:1], y.shape),
    "a NaN": lambda y: np.where(y == y.max(), np.nan, y),
    "a hundredth too large": lambda y: y * 1.01,
    "a row too few": lambda y: y[1:],
    "zeros": np.zeros_like,
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_an_engine_that_computes_something_else_fails_in_its_own_stage(harm, card, checkpoint, tmp_path):
    card(harm)
    with pytest.raises(VerificationFailed) as caught:
        exported(checkpoint, tmp_path)
    assert str(caught.value).startswith(f"{STAGE}: ")
    assert (tmp_path / "out" / "model.fp16.engine.rejected").is_file()


def test_a_card_that_fails_is_a_failure_and_one_that_does_not_fit_is_not_run(card, checkpoint, tmp_path):
    card(error=DeviceFailed("cudaMalloc: cudaErrorMemoryAllocation"))
    with pytest.raises(VerificationFailed, match="engine on its GPU against float64: cudaMalloc"):
        exported(checkpoint, tmp_path)
    card(error=SdkMissing("this GPU is sm75"))
    check = check_of(exported(checkpoint, tmp_path))
    assert check.passed is None
    assert check.detail == "not run: this GPU is sm75; see engines verify"
    with pytest.raises(SdkMissing, match="this GPU is sm75"):
        exported(checkpoint, tmp_path, require=["trt"])


def test_without_a_gpu_the_check_is_not_run_and_required_it_is_an_error_at_once(command, checkpoint, tmp_path):
    done = command(checkpoint, "--size", "20", "--trt", "fp16")
    assert done.code == 0
    assert f"skip {STAGE}: not run: no GPU answers here" in done.stdout
    assert "PASS: 7 of 7 checks hold, 1 not run" in done.stdout
    required = command(checkpoint, "--size", "20", "--trt", "fp16", "--require", "trt", "--out", "other")
    assert required.code == 4
    assert required.error.startswith("--require trt: no GPU answers here")
    assert required.stdout == ""
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--require", "trt"], "no engine is asked for"),
        (["--trt", "fp16", "--require", "gpu"], "unknown; choose from trt"),
    ],
)
def test_a_wrong_requirement_is_a_usage_error(flags, words, command, checkpoint):
    done = command(checkpoint, *flags)
    assert done.code == 2
    assert words in done.error
