"""What the harness of ``python -m engines bench`` costs on a session of 50 microseconds, over a tight loop.

    python -m benchmarks.harness_overhead [--rounds 100] [--calls 1000] [--microseconds 50] [--json FILE]

The shorter a query, the more of it is the harness, which reads the clock after each one and holds a moment for each;
50 microseconds are less than any network takes. Two of them are timed:

    busy wait     a backend whose run() returns as soon as the clock has gone on by 50 microseconds
    ONNX Runtime  a file of products of small matrices, as many as take 50 microseconds here, on one thread

Each is run in three ways, which take turns within a round, ``--calls`` calls each, in another order every round:

    session       onnxruntime.InferenceSession.run itself, in a for loop with one clock reading at either end
    tight loop    the backend's run(), in the same loop; for the busy wait, this is the least that there is
    harness       engines.bench.contenders.HostQueries, as the benchmark runs it

A round's figure is its time divided by its calls. The table has the medians over the rounds, and for each way over the
one before it the median of the ratios within a round with its quartiles. Python's collector of cycles is off in all of
them, as it is in the benchmark. There is no pass or fail; absolute times belong to the machine in the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.runner_overhead import MICROSECONDS, count_from_text, machine_line, microseconds_per_call
from engines.backends.backend import Arrays, TensorDescription
from engines.backends.onnx_runtime import OnnxRuntime
from engines.bench.contenders import HostQueries
from engines.timing import Queries

WIDTH = 32
"""Of the matrices: a product takes a microsecond or two."""
PROBE = 8
TUNING_CALLS, TUNING_STEPS = 400, 4
TARGET = 1.05
"""The harness over the tight loop."""
SESSION, TIGHT, HARNESS = "session", "tight loop", "harness"

Way = Callable[[int], float]
"""Makes so many calls, and gives the microseconds that each took."""


@dataclasses.dataclass(frozen=True)
class Overhead:
    """Microseconds a call in each round, by way, in the order of what each adds to the one before."""

    title: str
    ways: Mapping[str, tuple[float, ...]]

    def ratios(self, way: str, over: str) -> list[float]:
        """Within each round."""
        return [one / other for one, other in zip(self.ways[way], self.ways[over], strict=True)]

    def ratio(self, way: str, over: str) -> float:
        """The median of ``ratios``."""
        return statistics.median(self.ratios(way, over))


class BusyWait:
    """A backend that computes nothing for an exact time."""

    inputs: tuple[TensorDescription, ...] = ()
    outputs: tuple[TensorDescription, ...] = ()
    batch: tuple[int, int | None] = (1, None)

    def __init__(self, microseconds: float) -> None:
        self._seconds = microseconds / MICROSECONDS

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Returns ``feeds`` when the time is over."""
        end = time.perf_counter() + self._seconds
        while time.perf_counter() < end:
            pass
        return dict(feeds)

    def close(self) -> None:
        """Holds nothing."""


