"""Reads an ONNX file with numpy alone: what an engine is compiled from, and held against, on a machine without onnx.

A file is a ModelProto (``engines.protobuf`` has the format): nodes by name and the tensors that they read and make,
inputs and outputs with their shapes, weights, metadata. The file is mapped and a weight is a view of it, so that half a
gigabyte is read in milliseconds. Weights may stand in a file beside the model, and nowhere else. Attributes of nodes
that are numbers or text are read. What is not read: other attributes, among them graphs inside nodes, and functions.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import math
import mmap
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.backend import TensorDescription
from engines.errors import InputRejected, first_line
from engines.protobuf import FIXED32, FIXED64, Message

DTYPES = (
    "undefined", "float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool", "float16",
    "float64", "uint32", "uint64", "complex64", "complex128", "bfloat16", "float8e4m3fn", "float8e4m3fnuz",
    "float8e5m2", "float8e5m2fnuz", "uint4", "int4", "float4e2m1", "float8e8m0",
)  # fmt: skip
"""The names of TensorProto.DataType, in the order of their numbers."""

NUMPY_DTYPES = frozenset(DTYPES[1:16]) - {"string"}
EXTERNAL = 1


class _Model(enum.IntEnum):
    IR_VERSION, PRODUCER_NAME, GRAPH, OPSET_IMPORT, METADATA_PROPS = 1, 2, 7, 8, 14


class _Graph(enum.IntEnum):
    NODE, INITIALIZER, INPUT, OUTPUT, SPARSE_INITIALIZER = 1, 5, 11, 12, 15


class _Node(enum.IntEnum):
    INPUT, OUTPUT, NAME, OP_TYPE, ATTRIBUTE, DOMAIN = 1, 2, 3, 4, 5, 7


class _Attribute(enum.IntEnum):
    NAME, FLOAT, INTEGER, TEXT, TENSOR, FLOATS, INTEGERS, TEXTS, TYPE = 1, 2, 3, 4, 5, 7, 8, 9, 20


class _AttributeType(enum.IntEnum):
    FLOAT, INTEGER, TEXT, TENSOR, FLOATS, INTEGERS, TEXTS = 1, 2, 3, 4, 6, 7, 8


class _Value(enum.IntEnum):
    NAME, TYPE = 1, 2


class _Tensor(enum.IntEnum):
    DIMS, DATA_TYPE, SEGMENT, FLOAT_DATA, INT32_DATA, INT64_DATA, NAME, RAW_DATA = 1, 2, 3, 4, 5, 7, 8, 9
    DOUBLE_DATA, UINT64_DATA, EXTERNAL_DATA, DATA_LOCATION = 10, 11, 13, 14


External = Callable[[str], memoryview]
"""Gives the bytes of the file of that name beside the model."""


Attribute = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Node:
    """An operation: ``domain`` is empty for ONNX's own; ``inputs`` and ``outputs`` name tensors, "" an absent one.

    ``attributes`` has those that are numbers, text or lists of either. ``constant`` is the tensor that a Constant is,
    where it is given as one: a view of the file.
    """

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = dataclasses.field(default_factory=dict, hash=False)
    constant: NDArray[Any] | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """A model as it stands in a file. ``inputs`` are those that a caller feeds; ``weights`` are views of the file.

    ``opsets`` has the version of each operator set by its domain, "" for ONNX's own.
    """

    path: pathlib.Path
    producer: str
    opsets: dict[str, int]
    metadata: dict[str, str]
    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]
    nodes: tuple[Node, ...]
    weights: Mapping[str, NDArray[Any]]


def onnx_file_from_path(path: str | os.PathLike[str]) -> OnnxFile:
    """Reads a model of any size, with its weights inside or in files beside it.

    Raises:
        InputRejected: not an ONNX file, or not a whole one, or a weight is of a type that numpy lacks.
    """
    where = pathlib.Path(path)
    try:
        return _onnx_file_from_bytes(_mapped(where), where)
    except (ValueError, OSError, OverflowError) as error:
        raise InputRejected(f"{where}: not a whole ONNX file ({first_line(error)}); export it again") from error


def _mapped(path: pathlib.Path) -> memoryview:
    if not path.is_file():
        raise ValueError(f"no file {path.name} is there")
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _onnx_file_from_bytes(data: memoryview, path: pathlib.Path) -> OnnxFile:
    model = Message(data)
    if _Model.GRAPH not in model or not model.integer(_Model.IR_VERSION):
        raise ValueError("it holds no model")
    graph = model.message(_Model.GRAPH)
    if _Graph.SPARSE_INITIALIZER in graph:
        raise ValueError("it has sparse weights, which are not read")
    beside = functools.cache(lambda name: _mapped(path.parent / name))
    weights = _unique("weights", [_weight(tensor, beside) for tensor in graph.messages(_Graph.INITIALIZER)])
    inputs = tuple(_description(value) for value in graph.messages(_Graph.INPUT))
    return OnnxFile(
        path=path,
        producer=model.text(_Model.PRODUCER_NAME),
        opsets=_unique("opsets", [(entry.text(1), entry.integer(2)) for entry in model.messages(_Model.OPSET_IMPORT)]),
        metadata=_entries("metadata", model.messages(_Model.METADATA_PROPS)),
        inputs=tuple(value for value in inputs if value.name not in weights),  # before IR version 4 weights stand there
        outputs=tuple(_description(value) for value in graph.messages(_Graph.OUTPUT)),
        nodes=tuple(_node(message, beside) for message in graph.messages(_Graph.NODE)),
        weights=weights,
    )


def _unique(what: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        twice, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"two {what} are called {twice!r}")
    return names


def _entries(what: str, messages: list[Message]) -> dict[str, str]:
    """A map of text, kept as messages of a key (1) and a value (2)."""
    return _unique(what, [(entry.text(1), entry.text(2)) for entry in messages])


def _node(message: Message, beside: External) -> Node:
    op_type = message.text(_Node.OP_TYPE)
    stored = message.messages(_Node.ATTRIBUTE)
    attributes = [(entry.text(_Attribute.NAME), _attribute(entry)) for entry in stored]
    return Node(
        name=message.text(_Node.NAME),
        op_type=op_type,
        domain=message.text(_Node.DOMAIN),
        inputs=tuple(message.texts(_Node.INPUT)),
        outputs=tuple(message.texts(_Node.OUTPUT)),
        attributes={name: value for name, value in _unique("attributes", attributes).items() if value is not None},
        constant=_constant(stored, beside) if op_type == "Constant" else None,
    )


def _attribute(entry: Message) -> Attribute | None:
    """An AttributeProto's value; None for a tensor, a graph and the like, and for bytes that are no text."""
    kind = entry.integer(_Attribute.TYPE)
    if kind == _AttributeType.INTEGER:
        return entry.integer(_Attribute.INTEGER)
    if kind == _AttributeType.INTEGERS:
        return tuple(entry.integers(_Attribute.INTEGERS))
    if kind in (_AttributeType.FLOAT, _AttributeType.FLOATS):
        field = _Attribute.FLOAT if kind == _AttributeType.FLOAT else _Attribute.FLOATS
        numbers = tuple(np.frombuffer(entry.fixed(field, FIXED32), np.float32).tolist())
        return numbers if kind == _AttributeType.FLOATS else (numbers or (0.0,))[-1]
    try:
        if kind == _AttributeType.TEXT:
            return entry.text(_Attribute.TEXT)
        return tuple(entry.texts(_Attribute.TEXTS)) if kind == _AttributeType.TEXTS else None
    except UnicodeDecodeError:
        return None


