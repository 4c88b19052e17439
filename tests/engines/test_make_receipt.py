"""``make receipt``: it ends at once without a GPU, and asks for what the card that is there can do."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from engines.cli import COMMANDS
from engines.cli import main as engines_main
from exporter.cli import main as exporter_main
from tests.conftest import EXAMPLES, ROOT

SCRIPT = EXAMPLES / "receipts" / "make_receipt.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_receipt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_receipt", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def card(script, monkeypatch, tmp_path):
    """``card(capability, codes)``: a GPU, and what the commands end with; gives what was run, and whether it saw it."""

    def plug_in(capability, codes=()):
        ran, left = [], list(codes)

        def run(command, env, check):
            assert not check
            assert command[:2] == [sys.executable, "-m"]
            ran.append((command[2:], env.get("CUDA_VISIBLE_DEVICES") != ""))
            return subprocess.CompletedProcess(command, left.pop(0) if left else 0)

        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(script, "gpu_compute_capability", lambda: capability)
        monkeypatch.setattr(script.subprocess, "run", run)
        return ran

    return plug_in


def test_without_a_gpu_it_ends_with_one_line_before_anything_is_installed(tmp_path):
    """In a Python without packages, as make calls it first."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-S", str(SCRIPT), "--check"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("error: no NVIDIA GPU answers here")
    assert done.stderr.count("\n") == 1


def test_without_a_gpu_nothing_is_run(script, card, capsys):
    ran = card(None)
    assert script.main([]) == 4
    assert ran == []
    assert capsys.readouterr().err.startswith("error: no NVIDIA GPU answers here")


@pytest.mark.parametrize(
    ("capability", "extra"), [(75, "rtx"), (86, "rtx"), (120, "rtx"), (70, "tensorrt"), (90, "tensorrt")]
)
def test_the_sdk_that_the_card_needs_is_named(script, card, capsys, capability, extra):
    card(capability)
    assert script.main(["--check"]) == 0
    assert capsys.readouterr().out == f"{extra}\n"


def test_a_card_of_tensorrt_for_rtx_gets_engines_built_for_it(script, card, capsys):
    ran = card(86)
    assert script.main(["--out", "mine.json"]) == 0
    commands = [" ".join(command) for command, _ in ran]
    assert commands == [
        "exporter examples/fashion.pt --out receipt-exports/fashion --trt fp32,fp16,int8 --size 28 "
        "--calib examples/fashion_calibration.npz --sdk tensorrt_rtx --gpu sm86",
        "benchmarks.random_checkpoint A0 receipt-exports/repvgg_a0.pt",
        "exporter receipt-exports/repvgg_a0.pt --out receipt-exports/repvgg_a0 --trt fp32,fp16 --size 224 "
        "--sdk tensorrt_rtx --gpu sm86",
        "engines receipt receipt-exports/fashion receipt-exports/repvgg_a0 --out mine.json",
    ]
    assert [sees_gpu for _, sees_gpu in ran] == [False, False, False, True]
    said = capsys.readouterr().out
    assert "mine.json is written: please send it: open a pull request" in said
    assert "python -m engines receipt" in said


def test_turing_gets_half_precision_alone(script, card):
    ran = card(75)
    script.main([])
    asked = [command[command.index("--trt") + 1] for command, _ in ran if "--trt" in command]
    assert asked == ["fp16", "fp16"]


def test_another_card_gets_its_engines_from_full_tensorrt_on_the_card_itself(script, card):
    ran = card(90)
    script.main([])
    assert not any("--gpu" in command for command, _ in ran)
    built = [(command, sees_gpu) for command, sees_gpu in ran if command[:2] == ["engines", "build"]]
    assert [command[2].rpartition("/")[2] for command, _ in built] == [
        "fashion.fp32.onnx", "fashion.fp16.onnx", "fashion.int8.onnx", "repvgg_a0.fp32.onnx", "repvgg_a0.fp16.onnx",
    ]  # fmt: skip
    assert all(command[3:] == ["--sdk", "tensorrt"] and sees_gpu for command, sees_gpu in built)


def test_an_interruption_is_no_traceback(script, card, capsys, monkeypatch):
    card(86)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.subprocess, "run", interrupted)
    assert script.main([]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "there", "said"),
    [("no/such.json", None, "no is no directory"), ("a.json", "receipt-exports", "receipt-exports: cannot be made")],
)
def test_what_cannot_be_written_is_one_line_before_anything_is_exported(
    script, card, capsys, tmp_path, out, there, said
):
    ran = card(86)
    if there is not None:
        (tmp_path / there).write_bytes(b"")
    assert script.main(["--out", out]) == 5
    assert (ran, said in capsys.readouterr().err) == ([], True)


@pytest.mark.parametrize(
    ("codes", "code", "count", "sent"),
    [((0, 0, 0, 1), 1, 4, True), ((0, 0, 0, 5), 5, 4, False), ((1,), 1, 1, False), ((0, 0, 3), 3, 3, False)],
    ids=["failed receipt", "unwritten", "failed export", "rejected"],
)
def test_it_stops_at_a_failure_and_asks_for_the_receipt_of_one(script, card, capsys, codes, code, count, sent):
    ran = card(86, codes)
    assert script.main([]) == code
    assert len(ran) == count
    assert ("please send it, above all since something failed" in capsys.readouterr().out) == sent


@pytest.mark.parametrize("capability", [75, 86, 90])
def test_every_command_is_one_that_there_is(script, tmp_path, capability, capsys):
    """Their arguments are understood: in an empty directory each ends for want of a file, and none for its usage."""
    for step in script.steps(capability, tmp_path / "exports", tmp_path / "receipt.json"):
        program, *arguments = step.arguments
        if program == "benchmarks.random_checkpoint":
            assert arguments[0] == "A0"
            continue
        arguments = [word.replace("examples/", "no-such-folder/") for word in arguments]
        code = {"exporter": exporter_main, "engines": engines_main}[program](arguments)
        assert code == 3, capsys.readouterr().err
        assert program == "exporter" or arguments[0] in COMMANDS
