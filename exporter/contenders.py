"""A file to be compared with another: a checkpoint, an ONNX file or an engine, whichever its content says.

What a checkpoint does not tell (strides, epsilon, size, normalisation) stands in the metadata of an ONNX file and in
the sidecar of an engine, so the one that is compared with it supplies the assumptions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from engines.integrity import checked_engine
from engines.kind import ONNX, kind_of_file
from engines.manifest import manifest_from_file, sidecar_path
from engines.runner import load
from exporter.checkpoint import checkpoint_from_path, is_checkpoint
from exporter.errors import InputRejected, NotFinite, VerificationFailed, listed
from exporter.ledger import Run
from exporter.model import outputs_of_network
from exporter.onnx_file import graph_from_file
from exporter.onnx_graph import Graph, checked
from exporter.onnxruntime_cpu import session_from_file, session_from_graph
from exporter.precisions import PRECISIONS
from exporter.quantization.dialect import QUANTIZATION, dialect_problems
from exporter.repvgg import network_from_checkpoint
from exporter.request import Request

OPERATIONS = (
    "Cast", "Conv", "DequantizeLinear", "Flatten", "Gemm", "GlobalAveragePool", "Identity", "Mul", "QuantizeLinear",
    "ReduceMean", "Relu", "Reshape", "Sigmoid",
)  # fmt: skip
"""What a deployed RepVGG is made of, and what a graph may hold."""

EXACTNESS = ("float64", "fp32", "fp16", "int8")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One of two files.

    Attributes:
        path: the file.
        kind: "checkpoint", "ONNX" or "engine".
        precision: of EXACTNESS.
        shape: of the input without the batch, None where it is not fixed.
        largest: the largest batch that it is made for; 0 where there is none.
        outputs: the names of its outputs, in order.
        opened: a context manager that gives what runs (n, C, H, W) to the outputs by name.
    """

    path: pathlib.Path
    kind: str
    precision: str
    shape: tuple[int | None, ...]
    largest: int
    outputs: tuple[str, ...]
    opened: Callable[[], contextlib.AbstractContextManager[Run]]

    @property
    def title(self) -> str:
        """As in "model.fp16.onnx (ONNX, fp16)"."""
        return f"{self.path.name} ({self.kind}, {self.precision})"


def assumptions_of(path: pathlib.Path) -> dict[str, str]:
    """The assumptions that an ONNX file or an engine was made under; empty for other files, or where none stand there.

    Raises:
        InputRejected: the file cannot be read.
    """
    if is_checkpoint(path):
        return {}
    if kind_of_file(path) == ONNX:
        metadata = {entry.key: entry.value for entry in graph_from_file(path).structure.metadata_props}
        return _strings(metadata.get("assumptions", "{}"))
    sidecar = sidecar_path(path)
    return dict(manifest_from_file(sidecar).assumptions) if sidecar.is_file() else {}


def contender_from_path(path: pathlib.Path, request: Request) -> Contender:
    """Opens a file.

    Args:
        path: the file.
        request: what is said, or assumed, about a checkpoint; its path does not matter.

    Raises:
        InputRejected: it cannot be read, or is none of the three.
        VerificationFailed: it holds an operation that no RepVGG has, a weight that is not a number, or codes that ONNX
            and TensorRT read differently.
        SdkMissing: an engine that cannot run here.
    """
    if is_checkpoint(path):
        return _checkpoint(path, dataclasses.replace(request, path=path))
    return _onnx(path) if kind_of_file(path) == ONNX else _engine(path)


def _checkpoint(path: pathlib.Path, request: Request) -> Contender:
    try:
        network = network_from_checkpoint(checkpoint_from_path(path, request.weights), request)
    except NotFinite as error:
        raise VerificationFailed(str(error)) from error
    architecture = network.architecture

    def run(batch: NDArray[np.float32]) -> dict[str, NDArray[np.floating]]:
        outputs = outputs_of_network(architecture, network.tensors, torch.from_numpy(batch).double())
        return {name: value.numpy() for name, value in outputs.items()}

    shape = (architecture.in_channels, *request.size)
    names = tuple(output.name for output in architecture.outputs)
    return Contender(path, "checkpoint", "float64", shape, 0, names, lambda: contextlib.nullcontext(run))


