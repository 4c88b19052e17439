"""The range of a tensor's codes: how large a magnitude is before it is clipped.

With L levels (127 for 8 bits) a range t makes the scale s = t / L, and x becomes s * clip(round(x / s), -L, L). A small
t clips more, a large one rounds more coarsely. Three ways to choose, all from a histogram (``histogram``):

    mse   the t of the least mean of (x - rounded x)^2
    kl    the t whose codes tell the most about the distribution: Migacz, 8-bit Inference with TensorRT, GTC 2017
    max   the largest magnitude: nothing is clipped

**The mean squared error** is exact for values that lie evenly within their bin. With y = x / s, k = min(round(y), L),

    integral of (x - rounded x)^2 from 0 to x   =   s^3 * G(y),     G(y) = k / 12 + (y - k)^3 / 3

for each whole step before y adds 1/12, and the way from k to y the rest, be it rounding (|y - k| <= 1/2) or clipping.
A bin from a to b of width w so contributes its count times s^3 * (G(b / s) - G(a / s)) / w. Zeros contribute nothing.

**The divergence** for the first i bins: P is the histogram of these bins, with all that lies beyond put into the last;
Q is what L + 1 levels leave of it: bin j, from 0, belongs to group floor(j * (L + 1) / i), and each bin that is not
empty in P gets an equal share of its group's count, without what lies beyond. Both are divided by their sums, and

    KL(P, Q)   =   sum over j of P_j * log(P_j / Q_j)

is infinite where Q_j alone is 0. The least over i = L + 1 ... 2048 makes t = i * width. Zeros do not count: every range
keeps them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exporter.quantization.histogram import BINS, Histogram

__all__ = ["METHODS", "expected_error", "range_from_histogram"]

METHODS: tuple[str, ...] = ("mse", "kl", "max")
NARROWEST = 1e-3
"""Of the largest magnitude: the smallest candidate of "mse"."""
CANDIDATES = 201
"""Up to the largest magnitude, each 3.5 % above the one before; then as many again on both sides of the best."""


def range_from_histogram(histogram: Histogram, method: str, levels: int) -> float:
    """The magnitude t > 0 that the largest code stands for: the scale is t / levels.

    Args:
        histogram: of the values.
        method: one of ``METHODS``.
        levels: the largest code, as 127.

    Raises:
        ValueError: no value differs from 0, so that nothing tells what the range should be; or the method is unknown.
    """
    if histogram.largest == 0:
        raise ValueError(f"no range: all {histogram.count} values are 0")
    if method == "max":
        return histogram.largest
    if method == "mse":
        return _least_error(histogram, levels)
    if method == "kl":
        return _least_divergence(histogram, levels)
    raise ValueError(f"unknown method {method!r}: one of {', '.join(METHODS)}")


def expected_error(histogram: Histogram, t: float, levels: int) -> float:
    """The mean of (x - rounded x)^2 over all values, zeros included, with the range t.

    Raises:
        ValueError: there is no value, or the range is not positive.
    """
    if histogram.count == 0 or not t > 0:
        raise ValueError(f"no error of {histogram.count} values in a range of {t}")
    return float(_errors(histogram, torch.tensor([t], dtype=torch.float64), levels)[0])


def _errors(histogram: Histogram, t: Tensor, levels: int) -> Tensor:
    """The mean squared error for each range of t (n,), (n,) float64."""
    edges = torch.arange(BINS + 1, dtype=torch.float64) * histogram.width
    scale = (t / levels).reshape(-1, 1)
    y = edges / scale
    code = y.round().clamp_(max=levels)
    integral = scale**3 * (code / 12 + (y - code) ** 3 / 3)
    of_bins = integral.diff(dim=1) / histogram.width
    return of_bins @ histogram.counts.double() / histogram.count


def _least_error(histogram: Histogram, levels: int) -> float:
    low, high = math.log10(NARROWEST), 0.0
    for _ in range(2):
        exponents = torch.linspace(low, high, CANDIDATES, dtype=torch.float64)
        candidates = histogram.largest * 10**exponents
        best = int(_errors(histogram, candidates, levels).argmin())
        low, high = (float(exponents[min(max(best + way, 0), CANDIDATES - 1)]) for way in (-1, 1))
    return float(candidates[best])


def _least_divergence(histogram: Histogram, levels: int) -> float:
    """All numbers of bins at once: what a sum over bins needs is a difference of two running sums."""
    counts = histogram.counts.double()
    used = int(counts.nonzero().max()) + 1
    groups = levels + 1
    if used <= groups:
        return histogram.largest
    kept = torch.arange(groups, used + 1)  # each number of bins, the i of the formulas
    running, filled = _running(counts), _running((counts > 0).double())
    inside = running[kept]
    beyond = running[-1] - inside

    first = (torch.arange(groups + 1) * kept.reshape(-1, 1) + groups - 1) // groups  # of each group, rounded up
    mass = running[first].diff(dim=1)
    share = filled[first].diff(dim=1)
    share[:, -1] += (counts[kept - 1] == 0) & (beyond > 0)  # filled by what lies beyond
    level = mass / share.clamp(min=1)
    in_p = mass.clone()
    in_p[:, -1] += beyond

    last = counts[kept - 1]
    own = _running(torch.special.xlogy(counts, counts))[kept - 1] + torch.special.xlogy(last + beyond, last + beyond)
    divergence = (own - torch.special.xlogy(in_p, level).sum(dim=1)) / running[-1] + (inside / running[-1]).log()
    best = int(torch.where(inside > 0, divergence, torch.inf).argmin())
    return min(int(kept[best]) * histogram.width, histogram.largest)


def _running(values: Tensor) -> Tensor:
    """The sums of the first 0, 1, 2, ... values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
