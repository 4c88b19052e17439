"""What a run finds as it goes along, told line by line, and put together into the report at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from engines.parity import GATES
from engines.sdk import versions
from exporter.accuracy import accuracy_check
from exporter.description import Subject
from exporter.measured import Measured
from exporter.plain import Plain
from exporter.report import (
    AccuracyRow,
    Check,
    EngineRecord,
    FileRecord,
    HeadroomRow,
    LayerRow,
    QuantizationRecord,
    Report,
    line_from_headroom,
    line_from_quantization,
    lines_from_ledger,
)
from exporter.version import VERSION

Notify = Callable[[str], None]
"""Told each finding, one line at a time, as it is made."""

MARKS = {True: "ok  ", False: "FAIL", None: "skip"}


class Findings:
    """The checks of a run in order, and what else its report will hold."""

    def __init__(self, notify: Notify) -> None:
        self.checks: list[Check] = []
        self.gates = {name: gate.max_relative_error for name, gate in GATES.items()}
        self.accuracy: tuple[AccuracyRow, ...] = ()
        self.headroom: tuple[HeadroomRow, ...] = ()
        self.quantization: list[QuantizationRecord] = []
        self.layers: tuple[LayerRow, ...] = ()
        self.first_departing_layer: str | None = None
        self.witness: dict[str, Any] | None = None
        self.engines: list[EngineRecord] = []
        self._notify = notify

    def add(self, found: Sequence[Check]) -> None:
        """Keeps and tells ``found``."""
        for check in found:
            self.checks.append(check)
            self._notify(f"{MARKS[check.passed]} {check.stage}: {check.detail}")

    def add_gated(self, precision: str, check: Check) -> None:
        """The check that decides on a precision; its gate is what the precision must keep to from then on."""
        if check.gate is not None:
            self.gates[precision] = check.gate
        self.add([check])

    def add_witness(self, found: Sequence[Check], witness: dict[str, Any] | None) -> None:
        """What the batch norms say about the images."""
        self.witness = witness
        self.add(found)

    def add_engine(self, record: EngineRecord, found: Sequence[Check]) -> None:
        """An engine and its checks."""
        self.engines.append(record)
        self.add(found)

    def add_headroom(self, rows: Sequence[HeadroomRow], inputs: str) -> None:
        """How far each convolution is from overflow in a precision; no ``rows`` where its range is float32's."""
        if rows:
            self.headroom = tuple(rows)
            self._notify(f"headroom in half: {line_from_headroom(rows, inputs)}")

    def note(self, line: str) -> None:
        """Tells what is worth knowing, and no finding."""
        self._notify(line)

    def add_traffic(self, line: str | None) -> None:
        """What the engine of the last INT8 file moves, by its own program; None where that cannot be read."""
        if line is not None:
            self.quantization[-1] = dataclasses.replace(self.quantization[-1], traffic=line)
            self._notify(f"prediction: {line}")

    def add_quantization(self, record: QuantizationRecord) -> None:
        """What one INT8 file costs, and how it was made."""
        self.quantization.append(record)
        self._notify(line_from_quantization(record))

    def add_accuracy(self, rows: Sequence[AccuracyRow], max_drop: float | None) -> None:
        """Top-1 of each precision, as a verdict where ``max_drop`` says how much may be lost."""
        self.accuracy = tuple(rows)
        self.add([accuracy_check(row, max_drop) for row in rows])

    def add_layers(self, rows: Sequence[LayerRow], first_departing: str | None) -> None:
        """The ledger by layers."""
        self.layers, self.first_departing_layer = tuple(rows), first_departing
        self._notify(f"layers: {f'the first that departs is {first_departing}' if first_departing else 'none departs'}")

    def report(
        self,
        subject: Subject,
        checkpoint_sha256: str,
        inputs: str,
        plain: Plain,
        measured: Sequence[Measured],
        files: Sequence[FileRecord],
    ) -> Report:
        """Everything found, about ``files``."""
        ledger = tuple(row for one in measured for row in one.ledger)
        for line in lines_from_ledger(ledger):
            self._notify(line)
        return Report(
            version=VERSION,
            checkpoint=subject.checkpoint_record(checkpoint_sha256),
            architecture=subject.architecture_record,
            assumptions=subject.assumptions,
            inputs=inputs,
            certificates=tuple(dataclasses.asdict(certificate) for certificate in plain.certificates),
            checks=tuple(self.checks),
            ledger=ledger,
            layers=self.layers,
            first_departing_layer=self.first_departing_layer,
            accuracy=self.accuracy,
            headroom=self.headroom,
            quantization=tuple(self.quantization),
            witness=self.witness,
            gates=self.gates,
            engines=tuple(self.engines),
            files=tuple(files),
            versions=versions(),
        )