def _onnx(path: pathlib.Path) -> Contender:
    graph = graph_from_file(path)
    _check_graph(graph, path)
    inputs = [value for value in graph.structure.graph.input if value.name not in graph.weights]
    image, outputs = inputs[0].name, tuple(value.name for value in graph.structure.graph.output)
    batch, *shape = _shape(inputs[0], path)
    try:
        checked(graph)
    except VerificationFailed as error:
        raise VerificationFailed(f"{path}: {error}; export it again") from error
    precision = _precision(graph)
    if precision == "fp16":
        inferred = Graph(onnx.shape_inference.infer_shapes(graph.structure), graph.weights)
        twin = next(known.twin for known in PRECISIONS if known.name == precision)
        session = functools.partial(session_from_graph, twin(inferred) if twin else inferred, image)
    elif precision == "int8":  # as it is written: kernels for INT8 round in other places
        session = functools.partial(session_from_graph, graph, image)
    else:
        session = functools.partial(session_from_file, path, image)

    @contextlib.contextmanager
    def opened() -> Iterator[Run]:
        yield functools.partial(_in_batches_of, batch, session().run)

    return Contender(path, "ONNX", precision, tuple(shape), batch or 0, outputs, opened)


def _precision(graph: Graph) -> str:
    """Of EXACTNESS; INT8 whatever the floats between its codes are."""
    if any(node.op_type in QUANTIZATION for node in graph.structure.graph.node):
        return "int8"
    return "fp16" if any(array.dtype == np.float16 for array in graph.weights.values()) else "fp32"


def _engine(path: pathlib.Path) -> Contender:
    @contextlib.contextmanager
    def opened() -> Iterator[Run]:
        with load(path) as runner:
            source = runner.inputs[0].name
            yield lambda batch: runner.run({source: batch})

    manifest = checked_engine(path)[1]
    if manifest is None:
        raise InputRejected(f"{path}: no sidecar says what it is; build it again")
    if manifest.precision not in EXACTNESS:
        raise InputRejected(
            f"{path}: its precision is {manifest.precision}; this version compares {', '.join(EXACTNESS[1:])}"
        )
    (image,) = manifest.inputs
    shape = tuple(extent if isinstance(extent, int) else None for extent in image["shape"][1:])
    names = tuple(output["name"] for output in manifest.outputs)
    largest = manifest.profile[image["name"]][2][0]
    return Contender(path, "engine", manifest.precision, shape, largest, names, opened)


def _check_graph(graph: Graph, path: pathlib.Path) -> None:
    nodes = graph.structure.graph.node
    foreign = [node for node in nodes if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATIONS]
    if foreign:
        names = listed([f"{node.op_type} {node.name or node.output[0]}" for node in foreign], 3)
        raise VerificationFailed(f"{path}: a foreign operation: {names}; a deployed RepVGG has {', '.join(OPERATIONS)}")
    bad = [name for name, array in graph.weights.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    if bad:
        raise VerificationFailed(f"{path}: weight {listed(bad, 3)}: NaN or infinite; export it again")
    inputs = [value for value in graph.structure.graph.input if value.name not in graph.weights]
    if len(inputs) != 1 or not graph.structure.graph.output:
        raise VerificationFailed(
            f"{path}: {len(inputs)} inputs and {len(graph.structure.graph.output)} outputs; a RepVGG has one input"
        )
    ambiguous = dialect_problems(graph)
    if ambiguous:
        raise VerificationFailed(f"{path}: not the same to ONNX and TensorRT: {listed(ambiguous, 3)}")


def _shape(value: onnx.ValueInfoProto, path: pathlib.Path) -> list[int | None]:
    """The input's shape; None where a dimension is not fixed."""
    tensor = value.type.tensor_type
    shape = [dimension.dim_value or None for dimension in tensor.shape.dim]
    if tensor.elem_type != onnx.TensorProto.FLOAT or len(shape) != 4:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        raise VerificationFailed(f"{path}: its input is {kind} with {len(shape)} dimensions, not float32 (N, C, H, W)")
    return shape


def _in_batches_of(size: int | None, run: Run, batch: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
    """For a graph whose batch is fixed: in parts of ``size``, the last one filled up with its first image."""
    if size is None:
        return run(batch)
    parts = []
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
        parts.append({name: value[: len(part)] for name, value in run(filled).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _strings(text: str) -> dict[str, str]:
    try:
        found: Any = json.loads(text)
    except ValueError:
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, Mapping) else {}
