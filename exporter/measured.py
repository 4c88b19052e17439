"""Every form of one network on the same inputs: run, judged, and kept for the ledger."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from engines.golden import Golden
from engines.parity import Comparison, Gate, compare
from exporter.errors import DeviceFailed, VerificationFailed
from exporter.ledger import Run, Stage, ledger_from_stages, stage_from_run, whole_stage
from exporter.reference import Reference
from exporter.report import Check, LedgerRow

FLOAT32_LOSS_FACTOR = 4.0
"""Float32 may lose so many times what the training-time network itself loses in it."""

WIDEST_GATE = 1e-3
"""What no loss in float32 excuses."""

Judge = Callable[[Comparison], Gate]
"""The gate for a comparison; it may depend on the comparison, where a wider one costs work to find."""


class Measured:
    """Begins with the reference and grows by a stage at a time.

    ``largest`` is the largest batch that is run here; ``at`` is added to the names of stages and checks.
    """

    def __init__(self, reference: Reference, largest: int, at: str = "") -> None:
        self.source = reference
        self.at = at
        self.images: NDArray[np.float32] = reference.images
        self.reference: NDArray[np.float64] = reference.outputs
        self.layout = reference.layout
        self.stages: list[Stage] = []
        self._largest = largest

    @property
    def ledger(self) -> tuple[LedgerRow, ...]:
        """A row for each stage so far."""
        return ledger_from_stages(self.reference, self.stages, ranked=self.layout.ranked)

    def keep(self, name: str, opened: Callable[[], Run], count: int | None = None) -> None:
        """Runs a stage that is not judged, on the first ``count`` images or all.

        One that cannot be run is left out, and the checks after it say why.
        """
        with contextlib.suppress(VerificationFailed):
            self.stages.append(stage_from_run(name, self._joined(opened()), self.images[:count]))

    def keep_outputs(self, name: str, outputs: Mapping[str, NDArray[np.floating]]) -> None:
        """A stage that was computed elsewhere, on the first images, as many as there are ``outputs``, at once."""
        self.stages.append(whole_stage(name, self.layout.joined(outputs)))

    def _joined(self, run: Run) -> Callable[[NDArray[np.float32]], NDArray[np.floating]]:
        return lambda batch: self.layout.joined(run(batch))

    def check(self, name: str, title: str, opened: Callable[[], Run], judge: Judge, *, largest: bool = False) -> Check:
        """Runs a stage and judges it.

        Args:
            name: of the stage, in the ledger.
            title: of the check.
            opened: gives what runs (n, C, H, W) to the outputs by name.
            judge: gives the gate.
            largest: whether to run the largest batch, too.
        """
        title += self.at
        try:
            stage = stage_from_run(name + self.at, self._joined(opened()), self.images, self._largest if largest else 0)
            comparison = compare(self.reference[stage.order], stage.outputs)
        except (VerificationFailed, DeviceFailed, ValueError) as error:
            return Check(title, passed=False, value=None, gate=None, detail=f"{', '.join(self.layout.names)}: {error}")
        self.stages.append(stage)
        gate = self.layout.gate(judge(comparison))
        golden = Golden(self.images, self.reference, self.layout)
        failure = gate.failure(comparison) or _mix_up(golden, stage, gate)
        same = comparison.rows - len(comparison.flips)
        agreed = f", top-1 agrees on {same} of {comparison.rows}" if self.layout.ranked else ""
        detail = (
            f"relative error {comparison.relative_error:.1e} (gate {gate.max_relative_error:.1e}), "
            f"SQNR {comparison.sqnr_db:.1f} dB{agreed}"
        )
        if failure is None and not golden.tells_apart(gate):
            undecided = f"undecided: a constant answer would pass, too; give real images; {detail}"
            return Check(title, None, comparison.relative_error, gate.max_relative_error, undecided)
        return Check(
            title,
            failure is None,
            comparison.relative_error,
            gate.max_relative_error,
            f"{failure}; {detail}" if failure else detail,
        )


def _mix_up(golden: Golden, stage: Stage, gate: Gate) -> str | None:
    """Of a precision that may be far off, one output in a hundred may be nearer to another image's by chance."""
    places = golden.mixed_up(stage.outputs, stage.order)
    if len(places) <= (len(stage.order) // 100 if gate.min_sqnr_db is not None else 0):
        return None
    return f"output {places[0]} is nearer to that of another image: rows are mixed up, or all alike"


def fixed(gate: Gate) -> Judge:
    """The judge that always has the same gate."""
    return lambda comparison: gate


def at_least(gate: Gate, loss: Callable[[], float], factor: float) -> Judge:
    """``gate``, or ``factor`` times ``loss()`` where that is larger; ``loss`` is called only when ``gate`` fails."""

    def judge(comparison: Comparison) -> Gate:
        if comparison.non_finite or gate.failure(comparison) is None:
            return gate
        lost = factor * loss()
        if not math.isfinite(lost):
            return gate
        return dataclasses.replace(gate, max_relative_error=min(max(gate.max_relative_error, lost), WIDEST_GATE))

    return judge
