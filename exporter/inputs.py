"""What a run is proved on, opened and checked before anything is computed."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.calibration_images import calibration_problems, duplicate_warnings
from exporter.dataset import Dataset, dataset_from_path
from exporter.errors import UsageError
from exporter.expectation import Expectation, expectation_from_npz
from exporter.images import GOLDEN_IMAGES, Normalisation, noise_images
from exporter.ledger import affordable_images
from exporter.request import Request


@dataclasses.dataclass(frozen=True)
class Inputs:
    """``images`` (4, C, H, W) float32 are what every form of the network is compared on; ``source`` says where from.

    ``notes`` say what is doubtful about the files. ``calibration`` and ``labelled`` are the whole of them, where given,
    with the ``labels`` (N,) of the latter;
    ``expectation`` has the user's own model's answers. ``affordable`` are the first images, as many as an expensive
    network computes where it is not a file yet.
    """

    images: NDArray[np.float32]
    affordable: NDArray[np.float32]
    source: str
    notes: tuple[str, ...]
    calibration: Dataset | None
    labelled: Dataset | None
    labels: NDArray[np.int64] | None
    expectation: Expectation | None


def inputs_from_request(request: Request, architecture: Architecture, normalise: Normalisation) -> Inputs:
    """Opens the files that ``request`` names.

    Raises:
        InputRejected: one cannot be read, or does not fit the network.
        UsageError: labels for a network without a classifier.
    """
    channels = architecture.in_channels
    calibration = labelled = labels = expectation = None
    if request.calibration is not None:
        calibration = dataset_from_path(
            request.calibration, channels, request.size, normalise, "--calib", request.resize
        )
    if request.labels is not None:
        labelled = dataset_from_path(request.labels, channels, request.size, normalise, "--labels", request.resize)
        if architecture.classes is None:
            raise UsageError("--labels: the checkpoint has no classifier, so no answer is right or wrong; leave it out")
        labels = labelled.labels(architecture.classes)
    if request.expect is not None:
        expectation = expectation_from_npz(request.expect, architecture, request.size)
    chosen = calibration or labelled
    if chosen is None:
        images, source = noise_images(channels, request.size), "seeded noise (no --calib given)"
    else:
        images, source = chosen.first(GOLDEN_IMAGES), f"the first {GOLDEN_IMAGES} images of {chosen.path.name}"
    affordable = images[: affordable_images(architecture, request.size, len(images))]
    notes = notes_on(calibration, labelled, request)
    return Inputs(images, affordable, source, notes, calibration, labelled, labels, expectation)


def notes_on(calibration: Dataset | None, labelled: Dataset | None, request: Request) -> tuple[str, ...]:
    """What is doubtful about the images, each a line.

    Raises:
        InputRejected: they cannot be used for what is asked.
    """
    notes = [note for dataset in (calibration, labelled) if dataset is not None for note in dataset.notes]
    if calibration is not None and "int8" in request.trt:
        notes += calibration_problems(calibration)
        if labelled is not None:
            notes += duplicate_warnings(calibration, labelled)
    return tuple(notes)
