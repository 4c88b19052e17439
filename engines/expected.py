"""What an engine must hold, by the typed ONNX graph that it was compiled from: every Conv and Gemm with its numbers.

A weight is stored in floating point, or as int8 codes behind a DequantizeLinear. Then the input comes from a
QuantizeLinear and a DequantizeLinear of one scale, and the node computes

    input_scale * weight_scale * (codes of the weight * codes of the input) + bias

Compilers take other graphs, too, and make something else of them without a word: uint8 codes are clamped at 127, and
zero points that are absent are taken for int8 although they are uint8. Such graphs are refused here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputRejected
from engines.onnx_file import Node, OnnxFile


@dataclasses.dataclass(frozen=True)
class Scales:
    """What the codes of an INT8 node stand for; ``quantizer`` is the node that makes those of its input.

    ``of_input`` is (), ``of_weight`` () or (out,); both float32, or both float16.
    """

    quantizer: str
    of_input: NDArray[Any]
    of_weight: NDArray[Any]


@dataclasses.dataclass(frozen=True)
class ExpectedConvolution:
    """A Conv of the typed graph: ``weight`` (out, in / groups, height, width) and ``bias`` (out,) in its dtype.

    In INT8 the weight is codes, and there are ``scales``.
    """

    node: str
    relu_node: str | None
    weight: NDArray[Any]
    bias: NDArray[Any]
    scales: Scales | None = None


@dataclasses.dataclass(frozen=True)
class ExpectedMatrix:
    """A Gemm of the typed graph: ``weight`` (classes, channels) and ``bias`` (classes,) in its dtype, or codes."""

    node: str
    weight: NDArray[Any]
    bias: NDArray[Any]
    scales: Scales | None = None


def expected_from_onnx(onnx: OnnxFile) -> tuple[list[ExpectedConvolution], list[ExpectedMatrix]]:
    """What an engine compiled from a typed ONNX file must hold; see ``expected_from_nodes``."""
    return expected_from_nodes(onnx.nodes, onnx.weights, str(onnx.path))


def expected_from_nodes(
    nodes: Sequence[Node], weights: Mapping[str, NDArray[Any]], where: str
) -> tuple[list[ExpectedConvolution], list[ExpectedMatrix]]:
    """Every Conv, with the ReLU that reads it, and every Gemm; ``where`` names the graph in errors.

    Raises:
        InputRejected: one of them has no bias, or reads a weight or bias that is not stored in the file, or codes that
            are not int8 around a zero point of 0.
    """
    graph = _Graph(weights, {output: node for node in nodes for output in node.outputs}, where)
    relu_of = {node.inputs[0]: node.name for node in nodes if node.op_type == "Relu" and node.inputs}
    convolutions = [
        ExpectedConvolution(node.name, relu_of.get(node.outputs[0]), *operands)
        for node in nodes
        if node.op_type == "Conv"
        for operands in [graph.operands(node)]
    ]
    matrices = [ExpectedMatrix(node.name, *graph.operands(node)) for node in nodes if node.op_type == "Gemm"]
    return convolutions, matrices


@dataclasses.dataclass(frozen=True)
class _Graph:
    """``made_by`` has the node that makes each tensor."""

    weights: Mapping[str, NDArray[Any]]
    made_by: Mapping[str, Node]
    where: str

    def operands(self, node: Node) -> tuple[NDArray[Any], NDArray[Any], Scales | None]:
        """Weight, bias, and the scales where the weight is codes."""
        whole = len(node.inputs) == 3 and node.outputs and node.inputs[2] in self.weights
        dequantizer = self.made_by.get(node.inputs[1]) if whole else None
        if whole and node.inputs[1] in self.weights:
            return self.weights[node.inputs[1]], self.weights[node.inputs[2]], None
        if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
            raise self._rejected(f"{node.op_type} {node.name} has no stored weight and bias")
        of_weight = self._scale(node, dequantizer)
        codes = self.weights.get(dequantizer.inputs[0])
        if codes is None or codes.dtype != np.int8 or of_weight.shape not in ((), codes.shape[:1]):
            raise self._rejected(
                f"{node.op_type} {node.name} has no stored int8 codes of one scale, or one per channel"
            )
        quantizer, of_input = self._of_input(node)
        bias = self.weights[node.inputs[2]]
        if not of_input.dtype == of_weight.dtype == bias.dtype:
            raise self._rejected(f"{node.op_type} {node.name} has scales and a bias of different types")
        return codes, bias, Scales(quantizer.name, of_input, of_weight)

    def _of_input(self, node: Node) -> tuple[Node, NDArray[Any]]:
        """The QuantizeLinear before a node with codes for a weight, and its scale."""
        dequantizer = self.made_by.get(node.inputs[0])
        quantizer = self.made_by.get(dequantizer.inputs[0]) if dequantizer is not None and dequantizer.inputs else None
        if (
            dequantizer is None
            or quantizer is None
            or (quantizer.op_type, dequantizer.op_type) != ("QuantizeLinear", "DequantizeLinear")
        ):
            raise self._rejected(
                f"{node.op_type} {node.name} has codes for a weight, and an input that is not quantized"
            )
        scale, again = self._scale(node, quantizer), self._scale(node, dequantizer)
        if scale.shape != () or scale.dtype != again.dtype or scale != again:
            raise self._rejected(f"the input of {node.op_type} {node.name} is not quantized and restored by one scale")
        return quantizer, scale

    def _scale(self, node: Node, coder: Node) -> NDArray[Any]:
        """The scale of a QuantizeLinear or DequantizeLinear beside ``node``, whose zero points are int8 and 0."""
        stored = [self.weights.get(name) for name in coder.inputs[1:]]
        scale, zero_point = stored if len(stored) == 2 else (None, None)
        if zero_point is None or zero_point.dtype != np.int8 or zero_point.any():
            raise self._rejected(
                f"{coder.op_type} {coder.name} has no int8 zero point of 0, and compilers silently take it for one"
            )
        if scale is None or scale.dtype not in (np.float16, np.float32) or not (scale > 0).all():
            raise self._rejected(f"{coder.op_type} {coder.name}, beside {node.name}, has no stored scale above 0")
        return scale

    def _rejected(self, problem: str) -> InputRejected:
        return InputRejected(f"{self.where}: {problem}; export it with python -m exporter")
