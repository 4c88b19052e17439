"""A receipt, read as strictly as it is written: every field is there, has its type, and nothing else is.

Sizes are bounded before anything is unpacked. What only its author can know, such as a date, is taken as it stands;
whether the figures follow from the raw data is what ``engines.receipts.replay`` asks.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputRejected, first_line
from engines.json_value import Malformed, Value, value_from_bytes
from engines.manifest import Manifest, manifest_from_value
from engines.parity import GATES
from engines.receipts.figures import DIGEST, FIGURES, SCHEMA, Layer, digest_of
from engines.receipts.packing import unpacked_array
from engines.roofline.fused_kernels import Work

T = TypeVar("T")

LARGEST_RECEIPT = 1 << 28
MOST_VALUES = 1 << 21
"""With a comma behind each; arrays are one text, so that a receipt of hours has some hundred thousand."""
LARGEST_COUNT = 1 << 62
MACHINE_FIELDS = ("compute_capability", "cpu", "cores", "load", "gpu", "card", "driver")
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


@dataclasses.dataclass(frozen=True)
class ReceivedSidecar:
    """What a sidecar says, and its text as a file: (bytes, SHA-256)."""

    manifest: Manifest
    file: tuple[int, str]


@dataclasses.dataclass(frozen=True)
class ReceivedEngine:
    """An engine's answers, by output, and the ``figures`` that are said to follow from them.

    ``answers`` is None where it was not run, and ``sidecar`` where that could not be read.
    """

    file: str
    sidecar: ReceivedSidecar | None
    answers: Mapping[str, NDArray[np.float32]] | None
    figures: Mapping[str, Any]
    layers: tuple[Layer, ...] | None
    layers_problem: str | None


@dataclasses.dataclass(frozen=True)
class ReceivedFile:
    """A file as it was found and as it was listed, each (bytes, SHA-256); None where it was not."""

    name: str
    found: tuple[int, str] | None
    listed: tuple[int, str] | None


@dataclasses.dataclass(frozen=True)
class ReceivedExport:
    """One directory. ``images`` are digests, ``reference`` the golden outputs by name; ``works`` are by file."""

    files: tuple[ReceivedFile, ...]
    findings: tuple[Mapping[str, Any], ...]
    images: tuple[str, ...]
    reference: Mapping[str, NDArray[np.float64]] | None
    engines: tuple[ReceivedEngine, ...]
    throughput: Value | None
    throughput_problem: str | None
    works: Mapping[str, tuple[Work, ...]]


@dataclasses.dataclass(frozen=True)
class ReceivedReceipt:
    """A receipt; ``plain`` is all of it as plain values, and ``digest_again`` their digest, which ``digest`` should be.

    ``card`` are the peaks that the roofline was made of, or null.
    """

    ran_on_gpu: bool
    tool: str
    date: str
    compute_capability: int | None
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    card: Value
    exports: tuple[ReceivedExport, ...]
    passed: bool
    verdict: str
    digest: str
    digest_again: str
    plain: Mapping[str, Any]


def receipt_from_file(path: pathlib.Path) -> ReceivedReceipt:
    """Reads a receipt.

    Raises:
        InputRejected: it cannot be read, is too large, damaged, or no receipt.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_RECEIPT + 1)
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if len(content) > LARGEST_RECEIPT or content.count(b",") > MOST_VALUES:
        raise InputRejected(f"{path}: larger than any receipt; give what python -m engines receipt wrote")
    try:
        return _receipt(value_from_bytes(content))
    except (Malformed, RecursionError) as error:
        raise damaged(path, error) from error


def damaged(path: pathlib.Path, error: Exception) -> InputRejected:
    """The error for a receipt in which ``error`` was found."""
    return InputRejected(f"{path}: {first_line(error)}; this receipt is damaged or was edited: ask for it again")


def _receipt(value: Value) -> ReceivedReceipt:
    schema = value.field("schema")
    if schema.whole_number() != SCHEMA:
        raise schema.wrong(f"{SCHEMA}, the only schema that this version reads")
    fields = value.fields(
        "ran_on_gpu", "schema", "tool", "date", "machine", "versions", "card", "exports", "passed", "verdict", DIGEST
    )
    date = fields["date"].text()
    if not _is_date(date):
        raise fields["date"].wrong("a time in UTC such as 2026-01-31T12:00:00Z")
    machine = fields["machine"].fields(*MACHINE_FIELDS)
    exports = fields["exports"].entries()
    if not exports:
        raise fields["exports"].wrong("one or more exports")
    return ReceivedReceipt(
        ran_on_gpu=fields["ran_on_gpu"].boolean(),
        tool=fields["tool"].text(),
        date=date,
        compute_capability=optional(machine["compute_capability"], lambda number: number.whole_number(least=10)),
        machine={name: optional(entry, _text_or_number) for name, entry in machine.items()},
        versions={name: text.text() for name, text in fields["versions"].items().items()},
        card=fields["card"],
        exports=tuple(_export(export) for export in exports),
        passed=fields["passed"].boolean(),
        verdict=fields["verdict"].text(),
        digest=fields[DIGEST].sha256(),
        digest_again=digest_of(value.value),
        plain=value.value,
    )


