"""One precision of a network: its typed graph, the ONNX file, the checks on both, the engine and its sidecar."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.audit import Audit, audit_of_file
from engines.compilation import CompilerProcess, Progress
from engines.compiler import Request as CompilerRequest
from engines.files import write_whole
from engines.manifest import sidecar_path
from engines.onnx_file import onnx_file_from_path
from engines.plan import header_from_file
from engines.runner import load
from engines.sdk import gpu_compute_capability
from engines.sidecar import compute_capabilities, manifest_from_build
from exporter import checks
from exporter.errors import DeviceFailed, SdkMissing, listed
from exporter.measured import Measured, fixed
from exporter.onnx_file import graph_from_file, write_onnx
from exporter.onnx_graph import INPUT, Graph, with_metadata
from exporter.onnxruntime_cpu import Session, session_from_graph
from exporter.plain import Plain
from exporter.precisions import Exponents, Precision
from exporter.reference import Reference
from exporter.report import Check, EngineRecord, HeadroomRow, rescaled_in_words
from exporter.request import Request
from exporter.staging import Staging


@dataclasses.dataclass(frozen=True)
class Typed:
    """A typed graph and where its ONNX file and its engine are or will be; ``files`` has external weights, too.

    ``name`` is the precision's, or that of one of its forms; ``kept``, ``exponents`` and ``headroom`` are what
    ``Rewritten`` says of them. ``engine`` is None where the ONNX file is all that is wanted.
    """

    precision: Precision
    name: str
    graph: Graph
    kept: dict[str, str]
    exponents: Exponents
    headroom: tuple[HeadroomRow, ...]
    files: tuple[pathlib.Path, ...]
    onnx: pathlib.Path
    engine: pathlib.Path | None

    @property
    def stage(self) -> str:
        """What it is called in the ledger."""
        return f"{self.name}, {self.precision.computed_by}"

    @property
    def computed(self) -> Graph:
        """The graph that ONNX Runtime computes with this precision's rounding and range."""
        return self.precision.twin(self.graph) if self.precision.twin else self.graph


def typed_from_graph(
    precision: Precision, graph: Graph, reference: Reference, metadata: Mapping[str, str], onnx: pathlib.Path
) -> Typed:
    """Rewrites the float32 ``graph`` to ``precision`` and writes it to ``onnx``; from then on the file is the graph."""
    rewritten = precision.rewrite(graph, reference.peaks)
    files = tuple(write_onnx(with_metadata(rewritten.graph, metadata), onnx))
    return Typed(
        precision,
        precision.name,
        graph_from_file(onnx),
        rewritten.kept,
        rewritten.exponents,
        rewritten.headroom,
        files,
        onnx,
        onnx.with_suffix(".engine"),
    )


def submit(typed: Typed, compiler: CompilerProcess, request: Request) -> None:
    """Starts the compilation, where an engine is wanted; ``engine_from_typed`` waits for it."""
    if typed.engine is None:
        return
    compiler.submit(
        CompilerRequest(str(typed.onnx), str(typed.engine), request.batch, request.gpu, sizes=request.profile)
    )


def contract_checks_of_typed(typed: Typed, plain: Plain) -> list[Check]:
    """The graph contract on the written file, and how much of it is in the precision that was asked for."""
    name, convs = typed.precision.name, [node for node in typed.graph.structure.graph.node if node.op_type == "Conv"]
    converted = [node for node in convs if typed.graph.weights[node.input[1]].dtype == np.dtype(typed.precision.dtype)]
    left = [f"{node} kept in float32: {reason}" for node, reason in typed.kept.items()]
    scaled = [rescaled_in_words(row) for row in typed.headroom if row.exponents]
    details = [f"{len(converted)} of {len(convs)} convs", *([listed(scaled, 5)] if scaled else []), *left]
    return [
        checks.contract_check(name, typed.onnx, plain, typed.graph, typed.exponents),
        Check(f"{name}, precision asked for", bool(converted), None, None, "; ".join(details)),
    ]


def numeric_checks_of_typed(typed: Typed, measured: Measured) -> list[Check]:
    """The typed graph's rounding and range, where ONNX Runtime does not show them by itself."""
    if typed.precision.twin is None:
        return []
    gate = fixed(typed.precision.gate)
    return [measured.check(typed.stage, f"{typed.stage} against float64", lambda: session_of_typed(typed).run, gate)]


def session_of_typed(typed: Typed) -> Session:
    """The typed graph with its precision's rounding and range, ready to run.

    Raises:
        VerificationFailed: ONNX Runtime refuses it.
    """
    return session_from_graph(typed.computed)


def engine_check(typed: Typed, measured: Measured, *, required: bool) -> Check:
    """The engine itself, on this machine's GPU; a check that is not run where there is none.

    Raises:
        SdkMissing: ``required``, and the engine cannot be run here.
    """
    name = f"{typed.precision.name}, engine on its GPU"
    title, gate = f"{name} against float64", fixed(typed.precision.gate)
    try:
        if gpu_compute_capability() is None or typed.engine is None:
            raise SdkMissing("no GPU answers here")
        with load(typed.engine) as runner:

            def run(batch: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
                return runner.run({INPUT: batch})

            return measured.check(name, title, lambda: run, gate, largest=True)
    except SdkMissing as missing:
        if required:
            raise
        return Check(title, passed=None, value=None, gate=None, detail=f"not run: {missing}; see engines verify")
    except DeviceFailed as failure:
        return Check(title, passed=False, value=None, gate=None, detail=str(failure))


def engine_from_typed(typed: Typed, compiler: CompilerProcess, progress: Progress) -> tuple[EngineRecord, Audit]:
    """Waits for the engine and audits its file.

    Raises:
        SdkMissing, CompilerRefused, OutputFailed: there is no engine.
        PlanRejected: there is one, but its file is not whole.
    """
    build = compiler.result(progress)
    audit = audit_of_file(build.engine, *checks.expected_convolutions(typed.graph))
    record = EngineRecord(
        name=build.engine.name,
        precision=typed.precision.name,
        sdk=build.sdk,
        sdk_version=build.sdk_version,
        compute_capabilities=compute_capabilities(header_from_file(build.engine)),
        seconds=round(build.seconds, 3),
        kept_in_float32=typed.kept,
        audit=audit.record,
    )
    return record, audit


def write_sidecar(typed: Typed, record: EngineRecord, request: Request, stage: Staging) -> None:
    """Writes ``<engine>.json`` beside the engine, and seals both."""
    engine = stage.path(record.name)
    stage.seal(engine)
    manifest = manifest_from_build(
        onnx_file_from_path(typed.onnx),
        name=record.name,
        sha256={"onnx": stage.sha256(typed.onnx), "engine": stage.sha256(engine)},
        sdk={"name": record.sdk, "version": record.sdk_version},
        cards=record.compute_capabilities,
        batch=request.batch,
        audit=record.audit,
    )
    path = sidecar_path(engine)
    write_whole(path, manifest.to_json().encode())
    stage.seal(path)
