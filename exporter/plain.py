"""Training-time RepVGG to plain Conv+ReLU network, with a certificate for every block.

For each block the branches are put into one convolution (``exporter.affine``) in float64. Three things are measured on
the way, with the user's own weights:

    certificate   per block, the fused convolution against that block's own branches on random input, in float64:
                  max|difference| / max|branches|. It says that the algebra is right, to 1e-12.
    rounding      the same with weights, input and arithmetic in float32, as the file is used. It says what that costs.
    whole network the fused network's outputs in float64, before any rounding, on the images that everything is compared
                  on: the errors of all blocks together.

One pass over the blocks does all of it, so that each block's weights are read and converted once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from exporter import affine
from exporter.architecture import Architecture, Block
from exporter.errors import CheckpointRejected
from exporter.model import Observer, block_output, block_tensors, branch_sum, head_output, parts_of, unobserved

CERTIFICATE_GATE = 1e-12
NOISE_SIZE = 33  # odd all the way down, so that stride 2 meets both borders
SEED = 20211


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The largest relative error of one fused block against its own branches, in float64 and in float32."""

    block: str
    branches: tuple[str, ...]
    error: float
    rounding_error: float


@dataclasses.dataclass(frozen=True)
class Plain:
    """The deployed network: ``architecture`` has only fused blocks, ``tensors`` are float32 by canonical name.

    ``outputs`` (n, classes) are its answers to the images in float64, before any rounding.
    """

    architecture: Architecture
    tensors: dict[str, Tensor]
    certificates: tuple[Certificate, ...]
    outputs: NDArray[np.float64]


def plain_from_repvgg(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    images: NDArray[np.float32],
    observe: Observer = unobserved,
) -> Plain:
    """Fuses every block and measures the result.

    Args:
        architecture: of the training-time network.
        tensors: by canonical name.
        images: (n, C, H, W), which go through the fused network in float64.
        observe: told every tensor on their way.

    Raises:
        CheckpointRejected: a fused weight is too large for float32.
    """
    generator = torch.Generator().manual_seed(SEED)
    certificates: list[Certificate] = []
    written: dict[str, Tensor] = {}
    blocks: list[Block] = []
    noise_size = NOISE_SIZE
    with torch.inference_mode():
        x = torch.from_numpy(images).double()
        observe("input", x)
        for block in architecture.blocks:
            own = block_tensors(tensors, block, torch.float64)
            convolution = convolution_from_block(block, own, architecture.bn_eps)
            rounded = _rounded(convolution, block)
            noise = _noise((1, block.in_channels, noise_size, noise_size), generator)
            truth = branch_sum(block, own, noise, architecture.bn_eps)
            certificate = Certificate(
                block=block.name,
                branches=block.branches,
                error=relative_error(truth, applied(convolution, noise)),
                rounding_error=relative_error(truth, applied(rounded, noise.float()).double()),
            )
            certificates.append(certificate)
            total = torch.cat([applied(convolution, part) for part in parts_of(x)])
            x = block_output(block, own, total, observe)
            observe(block.name, x)
            noise_size = -(-noise_size // block.stride)
            blocks.append(dataclasses.replace(block, branches=("fused",)))
            written[f"{block.name}.fused.weight"] = rounded.weight
            written[f"{block.name}.fused.bias"] = rounded.bias
        outputs = head_output(tensors, x, observe).numpy()
    for name, tensor in tensors.items():
        if name.startswith("head.") or ".se." in name:
            written[name] = tensor.float().contiguous().clone()  # not a view of the mapped file
    return Plain(dataclasses.replace(architecture, blocks=tuple(blocks)), written, tuple(certificates), outputs)


def convolution_from_block(block: Block, own: Mapping[str, Tensor], bn_eps: float) -> affine.Convolution:
    """The block's branches as one convolution in float64; ``own`` as ``block_tensors`` gives them, of any dtype."""
    stride = (block.stride, block.stride)
    if block.deployed:
        weight, bias = own["fused.weight"].double(), own["fused.bias"].double()
        return affine.Convolution(weight, bias, stride, (1, 1, 1, 1), block.groups)
    values = []
    for branch in block.branches:
        if branch == "identity":
            value = affine.identity(block.in_channels)
        else:
            weight = own[f"{branch}.weight"]
            around = (weight.shape[2] // 2, weight.shape[3] // 2)
            value = affine.convolution(weight, None, stride=stride, padding=around, groups=block.groups)
        value = affine.batch_normalised(
            value,
            weight=own[f"{branch}.bn.weight"],
            bias=own[f"{branch}.bn.bias"],
            mean=own[f"{branch}.bn.running_mean"],
            variance=own[f"{branch}.bn.running_var"],
            eps=bn_eps,
        )
        values.append(value)
    return affine.materialised(affine.summed(values))


def applied(convolution: affine.Convolution, x: Tensor) -> Tensor:
    """The convolution of x (N, in, H, W), in x's dtype."""
    top, left, bottom, right = convolution.padding
    weight, bias = convolution.weight.to(x.dtype), convolution.bias.to(x.dtype)
    if (top, left) == (bottom, right):
        return functional.conv2d(x, weight, bias, convolution.stride, (top, left), 1, convolution.groups)
    padded = functional.pad(x, (left, right, top, bottom))
    return functional.conv2d(padded, weight, bias, convolution.stride, 0, 1, convolution.groups)


def relative_error(reference: Tensor, candidate: Tensor) -> float:
    """max|candidate - reference| / max|reference|; 0 where both are 0 everywhere, NaN where anything is."""
    worst, scale = float((candidate - reference).abs().max()), float(reference.abs().max())
    return worst / scale if scale else (0.0 if worst == 0 else float("inf"))


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rounded(convolution: affine.Convolution, block: Block) -> affine.Convolution:
    weight, bias = convolution.weight.float().contiguous(), convolution.bias.float()
    if not all(torch.isfinite(extreme) for tensor in (weight, bias) for extreme in torch.aminmax(tensor)):
        raise CheckpointRejected(
            f"{block.name}: its fused weights are too large for float32 (a batch norm's variance is near zero); "
            f"the training run diverged or --eps is wrong"
        )
    return dataclasses.replace(convolution, weight=weight, bias=bias)
