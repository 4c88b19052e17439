"""ONNX files from and to a ``Graph``, without a second copy of the weights on either way.

A file is a ModelProto: a list of fields, each a tag (number and wire type) and a value. The graph is its field 7, a
weight is a field 5 of the graph, and a weight's bytes are the field 9 of that. Only this much is done by hand, so that
half a gigabyte of weights is written one at a time, and read by mapping the file; all the rest is protobuf's.
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
from exporter.errors import InputRejected, first_line
from exporter.onnx_graph import Graph, without_declarations

MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW_DATA = 7, 5, 9
ONE_FILE_LIMIT = 2**31 - 1
EXTERNAL_ALIGNMENT = 4096
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


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
    size = len(inner) + sum(len(_field(GRAPH_INITIALIZER, tensor.size)) + tensor.size for tensor in tensors)
    file.write(model.SerializeToString())
    file.write(_field(MODEL_GRAPH, size))
    file.write(inner)
    for tensor in tensors:
        file.write(_field(GRAPH_INITIALIZER, tensor.size))
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
        return len(self.head) + len(_field(TENSOR_RAW_DATA, self.array.nbytes)) + self.array.nbytes

    def write(self, file: BinaryIO) -> None:
        file.write(self.head)
        if self.array is not None:
            file.write(_field(TENSOR_RAW_DATA, self.array.nbytes))
            file.write(np.ascontiguousarray(self.array).data)


def _tensor_protos(weights: Mapping[str, NDArray[Any]]) -> Iterator[_LazyTensor]:
    for name, array in weights.items():
        yield _LazyTensor(_tensor_head(name, array).SerializeToString(), array)


def _tensor_head(name: str, array: NDArray[Any]) -> TensorProto:
    return TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)


def _field(number: int, size: int) -> bytes:
    """Tag and length of a length-delimited protobuf field."""
    encoded, value = bytearray([number << 3 | _LENGTH]), size
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


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
    try:
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return _graph_from_bytes(data, path.parent)
    except Exception as error:  # protobuf, numpy and the file system each raise their own
        raise InputRejected(f"{path}: not a whole ONNX file ({first_line(error)}); export it again") from error


def _graph_from_bytes(data: memoryview, folder: pathlib.Path) -> Graph:
    model, graph = bytearray(), bytearray()
    weights: dict[str, NDArray[Any]] = {}
    for number, whole, value in _fields(data):
        if number != MODEL_GRAPH:
            model += whole
            continue
        for inner_number, inner_whole, inner_value in _fields(value):
            if inner_number != GRAPH_INITIALIZER:
                graph += inner_whole
                continue
            head, array = _weight(inner_value, folder)
            if head.name in weights:
                raise ValueError(f"two weights are called {head.name}")
            weights[head.name] = array
    structure = onnx.ModelProto.FromString(bytes(model))
    structure.graph.MergeFromString(bytes(graph))
    for name, array in weights.items():
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        structure.graph.input.append(helper.make_tensor_value_info(name, dtype, array.shape))
    return Graph(structure, weights)


def _weight(data: memoryview, folder: pathlib.Path) -> tuple[TensorProto, NDArray[Any]]:
    """A weight's description without its bytes, and its value as a view of them."""
    head, raw = bytearray(), memoryview(b"")
    for number, whole, value in _fields(data):
        if number == TENSOR_RAW_DATA:
            raw = value
        else:
            head += whole
    tensor = TensorProto.FromString(bytes(head))
    if tensor.data_location == TensorProto.EXTERNAL:
        raw = _external(tensor, folder)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return tensor, np.frombuffer(raw, dtype).reshape(tuple(tensor.dims))


def _external(tensor: TensorProto, folder: pathlib.Path) -> memoryview:
    where = {entry.key: entry.value for entry in tensor.external_data}
    location = where["location"]
    if pathlib.PurePath(location).name != location:
        raise ValueError(f"weight {tensor.name} is kept outside the model's own directory")
    with open(folder / location, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = int(where["offset"])
    return data[start : start + int(where["length"])]


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Each field's number, its bytes with the tag, and its value's bytes."""
    position = 0
    while position < len(data):
        start = position
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == _VARINT:
            _, end = _varint(data, position)
        elif wire == _LENGTH:
            size, position = _varint(data, position)
            end = position + size
        elif wire in (_FIXED32, _FIXED64):
            end = position + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"wire type {wire} at byte {start}")
        if end > len(data):
            raise ValueError("it is cut short")
        yield tag >> 3, data[start:end], data[position:end]
        position = end


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The number at ``position``, and where it ends."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
