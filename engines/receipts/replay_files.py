"""Whether an export's files, its sidecars and its findings say the same of each other.

    files      the report, the golden vectors where they were read, and each engine with its sidecar; each file once
    sidecars   the SHA-256 of each one's text is that of the file, and what it says of the engine is the engine's
    findings   of each file those checks that are made of it, once each; an engine is sound whose sidecar is here
    listed     what is not as the export listed it was found out, or is an engine that was built again from its graph
    audit      the graph that an audited engine was compared with is among the files

Told, and following from nothing: which files the export listed, and what a finding says in words; also whether the
listed files, the audits and the ONNX files on the CPU passed, but for what stands above.
"""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Iterator

from engines.golden import GOLDEN_NAME
from engines.kind import ENGINE_SUFFIX, ONNX_SUFFIX
from engines.manifest import sidecar_path
from engines.receipts.received import ReceivedEngine, ReceivedExport, ReceivedFile
from engines.report_file import REPORT_NAME
from engines.verification import AUDIT, GOLDEN, INTEGRITY, LISTED, RUN


def file_problems(export: ReceivedExport) -> Iterator[str]:
    """Where they contradict each other."""
    found = {file.name: file for file in export.files}
    if len(found) < len(export.files):
        yield "a file is named twice"
    for name in (REPORT_NAME, *([] if export.reference is None else [GOLDEN_NAME])):
        if name not in found or found[name].found is None:
            yield f"{name}: was read, and is not among the files"
    engines = {engine.file for engine in export.engines}
    unknown = [name for name in found if name.endswith(ENGINE_SUFFIX) and name not in engines]
    yield from (f"{name}: an engine of which nothing else is said" for name in unknown)
    for engine in export.engines:
        yield from _engine_problems(engine, found)
    yield from _finding_problems(export, found)
    yield from _listed_problems(export)
    yield from _audit_problems(export)


def _engine_problems(engine: ReceivedEngine, found: dict[str, ReceivedFile]) -> Iterator[str]:
    """An engine whose sidecar is here is the file that was hashed, as its sidecar is."""
    beside = _sidecar_of(engine)
    if engine.file not in found or beside not in found:
        yield f"{engine.file}: is not among the files, or its sidecar is not"
    elif engine.sidecar is not None:
        file, sidecar = found[engine.file].found, found[beside].found
        if file is None or file[1] != engine.sidecar.manifest.sha256["engine"]:
            yield f"{engine.file}: its sidecar's SHA-256 is not the file's"
        if sidecar != engine.sidecar.file:
            yield f"{engine.file}: its sidecar's text is not that of the file that was hashed"


def _finding_problems(export: ReceivedExport, found: dict[str, ReceivedFile]) -> Iterator[str]:
    """As ``engines.verification`` finds; of a graph that is listed and not here, or is no file, there may be none."""
    sound = {engine.file: engine.sidecar is not None for engine in export.engines}
    expected = Counter([(GOLDEN_NAME, GOLDEN)])
    expected.update((name, INTEGRITY) for name in sound)
    expected.update((name, AUDIT) for name, passed in sound.items() if passed)
    made = Counter((finding["file"], finding["check"]) for finding in export.findings if finding["check"] != LISTED)
    for name, file in found.items():
        if name.endswith(ONNX_SUFFIX) and (file.found is not None or made[name, RUN]):
            expected[name, RUN] = 1
    for name, check in sorted(expected.keys() | made.keys()):
        if made[name, check] != expected[name, check]:
            yield f"{name}: {made[name, check]} findings of {check}, and there must be {expected[name, check]}"
    for finding in export.findings:
        if finding["check"] == INTEGRITY and finding["passed"] is not sound.get(finding["file"]):
            yield f"{finding['file']}: no finding says that it is sound, or its sidecar is not here"


def _listed_problems(export: ReceivedExport) -> Iterator[str]:
    """A report that says of itself that its export failed is found out before its files are looked at."""
    findings = [finding for finding in export.findings if finding["check"] == LISTED]
    said = [finding["passed"] for finding in findings]
    if {finding["file"] for finding in findings} != {REPORT_NAME} or said[:-1] not in ([], [False]) or said[-1] is None:
        yield "no finding says whether the files are as listed"
        return
    if said[-1]:
        again = _built_again(export)
        yield from (f"{name}: not as listed, and no finding says so" for name in _changed(export) if name not in again)


def _changed(export: ReceivedExport) -> list[str]:
    return [file.name for file in export.files if file.listed is not None and file.found != file.listed]


def _built_again(export: ReceivedExport) -> set[str]:
    """Engines that are others than the listed ones, as their sidecars are, made from a listed graph."""
    listed = {file.listed[1] for file in export.files if file.listed is not None and file.found == file.listed}
    others = {
        file.name for file in export.files if file.listed and file.found is not None and file.found[1] != file.listed[1]
    }
    pairs = [
        {engine.file, _sidecar_of(engine)}
        for engine in export.engines
        if engine.sidecar is None or engine.sidecar.manifest.sha256["onnx"] in listed
    ]
    return {name for pair in pairs if pair <= others for name in pair}


def _audit_problems(export: ReceivedExport) -> Iterator[str]:
    graphs = {file.found[1] for file in export.files if file.found is not None and file.name.endswith(ONNX_SUFFIX)}
    audited = {finding["file"] for finding in export.findings if finding["check"] == AUDIT and finding["passed"]}
    for engine in export.engines:
        if engine.file in audited and engine.sidecar and engine.sidecar.manifest.sha256["onnx"] not in graphs:
            yield f"{engine.file}: was compared with its graph, which is not among the files"


def _sidecar_of(engine: ReceivedEngine) -> str:
    return sidecar_path(pathlib.Path(engine.file)).name
