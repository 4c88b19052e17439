"""The network of an ``Architecture`` with canonical tensors, computed in any floating dtype.

    branch    BN(K x)     without a batch norm of its own in bare branches; K = 1 in identities
    block     y = ReLU(SE(z))  or  y = SE(ReLU(z))     z = sum over branches, or the deployed K x + b; behind it a batch
                                                       norm where the block has one
    SE        z * sigmoid(W2 relu(W1 mean(z) + b1) + b2)     over height and width (Hu et al., CVPR 2018)
    network   blocks; then global average pooling and one linear layer, or feature maps as they are

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


def branch_convolution(block: Block, branch: str, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A branch up to its batch norm: (N, in, H, W) to (N, out, ceil(H / s), ceil(W / s)); x itself of an identity."""
    weight = own.get(f"{branch}.weight")
    if weight is None:
        return x
    bias = own.get(f"{branch}.bias")
    return functional.conv2d(x, weight, bias, block.stride, weight.shape[-1] // 2, 1, block.groups)


def normalised(own: Mapping[str, Tensor], owner: str, y: Tensor, bn_eps: float) -> Tensor:
    """``y`` through the batch norm of a branch, or of ``post``; itself where there is none."""
    if f"{owner}.bn.weight" not in own:
        return y
    weight, bias, mean, variance = (
        own[f"{owner}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    return functional.batch_norm(y, mean, variance, weight, bias, training=False, eps=bn_eps)


def branch_sum(block: Block, own: Mapping[str, Tensor], x: Tensor, bn_eps: float) -> Tensor:
    """The sum of the block's branches, before SE and ReLU: (N, in, H, W) to (N, out, ceil(H / s), ceil(W / s))."""
    total: Tensor | None = None
    for branch in block.branches:
        y = normalised(own, branch, branch_convolution(block, branch, own, x), bn_eps)
        total = y if total is None else total.add_(y)
    if total is None:
        raise ValueError(f"{block.name} has no branches")
    return normalised(own, "post", total, bn_eps)


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
    if block.se_channels is None:
        return torch.relu(total)
    if block.se_after_activation:
        active = torch.relu(total)
        observe(f"{block.name}/relu", active)
        return squeezed_and_excited(block.name, own, active, observe)
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


def outputs_of_blocks(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    results: Iterator[tuple[Block, Tensor]],
    observe: Observer,
) -> dict[str, Tensor]:
    """The network's outputs by name, from each block's result (N, C, H, W) in order, which ``observe`` is told."""
    wanted = {output.block for output in architecture.outputs}
    outputs: dict[str, Tensor] = {}
    for block, x in results:
        name = architecture.tensor_names[block.name]
        observe(name, x)
        if block.name in wanted:
            outputs[name] = x
        if block is architecture.blocks[-1] and None in wanted:
            outputs[architecture.outputs[0].name] = head_output(tensors, x, observe)
    return outputs


def outputs_of_network(
    architecture: Architecture, tensors: Mapping[str, Tensor], images: Tensor, observe: Observer = unobserved
) -> dict[str, Tensor]:
    """The whole network in the dtype of ``images``: (N, C, H, W) to (N, classes), or feature maps, by output."""
    with torch.inference_mode():
        parts = [_outputs_at_once(architecture, tensors, part, observe) for part in parts_of(images)]
        return joined_parts(parts)


def joined_parts(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs of the parts of a batch as those of the whole."""
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _outputs_at_once(
    architecture: Architecture, tensors: Mapping[str, Tensor], x: Tensor, observe: Observer
) -> dict[str, Tensor]:
    def results(x: Tensor) -> Iterator[tuple[Block, Tensor]]:
        for block in architecture.blocks:
            own = block_tensors(tensors, block, x.dtype)
            x = block_output(block, own, branch_sum(block, own, x, architecture.bn_eps), observe)
            yield block, x

    observe("input", x)
    return outputs_of_blocks(architecture, tensors, results(x), observe)


def parts_of(images: Tensor) -> Iterator[Tensor]:
    """A batch in pieces that a float64 convolution has room for, each (at least 1, C, H, W)."""
    pixels = images.shape[2] * images.shape[3]
    yield from torch.split(images, max(1, PIXELS_AT_ONCE // pixels))
