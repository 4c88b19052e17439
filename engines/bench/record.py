"""What a benchmark found, as data; its JSON is what ``bench.json`` and receipts hold."""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bench.options import Setting
from engines.bench.rounds import NANOSECONDS, Measurement
from engines.bench.statistics import Estimate
from engines.version import VERSION

SCHEMA = 1
BENCH_NAME, PLOT_NAME = "bench.json", "bench.svg"


@dataclasses.dataclass(frozen=True)
class Parity:
    """Whether a file's answers are the network's; ``passed`` is None where that was not checked."""

    passed: bool | None
    detail: str


@dataclasses.dataclass(frozen=True)
class FileRow:
    """A file: what it is, what opening it took, and whether its answers are the network's."""

    file: str
    sha256: str
    bytes: int
    precision: str
    kind: str
    load_seconds: float
    parity: Parity
    operations_per_image: int | None


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time that ``card`` could take for a query, what ``binds``, and how much of that speed was reached."""

    card: str
    milliseconds: float
    binds: str
    percent: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A file at a batch, computed in one way. Rates are of images and of queries; latencies in ms.

    ``speedup`` is against the first file's row of this batch and way; ``no_speedup`` says why there is none.
    """

    file: str
    batch: int
    way: str
    first_seconds: float
    queries: int
    images_per_second: Estimate
    queries_per_second: Estimate
    latency_ms: dict[int, Estimate | None]
    parts_ms: dict[str, float]
    variation: float
    windows: tuple[float, ...]
    settled: bool
    speedup: Estimate | None
    against: str | None
    no_speedup: str | None
    bytes_per_image: float | None
    bound: Bound | None
    telemetry: dict[str, Any] | None
    measurement: Measurement


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything that one benchmark found; ``verdict`` begins with PASS, FAIL or NOT CHECKED."""

    machine: dict[str, Any]
    versions: dict[str, str]
    settings: tuple[Setting, ...]
    files: tuple[FileRow, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]

    @property
    def failures(self) -> list[str]:
        """What is wrong with the answers of files."""
        return [f"{file.file}: {file.parity.detail}" for file in self.files if file.parity.passed is False]

    @property
    def verdict(self) -> str:
        """In one line."""
        judged = [file for file in self.files if file.parity.passed is not None]
        held = sum(file.parity.passed is True for file in judged)
        if not judged:
            return f"NOT CHECKED: none of {len(self.files)} files was held to golden vectors"
        left = f", {len(self.files) - len(judged)} not checked" if len(judged) < len(self.files) else ""
        word = "PASS" if held == len(judged) else "FAIL"
        return f"{word}: {held} of {len(judged)} files computed their golden vectors, also in the timed batches{left}"

    def to_json(self, *, raw: bool = False) -> str:
        """As text; with ``raw``, every latency is in it, so that all figures can be made again."""
        return json.dumps(self.to_value(raw=raw), indent=2, allow_nan=False) + "\n"

    def to_value(self, *, raw: bool = False) -> dict[str, Any]:
        """As plain values."""
        return {
            "schema": SCHEMA,
            "tool": VERSION,
            "machine": self.machine,
            "versions": self.versions,
            "settings": [dataclasses.asdict(setting) for setting in self.settings],
            "files": [dataclasses.asdict(file) for file in self.files],
            "rows": [_value_of_row(row, raw=raw) for row in self.rows],
            "warnings": list(self.warnings),
            "verdict": self.verdict,
        }


def _value_of_row(row: Row, *, raw: bool) -> dict[str, Any]:
    value = {
        field.name: getattr(row, field.name)
        for field in dataclasses.fields(row)
        if field.name not in ("latency_ms", "speedup", "against", "measurement")
    }
    value |= {name: dataclasses.asdict(value[name]) for name in ("images_per_second", "queries_per_second")}
    value["windows"] = list(row.windows)
    value["bound"] = row.bound and dataclasses.asdict(row.bound)
    value["latency_ms"] = {
        f"p{percent}": estimate and dataclasses.asdict(estimate) for percent, estimate in row.latency_ms.items()
    }
    value["speedup"] = row.speedup and {**dataclasses.asdict(row.speedup), "against": row.against}
    if raw:
        value["raw"] = _raw(row.measurement)
    return value


def _raw(measurement: Measurement) -> dict[str, Any]:
    """Everything that was measured, also before the windows that count."""
    slices = measurement.slices
    return {
        "rounds": slices.counts.tolist(),
        "walls": slices.walls.tolist(),
        "rounds_per_window": measurement.rounds_per_window,
        "latencies": packed(slices.latencies),
        "parts": {name: packed(values) for name, values in measurement.parts.items()},
    }


def packed(seconds: NDArray[np.float64]) -> str:
    """Nanoseconds as little-endian unsigned 64-bit numbers, deflated, in base64."""
    return base64.b64encode(zlib.compress(np.rint(seconds * NANOSECONDS).astype("<u8").tobytes())).decode("ascii")


def unpacked(text: str, count: int) -> NDArray[np.float64]:
    """Seconds from what ``packed`` gave.

    Raises:
        ValueError: it is not that of ``count`` numbers.
    """
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(base64.b64decode(text, validate=True), 8 * count + 1)
    except zlib.error as error:
        raise ValueError(f"not deflated: {error}") from None
    if len(data) != 8 * count or not inflater.eof or inflater.unused_data:
        raise ValueError(f"not {count} numbers")
    return np.frombuffer(data, "<u8") / NANOSECONDS
