"""ONNX files from and to a ``Graph``, without a second copy of the weights on either way.

A file is a ModelProto (``engines.protobuf`` has the format). The graph is its field 7, a weight is a field 5 of the
graph, and its bytes are the field 9 of that. Only this much is written by hand, so that half a gigabyte of weights
goes to the disk one at a time, and ``engines.onnx_file`` reads them by mapping the file; all the rest is protobuf's.
"""

from __future__ import annotations

import dataclasses
import mmap
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from engines.files import reported_write_errors
from engines.onnx_file import onnx_file_from_path
from engines.protobuf import fields, prefix
from exporter.errors import InputRejected, first_line
from exporter.onnx_graph import Graph, without_declarations

MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW_DATA = 7, 5, 9
ONE_FILE_LIMIT = 2**31 - 1
EXTERNAL_ALIGNMENT = 4096


def write_onnx(graph: Graph, path: pathlib.Path, limit: int = ONE_FILE_LIMIT) -> list[pathlib.Path]:
    """Writes the model to ``path``: one file up to ``limit`` bytes, else with its weights in ``<path>.data``.

    Weights go to the disk one at a time, so that the peak memory is that of the largest one.

    Returns:
        The files written.

    Raises:
        OutputFailed: a file cannot be written.
    """
    total = sum(array.nbytes for array in graph.weights.values()) + graph.structure.ByteSize()
    with reported_write_errors(path):
        if total + 64 * len(graph.weights) > limit:
            return _write_with_external_data(graph, path)
        with open(path, "wb") as file:
            _write_model(graph, file, list(_tensor_protos(graph.weights)))
        return [path]


def _write_model(graph: Graph, file: BinaryIO, tensors: list[_LazyTensor]) -> None:
    """Writes ModelProto's bytes by hand around the weights."""
    model = without_declarations(graph)
    inner = model.graph.SerializeToString()
    model.ClearField("graph")
    size = len(inner) + sum(len(prefix(GRAPH_INITIALIZER, tensor.size)) + tensor.size for tensor in tensors)
    file.write(model.SerializeToString())
    file.write(prefix(MODEL_GRAPH, size))
    file.write(inner)
    for tensor in tensors:
        file.write(prefix(GRAPH_INITIALIZER, tensor.size))
        tensor.write(file)


@dataclasses.dataclass(frozen=True)
class _LazyTensor:
    """A TensorProto: its fields but for raw_data, and the array that raw_data is."""

    head: bytes
    array: NDArray[Any] | None

    @property
    def size(self) -> int:
        if self.array is None:
            return len(self.head)
        return len(self.head) + len(prefix(TENSOR_RAW_DATA, self.array.nbytes)) + self.array.nbytes

    def write(self, file: BinaryIO) -> None:
        file.write(self.head)
        if self.array is not None:
            file.write(prefix(TENSOR_RAW_DATA, self.array.nbytes))
            file.write(np.ascontiguousarray(self.array).data)


def _tensor_protos(weights: Mapping[str, NDArray[Any]]) -> Iterator[_LazyTensor]:
    for name, array in weights.items():
        yield _LazyTensor(_tensor_head(name, array).SerializeToString(), array)


def _tensor_head(name: str, array: NDArray[Any]) -> TensorProto:
    return TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)


def _write_with_external_data(graph: Graph, path: pathlib.Path) -> list[pathlib.Path]:
    data_path = path.with_name(path.name + ".data")
    tensors = []
    with open(data_path, "wb") as data:
        for name, array in graph.weights.items():
            data.write(bytes(-data.tell() % EXTERNAL_ALIGNMENT))
            head = _tensor_head(name, array)
            head.data_location = TensorProto.EXTERNAL
            where = {"location": data_path.name, "offset": str(data.tell()), "length": str(array.nbytes)}
            for key, value in where.items():
                head.external_data.add(key=key, value=value)
            data.write(np.ascontiguousarray(array).data)
            tensors.append(_LazyTensor(head.SerializeToString(), None))
    with open(path, "wb") as file:
        _write_model(graph, file, tensors)
    return [path, data_path]


def graph_from_file(path: pathlib.Path) -> Graph:
    """Reads a model of any size, with its weights inside or in an external file beside it.

    Raises:
        InputRejected: not an ONNX file, or not a whole one.
    """
    weights = onnx_file_from_path(path).weights
    try:
        structure = _structure_from_file(path)
    except Exception as error:  # protobuf and the file system each raise their own
        raise InputRejected(f"{path}: not a whole ONNX file ({first_line(error)}); export it again") from error
    for name, array in weights.items():
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        structure.graph.input.append(helper.make_tensor_value_info(name, dtype, array.shape))
    return Graph(structure, weights)


def _structure_from_file(path: pathlib.Path) -> onnx.ModelProto:
    """The model without its weights, which are not so much as looked at."""
    model, graph = bytearray(), bytearray()
    with open(path, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    for field in fields(data):
        if field.number != MODEL_GRAPH:
            model += field.whole
            continue
        for inner in fields(field.value):
            if inner.number != GRAPH_INITIALIZER:
                graph += inner.whole
    structure: onnx.ModelProto = onnx.ModelProto.FromString(bytes(model))
    structure.graph.MergeFromString(bytes(graph))
    return structure
