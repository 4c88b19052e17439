"""A receipt, checked again on a machine without a GPU: does every figure in it follow from its raw data?

    digest       the file is as it was written
    files        they, their sidecars and the findings say the same        ``engines.receipts.replay_files``
    engines      figures and verdicts, from the answers, the golden reference and the gates
    layers       whether each passes, from its figures, whose own raw data are too large to be kept
    throughput   rates, percentiles, intervals, speed-ups, the roofline      ``engines.receipts.replay_throughput``
    verdict      of the whole, and whether a GPU ran anything
    against      hashes and golden vectors are those of an export that is here

Taken as it stands is what follows from nothing else in the file: the date, the versions, the machine, the digests of
the images, what TOLD names of a benchmark, and what ``engines.receipts.replay_files`` says.

This proves that a receipt is consistent, not that it is honest: it can be forged by who wants to; it cannot change by
accident unseen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engines.errors import InputRejected, first_line, listed
from engines.files import sha256_of
from engines.golden import GOLDEN_NAME, Golden, golden_from_file
from engines.judgement import LEAST_CONTRAST, gate_of_engine
from engines.parity import GATES
from engines.receipts.figures import (
    Layer,
    engine_figures,
    first_departure,
    golden_from_reference,
    layer_passes,
    ran_on_gpu,
    verdict_of,
)
from engines.receipts.machine import CARD_FIELDS, NOT_OF_A_BENCHMARK
from engines.receipts.received import ReceivedEngine, ReceivedExport, ReceivedReceipt, optional
from engines.receipts.replay_files import file_problems
from engines.receipts.replay_throughput import check_amount, differences, record_problems
from engines.roofline.cards import CARDS, PRECISIONS, Card, card_of_device
from engines.verification import GOLDEN

OF_ITS_OWN = ("compute_capability", "load")
"""Of a machine: what a benchmark does not tell, and how busy it was, which is another in each one."""
HONESTY = "a receipt can be forged by who wants to; it cannot change by accident unseen"


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was held against the raw data; ``problems`` is empty where it holds."""

    place: str
    detail: str
    problems: tuple[str, ...]


def checks_of_receipt(receipt: ReceivedReceipt) -> Iterator[Check]:
    """Makes every figure again.

    Raises:
        Malformed: raw data are damaged.
    """
    check_amount(receipt.exports)
    again = receipt.digest_again
    problem = f"its SHA-256 is {again[:12]}..., and {receipt.digest[:12]}... is written"
    altered = () if again == receipt.digest else (problem,)
    yield Check("digest", "the file is as it was written", altered)
    card, contradictions = _card(receipt)
    yield Check("machine", _machine_said(receipt, card), (*contradictions, *_machine_problems(receipt, card)))
    for number, export in enumerate(receipt.exports, 1):
        place = f"export {number}" if len(receipt.exports) > 1 else "export"
        yield Check(f"{place}, files", _files_said(export), tuple(file_problems(export)))
        golden = _golden(export)
        yield Check(f"{place}, golden", f"{len(export.images)} images", tuple(_golden_problems(export, golden)))
        for engine in export.engines:
            said = str(engine.figures["detail"])
            yield Check(f"{place}, {engine.file}", said, tuple(_engine_problems(engine, golden, receipt)))
            if engine.layers is not None:
                yield Check(
                    f"{place}, {engine.file}, layers", _layers_said(engine.layers), tuple(_layer_problems(engine))
                )
        rows = "not measured" if export.throughput is None else "every figure follows from its raw data"
        yield Check(f"{place}, throughput", rows, tuple(_throughput_problems(export, card)))
    yield Check("verdict", receipt.verdict, tuple(_verdict_problems(receipt)))


def checks_against(receipt: ReceivedReceipt, folder: pathlib.Path) -> Iterator[Check]:
    """Holds hashes and golden vectors to the export in ``folder``.

    Of the receipt's exports it is that with engines of these names, and of several the one with the fewest problems.

    Raises:
        InputRejected: there are no golden vectors in the folder, or none of the exports is that of the folder.
    """
    golden = golden_from_file(folder / GOLDEN_NAME)
    found = [
        _checks_of_export(export, folder, golden)
        for export in receipt.exports
        if any((folder / engine.file).is_file() for engine in export.engines)
    ]
    if not found:
        raise InputRejected(f"{folder}: holds none of the engines of the receipt; give the export that it is about")
    yield from min(found, key=lambda checks: sum(len(check.problems) for check in checks))


