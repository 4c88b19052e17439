"""The command line as a person meets it: help, the lines it prints, JSON, quiet, and defaults."""

from __future__ import annotations

import json

import onnx
import pytest

from exporter import processes
from exporter.request import PRECISION_NAMES
from exporter.version import VERSION
from tests.conftest import EXAMPLES, run_process

FASHION = EXAMPLES / "fashion.pt"


def test_help_names_every_flag_precision_and_exit_code(tmp_path):
    done = run_process(["-m", "exporter", "--help"], tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    for word in (
        "--onnx",
        "--trt",
        "--size",
        "--batch",
        "--strides",
        "--eps",
        "--calib",
        "--gpu",
        "--json",
        "130",
        *PRECISION_NAMES,
    ):
        assert word in done.stdout


def test_the_version(tmp_path):
    assert run_process(["-m", "exporter", "--version"], tmp_path).stdout == f"repvgg-exporter {VERSION}\n"


def test_without_trt_the_onnx_is_the_default(command, tmp_path):
    outcome = command(FASHION, "--size", 28)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "fashion").iterdir()) == [
        "fashion.onnx",
        "golden.npz",
        "report.json",
        "report.md",
    ]
    lines = outcome.stdout.splitlines()
    assert lines[0] == "fashion.pt: RepVGG (no published variant), official naming, training form"
    assert "assumed: batch norm eps 1e-05 (official code; --eps)" in lines
    assert lines[-2] == "PASS: 4 of 4 checks hold"
    assert lines[-1].startswith("written to fashion/: fashion.onnx, golden.npz")


def test_trt_alone_leaves_the_float32_onnx_out(command, tmp_path):
    outcome = command(FASHION, "--trt", "fp16", "--size", 28, "--out", "here")
    assert outcome.code == 0
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert names == [
        "fashion.fp16.engine",
        "fashion.fp16.engine.json",
        "fashion.fp16.onnx",
        "golden.npz",
        "report.json",
        "report.md",
    ]


def test_json_prints_the_report_and_nothing_else(command, tmp_path):
    outcome = command(FASHION, "--size", 28, "--json")
    printed = json.loads(outcome.stdout)
    assert printed == json.loads((tmp_path / "fashion" / "report.json").read_text())
    assert printed["schema"] == 1
    assert printed["passed"] is True
    assert printed["architecture"]["depths"] == [1, 4, 3, 2, 1]


def test_quiet_prints_nothing(command):
    outcome = command(FASHION, "--size", 28, "--quiet")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "", "")


def test_a_flag_that_is_not_one_is_refused_with_the_way_to_the_help(command):
    outcome = command(FASHION, "--onx")
    assert outcome.code == 2
    assert outcome.error == "unrecognized arguments: --onx; see python -m exporter --help"


def test_debug_shows_the_traceback_and_the_line(command):
    outcome = command("missing.pt", "--debug")
    assert outcome.code == 3
    assert "Traceback" in outcome.stderr
    assert outcome.stderr.splitlines()[-1] == "error: missing.pt: no such file; check the path"


def test_the_assumptions_travel_in_the_onnx_file(command, tmp_path):
    command(FASHION, "--size", "28x30", "--mean", "0.25", "--std", "0.5", "--eps", "2e-5")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "fashion" / "fashion.onnx").metadata_props}
    assert metadata["precision"] == "fp32"
    assert metadata["lineage"] == "official"
    assert len(metadata["checkpoint_sha256"]) == 64
    assert json.loads(metadata["assumptions"]) == {
        "strides": "2,2,2,2,2",
        "eps": "2e-05",
        "size": "28x30",
        "mean": "0.25",
        "std": "0.5",
    }


@pytest.mark.parametrize("flag", ["--trt", "--onnx --trt"])
def test_several_precisions_in_one_run(flag, command, tmp_path):
    outcome = command(FASHION, *flag.split(), "fp16,fp32", "--size", 28)
    assert outcome.code == 0
    report = json.loads((tmp_path / "fashion" / "report.json").read_text())
    assert [engine["precision"] for engine in report["engines"]] == ["fp32", "fp16"]
    lines = [engine["audit"]["line"] for engine in report["engines"]]
    assert lines == [
        f"11 of 11 convs in {name}, Conv+ReLU in one kernel each, all 12 weights bit-equal" for name in ("FP32", "FP16")
    ]


def test_a_missing_package_is_named_with_the_line_that_installs_it(command, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PACKAGES", ("torch", "no_such_package"))
    outcome = command(FASHION, "--size", 28)
    assert outcome.code == 4
    assert outcome.error == "no_such_package: not installed; pip install 'repvgg-exporter[export,ort]'"
    assert list(tmp_path.iterdir()) == []
