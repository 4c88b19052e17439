"""Whether a file's answers to the golden images are the network's: the one place where that is decided.

    within the gate   relative error, SQNR and top-1 by the precision (``engines.parity``)
    not mixed up      each answer is nearest to that of its own image (``engines.golden``)

Errors are relative to the largest of all golden answers, so that one answer alone is held to the same as among others.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputRejected
from engines.golden import Golden, golden_from_file
from engines.parity import GATES, Comparison, Gate, compare

LEAST_CONTRAST = 1e-9


@dataclasses.dataclass(frozen=True)
class Judgement:
    """``failure`` says why the answers do not pass, and is None where they do; ``gate`` is what was asked of them."""

    failure: str | None
    detail: str
    comparison: Comparison
    gate: Gate

    @property
    def line(self) -> str:
        """The failure, if there is one, and the figures."""
        return self.detail if self.failure is None else f"{self.failure}; {self.detail}"


def judgement(
    golden: Golden, outputs: Mapping[str, NDArray[Any]], gate: Gate, images: Sequence[int] | None = None
) -> Judgement:
    """Holds answers against the golden ones.

    Args:
        golden: the vectors.
        outputs: arrays by the outputs' names, a row for each of ``images``.
        gate: of the precision, for a classifier's outputs.
        images: which golden image each row is for; None for each once, in order.

    Raises:
        ValueError: the outputs are not those of the golden vectors, by name, shape or number of rows.
    """
    rows = list(range(len(golden.images)) if images is None else images)
    answers, reference = golden.joined(outputs), golden.outputs[rows]
    gate = golden.layout.gate(gate)
    comparison = compare(reference, answers, scale_of=golden.outputs)
    failure = gate.failure(comparison)
    mixed_up = [] if failure else golden.mixed_up(answers, rows)
    if mixed_up:
        failure = f"answer {mixed_up[0]} is nearer to that of another image: rows are mixed up, or all alike"
    detail = f"{_worst_of(golden, answers, rows)}{gate.figures(comparison)}"
    if golden.layout.ranked:
        detail += f", top-1 agrees on {comparison.rows - len(comparison.flips)} of {comparison.rows}"
    if not golden.tells_apart(gate):
        detail += "; a constant answer would pass, too: export with --calib for vectors that tell more"
    return Judgement(failure, detail, comparison, gate)


def telling_golden(path: pathlib.Path) -> Golden:
    """Reads golden vectors that can tell one answer from another.

    Raises:
        InputRejected: they cannot be read, or cannot tell.
    """
    golden = golden_from_file(path)
    if golden.contrast <= LEAST_CONTRAST:
        raise InputRejected(
            f"{path}: two answers or all values are the same, so a mix-up could not be seen; export with other images"
        )
    return golden


def gate_with_tolerance(precision: str, tolerance: float) -> Gate:
    """The gate of the precision with another largest relative error."""
    usual = GATES.get(precision, Gate(tolerance, top1=True))
    return dataclasses.replace(usual, max_relative_error=tolerance)


def gate_of_engine(precision: str, tolerance: float) -> Gate:
    """An engine's, whose sidecar says this ``tolerance``: it may narrow the gate of the precision, and not widen it."""
    usual = GATES.get(precision)
    return gate_with_tolerance(precision, tolerance if usual is None else min(tolerance, usual.max_relative_error))


def _worst_of(golden: Golden, answers: NDArray[np.floating], rows: Sequence[int]) -> str:
    """Which of several outputs the relative error is that of; nothing where there is one."""
    count = len(golden.shapes)
    return f"{count} outputs, the worst is {golden.worst_output(answers, rows)}: " if count > 1 else ""