def _checks_of_export(export: ReceivedExport, folder: pathlib.Path, golden: Golden) -> tuple[Check, Check]:
    checked = [file for file in export.files if file.found is not None and (folder / file.name).is_file()]
    problems = [
        f"{file.name}: its SHA-256 is not that in the receipt"
        for file in checked
        if file.found is not None and sha256_of(folder / file.name) != file.found[1]
    ]
    problems += [f"{engine.file}: missing" for engine in export.engines if not (folder / engine.file).is_file()]
    same = f"{len(golden.images)} images and their answers are the same"
    return (
        Check(f"against {folder.name}, files", f"{len(checked)} files are the same", tuple(problems)),
        Check(f"against {folder.name}, golden", same, tuple(_other_golden(export, golden))),
    )


def _other_golden(export: ReceivedExport, golden: Golden) -> Iterator[str]:
    if export.reference is None:
        yield "the receipt has none"
        return
    if export.images != tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in golden.images):
        yield "the images are others"
    received = _golden(export)
    if received is None or not np.array_equal(received.outputs, golden.outputs) or received.shapes != golden.shapes:
        yield "the reference is another"


def _card(receipt: ReceivedReceipt) -> tuple[Card | None, list[str]]:
    """The card by its peaks in the receipt, and how it contradicts the GPU's name and compute capability."""
    if receipt.card.value is None:
        return None, []
    fields = receipt.card.fields(*CARD_FIELDS)
    peaks = fields["operations_per_second"].fields(*PRECISIONS)
    card = Card(
        key=fields["key"].text(),
        title=fields["title"].text(),
        device_names=(),
        compute_capability=fields["compute_capability"].whole_number(least=10),
        operations_per_second={
            name: optional(peak, lambda number: number.number(above=0)) for name, peak in peaks.items()
        },
        bytes_per_second=fields["bytes_per_second"].number(above=0),
        sources=(),
        notes="",
    )
    problems = []
    if card.compute_capability != receipt.compute_capability:
        problems.append(f"{card.title} is sm{card.compute_capability}, and the GPU sm{receipt.compute_capability}")
    name = receipt.machine.get("gpu")
    known = card_of_device(name) if isinstance(name, str) else None
    if known is None or known.key != card.key:
        problems.append(f"{card.title} is not what a GPU called {name} is known as")
    return card, problems


def _machine_said(receipt: ReceivedReceipt, card: Card | None) -> str:
    """The GPU, and whether the peaks in the receipt are those that are known here, which may be newer ones."""
    peaks = "its peaks are not known"
    if card is not None:
        known = [(card.key, card.operations_per_second, card.bytes_per_second) for card in CARDS]
        same = (card.key, card.operations_per_second, card.bytes_per_second) in known
        peaks = "its peaks are known" if same else "its peaks are others than those that are known here"
    return f"{receipt.machine['gpu'] or 'no GPU'}, {peaks}"


def _machine_problems(receipt: ReceivedReceipt, card: Card | None) -> Iterator[str]:
    """Every benchmark ran on the machine that the receipt is of, with the same software."""
    machine = {name: value for name, value in receipt.machine.items() if name not in OF_ITS_OWN}
    versions = {name: version for name, version in receipt.versions.items() if name not in NOT_OF_A_BENCHMARK}
    yield from differences(machine["card"], None if card is None else card.key, "card")
    for export in receipt.exports:
        if export.throughput is not None:
            told = {name: field.value for name, field in export.throughput.field("machine").items().items()}
            told = {name: value for name, value in told.items() if name not in OF_ITS_OWN}
            yield from differences(told, machine, "machine")
            for name, again in (("versions", versions), ("tool", receipt.tool)):
                yield from differences(export.throughput.field(name).value, again, name)


def _golden(export: ReceivedExport) -> Golden | None:
    return None if export.reference is None else golden_from_reference(export.images, export.reference)


def _golden_problems(export: ReceivedExport, golden: Golden | None) -> Iterator[str]:
    telling = golden is not None and golden.contrast > LEAST_CONTRAST
    said = [finding["passed"] for finding in export.findings if finding["check"] == GOLDEN]
    if said != [telling]:
        yield f"{said} is written of whether answers can be told apart, and {telling} follows from the reference"
    if golden is not None:
        first = [export.images.index(image) for image in export.images]
        if not np.array_equal(golden.outputs[first], golden.outputs):
            yield "images are the same whose answers are not"


