"""ONNX Runtime on the CPU, as the judge of graphs and files."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from engines.errors import first_line
from exporter.errors import VerificationFailed
from exporter.onnx_graph import INPUT, Graph

Batch = NDArray[np.float32]


class Session:
    """A graph that is ready to run.

    ``fed`` are the weights that are given with each run, not copied; ``outputs`` are the names of the graph's outputs.
    """

    def __init__(
        self,
        model: str | bytes,
        options: onnxruntime.SessionOptions,
        title: str,
        fed: Mapping[str, NDArray[Any]],
        image: str = INPUT,
    ) -> None:
        self._title, self._fed, self._input = title, fed, image
        with _refusals(title):
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.outputs: tuple[str, ...] = tuple(value.name for value in self._session.get_outputs())

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """(N, C, H, W) to each output, (N, classes) or (N, C, h, w).

        Raises:
            VerificationFailed: ONNX Runtime refuses the batch.
        """
        return dict(zip(self.outputs, self.tensors(batch, self.outputs), strict=True))

    def tensors(self, batch: Batch, names: Sequence[str]) -> list[NDArray[Any]]:
        """The values of several outputs of the graph."""
        with _refusals(self._title):
            found: list[NDArray[Any]] = self._session.run(list(names), {self._input: batch, **self._fed})
        return found


def session_from_file(path: pathlib.Path, image: str = INPUT) -> Session:
    """An ONNX file as anybody would run it: default optimizations.

    Raises:
        VerificationFailed: ONNX Runtime refuses the file.
    """
    return Session(str(path), _options(), path.name, {}, image)


def session_from_graph(graph: Graph, image: str = INPUT) -> Session:
    """A graph in memory exactly as written, without optimizations; its weights are fed, not copied.

    Raises:
        VerificationFailed: ONNX Runtime refuses the graph.
    """
    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return Session(graph.structure.SerializeToString(), options, "the graph", graph.weights, image)


def session_from_layers(graph: Graph, names: Sequence[str]) -> Session:
    """A graph in memory, of which ``names`` are outputs, too.

    Raises:
        VerificationFailed: ONNX Runtime refuses the graph.
    """
    structure = onnx.ModelProto()
    structure.CopyFrom(graph.structure)
    present = {value.name for value in structure.graph.output}
    structure.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return session_from_graph(Graph(structure, graph.weights))


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise VerificationFailed(f"{name}: ONNX Runtime refuses it ({first_line(error)})") from error


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a compiler is using the other core
    options.log_severity_level = 3  # errors alone: warnings about unused initializers are not the user's
    return options
