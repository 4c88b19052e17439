"""Typed ONNX files made node by node, of the shapes that networks have: what a compiler and its audit are tried on.

They are named as the exporter names them: block ``stage1.0`` makes ``stage1.0/Conv``, ``stage1.0/Relu`` and the weights
``stage1.0.weight`` and ``stage1.0.bias``; in half precision each output is cast to float32 from ``<output>/half``.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {"fp16": (TensorProto.FLOAT16, np.float16), "fp32": (TensorProto.FLOAT, np.float32)}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution with its ReLU; ``se`` is None, "before" or "after" the ReLU; ``groups`` 0 is depthwise.

    ``kept`` computes it in float32 between two casts, as is done in half precision where numbers would overflow.
    """

    name: str
    channels: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    se: str | None = None
    se_channels: int = 8
    kept: bool = False


class TypedGraph:
    """Nodes and weights of one precision, and the images that they take."""

    def __init__(self, precision="fp16", *, channels=3, size=(32, 32), seed=0):
        self.precision, self.size, self.channels = precision, size, channels
        self.kind, self.dtype = TYPES[precision]
        self.nodes, self.weights, self.outputs = [], {}, []
        self._random = np.random.default_rng(seed)
        self.width, self.last, self.scale = channels, "input", 1
        if precision == "fp16":
            self._node("Cast", ["input"], "input/half", name="input/Cast", to=self.kind)
            self.last = "input/half"

    def _node(self, operation, inputs, output, **attributes):
        self.nodes.append(helper.make_node(operation, inputs, [output], **attributes))
        return output

    def _cast(self, source, kind):
        return self._node("Cast", [source], f"{source}/cast", name=f"{source}/Cast", to=kind)

    def _stored(self, name, *shape):
        fan_in = max(1, int(np.prod(shape[1:])))
        value = self._random.normal(0, (2 / fan_in) ** 0.5 if len(shape) > 1 else 0.1, shape)
        self.weights[name] = value.astype(self.dtype)
        return name

    def layer(self, layer):
        name, groups, dtype = layer.name, layer.groups or self.width, self.dtype
        if layer.kept:
            self.last, self.dtype = self._cast(self.last, TensorProto.FLOAT), np.float32
        weight = self._stored(f"{name}.weight", layer.channels, self.width // groups, layer.kernel, layer.kernel)
        bias = self._stored(f"{name}.bias", layer.channels)
        total = self._node(
            "Conv", [self.last, weight, bias], f"{name}/conv", name=f"{name}/Conv", group=groups,
            kernel_shape=[layer.kernel] * 2, pads=[layer.kernel // 2] * 4, strides=[layer.stride] * 2,
        )  # fmt: skip
        self.width, self.scale = layer.channels, self.scale * layer.stride
        if layer.se == "before":
            total = self._se(name, total, layer.se_channels, f"{name}/se")
        after = layer.se == "after"
        total = self._node("Relu", [total], f"{name}/active" if after else name, name=f"{name}/Relu")
        self.last = self._se(name, total, layer.se_channels, name) if after else total
        if layer.kept:
            self.last, self.dtype = self._cast(self.last, self.kind), dtype
        return self

    def _se(self, name, total, squeezed, output):
        se = f"{name}/se"
        reduce = [
            self._stored(f"{name}.se.reduce.weight", squeezed, self.width, 1, 1),
            self._stored(f"{name}.se.reduce.bias", squeezed),
        ]
        expand = [
            self._stored(f"{name}.se.expand.weight", self.width, squeezed, 1, 1),
            self._stored(f"{name}.se.expand.bias", self.width),
        ]
        self._node("GlobalAveragePool", [total], f"{se}/pooled", name=f"{se}/Pool")
        self._node("Conv", [f"{se}/pooled", *reduce], f"{se}/reduced", name=f"{se}/reduce/Conv", kernel_shape=[1, 1])
        self._node("Relu", [f"{se}/reduced"], f"{se}/active", name=f"{se}/Relu")
        self._node("Conv", [f"{se}/active", *expand], f"{se}/expanded", name=f"{se}/expand/Conv", kernel_shape=[1, 1])
        self._node("Sigmoid", [f"{se}/expanded"], f"{se}/factor", name=f"{se}/Sigmoid")
        return self._node("Mul", [total, f"{se}/factor"], output, name=f"{se}/Mul")

    def layers(self, *layers):
        for layer in layers:
            self.layer(layer)
        return self

    def output(self, name, shape):
        """Makes the tensor that was made last an output."""
        maker = next(node for node in self.nodes if node.output[0] == self.last)
        if self.precision == "fp16":
            made = f"{name}/half"
            maker.output[0] = made
            self._node("Cast", [made], name, name=f"{name}/Cast", to=TensorProto.FLOAT)
            self.last = made
        else:
            maker.output[0] = self.last = name
        self.outputs.append((name, ["N", *shape]))
        return self

    def features(self, name):
        return self.output(name, [self.width, *(-(-side // self.scale) for side in self.size)])

    def head(self, classes):
        self._node("GlobalAveragePool", [self.last], "head/pooled", name="head/Pool")
        self._node("Flatten", ["head/pooled"], "head/features", name="head/Flatten", axis=1)
        weight, bias = self._stored("head.weight", classes, self.width), self._stored("head.bias", classes)
        self.last = self._node("Gemm", ["head/features", weight, bias], "scores", name="head/Gemm", transB=1)
        return self.output("output", [classes])

    def model(self, *, sizes=None):
        """``sizes`` as in "160x160:224x224:320x320" makes height and width free."""

        def free(name, shape):
            return [*shape[:2], f"{name}height", f"{name}width"] if sizes and len(shape) == 4 else shape

        size = sizes or f"{self.size[0]}x{self.size[1]}"
        graph = helper.make_graph(
            self.nodes, "graph",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, free("", ["N", self.channels, *self.size]))],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, free(f"{name}_", shape))
                for name, shape in self.outputs
            ],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        model.producer_name = "repvgg-exporter"
        numbers = ",".join(["0.5"] * self.channels)
        assumptions = {"strides": "1", "eps": "1e-05", "size": size, "mean": numbers, "std": numbers}
        helper.set_model_props(
            model,
            {"precision": self.precision, "checkpoint_sha256": "0" * 64, "assumptions": json.dumps(assumptions)},
        )
        onnx.checker.check_model(model, full_check=True)
        return model