def _files_said(export: ReceivedExport) -> str:
    """What was found wrong with them, which a receipt of a failure has in its findings alone."""
    wrong = [f"{finding['file']}: {finding['detail']}" for finding in export.findings if finding["passed"] is False]
    return f"{len(export.files)} files{'; it is said that ' if wrong else ''}{listed(wrong, 3)}"


def _engine_problems(engine: ReceivedEngine, golden: Golden | None, receipt: ReceivedReceipt) -> Iterator[str]:
    if engine.answers is None or engine.sidecar is None:
        yield from _unanswered_problems(engine, receipt)
        return
    if golden is None:
        yield "there are answers, and no golden vectors to judge them by"
        return
    manifest, here = engine.sidecar.manifest, receipt.compute_capability
    if manifest.tolerance > GATES[manifest.precision].max_relative_error:
        yield f"its tolerance of {manifest.tolerance:g} is wider than that of {manifest.precision}"
    cards = manifest.compute_capabilities
    if cards and here is not None and here < max(cards) and here not in cards:
        yield f"it answered on sm{here}, which its sidecar does not name"
    try:
        again = engine_figures(golden, manifest, engine.answers)
    except ValueError as error:
        yield first_line(error)
        return
    yield from differences(dict(engine.figures), again, "")
    told = [engine.layers is not None, engine.layers_problem is not None]
    if sum(told) != (0 if again["passed"] else 1):
        yield "layers are told of an engine that fails, and of no other"


def _unanswered_problems(engine: ReceivedEngine, receipt: ReceivedReceipt) -> Iterator[str]:
    """It failed, unless it is sound and there was no GPU to run it."""
    passed = None if engine.sidecar is not None and receipt.compute_capability is None else False
    if engine.figures != {**dict.fromkeys(engine.figures), "passed": passed, "detail": engine.figures["detail"]}:
        yield "figures or a verdict are written, and there are no answers that they follow from"
    if engine.figures["detail"] is None or engine.layers is not None or engine.layers_problem is not None:
        yield "it is not said why there are no answers, or layers are told of none"


def _layers_said(layers: Sequence[Layer]) -> str:
    departed = first_departure(layers)
    return "none departs" if departed is None else f"departs first at {departed.name}"


def _layer_problems(engine: ReceivedEngine) -> Iterator[str]:
    """Each passes or not by its figures, and the outputs are among them."""
    if engine.sidecar is None:
        return
    names = [layer.name for layer in engine.layers or ()]
    if not names or len(set(names)) < len(names) or set(engine.answers or ()) - set(names):
        yield "a layer is there twice, or an output is not among them"
    gate = gate_of_engine(engine.sidecar.manifest.precision, engine.sidecar.manifest.tolerance)
    for layer in engine.layers or ():
        passes = layer_passes(gate, layer.relative_error, layer.sqnr_db, layer.non_finite)
        if layer.non_finite and math.isfinite(layer.relative_error):
            yield f"layer {layer.name}: {layer.non_finite} outputs are not finite, and its error is"
        if passes is not layer.passed:
            yield f"layer {layer.name}: passed {layer.passed} is written, and {passes} follows from its figures"


def _throughput_problems(export: ReceivedExport, card: Card | None) -> Iterator[str]:
    ran = any(engine.answers is not None for engine in export.engines)
    if (export.throughput is not None) + (export.throughput_problem is not None) != ran:
        yield "there is a benchmark, or why there is none, exactly where an engine ran"
    yield from record_problems(export, card)


def _verdict_problems(receipt: ReceivedReceipt) -> Iterator[str]:
    exports: Sequence[dict[str, Any]] = receipt.plain["exports"]
    passed, verdict = verdict_of(exports)
    written = {"ran_on_gpu": receipt.ran_on_gpu, "passed": receipt.passed, "verdict": receipt.verdict}
    yield from differences(written, {"ran_on_gpu": ran_on_gpu(exports), "passed": passed, "verdict": verdict}, "")
    if receipt.ran_on_gpu and receipt.compute_capability is None:
        yield "a GPU ran something, and it has no compute capability"
