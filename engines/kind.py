"""Which kind of file something is, by its first bytes and never by its name.

An engine begins with its SDK's tag. An ONNX file is a ModelProto: it has no tag, so it is taken for one if its
top-level fields are those of a ModelProto, of the right wire types, up to the last byte. That reads a few dozen bytes,
whatever the size of the weights.
"""

from __future__ import annotations

import pathlib

from engines.errors import InputRejected
from engines.manifest import sidecar_path
from engines.plan import SDK_TAGS, mapped
from engines.protobuf import LENGTH, VARINT, fields

ONNX = "onnx"
ENGINE_SUFFIX = ".engine"
MODEL_GRAPH = 7
MODEL_FIELDS = {1: VARINT, 5: VARINT, **dict.fromkeys((2, 3, 4, 6, MODEL_GRAPH, 8, 14, 20, 25, 26), LENGTH)}
LARGEST_FIELD_COUNT = 10_000


def kind_of_file(path: pathlib.Path) -> str:
    """``"onnx"``, or the SDK that made the engine: ``"tensorrt"`` or ``"tensorrt_rtx"``.

    A file that looks like neither counts as an engine if it is called one or has a sidecar: what is wrong with it is
    then said by the checks of an engine.

    Raises:
        InputRejected: it cannot be read, or is neither.
    """
    if not path.is_file():
        raise InputRejected(f"{path}: no such file; check the path")
    data = memoryview(mapped(path)) if path.stat().st_size else memoryview(b"")
    sdk = SDK_TAGS.get(bytes(data[:4]))
    if sdk is not None:
        return sdk
    if path.suffix == ENGINE_SUFFIX or sidecar_path(path).exists():
        return "tensorrt"
    if _is_model(data):
        return ONNX
    problem = "not a whole ONNX file" if path.suffix == ".onnx" else "neither an ONNX file nor a TensorRT engine"
    raise InputRejected(f"{path}: {problem}; export it again")


def _is_model(data: memoryview) -> bool:
    numbers = set()
    try:
        for count, field in enumerate(fields(data)):
            if MODEL_FIELDS.get(field.number) != field.wire or count > LARGEST_FIELD_COUNT:
                return False
            numbers.add(field.number)
    except ValueError:
        return False
    return MODEL_GRAPH in numbers
