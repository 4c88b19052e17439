"""Plain network to ONNX: built node by node, written in one pass.

A ``Graph`` keeps the model's structure (a ``ModelProto`` whose weights are declared as inputs) apart from the weights
(numpy arrays by name). The structure is a few kilobytes, so that simplifying, checking and rewriting it costs nothing,
and the weights are copied once, into the file.

Names are the contract with what comes later: block ``stage1.0`` makes the nodes ``stage1.0/Conv`` and ``stage1.0/Relu``
and the weights ``stage1.0.weight`` and ``stage1.0.bias``; an engine's audit finds them again by those names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.errors import first_line
from exporter.architecture import OUTPUT, Architecture, Block
from exporter.errors import VerificationFailed
from exporter.plain import Plain

OPSET = 17
IR_VERSION = 8
INPUT, BATCH, HEIGHT, WIDTH = "input", "N", "height", "width"


@dataclasses.dataclass(frozen=True)
class Graph:
    """An ONNX model in two parts: ``structure`` declares each of ``weights`` as an input of the same name."""

    structure: onnx.ModelProto
    weights: Mapping[str, NDArray[Any]]


def structure_from_architecture(architecture: Architecture, size: tuple[int, int] | None) -> onnx.ModelProto:
    """The float32 graph of the plain network for images of ``size`` (height, width), or any; the batch is dynamic."""
    nodes = [node for block, source in _chain(architecture) for node in _block_nodes(architecture, block, source)]
    if architecture.classes is not None:
        nodes += _head_nodes(architecture.tensor_names[architecture.blocks[-1].name])
    frame: Sequence[int | str] = size or (HEIGHT, WIDTH)
    image = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [BATCH, architecture.in_channels, *frame])
    declared = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in _weight_shapes(architecture)
    ]
    graph = helper.make_graph(nodes, "repvgg", [image, *declared], list(_outputs(architecture, size)))
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="repvgg-exporter"
    )


def _outputs(architecture: Architecture, size: tuple[int, int] | None) -> Iterator[onnx.ValueInfoProto]:
    for output in architecture.outputs:
        frame: Sequence[int | str] = ()
        if output.block is not None:
            frame = (f"{output.name}_{HEIGHT}", f"{output.name}_{WIDTH}")
            frame = frame if size is None else architecture.size_behind(output.block, size)
        yield helper.make_tensor_value_info(output.name, TensorProto.FLOAT, [BATCH, output.channels, *frame])


def onnx_from_plain(plain: Plain, structure: onnx.ModelProto, metadata: Mapping[str, str]) -> Graph:
    """The plain network's weights in the simplified ``structure`` of its architecture.

    Raises:
        VerificationFailed: onnx's checker or shape inference rejects the structure.
    """
    return with_metadata(checked(Graph(structure, weights_from_plain(plain))), metadata)


def weights_from_plain(plain: Plain) -> dict[str, NDArray[np.float32]]:
    """The plain network's weights by their names in the graph, not copied."""
    return {name.replace(".fused.", "."): tensor.numpy() for name, tensor in plain.tensors.items()}


def with_metadata(graph: Graph, metadata: Mapping[str, str]) -> Graph:
    """The graph with exactly these ``metadata_props``."""
    structure = onnx.ModelProto()
    structure.CopyFrom(graph.structure)
    del structure.metadata_props[:]
    helper.set_model_props(structure, dict(metadata))
    return Graph(structure, graph.weights)


def checked(graph: Graph) -> Graph:
    """The graph itself, once onnx's checker and strict shape inference have passed on it."""
    try:
        onnx.checker.check_model(graph.structure, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationFailed(f"onnx checker: {first_line(error)}") from error
    return graph


def with_initializers(graph: Graph) -> onnx.ModelProto:
    """One in-memory model with its weights inside. Copies them: for small graphs and tests."""
    model = without_declarations(graph)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in graph.weights.items())
    return model


