"""What is left of a layer's error once its weights are codes, as far as a scale and a bias can undo it.

With z the product of codes at a position and y the float network's result there, the best a and b of y ~ a z + b are

    a = cov(y, z) / var(z)        b = mean(y) - a mean(z)

channel by channel over all positions of all images: a becomes the channel's weight scale, b its bias. It contains bias
correction (Nagel et al., ICCV 2019), which is the same with a left as it was; where a form has one scale for all
channels, one a is fitted to all of them, and each has its own b. The quantized layer sees what the quantized layers
before it give, so b also takes out what they have shifted.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

AT_ONCE = 8
FARTHEST = 2.0
"""A scale that is so many times what rounding to the grid says, or less than one over it, fits noise."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Means, variances and the covariance of y and z by channel, (C,) float64."""

    mean_y: Tensor
    mean_z: Tensor
    variance_z: Tensor
    covariance: Tensor


def moments_of(y: Tensor, z: Tensor) -> Moments:
    """Of two tensors (N, C, ...), a few images at a time."""
    sums = torch.zeros(4, y.shape[1], dtype=torch.float64)
    count = y.numel() // y.shape[1]
    for a, b in zip(torch.split(y, AT_ONCE), torch.split(z, AT_ONCE), strict=True):
        sums += torch.stack([sum_by_channel(product) for product in (a, b, b * b, a * b)])
    mean_y, mean_z, square, product = sums / count
    return Moments(mean_y, mean_z, (square - mean_z**2).clamp_min(0), product - mean_y * mean_z)


def sum_by_channel(x: Tensor) -> Tensor:
    """(N, C, ...) to (C,) float64; a column of an image is summed in x's own dtype, which is several times as fast."""
    columns = x.sum(2) if x.dim() == 4 else x
    return columns.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)


def refitted(moments: Moments, scale: Tensor, *, per_channel: bool) -> tuple[Tensor, Tensor]:
    """The factor (C,) on z and the bias (C,) that bring a z + b nearest to y.

    Args:
        moments: of y and z.
        scale: (C,) the factor that the grids say: weight scale times input scale.
        per_channel: whether each channel may have a factor of its own.
    """
    if per_channel:
        fitted = moments.covariance / moments.variance_z
    else:
        weight = scale * moments.variance_z
        fitted = scale * (moments.covariance * scale).sum() / (weight * scale).sum()
    ratio = fitted / scale
    fitted = torch.where((ratio > 1 / FARTHEST) & (ratio < FARTHEST), fitted, scale)  # a NaN is neither
    return fitted, moments.mean_y - fitted * moments.mean_z
