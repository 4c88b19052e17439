"""The contract on an INT8 file: what it must be, held against the codes and scales that it was made from.

What is wrong with Q/DQ graphs is mostly silent. TensorRT takes uint8 codes for int8 ones and clamps them at 127, takes
an absent zero point for an int8 one where ONNX means uint8, and compiles a weight whose scales lie along another axis,
or an activation with a scale for each channel, to a convolution of floats. Hence two sets of rules.

dialect       of any INT8 graph: codes and zero points are int8, zero points are there and 0, an activation has one
              scale, a weight one or one for each index of axis 0, biases are floats, scales are positive, finite and
              normal numbers of their type, and what makes codes and what turns them back have the same
structure     with every QuantizeLinear and DequantizeLinear taken out, the graph is the plain network's, node by node
              (``exporter.contract``)
placement     in front of each INT8 layer's input and weight, and nowhere else: not between a Conv and its ReLU, not on
              a bias, not on an output, not around what is kept
types         everything else has the form's dtype; float32 inputs and outputs are cast where that is float16
numbers       every code, scale, zero point, bias and float weight has the bits that were asked for
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from exporter.architecture import Architecture
from exporter.contract import structure_problems
from exporter.errors import InputRejected, VerificationFailed
from exporter.onnx_file import graph_from_file
from exporter.onnx_graph import Graph, checked, without_declarations
from exporter.quantization.dialect import QUANTIZATION, dialect_problems
from exporter.quantization.form import Form
from exporter.quantization.quantized import Quantized, QuantizedLayer
from exporter.weights import bit_problems


def quantized_contract_problems(path: pathlib.Path, architecture: Architecture, quantized: Quantized) -> list[str]:
    """Reads the file back and says everything that differs from what it must be; an empty list is a pass.

    Args:
        path: the ONNX file.
        architecture: of the plain network.
        quantized: what was to be written.
    """
    try:
        graph = graph_from_file(path)
    except InputRejected as error:
        return [str(error)]
    dialect = dialect_problems(graph)
    try:
        checked(graph)
    except VerificationFailed as error:
        return [*dialect, str(error)]
    written = _Written(graph)
    return [
        *dialect,
        *structure_problems(_without_quantization(without_declarations(graph)), architecture),
        *_placement_problems(written, quantized),
        *_type_problems(graph, quantized.form),
        *_number_problems(written, quantized),
    ]


class _Written:
    """The file's nodes by what they are called, make and read."""

    def __init__(self, graph: Graph) -> None:
        self.weights = graph.weights
        self.nodes = list(graph.structure.graph.node)
        self.outputs = [value.name for value in graph.structure.graph.output]
        self.by_name = {node.name: node for node in self.nodes}
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def made_by(self, tensor: str, operation: str) -> onnx.NodeProto | None:
        """What makes ``tensor``, if that is an ``operation``."""
        node = self.maker.get(tensor)
        return node if node is not None and node.op_type == operation else None

    def operands(self, name: str) -> tuple[onnx.NodeProto | None, onnx.NodeProto | None, onnx.NodeProto | None]:
        """In front of a layer: its input's QuantizeLinear and DequantizeLinear, its weight's DequantizeLinear."""
        node = self.by_name.get(name)
        if node is None or len(node.input) < 2:
            return None, None, None
        dequantize = self.made_by(node.input[0], "DequantizeLinear")
        quantize = None if dequantize is None else self.made_by(dequantize.input[0], "QuantizeLinear")
        return quantize, dequantize, self.made_by(node.input[1], "DequantizeLinear")


