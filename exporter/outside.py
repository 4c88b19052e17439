"""What is asked of witnesses from outside: of the batch norms, and of the user's own model.

No comparison of two forms of one reconstruction shows that the reconstruction is right: both sides would have the wrong
stride, epsilon or normalisation. The statistics in the batch norms were taken from the real images in training
(``exporter.witness``), and ``--expect`` has the real model's answers (``exporter.expectation``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from exporter.architecture import Architecture
from exporter.expectation import expectation_check
from exporter.inputs import Inputs
from exporter.model import Observer, unobserved
from exporter.proposals import proposal_from_images
from exporter.report import Check
from exporter.request import Request
from exporter.witness import CLEAR, CLEAR_DISAGREEMENT, FEWEST_IMAGES, UNAVAILABLE, WRONG, witness_from_images
from exporter.workload import multiply_accumulates

IMAGES = 128
IMAGES_AT_ONCE = 32
LARGEST_WORK = 400e9
"""Multiply-accumulates that the witness may take: some seconds. It is asked with FEWEST_IMAGES even beyond that."""
FITS = 0.6
"""What an assumption's mean distance must be for it to explain anything; networks whose statistics were never trained
stay above it whatever is assumed."""
STAGE = "witness, batch norms against your images"


def expectation_checks(architecture: Architecture, tensors: Mapping[str, Tensor], inputs: Inputs) -> list[Check]:
    """The user's own model's answers against the reconstruction in float64, where there are any."""
    return [] if inputs.expectation is None else [expectation_check(architecture, tensors, inputs.expectation)]


def witness_from_inputs(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
    request: Request,
    observe: Observer = unobserved,
) -> tuple[list[Check], dict[str, Any] | None]:
    """Runs the first IMAGES real images, where there are any, through the training-time network; fewer of a large one.

    It fails where the batch norms do not know the images, or know them clearly better under other assumptions. Where
    the branches contradict each other, they were never trained together and judge nothing; nor do they where the
    request ignores them. ``observe`` is told what the blocks compute.

    Returns:
        The check, and the report's ``witness``.
    """
    dataset = inputs.calibration or inputs.labelled
    if dataset is None:
        return [], None
    affordable = int(LARGEST_WORK // multiply_accumulates(architecture, request.size))
    count = max(FEWEST_IMAGES, min(IMAGES, affordable))
    witness = witness_from_images(architecture, tensors, dataset.batches(IMAGES_AT_ONCE, count), observe)
    record, detail = witness.record(), witness.line
    contradicted = any(not agreement.disagreement <= CLEAR_DISAGREEMENT for agreement in witness.agreements)
    if contradicted or witness.verdict in (CLEAR, UNAVAILABLE):
        passed = True if witness.verdict == CLEAR else None
        return [Check(STAGE, passed, None, None, detail)], {**record, "proposal": None}
    images = next(dataset.raw(count, count)).copy()
    proposal = proposal_from_images(architecture, tensors, images, dataset.normalise)
    failed = witness.verdict == WRONG or (proposal.found and proposal.drift_after <= FITS)
    detail += f"; {proposal.line}"
    if failed:
        detail += (
            " (ignored, as --ignore-witness says)" if request.ignore_witness else " (--ignore-witness lets it pass)"
        )
    passed = True if not failed else None if request.ignore_witness else False
    return [Check(STAGE, passed, None, None, detail)], {**record, "proposal": proposal.record()}


def source_of_peaks(inputs: Inputs, witness: Mapping[str, Any] | None) -> str:
    """Which images the range of activations was seen on: those of the witness, where it had any."""
    dataset = inputs.calibration or inputs.labelled
    if dataset is None or witness is None or not witness["images"]:
        return inputs.source
    return f"the first {witness['images']} images of {dataset.path.name}"
