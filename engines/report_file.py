"""``report.json`` as far as a serving machine reads it: which files an export wrote, and the gates that it used."""

from __future__ import annotations

import dataclasses
import pathlib

from engines.errors import InputRejected, first_line
from engines.files import sha256_of
from engines.json_value import Malformed, Value, value_from_bytes

REPORT_NAME = "report.json"
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class ListedFile:
    """A file of the export, by its name in the directory."""

    name: str
    bytes: int
    sha256: str

    def problem(self, folder: pathlib.Path) -> str | None:
        """How the file in ``folder`` differs from the one listed; None where it does not."""
        path = folder / self.name
        try:
            size = path.stat().st_size
            if not path.is_file():
                return f"{self.name}: not a file"
        except OSError:
            return f"{self.name}: missing"
        if size != self.bytes:
            return f"{self.name}: {size} bytes, listed with {self.bytes}"
        return None if sha256_of(path) == self.sha256 else f"{self.name}: its SHA-256 is not the one listed"


@dataclasses.dataclass(frozen=True)
class ReportFile:
    """What a run said of itself: ``gates`` has the largest relative error allowed in each precision."""

    passed: bool
    verdict: str
    gates: dict[str, float]
    files: tuple[ListedFile, ...]

    @property
    def names(self) -> frozenset[str]:
        """The names of its files."""
        return frozenset(file.name for file in self.files)


def report_from_file(path: pathlib.Path) -> ReportFile:
    """Reads a report.

    Raises:
        InputRejected: it cannot be read, or what is needed of it is missing or wrong.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    try:
        return _report(value_from_bytes(content))
    except Malformed as error:
        raise InputRejected(
            f"{path}: {first_line(error)}; this report is damaged or was edited: export again"
        ) from error


def _report(value: Value) -> ReportFile:
    schema = value.field("schema")
    if schema.value != SCHEMA or isinstance(schema.value, bool):
        raise schema.wrong(f"{SCHEMA}, the only schema that this version reads")
    gates = value.items().get("gates", Value({}, "gates")).items()
    files = tuple(_listed_file(entry) for entry in value.field("files").entries())
    if not files or len({file.name for file in files}) != len(files):
        raise value.field("files").wrong("one or more files of different names")
    return ReportFile(
        passed=value.field("passed").boolean(),
        verdict=value.field("verdict").text(),
        gates={name: _gate(gate) for name, gate in gates.items()},
        files=files,
    )


def _gate(value: Value) -> float:
    gate = value.number(above=0)
    if gate >= 1:
        raise value.wrong("a relative error below 1, since 1 is that of an output of zeros")
    return gate


def _listed_file(value: Value) -> ListedFile:
    size = value.field("bytes")
    if not isinstance(size.value, int) or isinstance(size.value, bool) or size.value < 0:
        raise size.wrong("a number of bytes")
    return ListedFile(value.field("name").file_name(), size.value, value.field("sha256").sha256())
