"""A benchmark's record made again from its raw data, and held against the one that is written.

Raw are the queries and seconds of each slice, every latency and its parts, and what each kernel computes and moves.
From them follow rates, percentiles, intervals, windows, whether they settled, speed-ups, and how near a row comes to
the card's bound. What was told once and follows from nothing else is named in TOLD: it is taken as it stands.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engines.bench.cautions import warnings_of_row
from engines.bench.contenders import ON_DEVICE
from engines.bench.options import Setting
from engines.bench.record import FileRow, Parity, Record, Row
from engines.bench.rounds import MOST_WINDOWS, WINDOWS
from engines.bench.rows import row_from_measurement
from engines.bench.speed_ups import with_speed_ups
from engines.bench.workload import Workload
from engines.json_value import Malformed, Value
from engines.receipts.raw_rows import measurement_from_raw, queries_of
from engines.receipts.received import ReceivedExport, optional
from engines.roofline.cards import Card
from engines.roofline.fused_kernels import Work

TOLD = (
    "settings", "warnings", "detail", "load_seconds", "first_seconds", "maximum_sm_clock_mhz", "sm_clock_mhz",
    "memory_clock_mhz", "temperature_c", "throttled",
)  # fmt: skip
"""Fields of a record that nothing else in a receipt depends on; nor does anything on a peak that binds no kernel, and
the power of a card that counts no energy follows from nothing."""

TELEMETRY = (
    "seconds", "images", "joules_per_image", "maximum_sm_clock_mhz", "sm_clock_mhz", "memory_clock_mhz",
    "temperature_c", "power_w",
)  # fmt: skip
THROTTLED = "throttled"

RELATIVE_TOLERANCE = 1e-9
MOST_QUERIES, MOST_ROWS = 1 << 24, 512
"""Of a whole receipt: queries that count, of which each takes some five bytes of the file and up to 32 of memory."""
MOST_MEASURED = MOST_QUERIES * MOST_WINDOWS // WINDOWS
LARGEST_NUMBER = 1 << 1000
"""Beyond it an integer of JSON is no float."""
RECORD_FIELDS = ("schema", "tool", "machine", "versions", "settings", "files", "rows", "warnings", "verdict")
_WAYS = frozenset(way.title for way in ON_DEVICE)
ROW_FACTS = ("file", "batch", "way", "first_seconds", "telemetry", "raw")


def differences(written: Any, again: Any, place: str) -> Iterator[str]:
    """Where two JSON values differ, as in ``rows[0].queries: 12 is written, and 13 follows``; numbers to 1e-9."""
    if isinstance(written, dict) and isinstance(again, dict):
        for name in dict.fromkeys((*again, *written)):
            inner = f"{place}.{name}" if place else str(name)
            if name not in written or name not in again:
                yield f"{inner}: {'is missing' if name in again else 'does not belong here'}"
            else:
                yield from differences(written[name], again[name], inner)
    elif isinstance(written, list) and isinstance(again, list) and len(written) == len(again):
        for index, (one, other) in enumerate(zip(written, again, strict=True)):
            yield from differences(one, other, f"{place}[{index}]")
    elif not _same(written, again):
        yield f"{place}: {_shown(written)} is written, and {_shown(again)} follows from the raw data"


def _same(written: Any, again: Any) -> bool:
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (written, again)]
    if all(numbers) and all(abs(value) < LARGEST_NUMBER for value in (written, again)):
        return math.isclose(written, again, rel_tol=RELATIVE_TOLERANCE)
    return type(written) is type(again) and bool(written == again)


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, int | float | str) else "null" if value is None else "something else"
    return text if len(text) <= 80 else text[:77] + "..."


def check_amount(exports: Sequence[ReceivedExport]) -> None:
    """Looks, before anything is unpacked, whether all rows together can be made again in bounded time and memory.

    Raises:
        Malformed: they are more, or have more queries, than a receipt that can be read has.
    """
    records = [export.throughput for export in exports if export.throughput is not None]
    rows = [row for record in records for row in record.field("rows").entries()]
    if len(rows) > MOST_ROWS:
        raise Malformed(f"{len(rows)} rows, more than the {MOST_ROWS} that are made again")
    queries = [queries_of(row.field("raw")) for row in rows]
    measured, counted = (sum(found[place] for found in queries) for place in (0, 1))
    for found, most in ((measured, MOST_MEASURED), (counted, MOST_QUERIES)):
        if found > most:
            raise Malformed(f"{found} queries in rounds, more than the {most} that are made again")


def record_problems(export: ReceivedExport, card: Card | None) -> Iterator[str]:
    """Where the record of an export differs from what its raw data give.

    Raises:
        Malformed: it is no record, or its raw data are damaged.
    """
    if export.throughput is None:
        return
    fields = export.throughput.fields(*RECORD_FIELDS)
    files = [_file_row(file) for file in fields["files"].entries()]
    rows = [_row_again(row, export.works, card) for row in fields["rows"].entries()]
    measured = [(row.file, row.batch, row.way) for row in rows]
    if not rows or len(set(measured)) < len(rows) or not {row.file for row in rows} <= {file.file for file in files}:
        raise fields["rows"].wrong("one or more rows of the files, each of another file, batch or way")
    if len({(row.batch, len(row.measurement.slices.counts)) for row in rows}) > len({row.batch for row in rows}):
        raise fields["rows"].wrong("as many rounds in each row of a batch")
    counted = [
        dataclasses.replace(file, operations_per_image=_workload(export.works, file.file).operations_per_image)
        for file in files
    ]
    again = Record(
        machine={name: told.value for name, told in fields["machine"].items().items()},
        versions={},
        settings=tuple(_setting(setting) for setting in fields["settings"].entries()),
        files=tuple(counted),
        rows=tuple(with_speed_ups(rows, files)),
        warnings=tuple(warning.text() for warning in fields["warnings"].entries()),
    )
    made = again.to_value(raw=False)
    for name in ("schema", "files", "verdict"):
        yield from differences(fields[name].value, made[name], name)
    for index, (written, row) in enumerate(zip(fields["rows"].value, made["rows"], strict=True)):
        plain = {name: value for name, value in written.items() if name != "raw"}
        yield from differences(plain, row, f"rows[{index}]")
    for row in again.rows:
        yield from (
            f"warnings: it is not said that {warning}"
            for warning in warnings_of_row(row)
            if warning not in again.warnings
        )
    yield from _missing_problems(again)
    yield from _file_problems(files, export)


def _missing_problems(record: Record) -> Iterator[str]:
    """Each file was measured in each batch and way, or it is said why not; a card that has a name tells of itself."""
    batches = list(dict.fromkeys(row.batch for row in record.rows))
    settings = {setting.name: setting.value for setting in record.settings}
    yield from differences(settings.get("batch"), ",".join(map(str, batches)), "settings: batch")
    for file in record.files:
        for batch in batches:
            measured = {row.way for row in record.rows if (row.file, row.batch) == (file.file, batch)}
            where = f"{file.file}, batch {batch}"
            if measured < _WAYS and not any(text.startswith(f"{where}: left out, ") for text in record.warnings):
                yield f"{where}: is not measured in every way, and it is not said why"
            if measured - _WAYS:
                yield f"{where}: is measured in a way that there is not"
    if record.machine.get("gpu") is not None and any(row.telemetry is None for row in record.rows):
        yield "rows: the card tells nothing of itself, not even its clocks"


def _file_problems(files: Sequence[FileRow], export: ReceivedExport) -> Iterator[str]:
    """What was measured must be the engines that answered, and none of them have passed that did not."""
    engines = {engine.file: engine for engine in export.engines}
    found = {file.name: file.found for file in export.files}
    for file in files:
        engine = engines.get(file.file)
        if engine is None or engine.answers is None or engine.sidecar is None:
            yield f"{file.file}: was measured, and is no engine that answered"
        elif (file.precision, file.kind) != (engine.sidecar.manifest.precision, engine.sidecar.manifest.sdk["name"]):
            yield f"{file.file}: measured as {file.precision} of {file.kind}, which its sidecar does not say"
        elif found.get(file.file) != (file.bytes, file.sha256):
            yield f"{file.file}: the file that was measured is not the one that was hashed"
        elif file.parity.passed and not engine.figures["passed"]:
            yield f"{file.file}: passed while it was measured, and its answers do not"


def _file_row(value: Value) -> FileRow:
    fields = value.fields(*(field.name for field in dataclasses.fields(FileRow)))
    parity = fields["parity"].fields("passed", "detail")
    return FileRow(
        file=fields["file"].file_name(),
        sha256=fields["sha256"].sha256(),
        bytes=fields["bytes"].value,
        precision=fields["precision"].text(),
        kind=fields["kind"].text(),
        load_seconds=fields["load_seconds"].number(),
        parity=Parity(optional(parity["passed"], Value.boolean), parity["detail"].text()),
        operations_per_image=fields["operations_per_image"].value,
    )


def _setting(value: Value) -> Setting:
    fields = value.fields("name", "value", "source")
    return Setting(**{name: field.text() for name, field in fields.items()})


def _workload(works: Mapping[str, tuple[Work, ...]], file: str) -> Workload:
    return Workload(works[file]) if file in works else Workload((), "not counted")


def _row_again(value: Value, works: Mapping[str, tuple[Work, ...]], card: Card | None) -> Row:
    """The row that its facts give, still without a speed-up."""
    facts = {name: value.field(name) for name in ROW_FACTS}
    file, batch = facts["file"].file_name(), facts["batch"].whole_number(least=1)
    return row_from_measurement(
        measurement_from_raw(facts["raw"]),
        file=file,
        batch=batch,
        way=facts["way"].text(),
        first_seconds=facts["first_seconds"].number(),
        workload=_workload(works, file),
        card=card,
        telemetry=optional(facts["telemetry"], _telemetry),
    )


def _telemetry(value: Value) -> dict[str, Any]:
    """Told by the card; where it counts energy, its power follows from that of an image, the images and the seconds."""
    fields = value.fields(*TELEMETRY, THROTTLED)
    told: dict[str, Any] = {name: optional(fields[name], Value.number) for name in TELEMETRY}
    images, seconds = (fields[name].number(above=0) for name in ("images", "seconds"))
    if told["joules_per_image"] is not None:
        told["power_w"] = told["joules_per_image"] * images / seconds
    told[THROTTLED] = optional(fields[THROTTLED], lambda reasons: [reason.text() for reason in reasons.entries()])
    return told
