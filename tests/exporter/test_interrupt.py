"""Ctrl-C and SIGTERM at any moment: exit code 130, one line, nothing on the disk, no process left running."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import ROOT
from tests.networks import NaiveRepVGG, Shape, contiguous_float

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs /proc"),
]
PROC = pathlib.Path("/proc")
LARGE = Shape(depths=(1, 2, 4, 6, 1), widths=(64, 64, 128, 256, 768))
COMPILER, SIMPLIFIER = "engines.compiler", "exporter.simplifier"
INTERRUPTED = "error: interrupted; nothing was written\n"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "large.pt"
    torch.save(contiguous_float(NaiveRepVGG(LARGE).state_dict()), path)
    return path


@pytest.fixture
def start(tmp_path):
    """``start(checkpoint, flags)``: the exporter at work in ``tmp_path``, in a session of its own; ended afterwards."""
    running = []

    def run(checkpoint, *flags, **environment):
        if not (tmp_path / "model.pt").exists():
            shutil.copyfile(checkpoint, tmp_path / "model.pt")
        process = subprocess.Popen(
            [sys.executable, "-m", "exporter", "model.pt", *flags],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        until(lambda: handles_sigterm(process.pid) or process.poll() is not None)
        return process

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(condition, seconds=60.0):
    """Waits for ``condition`` to hold; returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)
    return value


def handles_sigterm(pid):
    """Whether the process has put a handler on SIGTERM: Python itself has started, and ``main`` is at work."""
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return False
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(mask >> (signal.SIGTERM - 1) & 1)


def children(pid, module=""):
    """Process ids and start times of the living children whose command line has ``module`` in it."""
    found = set()
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z" and (not module or module in words):
                found.add((int(entry.name), fields[19]))
    return found


def living(processes):
    return {(pid, started) for pid, started in processes if started_at(pid) == started}


def started_at(pid):
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def wait_for(moment, process, tmp_path):
    """Seconds after the handlers stand, or until a file of the run is there."""
    if isinstance(moment, float):
        time.sleep(moment)
    else:
        pattern = "model.fp16.onnx" if moment == COMPILING else "model.fp16.engine"
        until(lambda: process.poll() is not None or list(tmp_path.glob(f"model/.export-*/{pattern}")))
    assert process.poll() is None, "it was over before the signal; the network is too small"


COMPILING, COMPILED = "a compiler has the typed graph", "the engine is being written"
QUICK = ("--onnx", "--trt", "fp16", "--size", "64")  # soon at the compiler


@pytest.mark.parametrize("moment", [0.0, 0.3, 1.0, 2.0, COMPILING, COMPILED])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(number, moment, start, large, tmp_path):
    process = start(large, "--onnx", "--trt", "fp16") if isinstance(moment, float) else start(large, *QUICK)
    wait_for(moment, process, tmp_path)
    helpers = children(process.pid)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, INTERRUPTED)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model.pt"]
    until(lambda: not living(helpers), seconds=10)


def test_a_compiler_is_alive_when_it_is_interrupted(start, large, tmp_path):
    process = start(large, *QUICK)
    wait_for(COMPILING, process, tmp_path)
    assert len(children(process.pid, COMPILER)) == 1
    assert not list(tmp_path.glob("model/.export-*/model.fp16.engine"))


@pytest.mark.parametrize("moment", [0.5, COMPILING])
def test_a_ctrl_c_of_the_terminal_reaches_the_whole_group_and_gives_one_line(moment, start, large, tmp_path):
    process = start(large, *QUICK)
    wait_for(moment, process, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, INTERRUPTED)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("pause", [0.0, 0.1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_impatient_second_signal_changes_nothing(number, pause, start, large, tmp_path):
    process = start(large, *QUICK)
    wait_for(COMPILING, process, tmp_path)
    helpers = children(process.pid)
    for _ in range(3):
        process.send_signal(number)
        time.sleep(pause)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, INTERRUPTED)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    until(lambda: not living(helpers), seconds=10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_published_is_never_called_unwritten(number, start, checkpoint, tmp_path):
    process = start(checkpoint, "--size", "20", PYTHONUNBUFFERED="1")
    for line in process.stdout:
        if line.startswith("PASS"):
            break
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "model.onnx",
        "golden.npz",
        "report.json",
        "report.md",
    }


def test_a_killed_export_leaves_no_process_and_nothing_that_looks_finished(start, large, tmp_path):
    process = start(large, *QUICK)
    wait_for(COMPILING, process, tmp_path)
    helpers = children(process.pid)
    assert helpers
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not living(helpers), seconds=20)
    assert [path.name for path in (tmp_path / "model").glob("[!.]*")] == []


@pytest.mark.parametrize(("module", "code"), [(COMPILER, 4), (SIMPLIFIER, 1)])
def test_a_helper_that_is_killed_is_reported_in_one_line(module, code, start, large, tmp_path):
    process = start(large, *QUICK)
    ((victim, _),) = until(lambda: children(process.pid, module))
    os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith("error: ")
    assert "-9" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_the_hidden_directory_is_removed_once_no_compiler_can_write_into_it(command, checkpoint, tmp_path, monkeypatch):
    seen = []
    remove = shutil.rmtree

    def watched(folder, **options):
        if pathlib.Path(folder).name.startswith(".export-"):
            seen.append(children(os.getpid(), COMPILER))
        remove(folder, **options)

    monkeypatch.setattr("exporter.staging.shutil.rmtree", watched)
    assert command(checkpoint.name, "--trt", "fp16", "--calib", "missing.npz").code == 3
    assert seen == [set()]
    assert list(tmp_path.iterdir()) == [checkpoint]
