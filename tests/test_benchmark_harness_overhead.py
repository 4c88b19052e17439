"""The overhead benchmark: its arithmetic, its graph, and that an overhead that is there is seen."""

from __future__ import annotations

import gc
import json
import time

import numpy as np
import onnx
import pytest

from benchmarks import harness_overhead
from benchmarks.harness_overhead import HARNESS, SESSION, TIGHT, BusyWait, Overhead, harnessed, looped, measured
from engines.bench.contenders import HostQueries
from engines.timing import Timing

QUICK = ["--rounds", "2", "--calls", "5", "--microseconds", "50"]


class Clock:
    """Time that passes only when it is told to, and a call that takes some of it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passing(self, seconds: float):
        def call(*_: object) -> dict[str, object]:
            self.now += seconds
            return {}

        return call


def test_ratios_are_of_each_round_and_their_median_is_told():
    overhead = Overhead("x", {TIGHT: (50.0, 100.0, 40.0), HARNESS: (51.0, 101.0, 60.0)})
    assert overhead.ratios(HARNESS, TIGHT) == pytest.approx([1.02, 1.01, 1.5])
    assert overhead.ratio(HARNESS, TIGHT) == pytest.approx(1.02)


def test_the_table_has_medians_and_says_whether_the_target_is_met():
    met = Overhead("session", {SESSION: (40.0, 40.0), TIGHT: (50.0, 50.0), HARNESS: (51.0, 51.0)})
    missed = Overhead("wait", {TIGHT: (50.0, 50.0), HARNESS: (53.0, 53.0)})
    lines = harness_overhead.text_from_overheads([met, missed]).splitlines()
    assert lines[1].split() == ["session", "session", "40.00"]
    assert lines[2].split()[:3] == ["session", "tight", "loop"]
    assert "50.00  session x 1.2500 (quartiles 1.2500 to 1.2500)" in lines[2]
    assert "51.00  tight loop x 1.0200" in lines[3]
    assert lines[-2] == "session: the harness adds 2.00% to the tight loop; target below 5%: met"
    assert lines[-1] == "wait: the harness adds 6.00% to the tight loop; target below 5%: NOT met"


@pytest.mark.parametrize(("tight", "slow"), [(50e-6, 50e-6), (50e-6, 60e-6)])
def test_what_the_harness_takes_longer_is_its_overhead(tight, slow, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    backend = BusyWait(50)
    monkeypatch.setattr(backend, "run", clock.passing(slow))
    ways = {TIGHT: looped(clock.passing(tight)), HARNESS: harnessed(HostQueries(backend, {}, clock))}
    overhead = measured("x", ways, rounds=3, calls=10)
    assert overhead.ways[TIGHT] == pytest.approx([1e6 * tight] * 3)
    assert overhead.ways[HARNESS] == pytest.approx([1e6 * slow] * 3)
    assert overhead.ratio(HARNESS, TIGHT) == pytest.approx(slow / tight)


def test_the_harness_figure_is_its_wall_time_divided_by_its_calls():
    class Queries:
        def run(self, count):
            return Timing(np.zeros(count), 3.0)

        def close(self):
            """Nothing."""

    assert harnessed(Queries())(6) == pytest.approx(0.5e6)


def test_ways_take_turns_in_another_order_each_round_and_the_first_round_does_not_count():
    order = []

    def way(name):
        def once(calls):
            order.append(f"{name}{int(gc.isenabled())}")
            return float(len(order))

        return once

    overhead = measured("x", {name: way(name) for name in "abc"}, rounds=2, calls=1)
    assert " ".join(order) == "a0 b0 c0 b0 c0 a0 c0 a0 b0"
    assert overhead.ways == {"a": (6.0, 8.0), "b": (4.0, 9.0), "c": (5.0, 7.0)}
    assert gc.isenabled()


def test_the_busy_wait_is_as_long_as_it_says_and_no_shorter():
    backend = BusyWait(200)
    started = time.perf_counter()
    for _ in range(20):
        assert backend.run({"input": 1}) == {"input": 1}
    assert time.perf_counter() - started >= 20 * 200e-6


@pytest.mark.parametrize("count", [1, 7])
def test_the_graph_has_the_products_asked_for_and_keeps_its_input_in_range(count, tmp_path):
    path = harness_overhead.write_products(tmp_path / "products.onnx", count)
    nodes = onnx.load(path).graph.node
    assert [node.op_type for node in nodes] == ["MatMul"] * count
    session = harness_overhead.one_thread_session(path)
    feeds = harness_overhead.feeds_of_products()
    (result,) = session.run(None, feeds)
    assert np.linalg.norm(result) == pytest.approx(np.linalg.norm(feeds["input"]), rel=1e-4)
    assert not np.allclose(result, feeds["input"])


@pytest.mark.parametrize(("per_product", "expected"), [(2.0, 25), (10.0, 5), (500.0, 1)])
def test_tuning_finds_how_many_products_take_so_long(per_product, expected, tmp_path, monkeypatch):
    def found(call, calls):
        return per_product * len(onnx.load(tmp_path / "p.onnx").graph.node)

    monkeypatch.setattr(harness_overhead, "microseconds_per_call", found)
    assert harness_overhead.tuned_graph(tmp_path / "p.onnx", 50) == expected
    assert len(onnx.load(tmp_path / "p.onnx").graph.node) == expected


def test_the_whole_run_prints_both_and_writes_every_round(tmp_path, capsys):
    harness_overhead.main([*QUICK, "--json", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    assert "busy wait of 50 us: the harness adds" in out
    assert "ONNX Runtime, " in out
    content = json.loads((tmp_path / "out.json").read_text())
    wait, session = content["overheads"]
    assert [list(one["ways"]) for one in (wait, session)] == [[TIGHT, HARNESS], [SESSION, TIGHT, HARNESS]]
    assert all(len(times) == 2 for one in (wait, session) for times in one["ways"].values())
    assert min(wait["ways"][TIGHT]) >= 50
    ratios = [h / t for h, t in zip(wait["ways"][HARNESS], wait["ways"][TIGHT], strict=True)]
    assert wait["ratio"] == pytest.approx(sum(ratios) / 2)


@pytest.mark.parametrize("flag", ["--rounds", "--calls", "--microseconds"])
@pytest.mark.parametrize("value", ["1", "0", "-3", "x"])
def test_counts_that_nothing_can_be_made_of_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit):
        harness_overhead.main([flag, value])
    assert f"argument {flag}" in capsys.readouterr().err
