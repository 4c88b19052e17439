"""INT8 ONNX files made node by node: networks of random codes and scales, in the two forms that are exported.

Block ``stage1.0`` makes ``stage1.0/Conv``, ``stage1.0/Relu`` and the weights ``stage1.0.weight`` and ``stage1.0.bias``,
behind the scales ``stage1.0.weight/scale`` and ``stage1.0/input/scale``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.compilation import CompilerProcess
from engines.compiler import Request
from engines.expected import expected_from_onnx
from engines.onnx_file import onnx_file_from_path
from engines.plan import plan_from_bytes
from engines.sdk import SDKS


@dataclasses.dataclass(frozen=True)
class Form:
    """``per_channel`` scales of weights; ``dtype`` of all that is not codes."""

    name: str
    per_channel: bool
    dtype: type
    opset: int

    @property
    def kind(self):
        return helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))


RTX = Form("rtx", per_channel=False, dtype=np.float16, opset=19)
PORTABLE = Form("portable", per_channel=True, dtype=np.float32, opset=17)


@dataclasses.dataclass(frozen=True)
class Block:
    """A convolution with its ReLU; ``groups`` 0 is depthwise, ``kept`` is not quantized, ``se`` its squeezed channels.

    ``scale`` is that of its input; None for a random one.
    """

    name: str
    channels: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    kept: bool = False
    relu: bool = True
    se: int = 0
    scale: float | None = None


EVERYTHING = (
    Block("stage0.0", 16, stride=2),
    Block("stage1.0", 32, stride=2),
    Block("stage1.1", 32, groups=4),
    Block("stage1.2", 32, kernel=1),
    Block("stage2.0", 32, kept=True),
    Block("stage2.1", 32, se=8),
    Block("stage3.0", 32),
    Block("stage3.1", 32),
)
"""Every kind of block that there is; the last two have weights of one shape."""


class QuantizedGraph:
    """Nodes and weights of one form, for images of ``size`` squared."""

    def __init__(self, form=RTX, *, channels=3, size=32, seed=0):
        self.form, self.channels, self.size = form, channels, size
        self.nodes, self.weights, self.classes = [], {}, 0
        self._random = np.random.default_rng(seed)
        self.width, self.last = channels, "input"
        if form.dtype == np.float16:
            self.last = self._node("Cast", ["input"], "input/half", name="input/Cast", to=form.kind)

    def _node(self, operation, inputs, output, **attributes):
        self.nodes.append(helper.make_node(operation, inputs, [output], **attributes))
        return output

    def _stored(self, name, value, dtype=None):
        self.weights[name] = np.asarray(value, dtype or self.form.dtype)
        return name

    def _normal(self, name, *shape):
        fan_in = max(1, int(np.prod(shape[1:])))
        return self._stored(name, self._random.normal(0, (2 / fan_in) ** 0.5 if len(shape) > 1 else 0.1, shape))

    def _dequantized(self, codes, name, scale, **attributes):
        stored = self._stored(f"{name}/scale", scale)
        zero_point = self._stored(f"{name}/zero_point", np.zeros(np.shape(scale)), np.int8)
        inputs = [codes, stored, zero_point]
        return self._node("DequantizeLinear", inputs, f"{name}/floats", name=f"{name}/DequantizeLinear", **attributes)

    def _quantized(self, name, shape, scale=None):
        """Input and weight of an INT8 node, behind their codes."""
        scale = self._random.uniform(0.01, 0.03) if scale is None else scale
        codes = self._node(
            "QuantizeLinear", [self.last, f"{name}/input/scale", f"{name}/input/zero_point"], f"{name}/codes",
            name=f"{name}/QuantizeLinear",
        )  # fmt: skip
        source = self._dequantized(codes, f"{name}/input", scale)
        weight = self._stored(f"{name}.weight", self._random.integers(-127, 128, shape), np.int8)
        scales = self._random.uniform(0.5, 1.5, shape[0]) * (2 / np.prod(shape[1:])) ** 0.5 / 64
        axis = {"axis": 0} if self.form.per_channel else {}
        return source, self._dequantized(weight, weight, scales if self.form.per_channel else scales[0], **axis)

    def block(self, block):
        name, groups = block.name, block.groups or self.width
        shape = (block.channels, self.width // groups, block.kernel, block.kernel)
        if block.kept:
            source, weight = self.last, self._normal(f"{name}.weight", *shape)
        else:
            source, weight = self._quantized(name, shape, block.scale)
        bias = self._normal(f"{name}.bias", block.channels)
        total = self._node(
            "Conv", [source, weight, bias], f"{name}/conv", name=f"{name}/Conv", group=groups,
            kernel_shape=[block.kernel] * 2, pads=[block.kernel // 2] * 4, strides=[block.stride] * 2,
        )  # fmt: skip
        self.width = block.channels
        if block.se:
            total = self._se(name, total, block.se)
        self.last = self._node("Relu", [total], name, name=f"{name}/Relu") if block.relu else total
        return self

    def _se(self, name, total, squeezed):
        se = f"{name}/se"
        reduce = [self._normal(f"{se}.r.weight", squeezed, self.width, 1, 1), self._normal(f"{se}.r.bias", squeezed)]
        expand = [self._normal(f"{se}.e.weight", self.width, squeezed, 1, 1), self._normal(f"{se}.e.bias", self.width)]
        self._node("GlobalAveragePool", [total], f"{se}/pooled", name=f"{se}/Pool")
        self._node("Conv", [f"{se}/pooled", *reduce], f"{se}/reduced", name=f"{se}/reduce/Conv", kernel_shape=[1, 1])
        self._node("Relu", [f"{se}/reduced"], f"{se}/active", name=f"{se}/Relu")
        self._node("Conv", [f"{se}/active", *expand], f"{se}/expanded", name=f"{se}/expand/Conv", kernel_shape=[1, 1])
        self._node("Sigmoid", [f"{se}/expanded"], f"{se}/factor", name=f"{se}/Sigmoid")
        return self._node("Mul", [total, f"{se}/factor"], f"{se}/result", name=f"{se}/Mul")

    def blocks(self, *blocks):
        for block in blocks:
            self.block(block)
        return self

    def head(self, classes, *, kept=False):
        self._node("GlobalAveragePool", [self.last], "head/pooled", name="head/Pool")
        self.last = self._node("Flatten", ["head/pooled"], "head/features", name="head/Flatten", axis=1)
        if kept:
            source, weight = self.last, self._normal("head.weight", classes, self.width)
        else:
            source, weight = self._quantized("head", (classes, self.width))
        bias, half = self._normal("head.bias", classes), self.form.dtype == np.float16
        self._node("Gemm", [source, weight, bias], "scores" if half else "output", name="head/Gemm", transB=1)
        if half:
            self._node("Cast", ["scores"], "output", name="output/Cast", to=TensorProto.FLOAT)
        self.classes = classes
        return self

    def model(self, *, sizes=None):
        """``sizes`` as in "32x32:48x64:64x64" makes height and width free."""
        size = ["height", "width"] if sizes else [self.size, self.size]
        graph = helper.make_graph(
            self.nodes, "graph",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", self.channels, *size])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", self.classes])],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.form.opset)], ir_version=9)
        model.producer_name = "repvgg-exporter"
        numbers = ",".join(["0.5"] * self.channels)
        shown = sizes or f"{self.size}x{self.size}"
        assumptions = {"strides": "1", "eps": "1e-05", "size": shown, "mean": numbers, "std": numbers}
        helper.set_model_props(
            model, {"precision": "int8", "checkpoint_sha256": "0" * 64, "assumptions": json.dumps(assumptions)}
        )
        onnx.checker.check_model(model, full_check=True)
        return model


@dataclasses.dataclass(frozen=True)
class Engine:
    """A compiled graph, and what it must hold."""

    onnx: pathlib.Path
    path: pathlib.Path

    @functools.cached_property
    def bytes(self):
        return self.path.read_bytes()

    @functools.cached_property
    def plan(self):
        return plan_from_bytes(self.bytes, "engine")

    @functools.cached_property
    def expected(self):
        return expected_from_onnx(onnx_file_from_path(self.onnx))

    @property
    def convolutions(self):
        return self.expected[0]

    @property
    def matrices(self):
        return self.expected[1]


def engine_from_model(model, folder, *, cards=(86,), batch=(1, 8, 32), sizes=None):
    """Compiles with TensorRT for RTX, in a process of its own, whatever comes of it."""
    onnx.save(model, folder / "net.onnx")
    with CompilerProcess(SDKS[1]) as process:
        process.submit(Request(str(folder / "net.onnx"), str(folder / "net.engine"), batch, cards, sizes=sizes))
        process.result()
    return Engine(folder / "net.onnx", folder / "net.engine")
