"""What ``engines.Runner`` costs over ONNX Runtime itself: time per call, and memory over many calls.

    python benchmarks/runner_overhead.py [--rounds 40] [--calls 500] [--runs 100000] [--json FILE]

Measured, on a graph of one Add over (N, 3, 8, 8) float32 at batch 1, where nearly all the time is overhead:

    session.run   onnxruntime.InferenceSession on the CPU, as anybody would open the file, and its run()
    Runner.run    engines.load of the same file, and its run(), with every check of what goes in

After one unmeasured round the two take turns, ``--calls`` calls each a round, so that what else the machine does falls
on both. A round's figure is its time divided by its calls; the table has the medians over the rounds, their difference
and their ratio, and the quartiles of the differences within a round. Then Runner.run is called ``--runs`` times, after
a tenth as many unmeasured calls, and the growth of this process's resident memory (VmRSS) is printed.

Not measured: GPUs, larger graphs and batches, where the same microseconds are a smaller share, batches that are split.
There is no pass or fail, and absolute times belong to the machine in the last line of the output.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

import engines

SHAPE = (3, 8, 8)
MICROSECONDS = 1e6


@dataclasses.dataclass(frozen=True)
class Overhead:
    """Microseconds a call in each round, and the growth of resident memory in kB over ``runs`` calls."""

    session: tuple[float, ...]
    runner: tuple[float, ...]
    runs: int
    growth_kb: int

    @property
    def difference(self) -> float:
        """Of the medians, in microseconds."""
        return statistics.median(self.runner) - statistics.median(self.session)

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.runner) / statistics.median(self.session)

    @property
    def differences(self) -> list[float]:
        """Within each round."""
        return [ours - bare for ours, bare in zip(self.runner, self.session, strict=True)]


def write_tiny_graph(path: pathlib.Path) -> pathlib.Path:
    """Writes an ONNX file that doubles its input, with as many names as an exported network has."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("N", *SHAPE)) for name in ("input", "output")]
    node = helper.make_node("Add", ["input", "input"], ["output"])
    graph = helper.make_graph([node], "tiny", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def microseconds_per_call(call: Callable[[], object], calls: int) -> float:
    """The time of ``calls`` calls, divided by their number."""
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls * MICROSECONDS


def resident_kb() -> int:
    """This process's resident memory."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def growth_in_kb(call: Callable[[], object], runs: int) -> int:
    """How much resident memory ``runs`` calls add, after a tenth as many."""
    microseconds_per_call(call, max(1, runs // 10))
    gc.collect()
    before = resident_kb()
    microseconds_per_call(call, runs)
    gc.collect()
    return resident_kb() - before


def measured(file: pathlib.Path, rounds: int, calls: int, runs: int) -> Overhead:
    """Both sides in turn on ``file``, then the memory."""
    feeds = {"input": np.ones((1, *SHAPE), np.float32)}
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    with engines.load(file) as runner:
        sides = (lambda: session.run(None, feeds), lambda: runner.run(feeds))
        times = [[microseconds_per_call(side, calls) for side in sides] for _ in range(rounds + 1)]
        growth = growth_in_kb(sides[1], runs)
    return Overhead(tuple(bare for bare, _ in times[1:]), tuple(ours for _, ours in times[1:]), runs, growth)


def text_from_overhead(overhead: Overhead) -> str:
    """The table."""
    (low, _, high), rounds = statistics.quantiles(overhead.differences, n=4), len(overhead.session)
    return "\n".join(
        [
            f"session.run  {statistics.median(overhead.session):8.2f} us a call, medians of {rounds} rounds",
            f"Runner.run   {statistics.median(overhead.runner):8.2f} us a call",
            f"difference   {overhead.difference:8.2f} us (quartiles of the rounds: {low:.2f} to {high:.2f})",
            f"ratio        {overhead.ratio:8.2f}",
            f"memory       {overhead.growth_kb:8d} kB more resident after {overhead.runs} calls of Runner.run",
        ]
    )


def machine_line() -> str:
    """Cores, load and versions."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    versions = f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}"
    return f"{cores} cores, load {load:.1f} at the start; Python {platform.python_version()}, {versions}"


def count_from_text(text: str) -> int:
    """A whole number of at least two, as quartiles need."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=count_from_text, default=40, metavar="N", help="measured rounds")
    parser.add_argument("--calls", type=count_from_text, default=500, metavar="N", help="calls of each side a round")
    parser.add_argument("--runs", type=count_from_text, default=100_000, metavar="N", help="calls for the memory")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write every round's numbers")
    arguments = parser.parse_args(argv)
    machine = machine_line()
    with tempfile.TemporaryDirectory(prefix="runner-overhead-") as directory:
        file = write_tiny_graph(pathlib.Path(directory) / "tiny.onnx")
        overhead = measured(file, arguments.rounds, arguments.calls, arguments.runs)
    print(text_from_overhead(overhead))
    print(f"\n{machine}")
    if arguments.json is not None:
        content = {"machine": machine, **dataclasses.asdict(overhead)}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
