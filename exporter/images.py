"""What goes into a network: how pixels are normalised, and noise where there are no images."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from exporter.errors import UsageError

GOLDEN_IMAGES = 4
SEED = 20210109
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.5,), (0.5,)


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """x = (pixel / 255 - mean) / std, per channel; ``assumed`` where the user gave neither."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    assumed: bool


def normalisation(channels: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Normalisation:
    """What was given, else the usual values for ``channels``: ImageNet's for three, 0.5 and 0.5 for one.

    Raises:
        UsageError: a list of another length than ``channels``.
    """
    usual_mean, usual_std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (GREY_MEAN, GREY_STD)
    for flag, given in (("--mean", mean), ("--std", std)):
        if given is not None and len(given) != channels:
            raise UsageError(f"{flag}: {len(given)} values for {channels} channels; give one for each")
    return Normalisation(mean or usual_mean, std or usual_std, mean is None and std is None)


def noise_images(channels: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """(4, channels, height, width) of normal noise, each image of another strength around another colour.

    The same on every machine. Colours, because pooling averages white noise away: all images would have nearly the same
    answer, and one that is wrong would not stand out.
    """
    generator = np.random.Generator(np.random.PCG64(SEED))
    noise = generator.standard_normal((GOLDEN_IMAGES, channels, *size), dtype=np.float32)
    strengths = np.linspace(0.25, 1.0, GOLDEN_IMAGES, dtype=np.float32)[:, None, None, None]
    levels = np.linspace(-1.0, 1.0, GOLDEN_IMAGES, dtype=np.float32)
    colours = np.stack([np.roll(levels, channel) for channel in range(channels)], axis=1)[:, :, None, None]
    return noise * strengths + colours
