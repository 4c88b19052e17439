"""The network that a graph describes, computed by torch, in floating point or with codes in some of its layers.

    float       y = W x + b
    INT8        y = (s_x s_w C_w) c_x + b          c_x = clip(round(x / s_x), -128, 127)

which is what a file with these codes computes, up to the rounding of float32's sums. In the float16 form, as ONNX
defines it, what is quantized was half before, and so is a weight that stands for a code; a layer's result that half
cannot hold is infinite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from exporter.onnx_graph import Graph
from exporter.precisions.rescaling import HALF_MAX
from exporter.quantization.form import levels
from exporter.quantization.quantized import Quantized, QuantizedLayer

WEIGHTED = ("Conv", "Gemm")


@dataclasses.dataclass(frozen=True)
class Step:
    """A node of a graph. ``inputs`` are the tensors that are not weights; ``weight`` and ``bias`` name the others."""

    name: str
    operation: str
    inputs: tuple[str, ...]
    output: str
    weight: str
    bias: str
    stride: int
    padding: int
    groups: int

    @property
    def weighted(self) -> bool:
        """Whether it is a Conv or a Gemm."""
        return self.operation in WEIGHTED


@dataclasses.dataclass(frozen=True)
class Steps:
    """A graph's nodes in order, the tensors that can be forgotten behind each, and the names of its outputs."""

    steps: tuple[Step, ...]
    forgotten: tuple[tuple[str, ...], ...]
    image: str
    outputs: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[Step, tuple[str, ...]]]:
        """Each step with what is not read any more behind it."""
        return iter(zip(self.steps, self.forgotten, strict=True))


Layer = Callable[[Step, Tensor], Tensor]
"""Computes a step that has weights."""
Unweighted = Callable[[Step, Sequence[Tensor]], Tensor]
"""Computes any other."""


def steps_of_graph(graph: Graph) -> Steps:
    """The float32 ``graph`` as steps."""
    proto = graph.structure.graph
    steps = tuple(_step(node, graph) for node in proto.node)
    outputs = tuple(value.name for value in proto.output)
    image = next(value.name for value in proto.input if value.name not in graph.weights)
    last = {name: index for index, step in enumerate(steps) for name in (*step.inputs, step.output)}
    forgotten = tuple(
        tuple(name for name, end in last.items() if end == index and name not in outputs) for index in range(len(steps))
    )
    return Steps(steps, forgotten, image, outputs)


def _step(node: onnx.NodeProto, graph: Graph) -> Step:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    weights = [name for name in node.input if name in graph.weights]
    return Step(
        name=node.name,
        operation=node.op_type,
        inputs=tuple(name for name in node.input if name not in graph.weights),
        output=node.output[0],
        weight=weights[0] if node.op_type in WEIGHTED else "",
        bias=weights[1] if node.op_type in WEIGHTED else "",
        stride=attributes.get("strides", [1])[0],
        padding=attributes.get("pads", [0])[0],
        groups=attributes.get("group", 1),
    )


def linear(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A Conv of x (N, in, H, W), or a Gemm of x (N, in)."""
    if step.operation == "Gemm":
        return functional.linear(x, weight, bias)
    return functional.conv2d(x, weight, bias, step.stride, step.padding, 1, step.groups)


def unweighted(step: Step, inputs: Sequence[Tensor]) -> Tensor:
    """Any other node. A ReLU is done in place: nothing else reads what goes into it."""
    x = inputs[0]
    match step.operation:
        case "Relu":
            return x.relu_()
        case "GlobalAveragePool":
            return x.mean(dim=(2, 3), keepdim=True)
        case "Flatten" | "Reshape":
            return x.flatten(1)
        case "Sigmoid":
            return x.sigmoid()
        case "Mul":
            return x * inputs[1]
    raise ValueError(f"{step.name}: {step.operation} is not an operation of a plain network")


def codes_of(x: Tensor, scale: float, bits: int = 8) -> Tensor:
    """X as codes, still in x's dtype; rounds half to even, as QuantizeLinear does."""
    largest = levels(bits)
    return (x / scale).round_().clamp_(-largest - 1, largest)


def float_layer(graph: Graph, dtype: torch.dtype = torch.float32) -> Layer:
    """Computes steps with the graph's own weights, rounded to ``dtype``."""
    tensors = {name: _laid_out(torch.tensor(array).to(dtype).float()) for name, array in graph.weights.items()}

    def computed(step: Step, x: Tensor) -> Tensor:
        return linear(step, x, tensors[step.weight], tensors[step.bias])

    return computed


def quantized_layer(step: Step, x: Tensor, layer: QuantizedLayer, bits: int = 8) -> Tensor:
    """A step in codes of so many ``bits`` for its input."""
    scale = torch.from_numpy(np.asarray(layer.weight_scale))
    weight = torch.from_numpy(layer.weight).float()
    weight = weight * scale.float().reshape(-1, *[1] * (weight.dim() - 1))
    if scale.dtype == torch.float16:
        weight, x = weight.half().float(), x.half().float()
    weight = _laid_out(weight * layer.input_scale)
    result = linear(step, codes_of(x, layer.input_scale, bits), weight, torch.from_numpy(layer.bias))
    if scale.dtype == torch.float16:
        return torch.where(result.abs() <= HALF_MAX, result, torch.inf)
    return result


def _laid_out(weight: Tensor) -> Tensor:
    """As convolutions are fastest in: channels last."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight


def run_steps(steps: Steps, images: Tensor, layer: Layer, unweighted: Unweighted = unweighted) -> dict[str, Tensor]:
    """(N, C, H, W) to the outputs by name."""
    tensors = {steps.image: images}
    for step, forgotten in steps:
        inputs = [tensors[name] for name in step.inputs]
        tensors[step.output] = layer(step, inputs[0]) if step.weighted else unweighted(step, inputs)
        for name in forgotten:
            tensors.pop(name, None)
    return {name: tensors[name] for name in steps.outputs}


class Simulation:
    """What a file with the codes of ``quantized`` computes, up to the rounding of its sums."""

    def __init__(self, quantized: Quantized, activation_bits: int = 8) -> None:
        self._steps = steps_of_graph(quantized.graph)
        self._layers, self._bits = quantized.layers, activation_bits
        half = quantized.form.dtype == np.float16
        self._exact = float_layer(quantized.graph, torch.float16 if half else torch.float32)

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is computed, in order."""
        return self._steps.steps

    @property
    def image(self) -> str:
        """The name of the tensor that images are."""
        return self._steps.image

    def computed(self, step: Step, inputs: Sequence[Tensor]) -> Tensor:
        """One step alone, which may overwrite its ``inputs``."""
        with torch.inference_mode():
            return self._layer(step, inputs[0]) if step.weighted else unweighted(step, inputs)

    def run(self, batch: NDArray[np.float32]) -> Mapping[str, NDArray[np.float32]]:
        """(N, C, H, W) to the outputs by name."""
        with torch.inference_mode():
            images = torch.tensor(batch).contiguous(memory_format=torch.channels_last)
            outputs = run_steps(self._steps, images, self._layer)
        return {name: value.numpy() for name, value in outputs.items()}

    def _layer(self, step: Step, x: Tensor) -> Tensor:
        layer = self._layers.get(step.name)
        return self._exact(step, x) if layer is None else quantized_layer(step, x, layer, self._bits)
