"""Another checkpoint of the same network, whose channels have very different ranges, as those of trained RepVGG can.

    python benchmarks/rescaled_checkpoint.py model.pt OUT.pt [--sigma 1] [--seed 0]

A ReLU lets a positive factor through, relu(f y) = f relu(y), so that channel c of every block's output can be
multiplied by f_c = exp(sigma n_c), n_c normal, if whatever reads the channel divides by it: the network's answers stay
the same, and one scale for a whole tensor fits no longer. The reverse of cross-layer equalization (Nagel et al. 2019,
"Data-Free Quantization Through Weight Equalization and Bias Correction"), written into the tensors of the training
form. With g the factors of a block's input (1 for the image) and f those of its output:

    convolutions    w'[o, i] = w[o, i] / g[i], so that their outputs, and the batch norms' statistics, stay as they are
    their BN        gamma' = f gamma, beta' = f beta
    identity's BN   mean' = g mean, var' = g^2 var, the statistics of the input that it now has; beta' = f beta, and
                    gamma' = f gamma sqrt(g^2 var + eps) / (g sqrt(var + eps)), which makes up for epsilon
    SE's first      w'[s, i] = w[s, i] / f[i], where a block has one; its answer, a gate for each channel, is the same
    classifier      w'[k, i] = w[k, i] / f[i], with the f of the last block

Exact: what remains is rounding. An identity's gain per channel becomes f / g times its own, an outlier beside the
other taps. Names are those of the authors' own code; the file written has the dtypes of the one read.
"""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

EPSILON = 1e-5
"""Of the authors' batch norms."""
_BLOCK = re.compile(r"(stage(\d+)(?:\.(\d+))?)\.rbr_dense\.bn\.weight")


def rescaled(state: Mapping[str, Tensor], sigma: float = 1.0, seed: int = 0, eps: float = EPSILON) -> dict[str, Tensor]:
    """The same function with rescaled channels.

    Args:
        state: a training-form state dict in the authors' names.
        sigma: the standard deviation of the factors' logarithms; 0 changes nothing.
        seed: of the factors.
        eps: of the batch norms.

    Returns:
        Every tensor of ``state``; those that are floating in float64.

    Raises:
        ValueError: there is no training-form block, or no classifier called ``linear``.
    """
    tensors = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    blocks = blocks_of(tensors)
    if not blocks or "linear.weight" not in tensors:
        raise ValueError("not a training-form RepVGG with the names of the authors' code (stage0.rbr_dense.bn, linear)")
    generator = torch.Generator().manual_seed(seed)
    before = tensors[f"{blocks[0]}.rbr_dense.conv.weight"].new_ones(1)  # the image, however many channels it has
    for block in blocks:
        channels = len(tensors[f"{block}.rbr_dense.bn.weight"])
        after = torch.exp(sigma * torch.randn(channels, generator=generator, dtype=torch.float64))
        _rescale_block(tensors, block, before, after, eps)
        before = after
    tensors["linear.weight"] = tensors["linear.weight"] / before
    return tensors


def blocks_of(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the blocks in the order of the data: stage0, stage1.0, ..."""
    found = [match for name in state if (match := _BLOCK.fullmatch(name))]
    return [match[1] for match in sorted(found, key=lambda match: (int(match[2]), int(match[3] or 0)))]


def _rescale_block(tensors: dict[str, Tensor], block: str, before: Tensor, after: Tensor, eps: float) -> None:
    for branch in ("rbr_dense", "rbr_1x1"):
        if f"{block}.{branch}.conv.weight" in tensors:
            weight = tensors[f"{block}.{branch}.conv.weight"]
            tensors[f"{block}.{branch}.conv.weight"] = weight / _by_input(before, weight)
            for part in ("weight", "bias"):
                tensors[f"{block}.{branch}.bn.{part}"] = tensors[f"{block}.{branch}.bn.{part}"] * after
    identity = f"{block}.rbr_identity"
    if f"{identity}.weight" in tensors:
        variance = tensors[f"{identity}.running_var"]
        moved = before.square() * variance
        gain = after / before * ((moved + eps) / (variance + eps)).sqrt()
        tensors[f"{identity}.weight"] = tensors[f"{identity}.weight"] * gain
        tensors[f"{identity}.bias"] = tensors[f"{identity}.bias"] * after
        tensors[f"{identity}.running_mean"] = tensors[f"{identity}.running_mean"] * before
        tensors[f"{identity}.running_var"] = moved
    if f"{block}.se.down.weight" in tensors:
        tensors[f"{block}.se.down.weight"] = tensors[f"{block}.se.down.weight"] / after[:, None, None]


def _by_input(factors: Tensor, weight: Tensor) -> Tensor:
    """The factors of the inputs of each row of a grouped convolution: broadcasts against (out, in / groups, h, w)."""
    if len(factors) == 1:
        return factors
    groups = len(factors) // weight.shape[1]
    return factors.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)[:, :, None, None]


def main(argv: Sequence[str] | None = None) -> None:
    """Writes one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path, help="a state dict in the authors' names, training form")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the factors' logarithms (1)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    state = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
    try:
        made = rescaled(state, arguments.sigma, arguments.seed)
    except ValueError as error:
        raise SystemExit(f"error: {arguments.checkpoint}: {error}") from None
    torch.save({name: value.to(state[name].dtype) for name, value in made.items()}, arguments.out)


if __name__ == "__main__":
    main()
