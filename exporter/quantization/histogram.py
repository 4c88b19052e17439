"""How often magnitudes occur, in memory that does not grow with their number.

    zeros       how many values are exactly 0
    counts[i]   how many have   i * width < |x| <= (i + 1) * width,   i = 0 ... 2047

The width is the smallest power of two (none below 2^-126) with which the largest magnitude finds a bin. So x / width
is exact in floating point; and when a larger value comes, bins are merged in pairs, which is exact, too. Whatever the
order in which values come and however they are divided among histograms, what is left depends on their set alone.

Zeros are counted apart, for there are many behind a ReLU and no rounding harms them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["BINS", "Histogram"]

BINS = 2048
PIECE = 1 << 17  # values; what is computed from so many stays in a processor's cache
SMALLEST_EXPONENT = -126  # of a normal float32, whose reciprocal is one, too


class Histogram:
    """A histogram of magnitudes.

    Attributes:
        width: of a bin; a power of two.
        zeros: how many values are 0.
        counts: (BINS,) int64.
        largest: the largest magnitude, exactly; 0.0 when there is none.
    """

    def __init__(self) -> None:
        self.width = 2.0**SMALLEST_EXPONENT
        self.zeros = 0
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.largest = 0.0

    @property
    def count(self) -> int:
        """How many values there are, zeros included."""
        return self.zeros + int(self.counts.sum())

    def add(self, values: Tensor) -> None:
        """Counts float32 values of any shape.

        Raises:
            ValueError: a value is NaN or infinite; nothing has been counted.
            TypeError: the values are not float32.
        """
        if values.dtype != torch.float32:
            raise TypeError(f"a histogram takes float32 values, not {values.dtype}")
        if values.numel() == 0:
            return
        values = _in_memory_order(values.detach())
        smallest, greatest = (float(extreme) for extreme in torch.aminmax(values))
        if not (math.isfinite(smallest) and math.isfinite(greatest)):
            raise ValueError("a value is NaN or infinite")
        self._widen(max(-smallest, greatest))
        for piece in torch.split(values.reshape(-1), PIECE):
            occurrences = torch.bincount(_bins(piece, self.width, signed=smallest < 0), minlength=BINS + 1)
            self.zeros += int(occurrences[0])
            self.counts += occurrences[1:]

    def merged(self, other: Histogram) -> Histogram:
        """The histogram of the values of both."""
        result = Histogram()
        result._widen(max(self.largest, other.largest))
        result.zeros = self.zeros + other.zeros
        for part in (self, other):
            result.counts += _coarser(part.counts, part.width, result.width)
        return result

    def _widen(self, largest: float) -> None:
        """Makes room for a magnitude."""
        if largest <= self.largest:
            return
        self.largest = largest
        mantissa, exponent = math.frexp(largest / BINS)  # 0.5 <= mantissa < 1
        width = max(self.width, math.ldexp(0.5 if mantissa == 0.5 else 1.0, exponent))
        self.counts = _coarser(self.counts, self.width, width)
        self.width = width


def _in_memory_order(values: Tensor) -> Tensor:
    """The same values as a contiguous tensor, not copied where their dimensions only stand in another order."""
    if values.dim() == 4 and not values.is_contiguous():
        values = values.permute(0, 2, 3, 1)
    return values.contiguous()


def _bins(values: Tensor, width: float, *, signed: bool) -> Tensor:
    """ceil(|values| / width) as int16: 0 for a 0, otherwise 1 + the index of the bin."""
    if width > 1:
        values = values.double()  # in float32 the quotient of a very small number could be 0
    ratios = values * (1 / width)
    return (ratios.abs_() if signed else ratios).ceil_().to(torch.int16)


def _coarser(counts: Tensor, width: float, wider: float) -> Tensor:
    """Counts (BINS,) of bins of one width, in bins of another that is a power of two times as wide."""
    together = min(round(wider / width), BINS)
    merged = torch.zeros_like(counts)
    merged[: BINS // together] = counts.reshape(-1, together).sum(dim=1)
    return merged
