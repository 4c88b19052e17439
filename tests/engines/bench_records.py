"""A benchmark's record with figures of a test's choice; change it with ``dataclasses.replace``."""

from __future__ import annotations

import numpy as np

from engines.bench.options import Setting
from engines.bench.record import FileRow, Parity, Record, Row
from engines.bench.rounds import Measurement
from engines.bench.statistics import Estimate, Slices

ROW = Row(
    file="a.onnx",
    batch=8,
    way="numpy to numpy",
    first_seconds=0.25,
    queries=90,
    images_per_second=Estimate(33.46, 33.1, 33.94),
    queries_per_second=Estimate(4.18, 4.1, 4.2),
    latency_ms={50: Estimate(239.1, 238, 240), 90: Estimate(250, 249, 252), 95: None, 99: None},
    parts_ms={},
    variation=0.01,
    windows=(33.0, 33.5, 33.9),
    settled=True,
    speedup=None,
    against=None,
    no_speedup=None,
    bytes_per_image=None,
    bound=None,
    telemetry=None,
    measurement=Measurement(Slices(np.full(9, 10), np.full(9, 2.5), np.full(90, 0.25)), {}, 3),
)
FILE = FileRow(
    file="a.onnx",
    sha256="0" * 64,
    bytes=10,
    precision="fp32",
    kind="onnx",
    load_seconds=0.1234,
    parity=Parity(passed=True, detail="relative error 3.1e-07"),
    operations_per_image=2717908992,
)
MACHINE = {"cpu": "Some CPU", "cores": 2, "load": 0.5, "gpu": None, "card": None, "driver": None, "host": "SECRETHOST"}
"""The last is none of a record's."""


def record_of(*rows: Row, files: tuple[FileRow, ...] = (FILE,), warnings: tuple[str, ...] = (), **machine) -> Record:
    """A record of these rows."""
    return Record(
        machine=MACHINE | machine,
        versions={"python": "3.11.7", "onnxruntime": "1.31.1"},
        settings=(Setting("batch", "8", "--batch"),),
        files=files,
        rows=rows,
        warnings=warnings,
    )
