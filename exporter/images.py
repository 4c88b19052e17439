"""The images that everything is compared on: the user's own where given, else seeded noise."""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import InputRejected, UsageError, first_line

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
    """(4, channels, height, width) of standard normal noise, the same on every machine."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    return generator.standard_normal((GOLDEN_IMAGES, channels, *size), dtype=np.float32)


def images_from_npz(
    path: pathlib.Path, channels: int, size: tuple[int, int], normalise: Normalisation
) -> NDArray[np.float32]:
    """The first four images of an ``.npz``, normalised: (4, channels, height, width).

    ``images`` is uint8 (N, H, W, C) or (N, H, W), or float32 (N, C, H, W) that is normalised already.

    Raises:
        InputRejected: the file cannot be read, or its images have another size or number of channels.
    """
    images = np.atleast_1d(_images_array(path))
    if images.dtype == np.uint8:
        shaped = images[..., None] if images.ndim == 3 else images
        if shaped.ndim == 4:
            shaped = shaped.transpose(0, 3, 1, 2)
        first = shaped[:GOLDEN_IMAGES].astype(np.float32) / np.float32(255)
    else:
        shaped = first = images[:GOLDEN_IMAGES]
    if shaped.ndim != 4 or shaped.shape[1:] != (channels, *size) or len(images) < GOLDEN_IMAGES:
        raise InputRejected(
            f"{path}: images are {images.dtype} {images.shape}; expected at least {GOLDEN_IMAGES} "
            f"with {channels} channels of {size[0]}x{size[1]}: uint8 (N, H, W, C) or float32 (N, C, H, W); "
            f"set --size, or resize them"
        )
    if images.dtype == np.uint8:
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (normalise.mean, normalise.std))
        first = (first - mean) / std
    if not np.isfinite(first).all():
        raise InputRejected(f"{path}: images hold NaN or infinite values; make the file again")
    return np.ascontiguousarray(first, np.float32)


def _images_array(path: pathlib.Path) -> NDArray[Any]:
    if path.is_dir():
        raise InputRejected(f"{path}: folders of images are not read in this version; save them as an .npz with images")
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # about old headers, which are either read or refused
            with np.load(file, allow_pickle=False) as archive:
                images = np.asarray(archive["images"])
    except FileNotFoundError:
        raise InputRejected(f"{path}: no such file; check --calib") from None
    except KeyError:
        raise InputRejected(f"{path}: holds no array called images; np.savez it under that name") from None
    except Exception as error:  # damaged archives raise from zipfile, zlib and numpy alike
        raise InputRejected(f"{path}: not an .npz of arrays ({first_line(error)}); np.savez the images") from error
    if images.dtype not in (np.uint8, np.float32):
        raise InputRejected(f"{path}: images are {images.dtype}; expected uint8 or float32; np.savez them as such")
    return images
