"""Which kind of file something is, by its first bytes and never by its name, and which graph an engine is made from.

An engine begins with its SDK's tag. An ONNX file is a ModelProto: it has no tag, so it is taken for one if its
top-level fields are those of a ModelProto, of the right wire types, up to the last byte. That reads a few dozen bytes,
whatever the size of the weights.

An engine ``model.fp16.engine`` is made from ``model.fp16.onnx`` beside it. INT8 has two graphs: ``model.int8.engine``
is made from ``model.int8.onnx``, or with TensorRT for RTX from ``model.int8.rtx.onnx``. Its sidecar's hash says which.
"""

from __future__ import annotations

import pathlib

from engines.errors import InputRejected
from engines.files import sha256_of
from engines.manifest import sidecar_path
from engines.plan import SDK_TAGS, mapped
from engines.protobuf import LENGTH, VARINT, fields

ONNX = "onnx"
ENGINE_SUFFIX, ONNX_SUFFIX = ".engine", ".onnx"
GRAPH_SUFFIXES = (ONNX_SUFFIX, ".rtx.onnx")
"""In place of an engine's; the second is for TensorRT for RTX alone."""

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
    if path.is_dir():
        raise InputRejected(f"{path}: is a directory; give a file in it")
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
    problem = "not a whole ONNX file" if path.suffix == ONNX_SUFFIX else "neither an ONNX file nor a TensorRT engine"
    raise InputRejected(f"{path}: {problem}; export it again")


def engine_beside(onnx: pathlib.Path) -> pathlib.Path:
    """Where the engine of a typed ONNX file stands: ``model.int8.engine`` for either of its graphs."""
    longest = max((suffix for suffix in GRAPH_SUFFIXES if onnx.name.endswith(suffix)), key=len, default=onnx.suffix)
    return onnx.with_name(onnx.name.removesuffix(longest) + ENGINE_SUFFIX)


def graphs_beside(engine: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Where a graph of the engine may stand, in the order of GRAPH_SUFFIXES; none need be there."""
    return tuple(engine.with_suffix(suffix) for suffix in GRAPH_SUFFIXES)


def graph_of_engine(engine: pathlib.Path, sha256: str | None) -> pathlib.Path | None:
    """The one of ``graphs_beside`` that is there and has this hash; where no hash is given, the first that is there."""
    there = (path for path in graphs_beside(engine) if path.is_file())
    return next((path for path in there if sha256 is None or sha256_of(path) == sha256), None)


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
