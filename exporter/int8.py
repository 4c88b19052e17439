"""INT8 of one network: calibrated on the user's images, written in each form, and held to what was calibrated.

    float32 graph, images --calibrated_from_graph--> codes and scales (``exporter.quantization.calibration``)
      --graph_from_quantized--> <stem>.int8.onnx, always; <stem>.int8.rtx.onnx where TensorRT for RTX compiles

What makes a file right is asked in steps that each can fail alone: it holds the very codes (the contract), ONNX Runtime
computes from it what was simulated when it was made, and that is near enough to float32 over all images.

What calibration found is kept in <stem>.int8.calib.json with hashes of all that it was made from. A run that finds it
there, made from the same, starts from it; made from anything else, it is refused, and says why.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.parity import GATES
from engines.sdk import Sdk, check_precision
from exporter.architecture import Architecture
from exporter.dataset import Dataset
from exporter.errors import InputRejected, listed
from exporter.onnx_file import graph_from_file, write_onnx
from exporter.onnx_graph import Graph, with_metadata
from exporter.onnxruntime_cpu import session_from_file, session_from_graph
from exporter.precisions import INT8
from exporter.quantization.calibration import (
    ALGORITHM,
    Calibrated,
    Known,
    Settings,
    calibrated_from_graph,
)
from exporter.quantization.calibration_file import (
    SCHEMA,
    Binding,
    CalibrationFile,
    FormCalibration,
    calibration_from_file,
    difference,
)
from exporter.quantization.equivalence import least_agreement
from exporter.quantization.form import PORTABLE, RTX, Form
from exporter.quantization.layerwise import decibels
from exporter.quantization.qdq import graph_from_quantized
from exporter.quantization.simulation import Simulation
from exporter.quantized_contract import quantized_contract_problems
from exporter.report import Check, QuantizationRecord, QuantizedLayerRow
from exporter.request import Request
from exporter.typed import Typed

COMPARED_IMAGES = 32
SAME_DB = 50.0
"""Between each step of the file and its simulation."""
STEP_PIXELS = 4 * 224 * 224
"""Of the images whose tensors are all in memory for that."""

Notify = Callable[[str], None]
Progress = Callable[[str, int, int], None]
PREPROCESSING = ("size", "mean", "std", "resize")


def forms_of(sdk: Sdk) -> tuple[Form, ...]:
    """The forms that are written; the last is the one that ``sdk`` compiles."""
    return (PORTABLE, RTX) if sdk.module == "tensorrt_rtx" else (PORTABLE,)


def binding_from_request(
    request: Request, assumptions: Mapping[str, str], checkpoint: str, calibration: Dataset
) -> Binding:
    """What a calibration in this run is made from."""
    return Binding(
        checkpoint=checkpoint,
        data=calibration.digest,
        images=calibration.count,
        preprocessing={name: text for name, text in assumptions.items() if name in PREPROCESSING},
        network={name: text for name, text in assumptions.items() if name not in PREPROCESSING},
        method={"effort": request.int8_effort, "algorithm": ALGORITHM, "bits": "8"},
    )


def known_calibration(path: pathlib.Path, binding: Binding, notify: Notify) -> dict[str, Known]:
    """What an earlier run found, by form; nothing where its file is not there, or was made from anything else."""
    if not path.is_file():
        return {}
    try:
        found = calibration_from_file(path)
        stale = difference(found.binding, binding)
    except InputRejected as error:
        stale = str(error)
    if stale is not None:
        notify(f"note: {path.name} is refused: {stale}; calibrating anew")
        return {}
    notify(f"{path.name}: from the same checkpoint, images and method; its factors and ranges are used again")
    return {
        form.form: Known({name: np.array(values) for name, values in form.factors.items()}, dict(form.ranges))
        for form in found.forms
    }


def calibrated_forms(
    request: Request, graph: Graph, calibration: Dataset, known: Mapping[str, Known], sdk: Sdk, progress: Progress
) -> list[Calibrated]:
    """The float32 ``graph`` in INT8, in each form.

    Raises:
        UsageError: a card has no INT8.
        VerificationFailed: the budget cannot be reached, or a form cannot hold the network.
    """
    check_precision(sdk, INT8.name, request.gpu)
    return [
        calibrated_from_graph(
            graph,
            calibration,
            Settings(form, request.int8_effort, budget_db=request.int8_budget, report=request.int8_report),
            progress,
            known.get(form.name),
        )
        for form in forms_of(sdk)
    ]


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
    typed: Typed, calibrated: Calibrated, architecture: Architecture, calibration: Dataset, request: Request
) -> tuple[list[Check], QuantizationRecord]:
    """Whether the file is what was calibrated, computes what was simulated, and is near enough to float32."""
    quantized = calibrated.quantized
    problems = quantized_contract_problems(typed.onnx, architecture, quantized)
    layers = f"{len(quantized.layers)} layers with the codes, scales and biases that were calibrated, bit for bit"
    chosen = [layer for layer, reason in quantized.kept.items() if "squeeze-and-excitation" not in reason]
    asked = f"{len(quantized.layers)} of {len(quantized.layers) + len(chosen)} layers in INT8"
    left = [f"{layer} kept in {quantized.form.dtype}: {reason}" for layer, reason in quantized.kept.items()]
    images = next(calibration.batches(COMPARED_IMAGES))
    same, where = least_agreement(quantized, typed.graph, images[: _few(images)])
    exact = session_from_graph(typed.graph).run(images)
    whole = pooled_db(exact, Simulation(quantized).run(images))
    kernels = pooled_db(exact, session_from_file(typed.onnx).run(images))
    floor = GATES[INT8.name].min_sqnr_db if request.int8_budget is None else request.int8_budget
    record = record_from_calibrated(calibrated, typed.onnx.name, same, kernels, request)
    checks = [
        Check(f"{typed.name}, contract", not problems, None, None, listed(problems, 5) if problems else layers),
        Check(f"{typed.name}, precision asked for", bool(quantized.layers), None, None, "; ".join([asked, *left])),
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
            _quality_in_words(calibrated, floor, budget=request.int8_budget is not None),
        ),
    ]
    return checks, record


def _quality_in_words(calibrated: Calibrated, floor: float | None, *, budget: bool) -> str:
    agreement = "" if calibrated.agreement is None else f", top-1 agrees on {calibrated.agreement:.2%}"
    limit = "--int8-budget" if budget else "at least"
    detail = f"SQNR {calibrated.sqnr_db:.1f} dB over {calibrated.images} images ({limit} {floor:g}){agreement}"
    if floor is not None and calibrated.sqnr_db < floor:
        detail += "; INT8 changes this network too much: try --int8-effort high, --int8-budget or fp16"
    return detail


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


def calibration_text(binding: Binding, calibrated: list[Calibrated]) -> str:
    """``<stem>.int8.calib.json``."""
    forms = []
    for one in calibrated:
        layers = one.quantized.layers
        scales = {name: np.atleast_1d(layer.weight_scale).astype(np.float64) for name, layer in layers.items()}
        forms.append(
            FormCalibration(
                form=one.quantized.form.name,
                equalized=one.equalized,
                factors={name: tuple(map(float, values)) for name, values in one.factors.items()},
                ranges={name: float(fit.input_range) for name, fit in one.fits.items()},
                methods={name: fit.method for name, fit in one.fits.items()},
                weight_scales={name: tuple(map(float, values)) for name, values in scales.items()},
                sqnr_db=one.sqnr_db,
            )
        )
    return CalibrationFile(SCHEMA, binding, tuple(forms)).to_json()


Outputs = Mapping[str, NDArray[Any]]


def _few(images: NDArray[np.float32]) -> int:
    return max(1, STEP_PIXELS // int(images.shape[2] * images.shape[3]))


def pooled_db(exact: Outputs, found: Outputs) -> float:
    """The SQNR of all images together, in the worst output."""
    return min(_db(exact[name], found[name]) for name in exact)


def _db(exact: NDArray[Any], found: NDArray[Any]) -> float:
    y, other = exact.astype(np.float64), found.astype(np.float64)
    return decibels(float((y**2).sum()), float(((y - other) ** 2).sum()))