def _constant(stored: Sequence[Message], beside: External) -> NDArray[Any] | None:
    """The tensor that a Constant is; None where it is given in another way, or is of a type that numpy lacks."""
    for entry in stored:
        if entry.integer(_Attribute.TYPE) == _AttributeType.TENSOR:
            tensor = entry.message(_Attribute.TENSOR)
            return _weight(tensor, beside)[1] if _dtype(tensor.integer(_Tensor.DATA_TYPE)) in NUMPY_DTYPES else None
    return None


def _dtype(number: int) -> str:
    """The name of a TensorProto.DataType."""
    if not 0 < number < len(DTYPES):
        raise ValueError(f"there is no tensor type {number}")
    return DTYPES[number]


def _description(value: Message) -> TensorDescription:
    """A ValueInfoProto's name, element type and shape, which stand in its type's only field for tensors."""
    tensor_type, element_type, shape, dim, dim_value = 1, 1, 2, 1, 1
    name, tensor = value.text(_Value.NAME), value.message(_Value.TYPE).message(tensor_type)
    if shape not in tensor:
        raise ValueError(f"{name!r} is no tensor of a known shape")
    dims = tensor.message(shape).messages(dim)
    extents = [entry.integer(dim_value) if dim_value in entry else None for entry in dims]
    return TensorDescription(name, _dtype(tensor.integer(element_type)), tuple(extents))


