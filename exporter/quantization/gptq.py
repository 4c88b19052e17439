"""Rounding that looks at the input: GPTQ (Frantar et al. 2023, arXiv 2210.17323), in closed form and deterministic.

At each output position, a convolution of C / groups channels under a kernel k x k meets a vector x of
K = C / groups * k^2 values, in the order of ``weight.reshape(out, -1)``: channel, row, column. H = sum of x x^T over
all positions of all images is its **covariance** (not centred). A row w (K,) of the weight with codes q on a grid of
width ``scale`` has the error e = w - scale * q, which costs

    sum of (w x - scale * q x)^2   =   e H e^T   =   |e R|^2        H = R R^T,  R upper triangular

Component j of e R is a sum over i <= j. So going through the columns from the first to the last, each is rounded where
it makes its own component least, with what the columns before it left:

    q_j   =   round( (w_j + sum over i < j of e_i R_ij / R_jj) / scale )

That is GPTQ's update, with R in place of the inverse of H (R^-1 is the factor that the paper takes from H^-1). For a
diagonal H it is rounding to the nearest. Columns go in decreasing order of H's diagonal, so that those that matter most
have the most others left to make up for them. A small multiple of the identity on H makes R exist and keeps the codes
from fitting noise.

**A quantized input.** Where the layer sees x' instead of x, the float weight that comes nearest to w x is

    w'   =   w (C_fq + d I) (C_qq + d I)^-1          C_fq = sum of x x'^T,   C_qq = sum of x' x'^T

the least squares solution, held by d to w wherever the input says little. With x' = x it is w itself. It pays where
codes are of few bits: at 8, what a quantized input adds is all but independent of the input.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["cross_covariance", "input_covariance", "retargeted", "rounded_by_gptq", "rounded_to_nearest"]

DAMPING = 0.01
"""Of the mean of the diagonal, as in the paper."""
HOLD = 1.0
"""The same for a weight that follows a quantized input. With little, it fits the noise of a few images: it was worse on
others than the weight it began with, by 2 dB."""
SMALLEST_DAMPING = 1e-7
"""Where there has to be some."""
ATTEMPTS = 8
BLOCK = 128  # columns whose effect on the rest is put off, to be one product of matrices
LAID_OUT = 8 << 20  # input values under kernels that are in memory at a time
ROWS = 256  # of a covariance, computed at a time


def input_covariance(x: Tensor, kernel: int, stride: int, padding: int, groups: int) -> Tensor:
    """The sum of x x^T over the positions of a convolution; those of several calls add up.

    Products are summed in the dtype of the input for some thousand positions at a time, and in float64 beyond.

    Args:
        x: (N, C, H, W), what the convolution sees; (N, C, 1, 1) of a fully connected layer, with a kernel of 1.
        kernel: rows and columns of the kernel.
        stride: of the convolution.
        padding: on all four sides.
        groups: of the convolution.

    Returns:
        (groups, K, K) float64 with K = C / groups * kernel^2.
    """
    return _covariance(x, x, (kernel, stride, padding), groups, symmetric=True)


def cross_covariance(
    float_x: Tensor, quantized_x: Tensor, kernel: int, stride: int, padding: int, groups: int
) -> Tensor:
    """The sum of (float input) (quantized input)^T over the same positions of both: (groups, K, K) float64."""
    return _covariance(float_x, quantized_x, (kernel, stride, padding), groups, symmetric=False)


def _covariance(left: Tensor, right: Tensor, window: tuple[int, int, int], groups: int, *, symmetric: bool) -> Tensor:
    """Of a symmetric one, blocks below the diagonal are not computed but copied."""
    channels = left.shape[1] // groups
    size = channels * window[0] ** 2
    total = torch.zeros(groups, size, size, dtype=torch.float64)
    for group in range(groups):
        of_group = slice(group * channels, (group + 1) * channels)
        rights = _laid_out(right[:, of_group], *window)
        lefts = rights if symmetric else _laid_out(left[:, of_group], *window)
        for columns in rights:
            rows = columns if symmetric else next(lefts)
            for start in range(0, size, ROWS):
                end, first = start + ROWS, start if symmetric else 0
                total[group, start:end, first:] += rows[start:end] @ columns[first:].T
    if symmetric:
        for start in range(0, size, ROWS):
            end = start + ROWS
            total[:, end:, start:end] = total[:, start:end, end:].transpose(1, 2)
    return total


def _laid_out(x: Tensor, kernel: int, stride: int, padding: int) -> Iterator[Tensor]:
    """What is under the kernel at some positions after the other: (K, positions), of a few images or rows at a time."""
    images, channels, height, width = x.shape
    rows, across = ((length + 2 * padding - kernel) // stride + 1 for length in (height, width))
    in_a_row = channels * kernel**2 * across
    band = min(rows, max(1, LAID_OUT // in_a_row))
    together = max(1, LAID_OUT // (in_a_row * band))
    for start in range(0, images, together):
        for top in range(0, rows, band):
            bottom = min(top + band, rows)
            above, below = top * stride - padding, (bottom - 1) * stride - padding + kernel
            part = x[start : start + together, :, max(above, 0) : min(below, height)]
            part = functional.pad(part, (padding, padding, max(-above, 0), max(below - height, 0)))
            yield _under_kernel(part, kernel, stride, bottom - top, across)


def _under_kernel(x: Tensor, kernel: int, stride: int, rows: int, across: int) -> Tensor:
    """(n, C, height, width), padded, to (C * kernel^2, n * rows * across)."""
    images, channels = x.shape[:2]
    result = x.new_empty(channels, kernel, kernel, images, rows, across)
    for i in range(kernel):
        for j in range(kernel):
            taken = x[:, :, i : i + (rows - 1) * stride + 1 : stride, j : j + (across - 1) * stride + 1 : stride]
            result[:, i, j] = taken.transpose(0, 1)
    return result.reshape(channels * kernel**2, -1)


def rounded_to_nearest(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
    """The nearest codes, int8 in the shape of ``weight``, between -levels and levels.

    Args:
        weight: (out, ...) of any float dtype.
        scale: (out,) or (): what a code of 1 stands for.
        levels: the largest code, at most 127.

    Raises:
        ValueError: a scale is not a positive number, or a weight is NaN or infinite.
    """
    flat = weight.double().reshape(len(weight), -1)
    return _codes(flat, _checked(flat, scale), levels).to(torch.int8).reshape(weight.shape)


def rounded_by_gptq(weight: Tensor, covariance: Tensor, scale: Tensor, levels: int, damping: float = DAMPING) -> Tensor:
    """Codes whose error costs little on inputs of this covariance: (out, K) int8, between -levels and levels.

    Inputs that are always 0 leave their weights rounded to the nearest.

    Args:
        weight: (out, K).
        covariance: (K, K) float64, the sum or mean of x x^T; not changed.
        scale: (out,) or ().
        levels: the largest code, at most 127.
        damping: of the mean of the covariance's diagonal; ten times more whenever the covariance is not positive
            definite with it.

    Raises:
        ValueError: a scale is not a positive number, or something is NaN or infinite.
    """
    weight = weight.double()
    steps = _checked(weight, scale)
    diagonal = covariance.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("a covariance is NaN or infinite")
    order = torch.argsort(diagonal, descending=True, stable=True)
    order = order[diagonal[order] > 0]  # the others have no effect on any
    codes = _codes(weight, steps, levels)
    if len(order):
        factor = _upper_factor(covariance[order.unsqueeze(1), order], damping)
        codes[:, order] = _rounded_in_order(weight.T[order], factor, steps.T, levels).T
    return codes.to(torch.int8)


def retargeted(weight: Tensor, cross: Tensor, covariance: Tensor, damping: float = HOLD) -> Tensor:
    """The weight that on the quantized input comes nearest to what ``weight`` gives on the float input.

    Args:
        weight: (out, K).
        cross: (K, K) float64, sum of (float input) (quantized input)^T.
        covariance: (K, K) float64, of the quantized input; over the same positions.
        damping: of the mean of the covariance's diagonal; how firmly the weight is held to what it is.

    Returns:
        (out, K) float64.

    Raises:
        ValueError: something is NaN or infinite.
    """
    weight = weight.double()
    if not bool(covariance.diagonal().any()):
        return weight.clone()
    factor = _upper_factor(covariance, damping)
    # w' - w = w (C_fq - C_qq) (R R^T)^-1
    difference = weight @ (cross - covariance)
    left: Tensor = torch.linalg.solve_triangular(factor.T, difference, upper=False, left=False)
    change: Tensor = torch.linalg.solve_triangular(factor, left, upper=True, left=False)
    if not bool(torch.isfinite(change).all()):
        raise ValueError("a cross covariance or a weight is NaN or infinite")
    return weight + change


def _rounded_in_order(weight: Tensor, factor: Tensor, steps: Tensor, levels: int) -> Tensor:
    """The codes (K, out) float64 of columns, here the rows of ``weight`` (K, out), rounded from the first to the last.

    ``factor`` is R, which is overwritten; ``steps`` is (1, out).
    """
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    factor.div_(factor.diagonal().clone())  # R_ij / R_jj
    for start in range(0, len(weight), BLOCK):
        end = min(start + BLOCK, len(weight))
        target = weight[start:end] + factor[:start, start:end].T @ errors[:start]
        within = factor[start:end, start:end].T.contiguous()
        for j in range(start, end):
            wanted = target[j - start] + within[j - start, : j - start] @ errors[start:j]
            codes[j] = _codes(wanted, steps[0], levels)
            errors[j] = weight[j] - codes[j] * steps[0]
    return codes


def _upper_factor(matrix: Tensor, damping: float) -> Tensor:
    """The upper triangular R with R R^T = ``matrix`` + damping * mean of its diagonal * I, more where it must be.

    It is the lower factor of the matrix with rows and columns in the reverse order, reversed again.
    """
    mean = float(matrix.diagonal().mean())
    factor: Tensor
    for attempt in range(ATTEMPTS):
        damped = matrix.flip(0, 1)
        damped.diagonal().add_(mean * (max(damping, SMALLEST_DAMPING) * 10**attempt if attempt else damping))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor.flip(0, 1)
    raise ValueError(f"a covariance ({len(matrix)} inputs) is NaN, infinite or far from positive definite")


def _codes(values: Tensor, steps: Tensor, levels: int) -> Tensor:
    return (values / steps).round_().clamp_(-levels, levels)


def _checked(weight: Tensor, scale: Tensor) -> Tensor:
    """The scale as (out, 1) float64, once it and the weight can be used."""
    steps = scale.double().reshape(-1, 1).expand(len(weight), 1)
    if not bool((steps > 0).all() and torch.isfinite(steps).all()):
        raise ValueError("a weight's scale is not a positive number")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("a weight is NaN or infinite")
    return steps
