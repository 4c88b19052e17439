"""The last step of a build: the engine is held against its graph, and gets its name together with its sidecar."""

from __future__ import annotations

import dataclasses
import pathlib

from engines.audit import Audit, audit_of_file, expected_from_onnx
from engines.compilation import Compilation
from engines.compiler import Request
from engines.errors import VerificationFailed, listed
from engines.files import reported_write_errors, sha256_of, synced
from engines.interrupts import Uninterrupted
from engines.manifest import Manifest, sidecar_path
from engines.onnx_file import OnnxFile
from engines.plan import header_from_file
from engines.replacement import replace_together
from engines.sidecar import compute_capabilities, manifest_from_build
from engines.traffic import prediction_of_file

REJECTED = ".rejected"


@dataclasses.dataclass(frozen=True)
class Build:
    """An engine and its sidecar, audited and in place; for INT8, what ``engines.traffic`` predicts."""

    engine: pathlib.Path
    sidecar: pathlib.Path
    manifest: Manifest
    audit: Audit
    seconds: float
    warnings: tuple[str, ...]
    prediction: str | None = None


def delivered(
    made: Compilation, graph: OnnxFile, request: Request, target: pathlib.Path, interrupts: Uninterrupted
) -> Build:
    """Audits the engine, and moves it to ``target`` with its sidecar; one that does not pass, to ``*.rejected``.

    Args:
        made: the compiler's result, in a directory that is on one file system with ``target`` and removed afterwards.
        graph: what it was compiled from.
        request: what the compiler was asked for.
        target: the engine's final name.
        interrupts: is told when files are put into their places.

    Raises:
        VerificationFailed: the engine is not what ``graph`` says.
        PlanRejected: it is not even an engine.
        OutputFailed: a file cannot be put into its place; then none is.
    """
    audit = audit_of_file(made.engine, *expected_from_onnx(graph))
    if audit.problems:
        rejected = target.with_name(target.name + REJECTED)
        interrupts.too_late()
        with reported_write_errors(rejected):
            made.engine.replace(rejected)
        found = listed(list(audit.problems), 3)
        raise VerificationFailed(f"{target}: engine audit: {found}; kept as {rejected.name}, do not use it")
    manifest = manifest_from_build(
        graph,
        name=target.name,
        sha256={"onnx": sha256_of(graph.path), "engine": sha256_of(made.engine)},
        sdk={"name": made.sdk, "version": made.sdk_version},
        cards=compute_capabilities(header_from_file(made.engine), request.options),
        batch=request.batch,
        audit=audit.record,
        sizes=request.sizes,
    )
    predicted = prediction_of_file(made.engine, request.batch[1], None if request.sizes is None else request.sizes[1])
    sidecar = sidecar_path(made.engine)
    with reported_write_errors(sidecar_path(target)):
        sidecar.write_text(manifest.to_json(), encoding="utf-8")
        synced(sidecar)
        earlier = made.engine.parent / ".earlier"
        earlier.mkdir()
    interrupts.too_late()
    replace_together({made.engine: target, sidecar: sidecar_path(target)}, earlier)
    return Build(target, sidecar_path(target), manifest, audit, made.seconds, made.warnings, predicted)