def _without_quantization(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in which every node reads what its input was made of before there were codes."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.node[:]
    source: dict[str, str] = {}
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [source.get(name, name) for name in node.input]
        if node.op_type in QUANTIZATION:
            source[node.output[0]] = copy.input[0]
        else:
            plain.graph.node.append(copy)
    return plain


def _placement_problems(written: _Written, quantized: Quantized) -> Iterator[str]:
    belonging: set[str] = set()
    for name in quantized.layers:
        quantize, dequantize, weight = written.operands(name)
        for node, what in ((quantize if dequantize else None, "input"), (weight, "weight")):
            if node is None:
                yield f"{name} is not in INT8: its {what} is no codes"
        belonging |= {node.output[0] for node in (quantize, dequantize, weight) if node is not None}
    for name, reason in quantized.kept.items():
        if any(written.operands(name)):
            yield f"{name} is in INT8, but was to be kept: {reason}"
    for node in written.nodes:
        if node.op_type not in QUANTIZATION:
            continue
        if node.output[0] not in belonging:
            yield f"{node.name or node.op_type} stands {_place(written, node)}, where none belongs"
        for reader in written.readers.get(node.output[0], ()):
            if node.op_type == "QuantizeLinear" and reader.op_type != "DequantizeLinear":
                yield f"{reader.name or reader.op_type} reads the codes {node.output[0]} themselves"
            if node.op_type == "DequantizeLinear" and reader.name not in quantized.layers:
                yield f"{reader.name or reader.op_type} reads {node.output[0]}, which is for INT8 layers alone"
        if node.output[0] in written.outputs:
            yield f"{node.name or node.op_type} stands on the output {node.output[0]}, where none belongs"


def _place(written: _Written, node: onnx.NodeProto) -> str:
    """Where a QuantizeLinear or DequantizeLinear stands, in words."""
    before = node
    while before.op_type in QUANTIZATION and before.input[0] in written.maker:
        before = written.maker[before.input[0]]
    tensor = node.output[0]
    while tensor not in written.outputs and (readers := written.readers.get(tensor)):
        if readers[0].op_type not in QUANTIZATION:
            return f"between {before.name} and {readers[0].name}"
        tensor = readers[0].output[0]
    return f"between {before.name} and the output {tensor}"


def _type_problems(graph: Graph, form: Form) -> Iterator[str]:
    """Casts anywhere but at the border of a float16 network, and tensors of another type than the form's."""
    model = graph.structure.graph
    wanted = helper.np_dtype_to_tensor_dtype(form.dtype)
    cast = wanted != TensorProto.FLOAT
    images = {value.name for value in model.input if value.name not in graph.weights}
    outputs = {value.name for value in model.output}
    for node in model.node:
        at_border = not images.isdisjoint(node.input) or not outputs.isdisjoint(node.output)
        if (node.op_type == "Cast") != (cast and at_border):
            words = "is a Cast where none belongs" if node.op_type == "Cast" else "stands where a Cast belongs"
            yield f"{node.name or node.output[0]} {words}"
    inferred = onnx.shape_inference.infer_shapes(graph.structure).graph.value_info
    for value in inferred:
        kind = value.type.tensor_type.elem_type
        if kind not in (wanted, TensorProto.INT8):
            found, form_type = (TensorProto.DataType.Name(number).lower() for number in (kind, wanted))
            yield f"{value.name} is {found}, not {form_type}"


def _number_problems(written: _Written, quantized: Quantized) -> Iterator[str]:
    """Each array, looked up through the node that reads it; then those that nothing reads."""
    read: set[str] = set()
    weights, dtype = quantized.graph.weights, quantized.form.dtype
    for node in quantized.graph.structure.graph.node:
        layer = quantized.layers.get(node.name)
        for index, name in enumerate(node.input):
            if name not in weights or name not in written.weights:
                continue
            read.add(name)
            if layer is not None and index == 1:
                yield from bit_problems(name, written.weights[name], layer.weight, "the codes that it is made of")
                continue
            exact = weights[name] if layer is None else layer.bias
            yield from _float_problems(name, written.weights[name], exact, dtype)
        if layer is not None:
            yield from _scale_problems(written, node.name, layer, dtype, read)
    yield from (f"weight {name} is missing" for name in weights if name not in written.weights)
    yield from (f"weight {name} belongs to nothing" for name in written.weights if name not in read)


def _float_problems(name: str, written: NDArray[Any], exact: NDArray[Any], dtype: np.dtype[Any]) -> Iterator[str]:
    with np.errstate(over="ignore"):
        expected = exact.astype(dtype)
    if not np.isfinite(expected).all():
        yield f"weight {name} reaches {np.abs(exact).max():.4g}, beyond {dtype}"
    yield from bit_problems(name, written, expected, "the network's")


def _scale_problems(
    written: _Written, name: str, layer: QuantizedLayer, dtype: np.dtype[Any], read: set[str]
) -> Iterator[str]:
    """The scales and zero points in front of a layer; ``read`` grows by their names."""
    quantize, dequantize, weight = written.operands(name)
    scale = np.array(layer.input_scale, dtype)
    if float(scale) != layer.input_scale:
        yield f"{name}'s input scale {layer.input_scale!r} is no number of {dtype}"
    pairs = ((quantize, scale), (dequantize, scale), (weight, layer.weight_scale.astype(dtype)))
    for node, expected in pairs:
        if node is None:
            continue
        names = list(node.input[1:])
        if len(names) < 2 or not all(one in written.weights for one in names):
            yield f"{node.name} has no scale and zero point of its own"
            continue
        read.update(names)
        found, zero_point = (written.weights[one] for one in names)
        yield from bit_problems(names[0], found, expected, f"the scale that {name} was given")
        yield from bit_problems(names[1], zero_point, np.zeros(expected.shape, np.int8), "0")
