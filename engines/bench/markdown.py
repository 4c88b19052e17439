"""A bench record as a section of ``report.md``, and where it goes there.

The section stands between two markers, so that a later run replaces it and touches nothing else. Everything in it that
comes from files is escaped, so that no text can hold a marker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from engines.bench.curves import short_names
from engines.bench.record import PLOT_NAME, Bound, FileRow, Record, Row
from engines.bench.statistics import PERCENTILES, Estimate
from engines.bench.text import MISSING, PARTS, figure, interval, machine_text, speed_up_text
from engines.errors import InputRejected, listed
from engines.markdown_text import Markup, around_markers, escaped, table

BEGIN, END = "<!-- throughput -->", "<!-- /throughput -->"
RESULTS = {True: "pass", False: Markup("**FAIL**"), None: "not checked"}
MACHINE = ("gpu", "cpu", "driver", "load", "cores")
TELEMETRY = (
    ("sm_clock_mhz", "{:.0f} MHz"),
    ("temperature_c", "{:.0f} C"),
    ("power_w", "{:.0f} W"),
    ("joules_per_image", "{:.3g} J an image"),
)


def report_with_section(report: str, section: str) -> str:
    """A report with ``section`` between the markers: in the place of what stood there, else at the end.

    Raises:
        InputRejected: one marker without the other, or the two more than once.
    """
    marked = f"{BEGIN}\n{section.strip()}\n{END}\n"
    if BEGIN not in report and END not in report:
        return f"{report.rstrip()}\n\n{marked}" if report.strip() else marked
    around = around_markers(report, BEGIN, END)
    if around is None:
        raise InputRejected(
            f"report.md: {BEGIN} and {END} do not stand there once each, in this order; remove them, or export again"
        )
    before, after = around
    return before + marked + after.removeprefix("\n")


def markdown_from_record(record: Record) -> str:
    """The section; PLOT_NAME is beside the report."""
    names = short_names([file.file for file in record.files])
    columns = _columns(record.rows)
    parts = (
        "## Throughput",
        f"{escaped(record.verdict)}. Measured on {escaped(machine_text(record.machine, MACHINE))}.",
        f"![Images per second and latency against batch]({PLOT_NAME})",
        table(columns, (_cells(row, names, columns) for row in record.rows)),
        _legend(record.rows, names),
        "\n".join(f"- Warning: {escaped(warning)}" for warning in record.warnings),
        table(
            ("file", "precision", "parity", "found", "loaded in s", "operations per image"),
            (_file_cells(file, names) for file in record.files),
        ),
        table(("setting", "value", "source"), map(dataclasses.astuple, record.settings)),
        table(("package", "version"), record.versions.items()),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """What every row has, and of the rest what any has."""
    shown = {
        "parts ms": any(row.parts_ms for row in rows),
        "bound": any(row.bound for row in rows),
        "card": any(row.telemetry for row in rows),
    }
    percentiles = (f"p{percent} ms" for percent in PERCENTILES)
    optional = (column for column, is_shown in shown.items() if is_shown)
    return ("file", "batch", "way", "images/s", *percentiles, "first ms", "speed-up", *optional)


def _cells(row: Row, names: Mapping[str, str], columns: Sequence[str]) -> list[object]:
    """One row of the table, for ``columns``."""
    found: dict[str, object] = {
        "file": names[row.file],
        "batch": row.batch,
        "way": row.way,
        "images/s": _estimate(row.images_per_second) + ("" if row.settled else ", not settled"),
        **{f"p{percent} ms": _estimate(latency) for percent, latency in row.latency_ms.items()},
        "first ms": figure(1e3 * row.first_seconds),
        "speed-up": _speed_up(row),
        "parts ms": ", ".join(f"{part} {figure(row.parts_ms[part])}" for part in PARTS if part in row.parts_ms),
        "bound": _bound(row.bound),
        "card": _telemetry(row.telemetry or {}),
    }
    return [found[column] or MISSING for column in columns]


def _estimate(estimate: Estimate | None) -> str:
    return MISSING if estimate is None else interval(estimate, figure)


def _speed_up(row: Row) -> str:
    if row.speedup is not None:
        return speed_up_text(row.speedup)
    return "1" if row.no_speedup is None else f"none: {row.no_speedup}"


def _bound(bound: Bound | None) -> str:
    """How much of the card's bound was reached, and what binds."""
    if bound is None:
        return MISSING
    return f"{bound.percent:.0f} % of {bound.card} ({figure(bound.milliseconds)} ms), {bound.binds} binds"


def _telemetry(told: Mapping[str, Any]) -> str:
    texts = [form.format(told[name]) for name, form in TELEMETRY if told.get(name)]
    if told.get("throttled"):
        texts.append(f"held back by {listed(told['throttled'])}")
    return ", ".join(texts)


def _legend(rows: Sequence[Row], names: Mapping[str, str]) -> str:
    """What the figures are."""
    against = sorted({row.against for row in rows if row.against is not None})
    than = f" Speed-ups are against {escaped(listed([names[file] for file in against]))}." if against else ""
    return (
        f"In brackets are 95 % intervals; {MISSING} stands where there were too few queries, or nothing to tell.{than}"
    )


def _file_cells(file: FileRow, names: Mapping[str, str]) -> list[object]:
    operations = file.operations_per_image
    return [
        names[file.file],
        file.precision or MISSING,
        RESULTS[file.parity.passed],
        file.parity.detail,
        figure(file.load_seconds),
        MISSING if operations is None else f"{operations:,}",
    ]
