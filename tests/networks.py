"""RepVGG written once more, from the paper and naively: the oracle that the exporter is held against.

Nothing here imports the exporter. ``NaiveRepVGG`` has the authors' module names; the tables below give the same tensors
the names of the other families, and ``deployed_state`` fuses them with the paper's formulas, loop by loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """What to build; the defaults are a network small enough for any test."""

    depths: tuple[int, ...] = (1, 2, 2, 1, 1)
    widths: tuple[int, ...] = (8, 8, 12, 16, 16)
    strides: tuple[int, ...] = (2, 2, 2, 2, 2)
    in_channels: int = 3
    classes: int = 7
    even_groups: int = 1
    se: bool = False
    pointwise: bool = True
    identity: bool = True
    eps: float = 1e-5


class NaiveBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, groups: int, shape: Shape) -> None:
        super().__init__()
        self.rbr_dense = conv_bn(cin, cout, 3, stride, groups, shape.eps)
        self.rbr_1x1 = conv_bn(cin, cout, 1, stride, groups, shape.eps) if shape.pointwise else None
        has_identity = shape.identity and cin == cout and stride == 1
        self.rbr_identity = nn.BatchNorm2d(cin, eps=shape.eps) if has_identity else None
        self.se = None
        if shape.se:
            self.se = nn.Module()
            self.se.down = nn.Conv2d(cout, max(1, cout // 16), 1)
            self.se.up = nn.Conv2d(max(1, cout // 16), cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x)
        if self.rbr_1x1 is not None:
            y = y + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            y = y + self.rbr_identity(x)
        if self.se is not None:
            squeezed = y.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)
            y = y * torch.sigmoid(self.se.up(torch.relu(self.se.down(squeezed))))
        return torch.clamp(y, min=0)


class NaiveRepVGG(nn.Module):
    """The authors' names: stage0, stage1.0, ..., linear. BN statistics and scales are random, as after training."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape = shape
        position, channels = 0, shape.in_channels
        for stage, (depth, width, stride) in enumerate(zip(shape.depths, shape.widths, shape.strides, strict=True)):
            blocks = []
            for index in range(depth):
                groups = shape.even_groups if position % 2 == 0 and position > 0 else 1
                blocks.append(NaiveBlock(channels, width, stride if index == 0 else 1, groups, shape))
                channels, position = width, position + 1
            self.add_module(f"stage{stage}", blocks[0] if stage == 0 else nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, shape.classes)
        self.eval()
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        for stage in range(len(self.shape.depths)):
            x = getattr(self, f"stage{stage}")(x)
        return self.linear(x.flatten(2).mean(dim=2))

    def answer(self, x: Tensor) -> Tensor:
        """Outputs in float64."""
        with torch.no_grad():
            return self.double()(x.double())


def conv_bn(cin: int, cout: int, kernel: int, stride: int, groups: int, eps: float) -> nn.Sequential:
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(cout, eps=eps))
    return layers


def randomise(module: nn.Module) -> None:
    """Statistics and scales that differ per channel; a fresh BN is the identity and would hide every mistake in it."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.3, 0.3)
            nn.init.uniform_(part.running_var, 0.2, 2.0)
            nn.init.uniform_(part.weight, 0.3, 1.2)
            nn.init.uniform_(part.bias, -0.2, 0.3)


TIMM_NAMES = (
    ("rbr_dense.", "conv_kxk."),
    ("rbr_1x1.", "conv_1x1."),
    ("rbr_identity.", "identity."),
    ("rbr_reparam.", "reparam_conv."),
    ("se.down.", "attn.fc1."),
    ("se.up.", "attn.fc2."),
)
MMPRETRAIN_NAMES = (
    ("rbr_dense.conv.", "branch_3x3.conv."),
    ("rbr_dense.bn.", "branch_3x3.norm."),
    ("rbr_1x1.conv.", "branch_1x1.conv."),
    ("rbr_1x1.bn.", "branch_1x1.norm."),
    ("rbr_identity.", "branch_norm."),
    ("rbr_reparam.", "branch_reparam."),
    ("se.down.", "se_layer.conv1.conv."),
    ("se.up.", "se_layer.conv2.conv."),
)
NAMINGS = ("official", "timm", "mmpretrain")


def renamed(state: Mapping[str, Tensor], naming: str) -> dict[str, Tensor]:
    """A state dict in the authors' names, in those of another family."""
    return {named(name, naming): tensor for name, tensor in state.items()}


def named(name: str, naming: str) -> str:
    if naming == "official":
        return name
    table = TIMM_NAMES if naming == "timm" else MMPRETRAIN_NAMES
    if name.startswith("linear."):
        return name.replace("linear.", "head.fc.")
    for theirs, ours in table:
        if theirs in name:
            name = name.replace(theirs, ours)
    stage, _, rest = name.partition(".")
    number = int(stage.removeprefix("stage"))
    if number == 0:
        return ("stem." if naming == "timm" else "backbone.stem.") + rest
    return (f"stages.{number - 1}." if naming == "timm" else f"backbone.stage_{number}.") + rest


def deployed_state(model: NaiveRepVGG) -> dict[str, Tensor]:
    """The fused state dict, by the paper's section 3.3, in float32."""
    state = {}
    for name, block in model.named_modules():
        if isinstance(block, NaiveBlock):
            weight, bias = fused_branches(block)
            state[f"{name}.rbr_reparam.weight"], state[f"{name}.rbr_reparam.bias"] = weight.float(), bias.float()
    others = {k: v for k, v in model.state_dict().items() if k.startswith("linear.") or ".se." in k}
    return {**state, **{name: tensor.float() for name, tensor in others.items()}}


def fused_branches(block: NaiveBlock) -> tuple[Tensor, Tensor]:
    conv = block.rbr_dense.conv
    weight, bias = torch.zeros_like(conv.weight).double(), torch.zeros(conv.out_channels, dtype=torch.float64)
    per_group = conv.in_channels // conv.groups
    for kernel, bn in branch_kernels(block):
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        for channel in range(conv.out_channels):
            if kernel is None:
                weight[channel, channel % per_group, 1, 1] += scale[channel]
            elif kernel.shape[-1] == 1:
                weight[channel, :, 1, 1] += kernel[channel, :, 0, 0].double() * scale[channel]
            else:
                weight[channel] += kernel[channel].double() * scale[channel]
        bias += bn.bias.double() - bn.running_mean.double() * scale
    return weight.detach(), bias.detach()


def branch_kernels(block: NaiveBlock) -> list[tuple[Tensor | None, nn.BatchNorm2d]]:
    branches = [(block.rbr_dense.conv.weight, block.rbr_dense.bn)]
    if block.rbr_1x1 is not None:
        branches.append((block.rbr_1x1.conv.weight, block.rbr_1x1.bn))
    if block.rbr_identity is not None:
        branches.append((None, block.rbr_identity))
    return branches


def contiguous_float(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors in float32, ready to be saved."""
    return {name: (t.float() if t.is_floating_point() else t).detach().contiguous() for name, t in state.items()}
