"""The script that a user writes today: a RepVGG checkpoint to float32 ONNX, float16 ONNX and an engine, unchecked.

    python benchmarks/plain_export.py CHECKPOINT OUT --network A0

One process, one pass, the libraries' own ways: load, fuse each block in float32 as the authors' ``switch_to_deploy``
does, ``torch.onnx.export`` with a dynamic batch, onnxsim, float16, TensorRT for RTX. Nothing is read back or compared.
It imports nothing from this project, and is the yardstick of ``benchmarks/export_time.py``.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import onnx
import onnxsim
import tensorrt_rtx as trt
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

NETWORKS = {
    "A0": ((1, 2, 4, 14, 1), (48, 48, 96, 192, 1280)),
    "B3": ((1, 4, 6, 16, 1), (64, 192, 384, 768, 2560)),
}
"""Blocks and output channels of stages 0 to 4, from the paper's table 2."""

BATCHES = (1, 8, 32)
SIZE = 224


class ConvBN(nn.Module):
    """A convolution without bias and its batch norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H / stride, W / stride)."""
        normalised: Tensor = self.bn(self.conv(x))
        return normalised


class Block(nn.Module):
    """The training-time block: 3x3, 1x1 and, where the shape stays, identity; each with a batch norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.rbr_dense = ConvBN(in_channels, out_channels, 3, stride)
        self.rbr_1x1 = ConvBN(in_channels, out_channels, 1, stride)
        self.rbr_identity = nn.BatchNorm2d(out_channels) if in_channels == out_channels and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the sum of the branches."""
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            y = y + self.rbr_identity(x)
        return torch.relu(y)


class DeployBlock(nn.Module):
    """The same block as one 3x3 convolution."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        kernel, bias = fused_block(block)
        dense = block.rbr_dense.conv
        self.rbr_reparam = nn.Conv2d(
            dense.in_channels, dense.out_channels, 3, dense.stride[0], padding=1, device="meta"
        )
        self.rbr_reparam.weight = nn.Parameter(kernel, requires_grad=False)
        self.rbr_reparam.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the convolution."""
        return torch.relu(self.rbr_reparam(x))


class RepVGG(nn.Module):
    """``stage0`` and four stages, each beginning with stride 2; global average pooling; ``linear``."""

    def __init__(self, depths: tuple[int, ...], widths: tuple[int, ...], classes: int = 1000) -> None:
        super().__init__()
        channels = 3
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            inputs = [channels] + [width] * (depth - 1)
            blocks = [Block(channels, width, stride=1 if index else 2) for index, channels in enumerate(inputs)]
            self.add_module(f"stage{number}", nn.Sequential(*blocks) if number else blocks[0])
            channels = width
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes)."""
        for number in range(5):
            x = getattr(self, f"stage{number}")(x)
        scores: Tensor = self.linear(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return scores


def fused_batch_norm(kernel: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution with the batch norm behind it."""
    mean, variance = bn.running_mean, bn.running_var
    assert mean is not None
    assert variance is not None
    scale = bn.weight / torch.sqrt(variance + bn.eps)
    return kernel * scale.reshape(-1, 1, 1, 1), bn.bias - mean * scale


def fused_block(block: Block) -> tuple[Tensor, Tensor]:
    """The 3x3 kernel and the bias that do what the branches do, in the block's dtype."""
    kernel, bias = fused_batch_norm(block.rbr_dense.conv.weight, block.rbr_dense.bn)
    pointwise, pointwise_bias = fused_batch_norm(block.rbr_1x1.conv.weight, block.rbr_1x1.bn)
    kernel += functional.pad(pointwise, [1, 1, 1, 1])
    bias += pointwise_bias
    if block.rbr_identity is not None:
        one = torch.zeros_like(kernel)
        channels = torch.arange(kernel.shape[0])
        one[channels, channels, 1, 1] = 1
        identity, identity_bias = fused_batch_norm(one, block.rbr_identity)
        kernel += identity
        bias += identity_bias
    return kernel, bias


@torch.no_grad()
def switch_to_deploy(model: RepVGG) -> RepVGG:
    """Replaces every block of ``model`` by its fused form, one after the other."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Block):
            model.set_submodule(name, DeployBlock(module))
    return model.eval()


def onnx_from_model(model: nn.Module, size: int) -> onnx.ModelProto:
    """Exports with a dynamic batch, and simplifies."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=BATCHES[0], max=BATCHES[-1])},),
        verbose=False,
    )
    assert program is not None
    simplified, _ = onnxsim.simplify(program.model_proto)
    assert isinstance(simplified, onnx.ModelProto)
    return simplified


def half_in_place(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and values in float16, with a Cast behind the input and one before the output."""
    graph, single, half = model.graph, TensorProto.FLOAT, TensorProto.FLOAT16
    for weight in graph.initializer:
        if weight.data_type == single:
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    for value in graph.value_info:
        if value.type.tensor_type.elem_type == single:
            value.type.tensor_type.elem_type = half
    source, target = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        node.input[:] = [f"{name}_half" if name == source else name for name in node.input]
        node.output[:] = [f"{name}_half" if name == target else name for name in node.output]
    graph.node.insert(0, helper.make_node("Cast", [source], [f"{source}_half"], to=half))
    graph.node.append(helper.make_node("Cast", [f"{target}_half"], [target], to=single))
    return model


def write_engine(source: pathlib.Path, target: pathlib.Path, size: int) -> None:
    """Compiles a typed ONNX file."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        raise SystemExit("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
    profile = builder.create_optimization_profile()
    profile.set_shape("input", *((batch, 3, size, size) for batch in BATCHES))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise SystemExit("the compiler made no engine")
    target.write_bytes(engine)


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path, help="a state dict with the authors' names")
    parser.add_argument("out", type=pathlib.Path, help="directory to write")
    parser.add_argument("--network", choices=NETWORKS, required=True)
    arguments = parser.parse_args()
    out: pathlib.Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    model = RepVGG(*NETWORKS[arguments.network])
    model.load_state_dict(torch.load(arguments.checkpoint, map_location="cpu", weights_only=True))
    exported = onnx_from_model(switch_to_deploy(model), SIZE)
    del model
    onnx.save(exported, str(out / "model.onnx"))
    onnx.save(half_in_place(exported), str(out / "model.fp16.onnx"))
    del exported
    write_engine(out / "model.fp16.onnx", out / "model.fp16.engine", SIZE)


if __name__ == "__main__":
    main()
