"""INT8 of one network: calibrated on the user's images, written in each form, and held to what was calibrated.

    float32 graph, images --calibrated_from_graph--> codes and scales (``exporter.quantization.calibration``)
      --graph_from_quantized--> <stem>.int8.onnx, always; <stem>.int8.rtx.onnx where TensorRT for RTX compiles

What makes a file right is asked in steps that each can fail alone: the equalized network that it was made from computes
what the float32 graph does, the file holds the very codes (the contract), ONNX Runtime computes from it what was
simulated when it was made, and that is near enough to the equalized network over all images.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.compilation import Progress
from engines.files import write_whole
from engines.parity import GATES
from exporter.architecture import Architecture
from exporter.dataset import Dataset
from exporter.description import Subject
from exporter.errors import listed
from exporter.findings import Findings
from exporter.inputs import Inputs
from exporter.int8_calibration import binding_from_request, calibrated_forms, calibration_text, known_calibration
from exporter.onnx_file import graph_from_file, write_onnx
from exporter.onnx_graph import Graph, with_metadata
from exporter.onnxruntime_cpu import session_from_file, session_from_graph
from exporter.plain import Plain
from exporter.precisions import INT8
from exporter.processes import Processes
from exporter.quantization.calibration import Calibrated
from exporter.quantization.equivalence import least_agreement
from exporter.quantization.layerwise import decibels
from exporter.quantization.qdq import graph_from_quantized
from exporter.quantization.quantized import Quantized
from exporter.quantization.simulation import Simulation
from exporter.quantized_contract import quantized_contract_problems
from exporter.report import Check, QuantizationRecord, QuantizedLayerRow
from exporter.request import Request
from exporter.staging import Staging
from exporter.typed import Typed, submit

COMPARED_IMAGES = 32
SAME_DB = 50.0
"""Between each step of the file and its simulation."""
STEP_PIXELS = 4 * 224 * 224
"""Of the images whose tensors are all in memory for that."""

REMEDY = "INT8 changes this network too much: try --int8-effort high, --int8-budget or fp16"
EXACT_DB = 80.0
"""Equalization changes nothing but the rounding of float32, which is 110 dB and more below the outputs."""


def int8_from_request(
    subject: Subject,
    graph: Graph,
    plain: Plain,
    inputs: Inputs,
    checkpoint: str,
    processes: Processes,
    stage: Staging,
    found: Findings,
    progress: Progress,
) -> list[Typed]:
    """The forms of INT8, where it is asked for: calibrated, written and checked; the engine is being compiled."""
    request, calibration = subject.request, inputs.calibration
    if INT8.name not in request.trt or calibration is None:
        return []
    stem, compiler = request.path.stem, processes.compilers[INT8.name]
    name = f"{stem}.int8.calib.json"
    binding = binding_from_request(request, subject.assumptions, checkpoint, calibration)
    known = known_calibration(request.out / name, binding, graph, found.note)
    forms = calibrated_forms(request, graph, calibration, known, compiler.sdk, progress)
    typed = []
    for one in forms:
        form, is_last = one.quantized.form, one is forms[-1]
        engine = stage.path(f"{stem}.int8.engine") if is_last else None
        path = stage.path(f"{stem}.{form.name}.onnx")
        typed.append(typed_from_calibrated(one, subject.metadata(checkpoint, INT8.name), path, engine))
        submit(typed[-1], compiler, request)
        stage.seal(*typed[-1].files)
        checks_found, record = checks_of_quantized(typed[-1], one, graph, plain.architecture, calibration, request)
        found.add(checks_found)
        found.add_quantization(record)
    write_whole(stage.path(name), calibration_text(binding, forms).encode())
    stage.seal(stage.path(name))
    return typed


def typed_from_calibrated(
    calibrated: Calibrated, metadata: Mapping[str, str], onnx: pathlib.Path, engine: pathlib.Path | None
) -> Typed:
    """Writes the graph with its codes to ``onnx``; from then on the file is the graph."""
    quantized = calibrated.quantized
    files = tuple(write_onnx(with_metadata(graph_from_quantized(quantized), metadata), onnx))
    return Typed(
        precision=INT8,
        name=quantized.form.name,
        graph=graph_from_file(onnx),
        kept=dict(quantized.kept),
        exponents={},
        headroom=(),
        files=files,
        onnx=onnx,
        engine=engine,
    )


def checks_of_quantized(
    typed: Typed,
    calibrated: Calibrated,
    graph: Graph,
    architecture: Architecture,
    calibration: Dataset,
    request: Request,
) -> tuple[list[Check], QuantizationRecord]:
    """Whether the file is what was calibrated from ``graph``, computes what was simulated, and is near to float32."""
    quantized = calibrated.quantized
    problems = quantized_contract_problems(typed.onnx, architecture, quantized)
    layers = f"{len(quantized.layers)} layers with the codes, scales and biases that were calibrated, bit for bit"
    images = next(calibration.batches(COMPARED_IMAGES))
    equal = pooled_db(session_from_graph(graph).run(images), session_from_graph(quantized.graph).run(images))
    same, where = least_agreement(quantized, typed.graph, images[: _few(images)])
    exact = session_from_graph(typed.graph).run(images)
    whole = pooled_db(exact, Simulation(quantized).run(images))
    kernels = pooled_db(exact, session_from_file(typed.onnx).run(images))
    floor = GATES[INT8.name].min_sqnr_db if request.int8_budget is None else request.int8_budget
    record = record_from_calibrated(calibrated, typed.onnx.name, same, kernels, request)
    checks = [
        Check(
            f"{typed.name}, equalization in float32",
            equal >= EXACT_DB,
            equal,
            EXACT_DB,
            f"{equal:.1f} dB on {len(images)} images (at least {EXACT_DB:g})",
        ),
        Check(f"{typed.name}, contract", not problems, None, None, listed(problems, 5) if problems else layers),
        Check(f"{typed.name}, precision asked for", bool(quantized.layers), None, None, _layers_in_words(quantized)),
        Check(
            f"{typed.name}, ONNX Runtime against the simulation",
            same >= SAME_DB,
            same,
            SAME_DB,
            f"{same:.1f} dB in {where} (at least {SAME_DB:g} in each step, from the same values); the outputs, at the "
            f"end, {whole:.1f} dB, with its INT8 kernels {kernels:.1f} dB",
        ),
        Check(
            f"{typed.name}, all of --calib against float32",
            floor is None or calibrated.sqnr_db >= floor,
            calibrated.sqnr_db,
            floor,
            _quality_in_words(calibrated, record, floor),
        ),
    ]
    return checks, record


def _layers_in_words(quantized: Quantized) -> str:
    """How many layers are in INT8, of how many that could be; and which are not, and why."""
    dtype = quantized.form.dtype
    chosen = [layer for layer, reason in quantized.kept.items() if "squeeze-and-excitation" not in reason]
    inside = len(quantized.kept) - len(chosen)
    parts = [f"{len(quantized.layers)} of {len(quantized.layers) + len(chosen)} layers in INT8"]
    parts += [f"{layer} kept in {dtype}: {quantized.kept[layer]}" for layer in chosen]
    return "; ".join([*parts, *([f"{inside} inside squeeze-and-excitation kept in {dtype}"] if inside else [])])


def _quality_in_words(calibrated: Calibrated, record: QuantizationRecord, floor: float | None) -> str:
    agreement = "" if calibrated.agreement is None else f", top-1 agrees on {calibrated.agreement:.2%}"
    limit = "at least" if record.budget_db is None else "--int8-budget"
    detail = (
        f"SQNR {calibrated.sqnr_db:.1f} dB over {calibrated.images} images, {calibrated.fitted} of which layers are "
        f"fitted to ({limit} {floor:g}){agreement}"
    )
    return detail if floor is None or calibrated.sqnr_db >= floor else f"{detail}; {REMEDY}"


def record_from_calibrated(
    calibrated: Calibrated, file: str, simulation_db: float, kernels_db: float, request: Request
) -> QuantizationRecord:
    """What the report says of one form; the traffic of its engine is added once that is there."""
    sensitivities = {row.name: row for row in calibrated.sensitivities}
    rows = []
    for name, fit in calibrated.fits.items():
        row = sensitivities.get(name)
        alone, without = (None, None) if row is None else (row.alone_db, row.all_but_db)
        rows.append(QuantizedLayerRow(name, fit.input_range, fit.method, fit.clipped, fit.sqnr_db, alone, without))
    return QuantizationRecord(
        form=calibrated.quantized.form.name,
        file=file,
        effort=request.int8_effort,
        weight_bits=8,
        activation_bits=8,
        equalized=calibrated.equalized,
        equalized_db=calibrated.equalized_db,
        plain_db=calibrated.plain_db,
        images=calibrated.images,
        fitted_images=calibrated.fitted,
        sqnr_db=calibrated.sqnr_db,
        agreement=calibrated.agreement,
        simulation_db=simulation_db,
        kernels_db=kernels_db,
        budget_db=request.int8_budget,
        layers=tuple(rows),
        kept=dict(calibrated.quantized.kept),
        seconds=round(calibrated.seconds, 3),
        traffic=None,
    )


Outputs = Mapping[str, NDArray[Any]]


def _few(images: NDArray[np.float32]) -> int:
    return max(1, STEP_PIXELS // int(images.shape[2] * images.shape[3]))


def pooled_db(exact: Outputs, found: Outputs) -> float:
    """The SQNR of all images together, in the worst output."""
    return min(_db(exact[name], found[name]) for name in exact)


def _db(exact: NDArray[Any], found: NDArray[Any]) -> float:
    y, other = exact.astype(np.float64), found.astype(np.float64)
    return decibels(float((y**2).sum()), float(((y - other) ** 2).sum()))