def _is_date(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return _DATE.fullmatch(text) is not None


def optional(value: Value, read: Callable[[Value], T]) -> T | None:
    """What ``read`` makes of it; None for null."""
    return None if value.value is None else read(value)


def _text_or_number(value: Value) -> str | float:
    return value.text() if isinstance(value.value, str) else value.number()


def _export(value: Value) -> ReceivedExport:
    fields = value.fields("files", "findings", "golden", "engines", "throughput", "throughput_problem", "works")
    images, reference = _golden(fields["golden"])
    engines = tuple(_engine(engine) for engine in fields["engines"].entries())
    names = [engine.file for engine in engines]
    if not names or len(set(names)) < len(names):
        raise fields["engines"].wrong("one or more engines of different names")
    throughput = fields["throughput"]
    return ReceivedExport(
        files=tuple(_file(file) for file in fields["files"].entries()),
        findings=tuple(_finding(finding) for finding in fields["findings"].entries()),
        images=images,
        reference=reference,
        engines=engines,
        throughput=None if throughput.value is None else throughput,
        throughput_problem=optional(fields["throughput_problem"], Value.text),
        works={name: tuple(map(_work, works.entries())) for name, works in fields["works"].items().items()},
    )


def _file(value: Value) -> ReceivedFile:
    fields = value.fields("name", "bytes", "sha256", "listed")
    missing = fields["bytes"].value is None and fields["sha256"].value is None
    found = None if missing else (_count(fields["bytes"]), fields["sha256"].sha256())
    return ReceivedFile(fields["name"].file_name(), found, optional(fields["listed"], _listed))


def _listed(value: Value) -> tuple[int, str]:
    fields = value.fields("bytes", "sha256")
    return _count(fields["bytes"]), fields["sha256"].sha256()


def _count(value: Value) -> int:
    number = value.value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < LARGEST_COUNT:
        raise value.wrong("a whole number of at least 0")
    return number


def _finding(value: Value) -> dict[str, Any]:
    fields = value.fields("file", "check", "passed", "detail")
    return {
        "file": fields["file"].file_name(),
        "check": fields["check"].text(),
        "passed": optional(fields["passed"], Value.boolean),
        "detail": fields["detail"].text(),
    }


def _golden(value: Value) -> tuple[tuple[str, ...], dict[str, NDArray[np.float64]] | None]:
    if value.value is None:
        return (), None
    fields = value.fields("images", "outputs")
    images = tuple(image.sha256() for image in fields["images"].entries())
    outputs = {name: unpacked_array(output, "float64") for name, output in fields["outputs"].items().items()}
    for name, output in outputs.items():
        if len(output) != len(images) or output.ndim < 2 or not np.isfinite(output).all():
            raise fields["outputs"].field(name).wrong(f"finite numbers for each of {len(images)} images")
    if not outputs:
        raise fields["outputs"].wrong("one or more outputs")
    return images, outputs


FIGURE_READERS: Mapping[str, Callable[[Value], Any]] = {
    "passed": Value.boolean,
    "detail": Value.text,
    "non_finite": _count,
}
"""Of an engine; its other figures are numbers."""


def _engine(value: Value) -> ReceivedEngine:
    fields = value.fields("file", "sidecar", "answers", *FIGURES, "layers", "layers_problem")
    answers = fields["answers"]
    if fields["sidecar"].value is None and answers.value is not None:
        raise fields["sidecar"].wrong("its text, since the engine was run")
    return ReceivedEngine(
        file=fields["file"].file_name(),
        sidecar=optional(fields["sidecar"], _sidecar),
        answers=optional(answers, _answers),
        figures={name: optional(fields[name], FIGURE_READERS.get(name, Value.number)) for name in FIGURES},
        layers=optional(fields["layers"], lambda layers: tuple(map(_layer, layers.entries()))),
        layers_problem=optional(fields["layers_problem"], Value.text),
    )


def _sidecar(value: Value) -> ReceivedSidecar:
    """A JSON text inside of the JSON, since its SHA-256 is that of its bytes."""
    if not isinstance(value.value, str):
        raise value.wrong("the text of a sidecar")
    try:
        content = value.value.encode()
        inner = dataclasses.replace(value_from_bytes(content), place=value.place)
    except ValueError as error:
        raise Malformed(f"{value.place}: {first_line(error)}") from error
    manifest = manifest_from_value(inner)
    inner.field("precision").one_of(tuple(GATES))
    return ReceivedSidecar(manifest, (len(content), hashlib.sha256(content).hexdigest()))


def _answers(value: Value) -> dict[str, NDArray[np.float32]]:
    return {name: unpacked_array(answer, "float32") for name, answer in value.items().items()}


def _layer(value: Value) -> Layer:
    fields = value.fields(*(field.name for field in dataclasses.fields(Layer)))
    figures = [fields[name] for name in ("relative_error", "sqnr_db")]
    relative, sqnr = (np.inf if figure.value is None else figure.number() for figure in figures)
    return Layer(fields["name"].text(), relative, sqnr, _count(fields["non_finite"]), passed=fields["passed"].boolean())


def _work(value: Value) -> Work:
    fields = value.fields(*(field.name for field in dataclasses.fields(Work)))
    counts = ("operations", "read_bytes", "written_bytes", "weight_bytes")
    return Work(
        name=fields["name"].text(),
        dtype=fields["dtype"].one_of(tuple(GATES)),
        **{name: _count(fields[name]) for name in counts},
    )
