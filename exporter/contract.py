"""The graph contract: what an ONNX file on the disk must be, held against the plain network that it was made from.

body     per block exactly one Conv and one ReLU on its result, in the order of the network, and nothing else;
         with SE, between the two or behind them: pooling, Conv, ReLU, Conv, Sigmoid, Mul
head     one GlobalAveragePool, one Flatten or Reshape, one Gemm; nothing of it in a backbone
outputs  the classifier's, or the results of the blocks that were asked for, each under its name
typed    Casts, only where float32 and half meet
numbers  each Conv's stride, padding and groups are the block's; every weight has the bits of the fused one, in the
         type that was asked for, times the power of two that its channels were rescaled by (``exporter.weights``)
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from exporter.architecture import OUTPUT, Architecture, Block
from exporter.errors import ReportedError
from exporter.onnx_file import graph_from_file
from exporter.onnx_graph import INPUT, checked, without_declarations
from exporter.weights import weight_problems

SE_OPERATIONS = {"GlobalAveragePool": 1, "Conv": 2, "Relu": 1, "Sigmoid": 1, "Mul": 1}


def operation_counts(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operation stands in the graph."""
    return dict(collections.Counter(node.op_type for node in model.graph.node))


def expected_counts(architecture: Architecture) -> dict[str, int]:
    """The operations of the float32 graph of ``architecture``."""
    se_blocks = sum(block.se_channels is not None for block in architecture.blocks)
    counts = collections.Counter({"Conv": len(architecture.blocks), "Relu": len(architecture.blocks)})
    if architecture.classes is not None:
        counts.update({"GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1})
    counts.update({operation: count * se_blocks for operation, count in SE_OPERATIONS.items() if se_blocks})
    return dict(counts)


def contract_problems(
    path: pathlib.Path,
    architecture: Architecture,
    weights: Mapping[str, NDArray[np.float32]],
    half: Collection[str],
    exponents: Mapping[str, NDArray[np.int64]],
) -> list[str]:
    """Reads the file back and says everything that differs from what it must be; an empty list is a pass.

    Args:
        path: the ONNX file.
        architecture: of the plain network.
        weights: the fused float32 weights by their names in the graph.
        half: the names of those that must stand in the file rounded to float16.
        exponents: by the name of a Conv, the powers of two (C,) that the channels of its result were multiplied by.
    """
    try:
        graph = checked(graph_from_file(path))
    except ReportedError as error:
        return [str(error)]
    structure = structure_problems(without_declarations(graph), architecture)
    return [*structure, *weight_problems(graph.weights, architecture, weights, half, exponents)]


def structure_problems(model: onnx.ModelProto, architecture: Architecture) -> list[str]:
    """All but the numbers: operations, inputs and outputs, and who reads what; Casts are looked through.

    Args:
        model: whose weights are not declared as inputs.
        architecture: of the plain network.
    """
    return [
        *_count_problems(model, architecture),
        *_interface_problems(model, architecture),
        *_wiring_problems(model, architecture),
    ]


def _count_problems(model: onnx.ModelProto, architecture: Architecture) -> list[str]:
    found, expected = operation_counts(model), expected_counts(architecture)
    if architecture.classes is not None:
        found["Flatten"] = found.get("Flatten", 0) + found.pop("Reshape", 0)
    found.pop("Cast", None)
    different = sorted(op for op in found.keys() | expected.keys() if found.get(op, 0) != expected.get(op, 0))
    return [f"{found.get(op, 0)} {op} where {expected.get(op, 0)} belong" for op in different]


def _interface_problems(model: onnx.ModelProto, architecture: Architecture) -> list[str]:
    def described(values: Any) -> list[tuple[str, int, int, int]]:
        shapes = [(value, value.type.tensor_type.shape.dim) for value in values]
        return [(v.name, v.type.tensor_type.elem_type, len(d), d[1].dim_value if len(d) > 1 else 0) for v, d in shapes]

    problems = []
    if described(model.graph.input) != [(INPUT, onnx.TensorProto.FLOAT, 4, architecture.in_channels)]:
        problems.append(f"its input is not {INPUT}, float32 (N, {architecture.in_channels}, H, W)")
    outputs = [
        (output.name, onnx.TensorProto.FLOAT, 2 if output.block is None else 4, output.channels)
        for output in architecture.outputs
    ]
    if described(model.graph.output) != outputs:
        shapes = (
            f"{name}, float32 (N, {channels}{', H, W' if rank == 4 else ''})" for name, _, rank, channels in outputs
        )
        problems.append(f"its outputs are not {' and '.join(shapes)}")
    if not model.graph.input or not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        problems.append("its batch is not dynamic")
    return problems


class _Wires:
    """Who makes and who reads a tensor, looking through Casts."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.by_name = {node.name: node for node in model.graph.node}
        self.maker = {output: node for node in model.graph.node for output in node.output}

    def source(self, tensor: str) -> str:
        """The tensor that ``tensor`` is a Cast of, or itself."""
        while tensor in self.maker and self.maker[tensor].op_type == "Cast":
            tensor = self.maker[tensor].input[0]
        return tensor

    def made_by(self, tensor: str, name: str, operation: str) -> bool:
        """Whether ``tensor`` comes from the node ``name``, which is an ``operation``."""
        node = self.maker.get(self.source(tensor))
        return node is not None and node.name == name and node.op_type == operation


def _wiring_problems(model: onnx.ModelProto, architecture: Architecture) -> list[str]:
    wires = _Wires(model)
    problems = []
    source = INPUT
    for block in architecture.blocks:
        conv, relu = wires.by_name.get(f"{block.name}/Conv"), wires.by_name.get(f"{block.name}/Relu")
        if conv is None or relu is None or conv.op_type != "Conv" or relu.op_type != "Relu":
            problems.append(f"{block.name} has no Conv and ReLU of its own")
            break
        if wires.source(conv.input[0]) != source:
            problems.append(f"{conv.name} does not read {source}")
        if list(conv.input[1:]) != [f"{block.name}.weight", f"{block.name}.bias"]:
            problems.append(f"{conv.name} does not read its own weight and bias")
        if _geometry(conv) != ([block.stride] * 2, [block.padding] * 4, block.groups, [1, 1]):
            problems.append(f"{conv.name} has (strides, pads, group, dilations) {_geometry(conv)}")
        problems += _activation_problems(wires, block, relu)
        last = (
            relu if block.se_channels is None or not block.se_after_activation else wires.by_name.get(_product(block))
        )
        if last is None:
            problems.append(f"{block.name} has no product of its SE")
            break
        source = last.output[0]
        output = next((output for output in architecture.outputs if output.block == block.name), None)
        if output is not None and wires.source(output.name) != source:
            problems.append(f"{output.name} is not the result of {block.name}")
    return problems if architecture.classes is None else [*problems, *_head_problems(wires, source)]


def _product(block: Block) -> str:
    return f"{block.name}/se/Mul"


def _activation_problems(wires: _Wires, block: Block, relu: onnx.NodeProto) -> list[str]:
    """Whether the block's Conv, ReLU and SE come in the order of its family."""
    conv = f"{block.name}/Conv"
    if block.se_channels is None:
        return [] if wires.made_by(relu.input[0], conv, "Conv") else [f"{relu.name} does not read its own Conv"]
    if block.se_after_activation:
        if not wires.made_by(relu.input[0], conv, "Conv"):
            return [f"{relu.name} does not read its own Conv"]
        return _product_problems(wires, block, wires.by_name.get(_product(block)), (relu.name, "Relu"))
    scaled = wires.maker.get(wires.source(relu.input[0]))
    if scaled is None or scaled.op_type != "Mul":
        return [f"{relu.name} does not read its SE's product"]
    return _product_problems(wires, block, scaled, (conv, "Conv"))


def _product_problems(wires: _Wires, block: Block, product: onnx.NodeProto | None, whole: tuple[str, str]) -> list[str]:
    """SE's product is that of what ``whole`` makes (a node's name and operation) and of its own Sigmoid."""
    if product is None or product.op_type != "Mul" or len(product.input) != 2:
        return [f"{block.name} has no product of its SE"]
    if not wires.made_by(product.input[1], f"{block.name}/se/Sigmoid", "Sigmoid"):
        return [f"{product.name} does not read its SE's Sigmoid"]
    if not wires.made_by(product.input[0], *whole):
        return [f"{product.name} does not read {whole[0]}"]
    return _squeeze_problems(wires, block, whole)


def _squeeze_problems(wires: _Wires, block: Block, whole: tuple[str, str]) -> list[str]:
    """SE's factor comes, step by step, from what ``whole`` makes."""
    se = f"{block.name}/se"
    before = whole
    for name, operation, weights in (
        ("Pool", "GlobalAveragePool", None),
        ("reduce/Conv", "Conv", "reduce"),
        ("Relu", "Relu", None),
        ("expand/Conv", "Conv", "expand"),
        ("Sigmoid", "Sigmoid", None),
    ):
        node = wires.by_name.get(f"{se}/{name}")
        own = [] if weights is None else [f"{block.name}.se.{weights}.{part}" for part in ("weight", "bias")]
        if node is None or not wires.made_by(node.input[0], *before) or list(node.input[1:]) != own:
            return [f"{se}/{name} does not read {', '.join([before[0], *own])}"]
        before = (node.name, operation)
    return []


def _head_problems(wires: _Wires, source: str) -> list[str]:
    gemm = wires.maker.get(wires.source(OUTPUT))
    if gemm is None or gemm.op_type != "Gemm" or list(gemm.input[1:]) != ["head.weight", "head.bias"]:
        return [f"{OUTPUT} does not come from the classifier's Gemm"]
    if _is_scaled(gemm):
        return [f"{gemm.name} is not x W^T + b"]
    flat = wires.maker.get(wires.source(gemm.input[0]))
    pool = wires.maker.get(wires.source(flat.input[0])) if flat is not None else None
    if pool is None or pool.op_type != "GlobalAveragePool" or wires.source(pool.input[0]) != source:
        return [f"the head does not pool {source}"]
    return []


def _is_scaled(gemm: onnx.NodeProto) -> bool:
    """Whether a Gemm is anything but x W^T + b."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in gemm.attribute}
    wanted = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    defaults = {**wanted, "transB": 0}
    return any(values.get(name, defaults[name]) != value for name, value in wanted.items())


def _geometry(conv: onnx.NodeProto) -> tuple[list[int], list[int], int, list[int]]:
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in conv.attribute}
    strides, pads = values.get("strides", [1, 1]), values.get("pads", [0, 0, 0, 0])
    return list(strides), list(pads), values.get("group", 1), list(values.get("dilations", [1, 1]))
