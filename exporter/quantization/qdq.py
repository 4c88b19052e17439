"""The typed ONNX graph of a quantized network, as TensorRT and ONNX Runtime read it.

In front of each INT8 layer, and nowhere else, codes are made and turned back:

    x -> QuantizeLinear -> DequantizeLinear -> Conv or Gemm          scale (), zero point int8 0
    codes of its weight -> DequantizeLinear ---^                     scale (out,) with axis 0, or ()

A compiler multiplies the codes themselves and puts the scales behind the sum. It does so only where the pair stands
right in front of the layer: behind the ReLU (and SE) of the block before and never between a Conv and its ReLU, which
then stay one kernel. The bias is a float. Zero points are always written, and int8: an absent one means uint8 to ONNX
and int8 to TensorRT, which gives two networks, and neither says a word.

In a form whose dtype is float16 everything else computes in half between a Cast behind the float32 input and a Cast
before each float32 output; what is an output and read inside, too, is read before that Cast. Scales take the dtype of
what they scale; float16 ones need opset 19.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from exporter.onnx_graph import Graph, checked
from exporter.quantization.dialect import HALF_OPSET
from exporter.quantization.form import Form
from exporter.quantization.quantized import Quantized, QuantizedLayer

HALF_IR_VERSION = 9
"""The format of files that came with HALF_OPSET."""


def graph_from_quantized(quantized: Quantized) -> Graph:
    """Writes a quantized network down as a typed graph; weights in INT8 are their codes, under the weight's name.

    Raises:
        VerificationFailed: onnx's checker or shape inference rejects the graph.
    """
    float_graph = quantized.graph
    writer = _Writer(quantized)
    nodes = list(writer.nodes())
    structure = onnx.ModelProto()
    structure.CopyFrom(float_graph.structure)
    del structure.graph.node[:], structure.graph.value_info[:]
    structure.graph.node.extend(nodes)
    images = [value for value in structure.graph.input if value.name not in float_graph.weights]
    declared = [_declaration(name, array) for name, array in writer.weights.items()]
    del structure.graph.input[:]
    structure.graph.input.extend([*images, *declared])
    if quantized.form.dtype == np.float16:
        _raise_to_half(structure)
    return checked(Graph(onnx.shape_inference.infer_shapes(structure, strict_mode=True), writer.weights))


class _Writer:
    """One walk over the float32 graph's nodes; ``weights`` grows by scales and zero points on the way."""

    def __init__(self, quantized: Quantized) -> None:
        self.form, self.layers = quantized.form, quantized.layers
        self.graph = quantized.graph.structure.graph
        layers = [(node, self.layers[node.name]) for node in self.graph.node if node.name in self.layers]
        codes = {node.input[1]: layer.weight for node, layer in layers}
        given = {**quantized.graph.weights, **codes, **{node.input[2]: layer.bias for node, layer in layers}}
        self.weights = {name: _in_form(array, self.form) for name, array in given.items()}
        self._pairs: dict[tuple[str, float], str] = {}
        self._half: dict[str, str] = {}

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """The nodes of the typed graph, each behind what it reads."""
        outputs = {value.name for value in self.graph.output}
        if self.form.dtype == np.float16:
            for value in self.graph.input:
                if value.name not in self.weights:
                    self._half[value.name] = f"{value.name}/half"
                    yield _cast(value.name, self._half[value.name], value.name, TensorProto.FLOAT16)
            self._half |= {name: f"{name}/half" for name in outputs}
        for node in self.graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.output[:] = [self._half.get(name, name) for name in node.output]
            if node.name in self.layers:
                yield from self._quantized(copy, self.layers[node.name])
            else:
                copy.input[:] = [self._half.get(name, name) for name in node.input]
                yield copy
            for name in node.output:
                if name in outputs and name in self._half:
                    yield _cast(self._half[name], name, name, TensorProto.FLOAT)

    def _quantized(self, node: onnx.NodeProto, layer: QuantizedLayer) -> Iterator[onnx.NodeProto]:
        """A Conv or Gemm, behind what makes the codes of its input and what turns them and its weight's back."""
        tensor, weight, bias = node.input
        if (tensor, layer.input_scale) not in self._pairs:
            yield from self._pair(tensor, layer.input_scale)
        yield self._dequantize(weight, weight, layer.weight_scale)
        node.input[:] = [self._pairs[tensor, layer.input_scale], f"{weight}/dequantized", bias]
        yield node

    def _pair(self, tensor: str, scale: float) -> Iterator[onnx.NodeProto]:
        """``tensor`` as codes and back; a second scale of the same tensor has a number in its names."""
        others = sum(name == tensor for name, _ in self._pairs)
        name = f"{tensor}/{others}" if others else tensor
        codes, written = f"{name}/codes", np.array(scale, self.form.dtype)
        dequantize = self._dequantize(name, codes, written)
        source = self._half.get(tensor, tensor)
        inputs = [source, *dequantize.input[1:]]
        yield helper.make_node("QuantizeLinear", inputs, [codes], name=f"{name}/QuantizeLinear")
        yield dequantize
        (self._pairs[tensor, scale],) = dequantize.output

    def _dequantize(self, name: str, codes: str, scale: NDArray[Any]) -> onnx.NodeProto:
        """What turns ``codes`` back; several scales are those of axis 0."""
        self.weights[f"{name}/scale"] = scale.astype(self.form.dtype)
        self.weights[f"{name}/zero_point"] = np.zeros(scale.shape, np.int8)
        inputs = [codes, f"{name}/scale", f"{name}/zero_point"]
        node = helper.make_node("DequantizeLinear", inputs, [f"{name}/dequantized"], name=f"{name}/DequantizeLinear")
        if scale.ndim:
            node.attribute.append(helper.make_attribute("axis", 0))
        return node


def _in_form(array: NDArray[Any], form: Form) -> NDArray[Any]:
    """Floats in the form's dtype; indices and the like as they are."""
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):  # the contract on the file names what is beyond half
        return array.astype(form.dtype, copy=False)


def _cast(source: str, target: str, name: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{name}/Cast", to=to)


def _declaration(name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def _raise_to_half(structure: onnx.ModelProto) -> None:
    """Opset and file format that have float16 scales, where the graph's own are older."""
    for entry in structure.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, HALF_OPSET)
    structure.ir_version = max(structure.ir_version, HALF_IR_VERSION)
