"""What whoever reads a benchmark's figures must know: what was left out, did not settle, or is noisy."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from engines.bench.contenders import Contender
from engines.bench.options import Options
from engines.bench.record import Row
from engines.bench.rounds import WINDOWS
from engines.bench.statistics import AGREEMENT, LARGEST_VARIATION
from engines.bench.workload import Workload
from engines.errors import InputRejected
from engines.kind import ONNX
from engines.onnx_file import onnx_file_from_path
from engines.sizes import Size, text_of_size
from engines.timing import COMPUTE, D2H, H2D


def warnings_of_files(
    contenders: Sequence[Contender], names: Sequence[str], options: Options, workloads: Sequence[Workload]
) -> list[str]:
    """Of what the files are, and of what of them is not known."""
    found = []
    for contender, name, workload in zip(contenders, names, workloads, strict=True):
        if contender.kind == ONNX and contender.precision == "fp16" and options.provider in (None, "cpu"):
            found.append(f"{name}: ONNX Runtime computes float16 in float32 on a CPU; this is not its speed on a GPU")
        if contender.kind == ONNX and has_weights_elsewhere(contender.path):
            found.append(f"{name}: its weights stand in a file beside it, which is in neither its size nor its SHA-256")
        if workload.problem is not None:
            found.append(f"{name}: no bound is known: {workload.problem}")
    return found


def warnings_of_sizes(names: Sequence[str], sizes: Sequence[Size]) -> list[str]:
    """Of files that compute images of another size than the first, which speed-ups are against."""
    first = text_of_size(sizes[0])
    return [
        f"{name}: computes images of {text_of_size(size)}, and {names[0]} of {first}: speed-ups are not at equal work"
        for name, size in zip(names, sizes, strict=True)
        if size != sizes[0]
    ]


def has_weights_elsewhere(path: pathlib.Path) -> bool:
    """Whether an ONNX file has more weights than it is large; False where that cannot be read."""
    try:
        weights = onnx_file_from_path(path).weights
    except InputRejected:
        return False
    return sum(weight.nbytes for weight in weights.values()) > path.stat().st_size


def warnings_of_left_out(contenders: Sequence[Contender], names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Of the ways that a file should have been measured in, and was not."""
    found = []
    for contender, name in zip(contenders, names, strict=True):
        for batch in dict.fromkeys(row.batch for row in rows):
            measured = {row.way for row in rows if row.file == name and row.batch == batch}
            missing = [way.title for way in contender.ways if way.title not in measured]
            if missing:
                found.append(f"{name}, batch {batch}: left out, no CUDA graph could be recorded: {'; '.join(missing)}")
    return found


def warnings_of_row(row: Row) -> list[str]:
    """Of how the measurement went."""
    where = f"{row.file}, batch {row.batch}, {row.way}"
    found = []
    if not row.settled:
        found.append(
            f"{where}: did not settle: the last {WINDOWS} of {len(row.windows)} windows differ by more than "
            f"{AGREEMENT:.0%}"
        )
    if row.variation > LARGEST_VARIATION:
        remedy = "lock the GPU's clocks (nvidia-smi -lgc)" if row.parts_ms else "stop what else runs on this machine"
        found.append(f"{where}: latencies vary by {row.variation:.1%}, more than {LARGEST_VARIATION:.1%}; {remedy}")
    if row.telemetry is not None and row.telemetry["throttled"]:
        found.append(f"{where}: the card held its clocks back: {', '.join(row.telemetry['throttled'])}")
    longest = max((H2D, D2H), key=lambda part: row.parts_ms.get(part, 0.0))
    if row.parts_ms.get(longest, 0.0) > row.parts_ms.get(COMPUTE, 0.0):
        found.append(f"{where}: copying ({longest}) takes longer than computing")
    return found
