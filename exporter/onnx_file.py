"""Reads an ONNX file back as a ``Graph``: its structure parsed, its weights left where they are, mapped.

A file is a ModelProto: a list of fields, each a tag (number and wire type) and a value. The graph is its field 7, a
weight is a field 5 of the graph, and a weight's bytes are the field 9 of that. Only this much is walked by hand, so
that half a gigabyte of weights is neither copied nor parsed; all the rest is given to protobuf.
"""

from __future__ import annotations

import mmap
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from exporter.errors import InputRejected, first_line
from exporter.onnx_graph import Graph

MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW_DATA = 7, 5, 9
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


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
