"""ONNX Runtime on the CPU, as the judge of graphs and files."""

from __future__ import annotations

import pathlib

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from engines.errors import first_line
from exporter.errors import VerificationFailed
from exporter.onnx_graph import INPUT, OUTPUT, Graph


def outputs_from_file(path: pathlib.Path, batches: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Runs an ONNX file as anybody would: default optimizations, one run per batch (N, C, H, W) to (N, classes).

    Raises:
        VerificationFailed: ONNX Runtime refuses the file.
    """
    options = _options()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return [session.run([OUTPUT], {INPUT: batch})[0] for batch in batches]
    except Exception as error:
        raise VerificationFailed(f"{path.name}: ONNX Runtime refuses it ({first_line(error)})") from error


def outputs_from_graph(graph: Graph, batches: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Runs a graph in memory exactly as written, without optimizations; its weights are fed, not copied.

    Raises:
        VerificationFailed: ONNX Runtime refuses the graph.
    """
    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = graph.structure.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return [session.run([OUTPUT], {INPUT: batch, **graph.weights})[0] for batch in batches]
    except Exception as error:
        raise VerificationFailed(f"ONNX Runtime refuses the graph ({first_line(error)})") from error


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a compiler is using the other core
    options.log_severity_level = 3  # errors alone: warnings about unused initializers are not the user's
    return options
