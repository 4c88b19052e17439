"""Where an engine's answers are wrong: which layer of it departs first.

    layers        every ReLU's result and every head's, in the order of the graph, then the graph's own outputs
    copy          the engine's typed ONNX file with all of them as outputs, compiled for this GPU in its own process
    departure     of a layer: its result by that engine, against ONNX Runtime's on the CPU by the very same copy

A layer departs that is beyond the gate of the engine's precision, top-1 left aside; all that come after the first are
computed from its result. The copy is made without reading the graph: protocol buffers merge messages that are written
one after the other, so the bytes of ModelProto{graph{output: [...]}} behind the file's add the outputs and touch
nothing else. Each output has its tensor's own element type, which ONNX Runtime infers.

More outputs are more to be written, so a compiler may choose other kernels: no departure in the copy does not acquit
the engine.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.backends.backend import TensorDescription
from engines.compilation import CompilerProcess
from engines.compiler import Options, Request
from engines.errors import InputRejected, SdkMissing
from engines.files import write_whole
from engines.golden import golden_from_file
from engines.integrity import checked_engine, sdk_of
from engines.judgement import gate_of_engine
from engines.kind import graph_of_engine
from engines.manifest import Manifest
from engines.onnx_file import DTYPES, OnnxFile, onnx_file_from_path
from engines.parity import Gate, compare
from engines.protobuf import VARINT, prefix
from engines.receipts.figures import Layer, layer_passes
from engines.runner import load
from engines.sdk import RTX_CARDS, Sdk, gpu_compute_capability
from engines.sizes import Sizes
from engines.verification import answers_to_golden

LAYER_OPERATIONS = ("Relu", "Gemm")
COPY_NAME = "layers.onnx"
ENGINE_NAME = "layers.engine"

_GRAPH, _GRAPH_OUTPUT = 7, 12
_NAME, _TYPE, _TENSOR_TYPE, _ELEMENT_TYPE, _SHAPE, _DIM = 1, 2, 1, 1, 2, 1


def layer_names(onnx: OnnxFile) -> tuple[str, ...]:
    """The tensors to be looked at, in the order in which the graph makes them."""
    made = [node.outputs[0] for node in onnx.nodes if node.op_type in LAYER_OPERATIONS]
    return tuple(dict.fromkeys([*made, *(value.name for value in onnx.outputs)]))


def with_outputs(model: bytes, outputs: Sequence[TensorDescription]) -> bytes:
    """A serialized ModelProto whose graph has further outputs.

    Args:
        model: the file's bytes, which come first as they are.
        outputs: to be added; with the dtype "undefined" their type is left for whoever reads the graph to infer.
    """
    added = b"".join(_message(_GRAPH_OUTPUT, _value_info(output)) for output in outputs)
    return model + _message(_GRAPH, added)


def _value_info(value: TensorDescription) -> bytes:
    """A ValueInfoProto; of its shape only the rank is said, since the graph's own operations give the extents."""
    named = _message(_NAME, value.name.encode())
    if value.dtype == DTYPES[0]:
        return named
    element = bytes([_ELEMENT_TYPE << 3 | VARINT, DTYPES.index(value.dtype)])
    shape = _message(_SHAPE, _message(_DIM, b"") * len(value.shape))
    return named + _message(_TYPE, _message(_TENSOR_TYPE, element + shape))


def _message(number: int, content: bytes) -> bytes:
    return prefix(number, len(content)) + content


def layers_of_engine(engine: pathlib.Path, *, device: int = 0) -> tuple[Layer, ...]:
    """Compiles the copy for the GPU ``device`` and compares it, layer by layer, on the golden images.

    Raises:
        InputRejected: the engine, its graph or its golden vectors cannot be used.
        SdkMissing: there is no such GPU, or the SDK or ONNX Runtime is not here.
        CompilerRefused: the compiler takes the graph, and not the copy.
        DeviceFailed: a call to the GPU failed.
    """
    header, manifest = checked_engine(engine)
    capability = gpu_compute_capability(device)
    if capability is None:
        raise SdkMissing(f"{engine}: no GPU answers here, and layers are computed on nothing else")
    onnx = None if manifest is None else graph_of_engine(engine, manifest.sha256["onnx"])
    if manifest is None or onnx is None:
        raise InputRejected(f"{engine}: the typed graph that it was made from is not beside it; copy it along")
    golden = golden_from_file(engine.parent / manifest.golden)
    gate = gate_of_engine(manifest.precision, manifest.tolerance)
    with tempfile.TemporaryDirectory(prefix="layers-") as folder:
        copy, compiled = pathlib.Path(folder) / COPY_NAME, pathlib.Path(folder) / ENGINE_NAME
        names = write_copy(onnx, copy)
        with load(copy) as runner:
            reference = answers_to_golden(runner, golden)
        compile_copy(copy, compiled, sdk_of(header), manifest, capability)
        with load(compiled, device=device, allow_unverified=True) as runner:
            found = answers_to_golden(runner, golden)
    return tuple(layer_from_results(name, reference[name], found[name], gate) for name in names)


def write_copy(onnx: pathlib.Path, copy: pathlib.Path) -> tuple[str, ...]:
    """Writes the typed ONNX file ``onnx`` with every layer as an output; returns the layers' names.

    Raises:
        InputRejected: it is no ONNX file, or ONNX Runtime refuses the copy.
        SdkMissing: ONNX Runtime is not here.
    """
    file = onnx_file_from_path(onnx)
    content, names = onnx.read_bytes(), layer_names(file)
    there = {value.name for value in file.outputs}
    untyped = [TensorDescription(name, DTYPES[0], ()) for name in names if name not in there]
    write_whole(copy, with_outputs(content, untyped))
    with load(copy) as runner:
        typed = [value for value in runner.outputs if value.name not in there]
    write_whole(copy, with_outputs(content, typed))
    return names


def compile_copy(copy: pathlib.Path, engine: pathlib.Path, sdk: Sdk, manifest: Manifest, capability: int) -> None:
    """Compiles for one card, with the profile of the engine in question up to its optimum, which saves memory.

    Raises:
        SdkMissing, CompilerRefused, OutputFailed: see ``engines.compilation.CompilerProcess.result``.
    """
    ((least, best, _),) = manifest.profile.values()
    cards = (capability,) if not sdk.needs_gpu and capability in RTX_CARDS else ()
    batch = (least[0], best[0], best[0])
    with CompilerProcess(sdk) as process:
        process.submit(Request(str(copy), str(engine), batch, cards, Options(), _sizes(manifest)))
        process.result()


def _sizes(manifest: Manifest) -> Sizes | None:
    """The profile's heights and widths where the graph leaves them free."""
    (image,) = manifest.inputs
    if all(isinstance(extent, int) for extent in image["shape"][1:]):
        return None
    least, best, most = ((shape[2], shape[3]) for shape in manifest.profile[image["name"]])
    return least, best, most


def layer_from_results(name: str, reference: NDArray[np.floating], found: NDArray[np.floating], gate: Gate) -> Layer:
    """Compares a layer's results (n, ...) of two computations of one graph."""
    rows = len(reference)
    comparison = compare(reference.reshape(rows, -1), found.reshape(rows, -1))
    figures = (comparison.relative_error, comparison.sqnr_db, comparison.non_finite)
    return Layer(name, *figures, passed=layer_passes(gate, *figures))
