"""How long an export takes, and how much memory: the exporter against the plain script that a user writes today.

    python benchmarks/export_time.py [--networks A0,B3] [--rounds 3] [--json FILE]

Measured. Each side goes from the same training-form checkpoint (random weights, random batch norm statistics) to
float32 ONNX, float16 ONNX and a float16 engine of TensorRT for RTX, at 224 px and batches 1 to 32:

    plain script   benchmarks/plain_export.py: torch.onnx.export, onnxsim, float16, the compiler. It checks nothing.
    exporter       python -m exporter CHECKPOINT --onnx --trt fp16 --sdk tensorrt_rtx --out OUT, with every check that
                   is on by default. --sdk only makes sure that a machine with a GPU compiles with the same compiler.

Every run is a fresh process. After one unmeasured run of each the two take turns, so that what else the machine does
falls on both; the ratio is that of the medians, and the ratio of every round stands beside it. Seconds are wall time
from starting the process to its end. Files go to the temporary directory, are looked for, deleted and synced to disk
between the runs. Two start-up times follow: ``python -m exporter --help`` and ``python -c "import torch"``.

    cpu s      processor time, user and system, of the process and its children: what a busy machine changes least
    others     how many cores' worth of time everything else on the machine took meanwhile, from /proc/stat; where it is
               not near 0 the seconds say little, and least about the side that uses more cores
    peak MB    the largest resident memory of any one process: VmHWM, which the kernel keeps, of the process and of each
               descendant, read from /proc every 20 ms, and the ru_maxrss that os.wait4 gives at the end
    total MB   the largest sum of VmRSS over the whole process tree at one reading. The exporter compiles in a process
               of its own, so its peak alone would flatter it; pages that two processes share count twice here. At
               least the peak, which a reading may have missed.

Both count the pages of a memory-mapped checkpoint.

Not measured: the speed of the engines, other precisions and SDKs, a machine with a GPU, a cold disk cache, installing.
Whether the two sides compute the same network is not measured either; tests/test_benchmark_export_time.py holds that.
There is no pass or fail, and absolute times belong to the machine in the last line of the output.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
NETWORKS = ("A0", "B3")
PLAIN, EXPORTER = "plain script", "exporter"
INTERVAL = 0.02
MADE = ("onnx", "fp16.onnx", "fp16.engine")
PACKAGES = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "tensorrt-rtx-cu12", "numpy")
HEADINGS = (
    "network",
    "what",
    "median s",
    "min-max s",
    "ratio",
    "each round",
    "cpu s",
    "others",
    "peak MB",
    "ratio",
    "total MB",
)
TEXT_COLUMNS = (0, 1)


@dataclasses.dataclass(frozen=True)
class Run:
    """One process from start to end. ``children_mb`` has the peak of every descendant that was seen.

    ``sampled_mb`` is the largest memory of all of them together at one reading; ``other_cores`` the processor time that
    the rest of the machine took, per second.
    """

    seconds: float
    cpu_seconds: float
    other_cores: float
    own_mb: float
    children_mb: tuple[float, ...]
    max_rss_mb: float
    sampled_mb: float

    @property
    def peak_mb(self) -> float:
        """The largest resident memory of any one process."""
        return max(self.own_mb, self.max_rss_mb, *self.children_mb)

    @property
    def total_mb(self) -> float:
        """The largest memory of the whole tree."""
        return max(self.sampled_mb, self.peak_mb)


@dataclasses.dataclass(frozen=True)
class Row:
    """Every measured run of one command; ``network`` is empty for a start-up time."""

    network: str
    what: str
    runs: tuple[Run, ...]

    @property
    def seconds(self) -> list[float]:
        """Wall time of each round."""
        return [run.seconds for run in self.runs]

    def median(self, field: str) -> float:
        """The median over the rounds of one of ``Run``'s numbers."""
        return statistics.median(float(getattr(run, field)) for run in self.runs)


@dataclasses.dataclass(frozen=True)
class Ratios:
    """Ours divided by plain, so that below 1 is ours the smaller."""

    seconds: float
    each_round: tuple[float, ...]
    peak: float


class MemorySampler:
    """Reads the memory of a process and all its descendants from a thread; a context manager.

    ``peaks`` has each process's VmHWM in kB by process id, ``total`` the largest sum of VmRSS.
    """

    def __init__(self, pid: int, interval: float = INTERVAL) -> None:
        self.pid = pid
        self.peaks: dict[int, int] = {}
        self.total = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        self._sample()
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        total = 0
        for pid in _tree(self.pid):
            status = _status(pid)
            self.peaks[pid] = max(self.peaks.get(pid, 0), status.get("VmHWM", 0))
            total += status.get("VmRSS", 0)
        self.total = max(self.total, total)


