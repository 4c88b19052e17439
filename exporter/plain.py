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
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from exporter import affine
from exporter.architecture import Architecture, Block
from exporter.errors import CheckpointRejected
from exporter.model import Observer, block_output, block_tensors, branch_sum, outputs_of_blocks, parts_of, unobserved

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

    ``outputs`` are its answers to the images in float64 by output, (n, classes) or (n, C, h, w), before any rounding.
    """

    architecture: Architecture
    tensors: dict[str, Tensor]
    certificates: tuple[Certificate, ...]
    outputs: dict[str, NDArray[np.float64]]


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
    fusing = _Fusing(architecture, tensors, observe)
    with torch.inference_mode():
        x = torch.from_numpy(images).double()
        observe("input", x)
        outputs = outputs_of_blocks(architecture, tensors, fusing.results(x), observe)
    for name, tensor in tensors.items():
        if name.startswith("head.") or ".se." in name:
            fusing.written[name] = tensor.float().contiguous().clone()  # not a view of the mapped file
    return Plain(
        dataclasses.replace(architecture, blocks=tuple(fusing.blocks)),
        fusing.written,
        tuple(fusing.certificates),
        {name: value.numpy() for name, value in outputs.items()},
    )


class _Fusing:
    """One pass over the blocks, and what has come of it so far."""

    def __init__(self, architecture: Architecture, tensors: Mapping[str, Tensor], observe: Observer) -> None:
        self.architecture, self.tensors, self.observe = architecture, tensors, observe
        self.certificates: list[Certificate] = []
        self.written: dict[str, Tensor] = {}
        self.blocks: list[Block] = []

    def results(self, x: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Fuses each block, and gives it with what its fused convolution makes of x (n, C, H, W) in float64."""
        generator = torch.Generator().manual_seed(SEED)
        noise_size = NOISE_SIZE
        for block in self.architecture.blocks:
            own = block_tensors(self.tensors, block, torch.float64)
            convolution = convolution_from_block(block, own, self.architecture.bn_eps)
            rounded = _rounded(convolution, block)
            noise = _noise((1, block.in_channels, noise_size, noise_size), generator)
            truth = branch_sum(block, own, noise, self.architecture.bn_eps)
            certificate = Certificate(
                block=block.name,
                branches=block.branches,
                error=relative_error(truth, applied(convolution, noise)),
                rounding_error=relative_error(truth, applied(rounded, noise.float()).double()),
            )
            self.certificates.append(certificate)
            total = torch.cat([applied(convolution, part) for part in parts_of(x)])
            x = block_output(block, own, total, self.observe)
            noise_size = -(-noise_size // block.stride)
            self.blocks.append(dataclasses.replace(block, branches=("fused",), post_batch_norm=False))
            self.written[f"{block.name}.fused.weight"] = rounded.weight
            self.written[f"{block.name}.fused.bias"] = rounded.bias
            yield block, x


def convolution_from_block(block: Block, own: Mapping[str, Tensor], bn_eps: float) -> affine.Convolution:
    """The block's branches as one convolution in float64; ``own`` as ``block_tensors`` gives them, of any dtype."""
    stride = (block.stride, block.stride)
    values = []
    for branch in block.branches:
        weight = own.get(f"{branch}.weight")
        if weight is None:
            value = affine.identity(block.in_channels)
        else:
            around = (weight.shape[2] // 2, weight.shape[3] // 2)
            bias = own.get(f"{branch}.bias")
            value = affine.convolution(weight, bias, stride=stride, padding=around, groups=block.groups)
        values.append(_normalised(value, own, branch, bn_eps))
    return affine.materialised(_normalised(affine.summed(values), own, "post", bn_eps))


def _normalised(
    value: affine.AffineConvolution, own: Mapping[str, Tensor], owner: str, bn_eps: float
) -> affine.AffineConvolution:
    """``value`` followed by the batch norm of a branch, or of ``post``; itself where there is none."""
    if f"{owner}.bn.weight" not in own:
        return value
    return affine.batch_normalised(
        value,
        weight=own[f"{owner}.bn.weight"],
        bias=own[f"{owner}.bn.bias"],
        mean=own[f"{owner}.bn.running_mean"],
        variance=own[f"{owner}.bn.running_var"],
        eps=bn_eps,
    )


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
