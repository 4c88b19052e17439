"""Affine convolutions as values, in float64: the one algebra behind every re-parameterization.

A value stands for the map from x (N, in, H, W) to y (N, out, Ho, Wo)

    y[o, p] = b[o] + sum over terms, i and t of a[o] K[o, i, t] x[i, s p + t]     x is 0 outside its frame
    Ho      = floor((H + c) / s) + 1                                              and so for the width

with the taps t at absolute offsets: a 3x3 convolution with padding 1 has taps -1, 0, 1, a 1x1 without padding has the
tap 0, and both have extent c = -1. "Pad the 1x1 kernel to 3x3" is then nothing but a sum of two values, and any
padding, also an uneven one, is only a matter of where the taps are.

    batch norm   linear in y per channel: a' = a g / sqrt(v + eps), b' = beta + (b - mean) g / sqrt(v + eps)
    identity     the 1x1 kernel 1 with as many groups as channels (a dirac kernel)
    sum          of values with equal s and c: the terms side by side, the biases added
    groups       a term with more groups than needed is a block-diagonal one with fewer; a sum lives at the gcd

Terms stay apart until ``materialised`` puts them into one kernel, and a term's scale a stays apart from its kernel K,
so that K is read once and may be of any floating dtype: the product is computed in float64. (The case of three terms is
section 3.3 of Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Term:
    """``scale`` (out,) in float64 times ``kernel`` (out, in / groups, kh, kw); its first tap is at ``offset``."""

    scale: Tensor
    kernel: Tensor
    offset: Pair
    groups: int


@dataclasses.dataclass(frozen=True)
class AffineConvolution:
    """The value of the module docstring; ``bias`` (out,) in float64, ``extent`` is c."""

    terms: tuple[Term, ...]
    bias: Tensor
    in_channels: int
    stride: Pair
    extent: Pair


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A value put into one convolution: ``weight`` (out, in / groups, kh, kw) and ``bias`` (out,) in float64.

    ``padding`` is (top, left, bottom, right), as ONNX orders it.
    """

    weight: Tensor
    bias: Tensor
    stride: Pair
    padding: tuple[int, int, int, int]
    groups: int


def convolution(weight: Tensor, bias: Tensor | None, *, stride: Pair, padding: Pair, groups: int) -> AffineConvolution:
    """The value of an ordinary convolution with ``weight`` (out, in / groups, kh, kw) of any floating dtype."""
    out, inner, *size = weight.shape
    one = torch.ones(out, dtype=torch.float64)
    return AffineConvolution(
        terms=(Term(one, weight, (-padding[0], -padding[1]), groups),),
        bias=torch.zeros_like(one) if bias is None else bias.double(),
        in_channels=inner * groups,
        stride=stride,
        extent=(2 * padding[0] - size[0], 2 * padding[1] - size[1]),
    )


def identity(channels: int) -> AffineConvolution:
    """The value of y = x."""
    kernel = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
    return convolution(kernel, None, stride=(1, 1), padding=(0, 0), groups=channels)


def batch_normalised(
    value: AffineConvolution, *, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> AffineConvolution:
    """``value`` followed by a batch norm in eval mode; the four statistics are (out,) of any floating dtype."""
    scale = weight.double() / torch.sqrt(variance.double() + eps)
    terms = tuple(dataclasses.replace(term, scale=term.scale * scale) for term in value.terms)
    return dataclasses.replace(value, terms=terms, bias=bias.double() + (value.bias - mean.double()) * scale)


def summed(values: Sequence[AffineConvolution]) -> AffineConvolution:
    """The sum of values of the same source.

    Raises:
        ValueError: they differ in channels, stride or extent, so that their outputs have different shapes.
    """
    first = values[0]
    for value in values[1:]:
        mine = (value.in_channels, len(value.bias), value.stride, value.extent)
        theirs = (first.in_channels, len(first.bias), first.stride, first.extent)
        if mine != theirs:
            raise ValueError(f"cannot be summed: (in, out, stride, extent) are {theirs} and {mine}")
    terms = tuple(term for value in values for term in value.terms)
    bias = torch.stack([value.bias for value in values]).sum(dim=0)
    return dataclasses.replace(first, terms=terms, bias=bias)


def materialised(value: AffineConvolution) -> Convolution:
    """One convolution equal to ``value``: the smallest kernel that holds every tap, at the gcd of the groups."""
    groups = math.gcd(*(term.groups for term in value.terms))
    top, bottom = _span(value, 0)
    left, right = _span(value, 1)
    size = (bottom - top + 1, right - left + 1)
    shape = (len(value.bias), value.in_channels // groups, *size)
    weight: Tensor | None = None
    for term in sorted(value.terms, key=lambda term: -term.kernel.numel()):
        kernel = term.kernel if term.kernel.element_size() > 1 else term.kernel.double()  # float8 promotes to nothing
        scaled = _regrouped(kernel * term.scale[:, None, None, None], term.groups, groups)
        if weight is None:
            weight = scaled if scaled.shape == shape else scaled.new_zeros(shape)
        if weight is not scaled:
            row, column = term.offset[0] - top, term.offset[1] - left
            height, width = scaled.shape[2:]
            weight[:, :, row : row + height, column : column + width] += scaled
    if weight is None:
        raise ValueError("a value without terms has no kernel")
    padding = (-top, -left, value.extent[0] + size[0] + top, value.extent[1] + size[1] + left)
    return Convolution(weight, value.bias, value.stride, padding, groups)


def _span(value: AffineConvolution, axis: int) -> Pair:
    """First and last tap along an axis, widened with zero taps where the padding would otherwise be negative."""
    first = min(term.offset[axis] for term in value.terms)
    last = max(term.offset[axis] + term.kernel.shape[2 + axis] - 1 for term in value.terms)
    return min(first, 0), max(last, -1 - value.extent[axis])


def _regrouped(kernel: Tensor, groups: int, fewer: int) -> Tensor:
    """``kernel`` (out, in / groups, ...) as (out, in / fewer, ...), block-diagonal; ``fewer`` divides ``groups``."""
    if groups == fewer:
        return kernel
    ratio, (out, inner, *size) = groups // fewer, kernel.shape
    blocks = kernel.view(fewer, ratio, out // groups, inner, *size)
    wide = kernel.new_zeros(fewer, ratio, out // groups, ratio, inner, *size)
    for index in range(ratio):
        wide[:, index, :, index] = blocks[:, index]
    return wide.view(out, ratio * inner, *size)
