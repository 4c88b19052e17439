"""Top-1 on labelled images, precision by precision, each against float32 on the very same images.

With c_i = 1 where a network names the class of image i, and d_i = c_i(float32) - c_i(precision):

    drop             mean d
    standard error   sqrt(var d / n), of the paired difference: far smaller than that of either top-1 alone, since the
                     two networks are right and wrong on nearly the same images

An answer with a NaN or an infinity in it names no class and is never right: to numpy, the largest of NaNs is the first
class. A network that gives one fails, whatever its top-1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import OUTPUT
from exporter.dataset import Dataset
from exporter.ledger import Run
from exporter.report import AccuracyRow, Check

IMAGES_AT_ONCE = 16
BASELINE = "fp32"
NO_CLASS = -1
"""What an answer names that is not finite: no label is negative."""
Progress = Callable[[str, int, int], None]


def accuracy_from_labels(
    dataset: Dataset, labels: NDArray[np.int64], networks: Mapping[str, Run], progress: Progress
) -> tuple[AccuracyRow, ...]:
    """Runs every network over all images once.

    Args:
        dataset: the images; they are read as a stream.
        labels: (N,) classes.
        networks: by precision, "fp32" among them; each a classifier.
        progress: told the images done.
    """
    named = {precision: np.empty(dataset.count, np.int64) for precision in networks}
    done = 0
    for batch in dataset.batches(IMAGES_AT_ONCE):
        for precision, run in networks.items():
            named[precision][done : done + len(batch)] = classes_of(run(batch)[OUTPUT])
        done += len(batch)
        progress("top-1", done, dataset.count)
    return tuple(row_from_answers(precision, answers, named[BASELINE], labels) for precision, answers in named.items())


def classes_of(outputs: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """The class that each row of (n, classes) names; NO_CLASS where it is not finite."""
    finite = np.isfinite(outputs).all(axis=1)
    return np.where(finite, outputs.argmax(axis=1), NO_CLASS)


def row_from_answers(
    precision: str, answers: NDArray[np.int64], baseline: NDArray[np.int64], labels: NDArray[np.int64]
) -> AccuracyRow:
    """The figures of one precision from what it, and float32, named: classes or NO_CLASS, all (N,)."""
    right = answers == labels
    difference = (baseline == labels).astype(np.float64) - right
    return AccuracyRow(
        precision=precision,
        images=len(labels),
        top1=float(right.mean()),
        drop=float(difference.mean()),
        standard_error=math.sqrt(float(difference.var(ddof=1)) / len(labels)),
        agreement=float(((answers == baseline) & (answers != NO_CLASS)).mean()),
        non_finite=int((answers == NO_CLASS).sum()),
    )


def accuracy_check(row: AccuracyRow, max_drop: float | None) -> Check:
    """``max_drop`` in percentage points makes a verdict of it; without one the figures are only told.

    Outputs that are not finite fail in either case.
    """
    detail = f"{row.top1:.2%} of {row.images} images"
    if row.precision != BASELINE:
        detail += (
            f", {100 * row.drop:.2f} points below {BASELINE} (standard error {100 * row.standard_error:.2f}), "
            f"the same class on {row.agreement:.2%}"
        )
    if row.non_finite:
        detail += f"; on {row.non_finite} of them its outputs are NaN or infinite"
        return Check(f"{row.precision}, top-1", passed=False, value=row.top1, gate=None, detail=detail)
    if max_drop is None or row.precision == BASELINE:
        return Check(f"{row.precision}, top-1", passed=True, value=row.top1, gate=None, detail=detail)
    passed = 100 * row.drop <= max_drop
    limit = f"{'within' if passed else 'beyond'} --max-drop {max_drop:g}"
    return Check(f"{row.precision}, top-1", passed, 100 * row.drop, max_drop, f"{detail}; {limit}")
