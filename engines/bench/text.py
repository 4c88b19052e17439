"""A benchmark's record as lines for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines.bench.record import FileRow, Record, Row
from engines.bench.rounds import WINDOWS
from engines.bench.statistics import Estimate
from engines.timing import COMPUTE, D2H, H2D

MISSING = "-"
PARTS = (H2D, COMPUTE, D2H)
WORDS = {True: "ok", False: "FAIL", None: "not checked"}
COLUMNS = (
    "file", "way", "images/s (95 %)", "queries/s", "p50 ms", "p90", "p95", "p99", "h2d", "compute", "d2h", "first ms",
    "MHz", "C", "W", "J/image", "speed-up", "% of the bound",
)  # fmt: skip
MACHINE = {"gpu": "{}", "driver": "driver {}", "cpu": "{}", "cores": "{} cores", "load": "load {}"}
NAMED = 2
"""Columns of words, which stand to the left."""


def lines_from_record(record: Record) -> list[str]:
    """The whole record: what it was measured on and how, a table for each batch, and what to know of it."""
    batches = dict.fromkeys(row.batch for row in record.rows)
    tables = [line for batch in batches for line in _table([row for row in record.rows if row.batch == batch])]
    return [*_lines_before(record), *tables, *_lines_after(record)]


def _lines_before(record: Record) -> list[str]:
    parts = (machine_text(record.machine, names) for names in (("gpu", "driver"), ("cpu", "cores", "load")))
    settings = ", ".join(f"{setting.name} {setting.value} ({setting.source})" for setting in record.settings)
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return [
        f"machine: {'; '.join(part for part in parts if part)}",
        f"versions: {versions}",
        f"settings: {settings}",
        *(_file_line(file) for file in record.files),
    ]


def _file_line(file: FileRow) -> str:
    operations = "" if file.operations_per_image is None else f", {file.operations_per_image / 1e9:.3g} GFLOP an image"
    return (
        f"file {file.file}: {file.precision or 'no precision named'}, {file.bytes / 1e6:.3g} MB, opened in "
        f"{file.load_seconds * 1e3:.0f} ms{operations}; parity {WORDS[file.parity.passed]}: {file.parity.detail}"
    )


def _table(rows: Sequence[Row]) -> list[str]:
    """Of one batch; columns in which nothing stands are left out."""
    cells = [list(COLUMNS), *(_cells(row) for row in rows)]
    used = [index for index in range(len(COLUMNS)) if any(line[index] != MISSING for line in cells[1:])]
    widths = {index: max(len(line[index]) for line in cells) for index in used}
    windows = len(rows[0].windows)
    settled = f"the last {WINDOWS} agree" if all(row.settled for row in rows) else "not settled"
    lines = [f"batch {rows[0].batch}: {windows} windows, {settled}"]
    for line in cells:
        aligned = [
            line[index].ljust(widths[index]) if index < NAMED else line[index].rjust(widths[index]) for index in used
        ]
        lines.append(f"  {'  '.join(aligned)}".rstrip())
    return lines


def _lines_after(record: Record) -> list[str]:
    rows = [(f"{row.file}, batch {row.batch}, {row.way}", row) for row in record.rows]
    return [
        *(f"no speed-up {where}: {row.no_speedup}" for where, row in rows if row.no_speedup is not None),
        *(f"warning {warning}" for warning in record.warnings),
        record.verdict,
    ]


def _cells(row: Row) -> list[str]:
    return [
        row.file,
        row.way,
        interval(row.images_per_second, ("{:.0f}" if row.images_per_second.value >= 100 else "{:.2f}").format),
        _plain(row.queries_per_second.value),
        *(_ms(None if estimate is None else estimate.value) for estimate in row.latency_ms.values()),
        *(_ms(row.parts_ms.get(part)) for part in PARTS),
        _ms(row.first_seconds * 1e3),
        *(_told(row, name) for name in ("sm_clock_mhz", "temperature_c", "power_w", "joules_per_image")),
        MISSING if row.speedup is None else speed_up_text(row.speedup),
        MISSING if row.bound is None else f"{row.bound.percent:.0f} % ({row.bound.binds})",
    ]


def _told(row: Row, name: str) -> str:
    """What the card told of itself while it computed the row."""
    value = None if row.telemetry is None else row.telemetry[name]
    return MISSING if value is None else f"{value:.4g}"


def _ms(value: float | None) -> str:
    return MISSING if value is None else figure(value).replace(",", "")


def _plain(value: float) -> str:
    """Four digits, or all that stand before the point."""
    return f"{value:.4g}" if value < 9999.5 else f"{value:.0f}"


def machine_text(machine: Mapping[str, Any], names: Sequence[str]) -> str:
    """What is known of these."""
    return ", ".join(MACHINE[name].format(machine[name]) for name in names if machine[name] is not None)


def figure(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def interval(estimate: Estimate, form: Callable[[float], str], unit: str = "") -> str:
    """As in ``33.5 (33.1 to 33.9)``, with each number in this form."""
    return f"{form(estimate.value)}{unit} ({form(estimate.low)} to {form(estimate.high)})"


def speed_up_text(estimate: Estimate) -> str:
    """As in ``1.42x (1.38 to 1.45)``."""
    return interval(estimate, "{:.2f}".format, "x")
