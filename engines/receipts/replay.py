"""A receipt, checked again on a machine without a GPU: does every figure in it follow from its raw data?

    digest       the file is as it was written
    engines      figures and verdicts, from the answers, the golden reference and the gates
    layers       whether each passes, from its figures, whose own raw data are too large to be kept
    throughput   rates, percentiles, intervals, speed-ups, the roofline      ``engines.receipts.replay_throughput``
    verdict      of the whole, and whether a GPU ran anything
    against      hashes and golden vectors are those of an export that is here

This proves that a receipt is consistent, not that it is honest: it can be forged by who wants to; it cannot be wrong by
accident.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engines.errors import InputRejected, first_line
from engines.files import sha256_of
from engines.golden import GOLDEN_NAME, Golden, golden_from_file
from engines.judgement import LEAST_CONTRAST, gate_of_engine
from engines.kind import ENGINE_SUFFIX
from engines.manifest import sidecar_path
from engines.parity import GATES
from engines.receipts.figures import (
    Layer,
    engine_figures,
    finite,
    first_departure,
    golden_from_reference,
    layer_passes,
    ran_on_gpu,
    verdict_of,
)
from engines.receipts.machine import CARD_FIELDS
from engines.receipts.received import ReceivedEngine, ReceivedExport, ReceivedFile, ReceivedReceipt
from engines.receipts.replay_throughput import check_amount, differences, record_problems
from engines.roofline.cards import PRECISIONS, Card, card_of_device
from engines.verification import GOLDEN, INTEGRITY, LISTED

BUILT_AGAIN = "built again since, from the listed graph: "
"""Of a finding, before the names of engines."""
HONESTY = "a receipt can be forged by who wants to; it cannot be wrong by accident"


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
    known = "its peaks are known" if card is not None else "its peaks are not known"
    yield Check(
        "machine", f"{receipt.machine.get('gpu') or 'no GPU'}, {known}", (*contradictions, *_machine_problems(receipt))
    )
    for number, export in enumerate(receipt.exports, 1):
        place = f"export {number}" if len(receipt.exports) > 1 else "export"
        yield Check(f"{place}, files", f"{len(export.files)} files", tuple(_file_problems(export)))
        golden = _golden(export)
        yield Check(f"{place}, golden", f"{len(export.images)} images", tuple(_golden_problems(export, golden)))
        for engine in export.engines:
            said = str(engine.figures["detail"])
            yield Check(f"{place}, {engine.file}", said, tuple(_engine_problems(engine, golden)))
            if engine.layers is not None:
                yield Check(
                    f"{place}, {engine.file}, layers", _layers_said(engine.layers), tuple(_layer_problems(engine))
                )
        rows = "not measured" if export.throughput is None else "every figure follows from its raw data"
        yield Check(f"{place}, throughput", rows, tuple(_throughput_problems(export, card)))
    yield Check("verdict", receipt.verdict, tuple(_verdict_problems(receipt)))


def checks_against(receipt: ReceivedReceipt, folder: pathlib.Path) -> Iterator[Check]:
    """Holds hashes and golden vectors to the export in ``folder``; the receipt's engines name which of its exports.

    Raises:
        InputRejected: there are no golden vectors in the folder, or none of the exports is that of the folder.
    """
    golden = golden_from_file(folder / GOLDEN_NAME)
    exports = [
        export for export in receipt.exports if any((folder / engine.file).is_file() for engine in export.engines)
    ]
    if not exports:
        raise InputRejected(f"{folder}: holds none of the engines of the receipt; give the export that it is about")
    for export in exports:
        checked = [file for file in export.files if file.found is not None and (folder / file.name).is_file()]
        problems = [
            f"{file.name}: its SHA-256 is not that in the receipt"
            for file in checked
            if file.found is not None and sha256_of(folder / file.name) != file.found[1]
        ]
        problems += [f"{engine.file}: missing" for engine in export.engines if not (folder / engine.file).is_file()]
        yield Check(f"against {folder.name}, files", f"{len(checked)} files are the same", tuple(problems))
        yield Check(
            f"against {folder.name}, golden",
            f"{len(golden.images)} images and their answers are the same",
            tuple(_other_golden(export, golden)),
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
            name: None if peak.value is None else peak.number(above=0) for name, peak in peaks.items()
        },
        bytes_per_second=fields["bytes_per_second"].number(above=0),
        l2_bytes=None,
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


def _machine_problems(receipt: ReceivedReceipt) -> Iterator[str]:
    """Every benchmark ran on the machine that the receipt is of."""
    machine = {name: value for name, value in receipt.machine.items() if name != "compute_capability"}
    for export in receipt.exports:
        if export.throughput is not None:
            yield from differences(export.throughput.field("machine").value, machine, "machine")
            told = export.throughput.field("versions").items()
            versions = {name: version for name, version in receipt.versions.items() if name in told}
            yield from differences({name: version.value for name, version in told.items()}, versions, "versions")


def _file_problems(export: ReceivedExport) -> Iterator[str]:
    """A file that is not the listed one must have been found out, unless a finding says that it was built again."""
    found = {file.name: file for file in export.files}
    listings = [finding for finding in export.findings if finding["check"] == LISTED]
    said = " ".join(finding["detail"] for finding in listings if finding["passed"])
    engines = {engine.file for engine in export.engines}
    built = engines.intersection(said.partition(BUILT_AGAIN)[2].split(", "))
    again = built.union(sidecar_path(pathlib.Path(name)).name for name in built)
    others = [file.name for file in export.files if file.listed is not None and file.found != file.listed]
    if len(found) < len(export.files):
        yield "a file is named twice"
    if not listings:
        yield "no finding says whether the files are as listed"
    if all(finding["passed"] for finding in listings):
        yield from (f"{name}: not as listed, and no finding says so" for name in others if name not in again)
    unknown = [name for name in found if name.endswith(ENGINE_SUFFIX) and name not in engines]
    yield from (f"{name}: an engine of which nothing else is said" for name in unknown)
    for engine in export.engines:
        sidecar = found.get(sidecar_path(pathlib.Path(engine.file)).name)
        yield from _engine_file_problems(engine, found.get(engine.file), sidecar, export)


def _engine_file_problems(
    engine: ReceivedEngine, file: ReceivedFile | None, sidecar: ReceivedFile | None, export: ReceivedExport
) -> Iterator[str]:
    """An engine that answered is the file that was hashed, as its sidecar is, and was found sound."""
    if file is None or file.found is None:
        yield f"{engine.file}: is not among the files"
    elif engine.sidecar is not None and engine.sidecar.manifest.sha256["engine"] != file.found[1]:
        yield f"{engine.file}: its sidecar's SHA-256 is not the file's"
    if engine.sidecar is not None and (
        sidecar is None or sidecar.found is None or sidecar.found[1] != engine.sidecar.sha256
    ):
        yield f"{engine.file}: its sidecar's text is not that of the file that was hashed"
    named = [finding for finding in export.findings if finding["file"] == engine.file]
    sound = [finding["passed"] for finding in named if finding["check"] == INTEGRITY]
    if not sound or (engine.answers is not None and sound != [True]):
        yield f"{engine.file}: no finding says that it is sound"


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


def _engine_problems(engine: ReceivedEngine, golden: Golden | None) -> Iterator[str]:
    if engine.answers is None or engine.sidecar is None:
        if engine.figures["passed"] or any(
            engine.figures[name] is not None for name in engine.figures if name not in ("passed", "detail")
        ):
            yield "figures are written, and there are no answers that they follow from"
        if engine.figures["detail"] is None or engine.layers is not None:
            yield "it is not said why there are no answers"
        return
    if golden is None:
        yield "there are answers, and no golden vectors to judge them by"
        return
    manifest = engine.sidecar.manifest
    if manifest.tolerance > GATES[manifest.precision].max_relative_error:
        yield f"its tolerance of {manifest.tolerance:g} is wider than that of {manifest.precision}"
    try:
        again = engine_figures(golden, manifest, engine.answers)
    except ValueError as error:
        yield first_line(error)
        return
    yield from differences(dict(engine.figures), again, "")
    told = [engine.layers is not None, engine.layers_problem is not None]
    if sum(told) != (0 if again["passed"] else 1):
        yield "layers are told of an engine that fails, and of no other"


def _layers_said(layers: Sequence[Layer]) -> str:
    departed = first_departure(layers)
    return "none departs" if departed is None else f"departs first at {departed.name}"


def _layer_problems(engine: ReceivedEngine) -> Iterator[str]:
    """Each passes or not by its figures."""
    if engine.sidecar is None:
        return
    gate = gate_of_engine(engine.sidecar.manifest.precision, engine.sidecar.manifest.tolerance)
    for layer in engine.layers or ():
        passes = layer_passes(gate, finite(layer.relative_error), finite(layer.sqnr_db), layer.non_finite)
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
