"""Training-time RepVGG to plain Conv+ReLU network, with a certificate for every block.

For each block the branches are put into one convolution (``exporter.affine``) in float64. Three things are measured on
the way, with the user's own weights:

    certificate   per block, the fused convolution against that block's own branches on random input, in float64:
                  max|difference| / max|branches|. It says that the algebra is right, to 1e-12.
    rounding      the same with weights, input and arithmetic in float32, as the file is used. It says what that costs.
    whole network both networks side by side in float64 on a small random image: the errors of all blocks together.

One pass over the blocks does all of it. Each convolution runs once on a batch of two, the image on its way through the
network and the block's own noise, since what it costs here is reading the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from exporter import affine
from exporter.architecture import Architecture, Block
from exporter.errors import CheckpointRejected
from exporter.model import block_output, block_tensors, branch_sum, head_output

CERTIFICATE_GATE = 1e-12
IMAGE_SIZE = 33  # odd all the way down, so that stride 2 meets both borders
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

    ``float64_error`` is the relative error of the whole network's outputs, before any rounding.
    """

    architecture: Architecture
    tensors: dict[str, Tensor]
    certificates: tuple[Certificate, ...]
    float64_error: float


def plain_from_repvgg(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Plain:
    """Fuses every block and measures the result.

    Raises:
        CheckpointRejected: a fused weight is too large for float32.
    """
    generator = torch.Generator().manual_seed(SEED)
    certificates: list[Certificate] = []
    written: dict[str, Tensor] = {}
    blocks: list[Block] = []
    with torch.inference_mode():
        trained = fused = _noise((1, architecture.in_channels, IMAGE_SIZE, IMAGE_SIZE), generator)
        for block in architecture.blocks:
            own = block_tensors(tensors, block, torch.float64)
            convolution = convolution_from_block(block, own, architecture.bn_eps)
            rounded = _rounded(convolution, block)
            noise = _noise(tuple(trained.shape), generator)
            truth = branch_sum(block, own, torch.cat([trained, noise]), architecture.bn_eps)
            found = applied(convolution, torch.cat([fused, noise]))
            certificate = Certificate(
                block=block.name,
                branches=block.branches,
                error=relative_error(truth[1:], found[1:]),
                rounding_error=relative_error(truth[1:], applied(rounded, noise.float()).double()),
            )
            certificates.append(certificate)
            trained, fused = block_output(block, own, truth[:1]), block_output(block, own, found[:1])
            blocks.append(dataclasses.replace(block, branches=("fused",)))
            written[f"{block.name}.fused.weight"] = rounded.weight
            written[f"{block.name}.fused.bias"] = rounded.bias
        error = relative_error(head_output(tensors, trained), head_output(tensors, fused))
    for name, tensor in tensors.items():
        if name.startswith("head.") or ".se." in name:
            written[name] = tensor.float().contiguous().clone()  # not a view of the mapped file
    return Plain(dataclasses.replace(architecture, blocks=tuple(blocks)), written, tuple(certificates), error)


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
