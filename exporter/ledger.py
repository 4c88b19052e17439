"""The ledger: the same inputs through every form of the network, and what each step on the way cost.

    stage s, outputs y_s        reference r = training-time network in float64
    a row of s                  compare(r, y_s)                      how far from the truth (``engines.parity``)
    added by s                  max|y_s - y_(s-1)| / max|r|          what this step, and not those before it, did

Images go through in batches of one and of three; the float32 graph and engines, also in the largest batch that engines
are built for, in a shuffled repetition, so that a graph that mixes up the rows of a batch is seen. Of an expensive
network that batch is made smaller, to LARGEST_WORK, and the stages that are not files compute fewer images; what was
computed stands in the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.parity import compare
from exporter.architecture import Architecture
from exporter.errors import VerificationFailed
from exporter.report import LedgerRow
from exporter.workload import multiply_accumulates, output_values

LARGEST_WORK = 50e9
"""Multiply-accumulates that the largest batch may take here: about a second on two cores."""
LARGEST_VALUES = 8_000_000
"""Numbers that the outputs of the largest batch may have: feature maps are large, and compared in float64."""
IMAGES_AT_ONCE = 32
SEED = 20212

Outputs = NDArray[np.floating]
Run = Callable[[NDArray[np.float32]], Mapping[str, NDArray[Any]]]
"""Images (n, C, H, W) to the outputs by name, (n, classes) or (n, C, h, w)."""
Rows = Callable[[NDArray[np.float32]], Outputs]
"""The same, with the outputs joined to one row for each image (``engines.outputs``)."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One form of the network: its outputs, and the rows of the inputs that they belong to, batch by batch."""

    name: str
    outputs: Outputs
    rows: tuple[tuple[int, ...], ...]

    @property
    def batches(self) -> tuple[int, ...]:
        """The sizes of the batches."""
        return tuple(len(rows) for rows in self.rows)

    @property
    def order(self) -> list[int]:
        """Which input each output belongs to."""
        return [row for rows in self.rows for row in rows]


def whole_stage(name: str, outputs: Outputs) -> Stage:
    """A stage that computed all inputs at once."""
    return Stage(name, outputs, (tuple(range(len(outputs))),))


def stage_from_run(name: str, run: Rows, images: NDArray[np.float32], largest: int = 0) -> Stage:
    """Runs ``images`` in a batch of one and batches of the rest, and then, if that is more, in one of ``largest``.

    Raises:
        VerificationFailed: from ``run``, or because a batch came back in another number of rows.
    """
    rest = range(1, len(images))
    rows: list[tuple[int, ...]] = [
        (0,),
        *(tuple(rest[start : start + IMAGES_AT_ONCE]) for start in range(0, len(rest), IMAGES_AT_ONCE)),
    ]
    if largest > max(map(len, rows)):
        repeated = np.resize(np.arange(len(images)), largest)
        rows.append(tuple(np.random.Generator(np.random.PCG64(SEED)).permutation(repeated).tolist()))
    outputs = []
    for batch in rows:
        found = run(np.ascontiguousarray(images[list(batch)]))
        if len(found) != len(batch):
            raise VerificationFailed(f"{name}: a batch of {len(batch)} came back as {len(found)} rows")
        outputs.append(found)
    return Stage(name, np.concatenate(outputs), tuple(rows))


def largest_batch(architecture: Architecture, size: tuple[int, int], wanted: int) -> int:
    """``wanted``, or as many images as LARGEST_WORK and LARGEST_VALUES allow."""
    work = int(LARGEST_WORK // multiply_accumulates(architecture, size))
    return min(wanted, work, LARGEST_VALUES // output_values(architecture, size))


def affordable_images(architecture: Architecture, size: tuple[int, int], wanted: int) -> int:
    """How many of ``wanted`` images a stage that is not a file computes; at least one."""
    return max(1, largest_batch(architecture, size, wanted))


def ledger_from_stages(
    reference: NDArray[np.float64], stages: Sequence[Stage], *, ranked: bool = True
) -> tuple[LedgerRow, ...]:
    """A row for each stage, in order.

    Args:
        reference: (n, classes), of the training-time network in float64.
        stages: of outputs (rows, classes).
        ranked: whether the rows are of scores, whose top-1 means something.

    Raises:
        ValueError: outputs of another shape.
    """
    rows = []
    before = whole_stage("reference", reference)
    scale = float(np.abs(reference).max())
    for stage in stages:
        comparison = compare(reference[stage.order], stage.outputs)
        rows.append(LedgerRow(stage.name, comparison, _added(before, stage, scale), stage.batches, ranked))
        before = stage
    return tuple(rows)


def _added(before: Stage, stage: Stage, scale: float) -> float:
    """The largest difference of the two on the inputs that both computed; a NaN stays one."""
    first = {row: before.outputs[place] for place, row in reversed(list(enumerate(before.order)))}
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        common = [place for place, row in enumerate(stage.order) if row in first]
        earlier = np.stack([first[stage.order[place]] for place in common]).astype(np.float64)
        worst = float(np.abs(stage.outputs[common].astype(np.float64) - earlier).max())
        return worst / scale if scale else (0.0 if worst == 0 else float("inf"))
