"""From an image file to what the network takes: x = (pixel / 255 - mean) / std, at the network's size.

The steps are those of the usual evaluation on ImageNet, which the authors of RepVGG use, too:

    orientation   turned as its EXIF data says
    colours       converted to RGB, or to grey for a network of one channel. Transparency is dropped, as the usual image
                  loaders of training do: what counts is the colour that stands in the file
    size          an image of the network's size stays as it is. Any other is scaled (bilinear, antialiased) until it
                  just covers the network's size divided by 0.875, and the centre is cut out: 224 means 256, then 224
    numbers       scaled to 0..1, minus the mean, divided by the standard deviation, channel by channel
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.backend import TensorDescription
from engines.errors import InputRejected, SdkMissing, first_line
from engines.json_value import Malformed, value_from_bytes
from engines.manifest import Manifest
from engines.sizes import size_and_range_from_text

CROP = 0.875
MODES = {1: "L", 3: "RGB"}
EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
LARGEST_SCALED = 1 << 26


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """``mean`` and ``std`` per channel in units of 0..1; ``size`` is (height, width); ``channels`` 1 or 3."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    channels: int

    @property
    def line(self) -> str:
        """What is done to an image, in one line."""
        height, width = self.size
        colours = "RGB" if self.channels == 3 else "grey"
        covered = f"{round(height / CROP)}x{round(width / CROP)}"
        return (
            f"{colours}, {height}x{width} (any other size is scaled to cover {covered}, and the centre cut out), "
            f"pixels in 0..1 minus {_listed(self.mean)}, divided by {_listed(self.std)}"
        )

    def array_from_image(self, path: pathlib.Path) -> NDArray[np.float32]:
        """Reads an image file; returns (1, channels, height, width).

        Raises:
            InputRejected: not an image of 8 bits per channel that can be read, or too large to be meant.
            SdkMissing: Pillow is not installed.
        """
        pixels = _pixels(path, MODES[self.channels], self.size)
        mean, std = (np.array(values, np.float32) for values in (self.mean, self.std))
        normalised = (pixels.reshape(*self.size, self.channels).astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None], np.float32)


def preprocessing_from_manifest(manifest: Manifest, where: str) -> Preprocessing:
    """What an engine's sidecar says.

    Raises:
        InputRejected: the network takes something else than grey or RGB images.
    """
    fields = manifest.preprocessing
    height, width = fields["size"]
    return _checked(Preprocessing(fields["mean"], fields["std"], (height, width), fields["channels"]), where)


def preprocessing_from_metadata(
    metadata: Mapping[str, str], description: TensorDescription, where: str
) -> Preprocessing:
    """What an ONNX file's ``metadata_props`` say in ``assumptions``; the channels are those of its input.

    Raises:
        InputRejected: they say nothing, or nothing that fits the input.
    """
    if "assumptions" not in metadata or len(description.shape) != 4:
        raise InputRejected(
            f"{where}: says nothing of how images are prepared for it; use a file that this project exported"
        )
    try:
        value = value_from_bytes(metadata["assumptions"])
        mean, std = (_numbers(value.field(name).text()) for name in ("mean", "std"))
        size, sizes = size_and_range_from_text(value.field("size").text())
    except (Malformed, ValueError) as error:
        raise InputRejected(f"{where}: metadata assumptions: {first_line(error)}; export it again") from error
    made = (description.shape[1], *size)
    found = Preprocessing(mean, std, size, description.shape[1] or len(mean))
    is_free = description.shape[2:] == (None, None)
    if any(fixed not in (None, extent) for fixed, extent in zip(description.shape[1:], made, strict=True)) or (
        sizes is not None and not is_free
    ):
        raise InputRejected(f"{where}: its input is {description.shape}, its metadata say {size}; export it again")
    return _checked(found, where)


def _checked(found: Preprocessing, where: str) -> Preprocessing:
    if found.channels not in MODES:
        raise InputRejected(f"{where}: takes {found.channels} channels; only grey and RGB images can be read")
    numbers = (*found.mean, *found.std)
    if {len(found.mean), len(found.std)} != {found.channels} or not all(map(math.isfinite, numbers)):
        raise InputRejected(f"{where}: mean and std are not {found.channels} numbers each; export it again")
    if min(found.std) <= 0 or min(found.size) < 1:
        raise InputRejected(f"{where}: std and size must be above 0; export it again")
    return found


def _pixels(path: pathlib.Path, mode: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise SdkMissing(
            "Pillow, which reads images, is not installed here; pip install 'repvgg-exporter[images]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode not in EIGHT_BIT_MODES:
                    raise ValueError(f"pixels of kind {image.mode}; convert it to 8 bits per channel")
                turned = ImageOps.exif_transpose(image).convert(mode)
                return np.asarray(_resized(turned, size), np.uint8)
    except FileNotFoundError:
        raise InputRejected(f"{path}: no such image; check the path") from None
    except Exception as error:  # a damaged image raises whatever its decoder pleases
        raise InputRejected(f"{path}: no image can be read here ({first_line(error)})") from error


def _resized(image: Any, size: tuple[int, int]) -> Any:
    """See the module; ``size`` and all inside are (height, width) but for Pillow's own, which are (width, height)."""
    height, width = size
    if (image.height, image.width) == size:
        return image
    scaled = _covering((image.height, image.width), (round(height / CROP), round(width / CROP)))
    if scaled[0] * scaled[1] > LARGEST_SCALED:
        raise ValueError(f"{image.width}x{image.height} pixels are too narrow for {width}x{height}; cut it first")
    from PIL import Image

    larger = image.resize((scaled[1], scaled[0]), Image.Resampling.BILINEAR)
    top, left = round((scaled[0] - height) / 2), round((scaled[1] - width) / 2)
    return larger.crop((left, top, left + width, top + height))


def _covering(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """``size`` scaled, in its proportions, to the smallest that covers ``least``."""
    (height, width), (least_height, least_width) = size, least
    if least_height * width >= least_width * height:
        return least_height, width * least_height // height
    return height * least_width // width, least_width


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _listed(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