def _tree(pid: int) -> Iterator[int]:
    """The process and its living descendants; a child is listed under the thread that started it."""
    yield pid
    try:
        threads = list(pathlib.Path(f"/proc/{pid}/task").iterdir())
    except OSError:  # it has ended
        return
    for thread in threads:
        for child in _read(thread / "children").split():
            yield from _tree(int(child))


def _status(pid: int) -> dict[str, int]:
    """The sizes in kB in /proc/PID/status; none once the process has ended."""
    fields = (line.split() for line in _read(pathlib.Path(f"/proc/{pid}/status")).splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in fields if words[-1] == "kB"}


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # the process or thread is gone
        return ""


def _busy_seconds() -> float:
    """Processor time that the machine has spent since its start on anything but idling and waiting for a disk."""
    ticks = [int(word) for word in _read(pathlib.Path("/proc/stat")).split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, *interrupts_and_stolen = ticks[:8]
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def measured(command: Sequence[str], log: pathlib.Path) -> Run:
    """Runs ``command`` in the project's directory, its output going to ``log``.

    Raises:
        SystemExit: it failed; the message ends with its last line.
    """
    with open(log, "wb") as output:
        busy, started = _busy_seconds(), time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            with MemorySampler(process.pid) as memory:
                _, status, usage = os.wait4(process.pid, 0)
                seconds, busy = time.perf_counter() - started, _busy_seconds() - busy
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        raise SystemExit(f"error: {shlex.join(command)} ended with status {process.returncode}: {last}")
    used = usage.ru_utime + usage.ru_stime
    return Run(
        seconds=seconds,
        cpu_seconds=used,
        other_cores=max(0.0, busy - used) / seconds,
        own_mb=memory.peaks.get(process.pid, 0) / 1024,
        children_mb=tuple(peak / 1024 for pid, peak in memory.peaks.items() if pid != process.pid),
        max_rss_mb=usage.ru_maxrss / 1024,
        sampled_mb=memory.total / 1024,
    )


def measured_export(command: Sequence[str], out: pathlib.Path) -> Run:
    """Runs an export into ``out``, sees that its files are there, and removes them.

    Raises:
        SystemExit: it failed, or did not write what it should.
    """
    run = measured(command, out.with_suffix(".log"))
    made = {path.name.partition(".")[2] for path in out.iterdir() if path.stat().st_size}
    missing = [suffix for suffix in MADE if suffix not in made]
    if missing:
        raise SystemExit(f"error: {shlex.join(command)} wrote no {', '.join(missing)}")
    shutil.rmtree(out)
    os.sync()
    return run


def interleaved(network: str, sides: Mapping[str, Callable[[], Run]], rounds: int) -> list[Row]:
    """One unmeasured run of each side, then ``rounds`` times one after the other."""
    runs: dict[str, list[Run]] = {what: [] for what in sides}
    for number in range(rounds + 1):
        for what, run in sides.items():
            done = run()
            which = f"round {number}" if number else "warm-up"
            print(f"{network or 'start-up'}, {which}, {what}: {done.seconds:.2f} s", file=sys.stderr, flush=True)
            if number:
                runs[what].append(done)
    return [Row(network, what, tuple(made)) for what, made in runs.items()]


def rows_of_network(network: str, rounds: int, directory: pathlib.Path) -> list[Row]:
    """Plain script and exporter on one network, from a checkpoint made in ``directory``."""
    python, checkpoint, out = sys.executable, directory / f"{network}.pth", directory / "out"
    measured([python, "-m", "benchmarks.random_checkpoint", network, str(checkpoint)], directory / "checkpoint.log")
    os.sync()
    plain = [python, "benchmarks/plain_export.py", str(checkpoint), str(out), "--network", network]
    ours = [python, "-m", "exporter", str(checkpoint), "--onnx", "--trt", "fp16", "--sdk", "tensorrt_rtx"]
    ours += ["--out", str(out)]
    sides = {PLAIN: lambda: measured_export(plain, out), EXPORTER: lambda: measured_export(ours, out)}
    rows = interleaved(network, sides, rounds)
    checkpoint.unlink()
    return rows


def rows_of_startup(rounds: int, directory: pathlib.Path) -> list[Row]:
    """What a user waits for before anything happens."""
    log, python = directory / "startup.log", sys.executable
    sides = {
        "python -m exporter --help": lambda: measured([python, "-m", "exporter", "--help"], log),
        'python -c "import torch"': lambda: measured([python, "-c", "import torch"], log),
    }
    return interleaved("", sides, rounds)


def ratios_from_rows(ours: Row, plain: Row) -> Ratios:
    """Ours to plain: of the medians, and round by round."""
    return Ratios(
        seconds=ours.median("seconds") / plain.median("seconds"),
        each_round=tuple(a / b for a, b in zip(ours.seconds, plain.seconds, strict=True)),
        peak=ours.median("peak_mb") / plain.median("peak_mb"),
    )


def plain_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row that ``row`` is compared with, if it is one of the exporter's."""
    if row.what != EXPORTER:
        return None
    return next(other for other in rows if (other.network, other.what) == (row.network, PLAIN))


def table_from_rows(rows: Sequence[Row]) -> str:
    """The table as plain text, one line a row below the headings."""
    lines = [HEADINGS, *(_cells(row, plain_of(row, rows)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(map(_aligned, line, widths, range(len(line)))).rstrip() for line in lines)


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in TEXT_COLUMNS else cell.rjust(width)


def _cells(row: Row, plain: Row | None) -> tuple[str, ...]:
    times = (f"{row.median('seconds'):.2f}", f"{min(row.seconds):.2f}-{max(row.seconds):.2f}")
    cores = (f"{row.median('cpu_seconds'):.2f}", f"{row.median('other_cores'):.1f}")
    if not row.network:
        return ("-", row.what, *times, "-", "-", *cores, "-", "-", "-")
    ratio = each_round = peak = "-"
    if plain is not None:
        found = ratios_from_rows(row, plain)
        ratio, peak = f"{found.seconds:.2f}", f"{found.peak:.2f}"
        each_round = " ".join(f"{value:.2f}" for value in found.each_round)
    memory = (f"{row.median('peak_mb'):.0f}", peak, f"{row.median('total_mb'):.0f}")
    return (row.network, row.what, *times, ratio, each_round, *cores, *memory)


def machine_line() -> str:
    """Cores, processor, memory, load before the start, and the versions of what does the work."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = next((line.partition(":")[2].strip() for line in _cpu_lines()), platform.machine())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return (
        f"{cores} cores ({processor}), {memory:.0f} GB, load {load:.1f} at the start; "
        f"Python {platform.python_version()}, {versions}"
    )


def _cpu_lines() -> list[str]:
    lines = _read(pathlib.Path("/proc/cpuinfo")).splitlines()
    return [line for line in lines if line.startswith("model name")]


def json_from_rows(rows: Sequence[Row], machine: str) -> str:
    """Every number of every run, for other tools."""
    entries = []
    for row in rows:
        plain = plain_of(row, rows)
        ratios = None if plain is None else dataclasses.asdict(ratios_from_rows(row, plain))
        runs = [{**dataclasses.asdict(run), "peak_mb": run.peak_mb, "total_mb": run.total_mb} for run in row.runs]
        entries.append({"network": row.network or None, "what": row.what, "runs": runs, "ratios": ratios})
    return json.dumps({"machine": machine, "rows": entries}, indent=2) + "\n"


def networks_from_text(text: str) -> tuple[str, ...]:
    """``"A0,B3"`` to ("A0", "B3")."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in NETWORKS:
            raise argparse.ArgumentTypeError(f"unknown network {name!r}; choose from {', '.join(NETWORKS)}")
    return tuple(dict.fromkeys(names))


def rounds_from_text(text: str) -> int:
    """A whole number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=networks_from_text, default=NETWORKS, metavar="A0,B3")
    parser.add_argument("--rounds", type=rounds_from_text, default=3, metavar="N", help="measured runs of each")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write every run's numbers")
    arguments = parser.parse_args(argv)
    machine, rows = machine_line(), list[Row]()
    with tempfile.TemporaryDirectory(prefix="export-time-") as directory:
        for network in arguments.networks:
            rows += rows_of_network(network, arguments.rounds, pathlib.Path(directory))
        rows += rows_of_startup(arguments.rounds, pathlib.Path(directory))
    print(table_from_rows(rows))
    print(f"\n{machine}")
    if arguments.json is not None:
        arguments.json.write_text(json_from_rows(rows, machine), encoding="utf-8")


if __name__ == "__main__":
    main()
