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

Observer = Callable[[Block, Tensor, Tensor], None]
"""Called after each block with its input and the sum of its branches, both (N, C, H, W)."""

# Float64 convolutions unfold their input: 9 columns a pixel. Images go through in groups of this many pixels.
PIXELS_AT_ONCE = 4 * 224 * 224


def block_tensors(tensors: Mapping[str, Tensor], block: Block, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The block's own tensors in ``dtype`` (None: as they are, not copied), by their names inside the block.

    A fused kernel beside live branches is left out: nothing computes with it.
    """
    own = {}
    for name, tensor in tensors.items():
        stage, index, *inner = name.split(".", 2)
        if f"{stage}.{index}" == block.name and (block.deployed or not inner[0].startswith("fused.")):
            own[inner[0]] = tensor.to(dtype) if dtype is not None else tensor
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


def squeezed_and_excited(own: Mapping[str, Tensor], z: Tensor) -> Tensor:
    """(N, C, H, W) times one factor in 0..1 per image and channel."""
    y = z.mean(dim=(2, 3), keepdim=True)
    y = torch.relu(functional.conv2d(y, own["se.reduce.weight"], own["se.reduce.bias"]))
    return z * torch.sigmoid(functional.conv2d(y, own["se.expand.weight"], own["se.expand.bias"]))


def block_output(block: Block, own: Mapping[str, Tensor], total: Tensor) -> Tensor:
    """What leaves the block, from the sum of its branches."""
    return torch.relu(total if block.se_channels is None else squeezed_and_excited(own, total))


def head_output(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, classes)."""
    pooled = x.mean(dim=(2, 3))
    return functional.linear(pooled, tensors["head.weight"].to(x.dtype), tensors["head.bias"].to(x.dtype))


def logits(
    architecture: Architecture, tensors: Mapping[str, Tensor], images: Tensor, observe: Observer | None = None
) -> Tensor:
    """The whole network in the dtype of ``images``: (N, C, H, W) to (N, classes)."""
    with torch.inference_mode():
        return torch.cat([_logits_at_once(architecture, tensors, part, observe) for part in _parts(images)])


def _logits_at_once(
    architecture: Architecture, tensors: Mapping[str, Tensor], x: Tensor, observe: Observer | None
) -> Tensor:
    for block in architecture.blocks:
        own = block_tensors(tensors, block, x.dtype)
        total = branch_sum(block, own, x, architecture.bn_eps)
        if observe is not None:
            observe(block, x, total)
        x = block_output(block, own, total)
    return head_output(tensors, x)


def _parts(images: Tensor) -> Iterator[Tensor]:
    pixels = images.shape[2] * images.shape[3]
    yield from torch.split(images, max(1, PIXELS_AT_ONCE // pixels))