def without_declarations(graph: Graph) -> onnx.ModelProto:
    """The structure as it stands in a file: weights are not inputs."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.structure)
    inputs = [value for value in model.graph.input if value.name not in graph.weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


def _weight_shapes(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    for block in architecture.blocks:
        out = block.out_channels
        yield f"{block.name}.weight", (out, block.in_channels // block.groups, block.kernel, block.kernel)
        yield f"{block.name}.bias", (out,)
        if block.se_channels is not None:
            yield f"{block.name}.se.reduce.weight", (block.se_channels, out, 1, 1)
            yield f"{block.name}.se.reduce.bias", (block.se_channels,)
            yield f"{block.name}.se.expand.weight", (out, block.se_channels, 1, 1)
            yield f"{block.name}.se.expand.bias", (out,)
    if architecture.classes is not None:
        yield "head.weight", (architecture.classes, architecture.blocks[-1].out_channels)
        yield "head.bias", (architecture.classes,)


def _chain(architecture: Architecture) -> Iterator[tuple[Block, str]]:
    """Each block with the name of the tensor that goes into it."""
    source = INPUT
    for block in architecture.blocks:
        yield block, source
        source = architecture.tensor_names[block.name]


def _block_nodes(architecture: Architecture, block: Block, source: str) -> Iterator[onnx.NodeProto]:
    name, result = block.name, architecture.tensor_names[block.name]
    yield helper.make_node(
        "Conv",
        [source, f"{name}.weight", f"{name}.bias"],
        [f"{name}/conv"],
        name=f"{name}/Conv",
        kernel_shape=[block.kernel] * 2,
        pads=[block.padding] * 4,
        strides=[block.stride, block.stride],
        group=block.groups,
    )
    if block.se_channels is None:
        yield helper.make_node("Relu", [f"{name}/conv"], [result], name=f"{name}/Relu")
    elif block.se_after_activation:
        yield helper.make_node("Relu", [f"{name}/conv"], [f"{name}/relu"], name=f"{name}/Relu")
        yield from _se_nodes(name, f"{name}/relu", result)
    else:
        yield from _se_nodes(name, f"{name}/conv", f"{name}/se")
        yield helper.make_node("Relu", [f"{name}/se"], [result], name=f"{name}/Relu")


def _se_nodes(name: str, total: str, product: str) -> Iterator[onnx.NodeProto]:
    """Squeeze-and-excitation of ``total`` with 1x1 convolutions; the tensors within are named ``<block>/se/...``."""
    se = f"{name}/se"
    reduce, expand = ([f"{name}.se.{part}.weight", f"{name}.se.{part}.bias"] for part in ("reduce", "expand"))
    yield helper.make_node("GlobalAveragePool", [total], [f"{se}/pooled"], name=f"{se}/Pool")
    yield helper.make_node(
        "Conv", [f"{se}/pooled", *reduce], [f"{se}/reduced"], name=f"{se}/reduce/Conv", kernel_shape=[1, 1]
    )
    yield helper.make_node("Relu", [f"{se}/reduced"], [f"{se}/active"], name=f"{se}/Relu")
    yield helper.make_node(
        "Conv", [f"{se}/active", *expand], [f"{se}/expanded"], name=f"{se}/expand/Conv", kernel_shape=[1, 1]
    )
    yield helper.make_node("Sigmoid", [f"{se}/expanded"], [f"{se}/factor"], name=f"{se}/Sigmoid")
    yield helper.make_node("Mul", [total, f"{se}/factor"], [product], name=f"{se}/Mul")


def _head_nodes(source: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("GlobalAveragePool", [source], ["head/pooled"], name="head/Pool"),
        helper.make_node("Flatten", ["head/pooled"], ["head/features"], name="head/Flatten", axis=1),
        helper.make_node("Gemm", ["head/features", "head.weight", "head.bias"], [OUTPUT], name="head/Gemm", transB=1),
    ]
