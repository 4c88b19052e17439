"""The network of an ``Architecture`` with canonical tensors, computed in any floating dtype.

    block     y = ReLU(SE(sum over branches of BN(K x)))     or, deployed, y = ReLU(SE(K x + b))
    SE        z * sigmoid(W2 relu(W1 mean(z) + b1) + b2)     over height and width (Hu et al., CVPR 2018)
    network   blocks, global average pooling, one linear layer

Batch norms are in eval mode. Tensors are converted to the images' dtype block by block, so that a float64 run over a
memory-mapped checkpoint needs room for one block's weights and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from exporter.architecture import Architecture, Block

Observer = Callable[[str, Tensor], None]
"""Told every tensor on the way, by its name in the ONNX graph that ``exporter.onnx_graph`` makes."""

# Float64 convolutions unfold their input: 9 columns a pixel. Images go through in groups of this many pixels.
PIXELS_AT_ONCE = 4 * 224 * 224


def unobserved(name: str, value: Tensor) -> None:
    """The observer that looks away."""


def block_tensors(tensors: Mapping[str, Tensor], block: Block, dtype: torch.dtype) -> dict[str, Tensor]:
    """The block's own tensors in ``dtype``, by their names inside the block.

    A fused kernel beside live branches is left out: nothing computes with it.
    """
    own = {}
    for name, tensor in tensors.items():
        stage, index, *inner = name.split(".", 2)
        if f"{stage}.{index}" == block.name and (block.deployed or not inner[0].startswith("fused.")):
            own[inner[0]] = tensor.to(dtype)
    return own


def branch_sum(block: Block, own: Mapping[str, Tensor], x: Tensor, bn_eps: float) -> Tensor:
    """The sum of the block's branches, before SE and ReLU: (N, in, H, W) to (N, out, ceil(H / s), ceil(W / s))."""
    if block.deployed:
        return functional.conv2d(x, own["fused.weight"], own["fused.bias"], block.stride, 1, 1, block.groups)
    outputs = []
    for branch in block.branches:
        y = x
        if branch != "identity":
            weight = own[f"{branch}.weight"]
            y = functional.conv2d(x, weight, None, block.stride, weight.shape[-1] // 2, 1, block.groups)
        mean, variance = own[f"{branch}.bn.running_mean"], own[f"{branch}.bn.running_var"]
        weight, bias = own[f"{branch}.bn.weight"], own[f"{branch}.bn.bias"]
        outputs.append(functional.batch_norm(y, mean, variance, weight, bias, training=False, eps=bn_eps))
    total = outputs[0]
    for output in outputs[1:]:
        total = total.add_(output)
    return total


def squeezed_and_excited(name: str, own: Mapping[str, Tensor], z: Tensor, observe: Observer) -> Tensor:
    """(N, C, H, W) times one factor in 0..1 per image and channel."""
    pooled = z.mean(dim=(2, 3), keepdim=True)
    reduced = functional.conv2d(pooled, own["se.reduce.weight"], own["se.reduce.bias"])
    active = torch.relu(reduced)
    expanded = functional.conv2d(active, own["se.expand.weight"], own["se.expand.bias"])
    for part, value in (("pooled", pooled), ("reduced", reduced), ("active", active), ("expanded", expanded)):
        observe(f"{name}/se/{part}", value)
    return z * torch.sigmoid(expanded)


def block_output(block: Block, own: Mapping[str, Tensor], total: Tensor, observe: Observer = unobserved) -> Tensor:
    """What leaves the block, from the sum of its branches."""
    observe(f"{block.name}/conv", total)
    if block.se_channels is not None:
        total = squeezed_and_excited(block.name, own, total, observe)
        observe(f"{block.name}/se", total)
    return torch.relu(total)


def head_output(tensors: Mapping[str, Tensor], x: Tensor, observe: Observer = unobserved) -> Tensor:
    """(N, C, H, W) to (N, classes)."""
    pooled = x.mean(dim=(2, 3))
    scores = functional.linear(pooled, tensors["head.weight"].to(x.dtype), tensors["head.bias"].to(x.dtype))
    for name, value in (("head/pooled", pooled), ("head/features", pooled), ("output", scores)):
        observe(name, value)
    return scores


def logits(
    architecture: Architecture, tensors: Mapping[str, Tensor], images: Tensor, observe: Observer = unobserved
) -> Tensor:
    """The whole network in the dtype of ``images``: (N, C, H, W) to (N, classes)."""
    with torch.inference_mode():
        return torch.cat([_logits_at_once(architecture, tensors, part, observe) for part in parts_of(images)])


def _logits_at_once(architecture: Architecture, tensors: Mapping[str, Tensor], x: Tensor, observe: Observer) -> Tensor:
    observe("input", x)
    for block in architecture.blocks:
        own = block_tensors(tensors, block, x.dtype)
        x = block_output(block, own, branch_sum(block, own, x, architecture.bn_eps), observe)
        observe(block.name, x)
    return head_output(tensors, x, observe)


def parts_of(images: Tensor) -> Iterator[Tensor]:
    """A batch in pieces that a float64 convolution has room for, each (at least 1, C, H, W)."""
    pixels = images.shape[2] * images.shape[3]
    yield from torch.split(images, max(1, PIXELS_AT_ONCE // pixels))
