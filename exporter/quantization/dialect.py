"""What ONNX and TensorRT take for the same network: the rules of INT8 graphs, whoever wrote them.

A compiler does not refuse a graph that breaks one, or not always. Seen with TensorRT for RTX:

    uint8 codes with zero point 0           taken for int8: clamped at 127 where ONNX means 255
    an absent zero point                    the same, since ONNX means uint8 by it
    scales along another axis than 0        compiled to a convolution of floats
    a scale for each channel of an input    compiled to a convolution of floats
    other zero points, int32 biases         refused; so are QLinearConv and its like

A subnormal scale has few bits left, and the reciprocal that a kernel multiplies with may be infinite. All of this is
about single nodes. Where pairs stand is no matter of what is computed, and is for ``exporter.quantized_contract``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from exporter.onnx_graph import Graph

QUANTIZATION = ("QuantizeLinear", "DequantizeLinear")
INTEGER_OPERATIONS = ("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul")
LAYERS = ("Conv", "Gemm")
BIAS = 2
HALF_OPSET = 19
"""The first opset whose QuantizeLinear takes float16."""


def dialect_problems(graph: Graph) -> list[str]:
    """Everything in an INT8 graph that does not mean the same to ONNX and to the compiler; an empty list is a pass."""
    dialect = _Dialect(graph)
    return [problem for node in graph.structure.graph.node for problem in dialect.problems(node)]


class _Dialect:
    """A graph's nodes by what they make, to look at one after the other."""

    def __init__(self, graph: Graph) -> None:
        self._weights = graph.weights
        self._maker = {name: node for node in graph.structure.graph.node for name in node.output}
        versions = {entry.domain: entry.version for entry in graph.structure.opset_import}
        self._opset = versions.get("", versions.get("ai.onnx", 0))

    def problems(self, node: onnx.NodeProto) -> Iterator[str]:
        """What is wrong with one node."""
        if node.op_type in INTEGER_OPERATIONS:
            yield f"{_title(node)} is {node.op_type}, which the compiler refuses: write Q/DQ in front of a Conv"
        if node.op_type in LAYERS and len(node.input) > BIAS and self._is_quantized(node.input[BIAS]):
            yield f"{_title(node)} has a quantized bias: keep it in float"
        if node.op_type not in QUANTIZATION:
            return
        if len(node.input) < 2:
            yield f"{_title(node)} has no scale: write a number"
            return
        yield from self._code_problems(node)
        yield from self._scale_problems(node)
        if node.op_type == "DequantizeLinear":
            yield from self._pair_problems(node)

    def _is_quantized(self, tensor: str) -> bool:
        return tensor in self._maker and self._maker[tensor].op_type in QUANTIZATION

    def _is_weight(self, node: onnx.NodeProto) -> bool:
        """Whether what is quantized is a constant."""
        tensor, seen = node.input[0], set[str]()
        while self._is_quantized(tensor) and tensor not in seen:
            seen.add(tensor)
            tensor = next(iter(self._maker[tensor].input), "")
        return tensor in self._weights

    def _operand(self, node: onnx.NodeProto, index: int) -> NDArray[Any] | None:
        """A scale or zero point; None where there is none, or it is computed."""
        return self._weights.get(node.input[index]) if len(node.input) > index else None

    def _code_problems(self, node: onnx.NodeProto) -> Iterator[str]:
        codes = self._weights.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is not None and codes.dtype != np.int8:
            yield f"{_title(node)} has {codes.dtype} codes: write them as int8"
        if len(node.input) <= 2 or not node.input[2]:
            if node.op_type == "QuantizeLinear":
                yield (
                    f"{_title(node)} has no zero point, which is uint8 to ONNX and int8 to the compiler: "
                    "write an int8 0"
                )
            return
        zero_point = self._operand(node, 2)
        if zero_point is None:
            yield f"{_title(node)} computes its zero point: write an int8 0"
        elif zero_point.dtype != np.int8:
            yield f"{_title(node)} has a {zero_point.dtype} zero point: write it, and the codes, as int8"
        elif zero_point.any():
            yield f"{_title(node)} has a zero point that is not 0"

    def _scale_problems(self, node: onnx.NodeProto) -> Iterator[str]:
        scale = self._operand(node, 1)
        if scale is None:
            yield f"{_title(node)} computes its scale: write a number"
            return
        if scale.dtype.kind != "f":
            yield f"{_title(node)} has a scale of {scale.dtype}: write a float"
            return
        if scale.dtype == np.float16 and self._opset < HALF_OPSET:
            yield f"{_title(node)} has a float16 scale, for which opset {self._opset} is too old: {HALF_OPSET} has them"
        if scale.ndim > 1:
            yield f"{_title(node)} has a scale for each block of numbers: give it one for each index of axis 0"
        elif scale.size > 1 and not self._is_weight(node):
            yield f"{_title(node)} has {scale.size} scales for an activation: give it one"
        elif scale.size > 1 and (axis := _axis(node)) != 0:
            yield f"{_title(node)} has a scale for each index of axis {axis} of a weight: scale axis 0"
        least = np.finfo(scale.dtype).smallest_normal
        wrong = scale[~((scale >= least) & np.isfinite(scale))]
        if wrong.size:
            yield f"{_title(node)} has a scale of {wrong[0]:g}, which is not positive, finite and normal"

    def _pair_problems(self, node: onnx.NodeProto) -> Iterator[str]:
        """Where the codes come from a QuantizeLinear: the two must undo each other."""
        quantize = self._maker.get(node.input[0])
        if quantize is None or quantize.op_type != "QuantizeLinear":
            return
        made, turned = self._operand(quantize, 1), self._operand(node, 1)
        if made is not None and turned is not None and (made.dtype != turned.dtype or not np.array_equal(made, turned)):
            yield f"{_title(node)} has another scale than {_title(quantize)}"


def _axis(node: onnx.NodeProto) -> int:
    """Of the scales; ONNX means 1 where nothing is said."""
    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == "axis"), 1)


def _title(node: onnx.NodeProto) -> str:
    return node.name or next(iter(node.output), node.op_type)
