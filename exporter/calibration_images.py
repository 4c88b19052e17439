"""Whether images are fit to calibrate on: enough of them, different, no two sets of the same, and normalised.

What is certain is refused; what only looks wrong is a warning. Pixels normalised with mean m and standard deviation s
lie in -m / s .. (1 - m) / s. So floats that are whole numbers beyond that were never normalised; other floats beyond it
may be the overshoot of a scaling, or no pixels at all; and floats that fill 0..1 alone may be a coincidence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exporter.errors import InputRejected, listed
from exporter.image_files import shown
from exporter.image_stream import IMAGES_AT_ONCE, Dataset

FEWEST, RECOMMENDED = 128, 512
LARGEST_CONSTANT = 0.01
"""The share of images that may be of one colour: each is a point, and says nothing of textures."""
NAMED = 3
OVERSHOOT = 1.5
"""How far floats may leave the range of pixels, as a factor of its width about its centre: cubic scaling overshoots."""


def calibration_problems(dataset: Dataset) -> list[str]:
    """Reads all images once, if nobody has.

    Returns:
        Warnings, each a line.

    Raises:
        InputRejected: too many images are of one colour, all are the same, or some are NaN or infinite; or floats are
            surely not normalised.
    """
    facts = dataset.facts
    different = len(np.unique(facts.fingerprints))
    if different == 1:
        raise InputRejected(
            f"{shown(dataset.path)}: all {dataset.count} images are the same; give different ones for {dataset.flag}"
        )
    warnings = _constant(dataset, facts.constant)
    if different < FEWEST:
        same = "" if different == dataset.count else f", {different} of them different"
        warnings.append(
            f"{shown(dataset.path)}: {dataset.count} images{same}; at least {FEWEST} are asked for, {RECOMMENDED} "
            f"recommended"
        )
    elif different < dataset.count:
        warnings.append(
            f"{shown(dataset.path)}: {dataset.count - different} of {dataset.count} images are copies of others in it"
        )
    return warnings if dataset.holds_pixels else warnings + _unnormalised(dataset)


def duplicates(calibration: Dataset, labelled: Dataset) -> int:
    """How many labelled images are among those of the calibration, bit by bit as the network gets them."""
    return int(np.isin(labelled.fingerprints(), calibration.fingerprints()).sum())


def duplicate_warnings(calibration: Dataset, labelled: Dataset) -> list[str]:
    """A line where labelled images were calibrated on: what they are scored with is then too good."""
    found = duplicates(calibration, labelled)
    if not found:
        return []
    return [
        f"{shown(labelled.path)}: {found} of {labelled.count} labelled images are in {shown(calibration.path)}, too; "
        f"top-1 on images that were calibrated on may be too good, so label others"
    ]


def _constant(dataset: Dataset, constant: NDArray[np.bool_]) -> list[str]:
    names = [dataset.name_of(int(index)) for index in np.flatnonzero(constant)]
    if not names:
        return []
    line = f"{shown(dataset.path)}: {len(names)} of {dataset.count} images are of one colour: {listed(names, NAMED)}"
    if len(names) > LARGEST_CONSTANT * dataset.count:
        raise InputRejected(f"{line}; leave them out")
    return [line]


def _unnormalised(dataset: Dataset) -> list[str]:
    """What the values of float images say of how they were normalised."""
    lowest, highest, whole = _extremes(dataset)
    mean, std = (np.array(values) for values in (dataset.normalise.mean, dataset.normalise.std))
    black, white = -mean / std, (1 - mean) / std
    beyond = OVERSHOOT * (white - black) / 2
    found = f"{shown(dataset.path)}: float images hold values from {lowest.min():g} to {highest.max():g}"
    flags = f"mean {_listed(dataset.normalise.mean)} and std {_listed(dataset.normalise.std)}"
    expected = f"pixels normalised with {flags} lie in {black.min():.3g} to {white.max():.3g}"
    if (np.maximum(highest - (black + white) / 2, (black + white) / 2 - lowest) > beyond).any():
        if whole:
            raise InputRejected(
                f"{found}, all whole, and {expected}: save them as uint8 (N, H, W, C), or give the --mean and --std "
                f"that they went through"
            )
        return [f"{found}, and {expected}: look at --mean, --std and how the file was made"]
    if lowest.min() >= 0 and highest.max() <= 1 and (black < 0).all():
        return [f"{found}, and {expected}: none is darker than the mean, so they may not have been normalised"]
    return []


def _extremes(dataset: Dataset) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
    """The smallest and the largest value of each channel, (C,), and whether all values are whole numbers."""
    lowest, highest, whole = np.inf, -np.inf, True
    for batch in dataset.batches(IMAGES_AT_ONCE):
        lowest = np.minimum(lowest, batch.min(axis=(0, 2, 3)))
        highest = np.maximum(highest, batch.max(axis=(0, 2, 3)))
        whole = whole and bool((batch == np.rint(batch)).all())
    return np.asarray(lowest, np.float64), np.asarray(highest, np.float64), whole


def _listed(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
