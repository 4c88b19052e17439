"""How far one set of outputs is from another, and whether that is near enough.

With reference r and candidate y, both (n, classes):

    relative error   max|y - r| / max|r|, over everything
    SQNR             10 log10(sum r^2 / sum (y - r)^2), in dB
    cosine           sum r y / sqrt(sum r^2 sum y^2), over everything
    margin of row i  largest minus second largest value of r_i
    flip             the top-1 of row i differs
    decided flip     a flip although the margin of its row exceeds max|y_i - r_i|

No comparison has a gate by default: whoever compares says how near is near enough, by the precision that was asked for
(``GATES``) or otherwise.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Flip:
    """A row whose top-1 differs, and the reference's margin in it."""

    row: int
    margin: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The figures of one comparison. Errors are in the unit of the outputs unless called relative."""

    relative_error: float
    max_abs_error: float
    mean_abs_error: float
    sqnr_db: float
    cosine: float
    top1_agreement: float
    flips: tuple[Flip, ...]
    decided_flips: int
    non_finite: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Gate:
    """What a comparison must satisfy: a largest relative error, whether top-1 flips are counted, a least SQNR.

    The relative error is that of the worst number alone. Where many numbers are off by design, as in INT8, it must be
    wide, and the SQNR says what the noise comes to over all of them.
    """

    max_relative_error: float
    top1: bool
    min_sqnr_db: float | None = None

    def figures(self, comparison: Comparison) -> str:
        """What was found beside what is asked for."""
        least = "" if self.min_sqnr_db is None else f" (gate {self.min_sqnr_db:g} dB)"
        return (
            f"relative error {comparison.relative_error:.1e} (gate {self.max_relative_error:.1e}), "
            f"SQNR {comparison.sqnr_db:.1f} dB{least}"
        )

    def failure(self, comparison: Comparison) -> str | None:
        """Why ``comparison`` does not pass, or None when it does. A NaN never passes."""
        if comparison.non_finite:
            return f"{comparison.non_finite} outputs are NaN or infinite"
        if not comparison.relative_error <= self.max_relative_error:
            return f"relative error {comparison.relative_error:.2e} exceeds {self.max_relative_error:.1e}"
        if self.min_sqnr_db is not None and not comparison.sqnr_db >= self.min_sqnr_db:
            return f"SQNR {comparison.sqnr_db:.1f} dB is below {self.min_sqnr_db:g} dB"
        if self.top1 and comparison.decided_flips:
            return f"top-1 differs in {comparison.decided_flips} of {comparison.rows} rows beyond the error's reach"
        return None


GATES = {
    "fp32": Gate(max_relative_error=5e-6, top1=True),
    "fp16": Gate(max_relative_error=5e-3, top1=True),
    "int8": Gate(max_relative_error=0.25, top1=False, min_sqnr_db=20.0),
}
"""By precision, against the training-time network in float64."""


def compare(
    reference: NDArray[np.floating], candidate: NDArray[np.floating], *, scale_of: NDArray[np.floating] | None = None
) -> Comparison:
    """Compares two (n, classes) arrays of any float dtype, in float64.

    Args:
        reference: what should have been computed.
        candidate: what was.
        scale_of: what errors and noise are set against, where ``reference`` is a part of it; None for ``reference``.

    Raises:
        ValueError: the shapes differ, or there is nothing to compare.
    """
    if reference.shape != candidate.shape or reference.ndim != 2 or reference.size == 0:
        raise ValueError(f"outputs cannot be compared: shapes {reference.shape} and {candidate.shape}")
    r, y = reference.astype(np.float64), candidate.astype(np.float64)
    whole = r if scale_of is None else scale_of.astype(np.float64)
    non_finite = int(y.size - np.isfinite(y).sum()) + int(r.size - np.isfinite(r).sum())
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = np.abs(y - r)
        scale, noise = float(np.abs(whole).max()), float((error**2).mean())
        worst = float(error.max())
        relative = worst / scale if scale > 0 else (0.0 if worst == 0 else math.inf)
        sqnr = math.inf if noise == 0 else 10 * math.log10(max(float((whole**2).mean()) / noise, 1e-300))
        length = math.sqrt(float((r**2).sum()) * float((y**2).sum()))
        cosine = float((r * y).sum()) / length if length else (1.0 if worst == 0 else 0.0)
        margin = margins(r)
        decided = margin > error.max(axis=1)
    same = y.argmax(axis=1) == r.argmax(axis=1)
    return Comparison(
        relative_error=relative,
        max_abs_error=worst,
        mean_abs_error=float(error.mean()),
        sqnr_db=sqnr,
        cosine=cosine,
        top1_agreement=float(same.mean()),
        flips=tuple(Flip(int(row), float(margin[row])) for row in np.flatnonzero(~same)),
        decided_flips=int((~same & decided).sum()),
        non_finite=non_finite,
        rows=len(r),
    )


def margins(outputs: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n, classes) to (n,): the largest value of each row minus the second largest; infinite for a single class."""
    if outputs.shape[1] < 2:
        return np.full(len(outputs), np.inf)
    top = np.partition(outputs.astype(np.float64), -2, axis=1)
    return np.asarray(top[:, -1] - top[:, -2], np.float64)
