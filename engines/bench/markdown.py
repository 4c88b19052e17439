"""A bench record as a section of ``report.md``, and where it goes there.

The section stands between two markers, so that a later run replaces it and touches nothing else. Everything in it that
comes from files is escaped, so that no text can hold a marker.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from engines.bench.curves import PERCENTILES, short_names
from engines.errors import InputRejected, listed
from engines.json_value import Value
from engines.markdown_text import Markup, escaped, table
from engines.timing import COMPUTE, D2H, H2D

BEGIN, END = "<!-- throughput -->", "<!-- /throughput -->"
MISSING = "-"
RESULTS = {True: "pass", False: Markup("**FAIL**"), None: "not checked"}
PARTS = (H2D, COMPUTE, D2H)
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
    before, begin, rest = report.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin and END not in report:
        return f"{report.rstrip()}\n\n{marked}" if report.strip() else marked
    if not end or END in before or BEGIN in inside or BEGIN in after or END in after:
        raise InputRejected(
            f"report.md: {BEGIN} and {END} do not stand there once each, in this order; remove them, or export again"
        )
    return before + marked + after.removeprefix("\n")


def markdown_from_record(record: Mapping[str, Any], plot_name: str | None) -> str:
    """The section.

    Args:
        record: the JSON value of a bench record.
        plot_name: of the picture that stands beside the report; None where there is none.

    Raises:
        Malformed: not a bench record.
    """
    value = Value(dict(record))
    rows, files = value.field("rows").entries(), value.field("files").entries()
    names = short_names([file.field("file").text() for file in files])
    settings = (
        [setting.field(name).value for name in ("name", "value", "source")] for setting in _all(value, "settings")
    )
    versions = ((name, version.value) for name, version in value.field("versions").items().items())
    columns = _columns(rows)
    parts = (
        "## Throughput",
        f"{escaped(value.field('verdict').text())}. Measured on {_machine(value.field('machine').items())}.",
        f"![Images per second and latency against batch]({urllib.parse.quote(plot_name)})" if plot_name else "",
        table(columns, (_cells(row, names, columns) for row in rows)),
        _legend(rows, names),
        "\n".join(f"- Warning: {escaped(warning.text())}" for warning in _all(value, "warnings")),
        table(
            ("file", "precision", "parity", "found", "loaded in s", "operations per image"),
            (_file_cells(file, names) for file in files),
        ),
        table(("setting", "value", "source"), settings),
        table(("package", "version"), versions),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _columns(rows: Sequence[Value]) -> tuple[str, ...]:
    """What every row has, and of the rest what any has."""
    optional = (("parts ms", "parts_ms"), ("bound", "bound"), ("card", "telemetry"))
    shown = (title for title, name in optional if any(row.items().get(name, Value(None)).value for row in rows))
    percentiles = (f"{name} ms" for name in reversed(PERCENTILES))
    return ("file", "batch", "way", "images/s", *percentiles, "first ms", "speed-up", *shown)


def _cells(row: Value, names: Mapping[str, str], columns: Sequence[str]) -> list[object]:
    """One row of the table, for ``columns``."""
    latencies = row.field("latency_ms").items()
    found: dict[str, object] = {
        "file": _name(row, names),
        "batch": row.field("batch").whole_number(least=1),
        "way": row.field("way").text(),
        "images/s": _estimate(row.field("images_per_second"))
        + ("" if row.field("settled").boolean() else ", not settled"),
        "first ms": figure(1e3 * row.field("first_seconds").number()),
        "speed-up": _speed_up(row),
        "parts ms": _parts(row),
        "bound": _bound(row),
        "card": _telemetry(row),
    }
    for name in PERCENTILES:
        found[f"{name} ms"] = _estimate(latencies[name]) if name in latencies else MISSING
    return [found[column] for column in columns]


def _estimate(value: Value) -> str:
    """As in ``33.5 (33.1 to 33.9)``."""
    if value.value is None:
        return MISSING
    middle, low, high = (figure(value.field(name).number()) for name in ("value", "low", "high"))
    return f"{middle} ({low} to {high})"


def _speed_up(row: Value) -> str:
    ratio, reason = row.field("speedup"), row.field("no_speedup")
    if ratio.value is not None:
        middle, low, high = (f"{ratio.field(name).number():.2f}" for name in ("value", "low", "high"))
        return f"{middle}x ({low} to {high})"
    return "1" if reason.value is None else f"none: {reason.text()}"


def _parts(row: Value) -> str:
    """Medians of the copies and of the engine."""
    parts = row.field("parts_ms").items()
    return ", ".join(f"{name} {figure(parts[name].number())}" for name in PARTS if name in parts) or MISSING


def _bound(row: Value) -> str:
    """How much of the card's bound was reached, and what binds."""
    bound = row.items().get("bound", Value(None))
    if bound.value is None:
        return MISSING
    of_card = f"{bound.field('percent').number():.0f} % of {bound.field('card').text()}"
    return f"{of_card} ({figure(bound.field('milliseconds').number())} ms), {bound.field('binds').text()} binds"


def _telemetry(row: Value) -> str:
    told = row.items().get("telemetry", Value(None))
    if told.value is None:
        return MISSING
    values = {name: value for name, value in told.items().items() if value.value}
    texts = [form.format(values[name].number()) for name, form in TELEMETRY if name in values]
    if "throttled" in values:
        texts.append(f"held back by {listed([reason.text() for reason in values['throttled'].entries()])}")
    return ", ".join(texts) or MISSING


def _legend(rows: Sequence[Value], names: Mapping[str, str]) -> str:
    """What the figures are."""
    against = {ratio.field("against").text() for row in rows if (ratio := row.field("speedup")).value is not None}
    than = (
        f" Speed-ups are against {escaped(listed([names.get(file, file) for file in sorted(against)]))}."
        if against
        else ""
    )
    return (
        f"In brackets are 95 % intervals; {MISSING} stands where there were too few queries, or nothing to tell.{than}"
    )


def _machine(machine: Mapping[str, Value]) -> str:
    known = {name: value.value for name, value in machine.items() if value.value is not None}
    texts = [str(known[name]) for name in ("gpu", "cpu") if name in known]
    texts += [f"{title} {known[name]}" for name, title in (("driver", "driver"), ("load", "load")) if name in known]
    texts += [f"{known['cores']} cores"] if "cores" in known else []
    return escaped(", ".join(texts) or "an unnamed machine")


def _file_cells(file: Value, names: Mapping[str, str]) -> list[object]:
    parity, operations = file.field("parity"), file.field("operations_per_image").value
    passed = parity.field("passed")
    return [
        _name(file, names),
        file.field("precision").value or MISSING,
        RESULTS[None if passed.value is None else passed.boolean()],
        parity.field("detail").value,
        figure(file.field("load_seconds").number()),
        MISSING if operations is None else f"{operations:,}",
    ]


def _name(entry: Value, names: Mapping[str, str]) -> str:
    file = entry.field("file")
    if file.text() not in names:
        raise file.wrong("one of the record's files")
    return names[file.text()]


def _all(value: Value, name: str) -> list[Value]:
    return value.field(name).entries()


def figure(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