def _weight(tensor: Message, beside: External) -> tuple[str, NDArray[Any]]:
    """A TensorProto's name and value."""
    called, shape = tensor.text(_Tensor.NAME), tuple(tensor.integers(_Tensor.DIMS))
    dtype = _dtype(tensor.integer(_Tensor.DATA_TYPE))
    if dtype not in NUMPY_DTYPES:
        raise ValueError(f"weight {called} is {dtype}, which numpy lacks")
    if _Tensor.SEGMENT in tensor or min(shape, default=0) < 0:
        raise ValueError(f"weight {called} has no whole shape")
    values = _values(tensor, called, np.dtype(dtype), beside)
    if values.size != math.prod(shape):
        raise ValueError(f"weight {called} has {values.size} numbers where {math.prod(shape)} belong")
    return called, values.reshape(shape)


def _values(tensor: Message, name: str, dtype: np.dtype[Any], beside: External) -> NDArray[Any]:
    """Its numbers as one vector: raw bytes here or in a file beside the model, or a list of numbers."""
    if tensor.integer(_Tensor.DATA_LOCATION) == EXTERNAL:
        raw = _external(_entries(f"entries of weight {name}", tensor.messages(_Tensor.EXTERNAL_DATA)), name, beside)
        return np.frombuffer(raw, dtype)
    if _Tensor.RAW_DATA in tensor:
        return np.frombuffer(tensor.blocks(_Tensor.RAW_DATA)[-1], dtype)
    if dtype == np.float32:
        return np.frombuffer(tensor.fixed(_Tensor.FLOAT_DATA, FIXED32), dtype)
    if dtype == np.float64:
        return np.frombuffer(tensor.fixed(_Tensor.DOUBLE_DATA, FIXED64), dtype)
    if dtype.kind == "c":
        raise ValueError(f"weight {name} is a list of complex numbers, which is not read")
    wide = {"int64": _Tensor.INT64_DATA, "uint64": _Tensor.UINT64_DATA, "uint32": _Tensor.UINT64_DATA}
    numbers = np.array(tensor.integers(wide.get(dtype.name, _Tensor.INT32_DATA)), np.int64)
    if dtype == np.float16:  # each number is the pattern of its bits
        return _narrowed(numbers, np.dtype(np.uint16), name).view(np.float16)
    return numbers.view(np.uint64) if dtype == np.uint64 else _narrowed(numbers, dtype, name)


def _narrowed(numbers: NDArray[np.int64], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    narrow = numbers.astype(dtype)
    if not np.array_equal(narrow, numbers):
        raise ValueError(f"weight {name} has numbers that are no {dtype.name}")
    return narrow


def _external(where: Mapping[str, str], name: str, beside: External) -> memoryview:
    location = where.get("location", "")
    if pathlib.PurePath(location).name != location:
        raise ValueError(f"weight {name} is kept outside the model's own directory")
    data = beside(location)
    start = int(where.get("offset", "0"))
    size = int(where.get("length", str(len(data) - start)))
    if not 0 <= start <= start + size <= len(data):
        raise ValueError(f"weight {name} reaches past the end of {location}")
    return data[start : start + size]
