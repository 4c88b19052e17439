"""What INT8 is calibrated from, and what an earlier calibration from the same has found already.

What calibration found is kept in <stem>.int8.calib.json with hashes of all that it was made from. A run that finds it
there, made from the same, starts from it; made from anything else, it is refused, and says why.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from engines.compilation import Progress
from engines.sdk import Sdk, check_precision
from exporter.dataset import Dataset
from exporter.errors import InputRejected
from exporter.onnx_graph import Graph
from exporter.precisions import INT8
from exporter.quantization.calibration import ALGORITHM, Calibrated, Known, Settings, calibrated_from_graph
from exporter.quantization.calibration_file import (
    SCHEMA,
    Binding,
    CalibrationFile,
    FormCalibration,
    calibration_from_file,
    difference,
    misfit,
)
from exporter.quantization.form import PORTABLE, RTX, Form
from exporter.quantization.layerwise import METHOD
from exporter.request import Request

Notify = Callable[[str], None]
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


def known_calibration(path: pathlib.Path, binding: Binding, graph: Graph, notify: Notify) -> dict[str, Known]:
    """What an earlier run found, by form; nothing where its file is not there, or was made from anything else."""
    if not path.is_file():
        return {}
    try:
        found = calibration_from_file(path)
        stale = difference(found.binding, binding) or misfit(found, _channels(graph))
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


def calibration_text(binding: Binding, calibrated: list[Calibrated]) -> str:
    """``<stem>.int8.calib.json``."""
    forms = []
    for one in calibrated:
        layers = one.whole.layers
        scales = {name: np.atleast_1d(layer.weight_scale).astype(np.float64) for name, layer in layers.items()}
        forms.append(
            FormCalibration(
                form=one.quantized.form.name,
                equalized=one.equalized,
                factors={name: tuple(map(float, values)) for name, values in one.factors.items()},
                ranges={name: float(value) for name, value in one.ranges.items()},
                methods=dict.fromkeys(one.ranges, METHOD),
                weight_scales={name: tuple(map(float, values)) for name, values in scales.items()},
                sqnr_db=one.sqnr_db,
            )
        )
    return CalibrationFile(SCHEMA, binding, tuple(forms)).to_json()


def _channels(graph: Graph) -> dict[str, int]:
    """By each layer's name, how many channels its result has."""
    nodes = [node for node in graph.structure.graph.node if node.op_type in ("Conv", "Gemm")]
    return {node.name: len(graph.weights[node.input[1]]) for node in nodes}
