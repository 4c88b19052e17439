"""The benchmark of the runner's overhead: it runs, and it would see a slow runner and a leak."""

from __future__ import annotations

import json
import time

import pytest

from benchmarks import runner_overhead
from engines.runner import Runner


@pytest.fixture
def file(tmp_path):
    return runner_overhead.write_tiny_graph(tmp_path / "tiny.onnx")


def test_it_prints_medians_difference_ratio_memory_and_machine(capsys, tmp_path):
    path = tmp_path / "numbers.json"
    runner_overhead.main(["--rounds", "3", "--calls", "10", "--runs", "100", "--json", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["session.run", "Runner.run", "difference", "ratio", "memory"]
    assert "onnxruntime" in lines[-1]
    numbers = json.loads(path.read_text())
    assert len(numbers["session"]) == len(numbers["runner"]) == 3
    assert min(numbers["session"] + numbers["runner"]) > 0


def test_the_figures_are_those_of_the_medians():
    overhead = runner_overhead.Overhead((10.0, 12.0, 50.0), (18.0, 15.0, 60.0), 100, 0)
    assert overhead.difference == 6.0
    assert overhead.ratio == 1.5
    assert overhead.differences == [8.0, 3.0, 10.0]


def test_a_slow_runner_and_a_leak_are_seen(file, monkeypatch):
    kept, plain = [], Runner.run

    def slow(self, feeds):
        time.sleep(0.001)
        kept.append(bytearray(b"x" * 2_000_000))  # beyond what a heap full of holes could hide
        return plain(self, feeds)

    monkeypatch.setattr(Runner, "run", slow)
    overhead = runner_overhead.measured(file, rounds=2, calls=10, runs=100)
    assert overhead.difference > 900
    assert overhead.growth_kb > 10_000


def test_many_runs_keep_no_memory(file):
    """A tenth of what the benchmark does by default: a leak of one output a run would be ten times the bound."""
    assert runner_overhead.measured(file, rounds=2, calls=10, runs=10_000).growth_kb < 2_000


@pytest.mark.parametrize("text", ["0", "1", "-3", "many"])
def test_counts_that_make_no_sense_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        runner_overhead.main(["--rounds", text])
    assert "is not a whole number above 1" in capsys.readouterr().err or "expected" in capsys.readouterr().err