def write_products(path: pathlib.Path, count: int) -> pathlib.Path:
    """Writes an ONNX file that multiplies its input (N, WIDTH) by ``count`` orthogonal matrices."""
    matrix, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("N", WIDTH)) for name in ("input", "output")]
    names = ["input", *(f"product{index}" for index in range(1, count)), "output"]
    nodes = [
        helper.make_node("MatMul", [names[index], "matrix"], [names[index + 1]], name=f"matmul{index}")
        for index in range(count)
    ]
    weights = [numpy_helper.from_array(matrix.astype(np.float32), "matrix")]
    graph = helper.make_graph(nodes, "products", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def tuned_graph(path: pathlib.Path, microseconds: float) -> int:
    """Writes the graph whose session takes nearest to ``microseconds`` a call; returns how many products it has."""
    count = PROBE
    for _ in range(TUNING_STEPS):
        session = one_thread_session(write_products(path, count))
        call = functools.partial(session.run, None, feeds_of_products())
        microseconds_per_call(call, TUNING_CALLS // 4)
        found = min(microseconds_per_call(call, TUNING_CALLS) for _ in range(3))
        count = max(1, round(count * microseconds / found))
    write_products(path, count)
    return count


def one_thread_session(path: pathlib.Path) -> Any:
    """ONNX Runtime as anybody would open the file, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds_of_products() -> Arrays:
    """The input of ``write_products``, which every product keeps as large as it is."""
    return {"input": np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32)}


def looped(call: Callable[[], object]) -> Way:
    """A for loop."""
    return functools.partial(microseconds_per_call, call)


def harnessed(queries: Queries) -> Way:
    """The benchmark's own loop; the time is what it says of itself."""
    return lambda calls: queries.run(calls).wall / calls * MICROSECONDS


def measured(title: str, ways: Mapping[str, Way], rounds: int, calls: int) -> Overhead:
    """All ways in turn, in another order each round, after a round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    with _without_collector():
        for number in range(rounds + 1):
            shift = number % len(ways)
            for name in [*ways][shift:] + [*ways][:shift]:
                found = ways[name](calls)
                if number:
                    times[name].append(found)
    return Overhead(title, {name: tuple(values) for name, values in times.items()})


def measured_busy_wait(microseconds: float, rounds: int, calls: int) -> Overhead:
    """The harness over a wait of so long."""
    backend, feeds = BusyWait(microseconds), feeds_of_products()
    harness = harnessed(HostQueries(backend, feeds, time.perf_counter))
    ways = {TIGHT: looped(lambda: backend.run(feeds)), HARNESS: harness}
    return measured(f"busy wait of {microseconds:g} us", ways, rounds, calls)


def measured_session(path: pathlib.Path, microseconds: float, rounds: int, calls: int) -> Overhead:
    """The harness over a session of about so long, written to ``path``."""
    products, feeds = tuned_graph(path, microseconds), feeds_of_products()
    session, backend = one_thread_session(path), OnnxRuntime(path, threads=1)
    ways = {
        SESSION: looped(lambda: session.run(None, feeds)),
        TIGHT: looped(lambda: backend.run(feeds)),
        HARNESS: harnessed(HostQueries(backend, feeds, time.perf_counter)),
    }
    title = f"ONNX Runtime, {products} products of {WIDTH}x{WIDTH}"
    try:
        return measured(title, ways, rounds, calls)
    finally:
        backend.close()


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def text_from_overheads(overheads: Sequence[Overhead]) -> str:
    """The table, and whether the target was met."""
    lines = [f"{'what':40}  {'way':10}  {'us a call':>9}  over"]
    for overhead in overheads:
        before: str | None = None
        for way, times in overhead.ways.items():
            over = "" if before is None else _over(overhead, way, before)
            lines.append(f"{overhead.title:40}  {way:10}  {statistics.median(times):9.2f}  {over}".rstrip())
            before = way
    lines += ["", *(_verdict(overhead) for overhead in overheads)]
    return "\n".join(lines)


def _over(overhead: Overhead, way: str, before: str) -> str:
    low, middle, high = statistics.quantiles(overhead.ratios(way, before), n=4)
    return f"{before} x {middle:.4f} (quartiles {low:.4f} to {high:.4f})"


def _verdict(overhead: Overhead) -> str:
    ratio = overhead.ratio(HARNESS, TIGHT)
    word = "met" if ratio < TARGET else "NOT met"
    return (
        f"{overhead.title}: the harness adds {ratio - 1:.2%} to the tight loop; target below {TARGET - 1:.0%}: {word}"
    )


def json_from_overheads(overheads: Sequence[Overhead], machine: str) -> str:
    """Every round's numbers."""
    entries = [
        {"title": overhead.title, "ways": overhead.ways, "ratio": overhead.ratio(HARNESS, TIGHT)}
        for overhead in overheads
    ]
    return json.dumps({"machine": machine, "overheads": entries}, indent=2) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=count_from_text, default=100, metavar="N", help="measured rounds")
    parser.add_argument("--calls", type=count_from_text, default=1000, metavar="N", help="calls of each way a round")
    parser.add_argument("--microseconds", type=count_from_text, default=50, metavar="N", help="of one call")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write every round's numbers")
    arguments = parser.parse_args(argv)
    machine = machine_line()
    with tempfile.TemporaryDirectory(prefix="harness-overhead-") as directory:
        path = pathlib.Path(directory) / "products.onnx"
        overheads = (
            measured_busy_wait(arguments.microseconds, arguments.rounds, arguments.calls),
            measured_session(path, arguments.microseconds, arguments.rounds, arguments.calls),
        )
    print(text_from_overheads(overheads))
    print(f"\n{machine}")
    if arguments.json is not None:
        arguments.json.write_text(json_from_overheads(overheads, machine), encoding="utf-8")


if __name__ == "__main__":
    main()
