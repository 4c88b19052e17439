"""The smallest and the largest of a network's sizes, where height and width are dynamic: proved as the usual one is.

A graph that computes one size rightly may have baked it in (a pooling window, a reshape), so the training-time network
is run at both ends of the range, too, and every file against it. Real images are scaled to those sizes; noise is made
anew.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from exporter.architecture import Architecture
from exporter.images import noise_images
from exporter.inputs import Inputs
from exporter.ledger import affordable_images
from exporter.measured import Measured
from exporter.reference import reference_from_repvgg
from exporter.request import Request, Size

IMAGES = 3
"""As many as make a batch in which rows can be mixed up, beside the one that is run alone."""


def measured_at_ends(
    architecture: Architecture, tensors: Mapping[str, Tensor], inputs: Inputs, request: Request
) -> tuple[Measured, ...]:
    """The training-time network's answers at the ends of ``request.size_range``; nothing where the size is fixed."""
    if request.size_range is None:
        return ()
    found = []
    for size in dict.fromkeys(request.size_range):
        images = images_of_size(inputs, architecture.in_channels, size)
        images = images[: affordable_images(architecture, size, IMAGES)]
        reference = reference_from_repvgg(architecture, tensors, images)
        found.append(Measured(reference, 0, at=f" at {size[0]}x{size[1]}"))
    return tuple(found)


def images_of_size(inputs: Inputs, channels: int, size: Size) -> NDArray[np.float32]:
    """(4, C, *size) float32: the compared images scaled, or noise of the same kind."""
    if inputs.calibration is None and inputs.labelled is None:
        return noise_images(channels, size)
    scaled = functional.interpolate(torch.from_numpy(inputs.images), size, mode="bilinear", antialias=True)
    images: NDArray[np.float32] = scaled.numpy()
    return images
