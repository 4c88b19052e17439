"""From an image file to what the network takes: x = (pixel / 255 - mean) / std, at the network's size.

The steps are those of the usual evaluation on ImageNet, which the authors of RepVGG use, too:

    orientation   turned as its EXIF data says
    colours       converted to RGB, or to grey for a network of one channel. Transparency is dropped, as the usual image
                  loaders of training do: what counts is the colour that stands in the file
    size          an image of the network's size stays as it is. Any other is scaled (bilinear, antialiased) until it
                  just covers the network's size divided by 0.875, and the centre is cut out: 224 means 256, then 224.
                  With ``resize`` the shorter side of every image is scaled to it instead, also of one that would fit,
                  as torchvision's Resize and CenterCrop do
    numbers       scaled to 0..1, minus the mean, divided by the standard deviation, channel by channel
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import IO, Any

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
    """``mean`` and ``std`` per channel in units of 0..1; ``size`` is (height, width); ``channels`` 1 or 3.

    ``resize`` is what the shorter side is scaled to before the centre is cut out; None for what the size asks for.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    channels: int
    resize: int | None = None

    @property
    def line(self) -> str:
        """What is done to an image, in one line."""
        height, width = self.size
        colours = "RGB" if self.channels == 3 else "grey"
        scaled = f"any other size is scaled to cover {round(height / CROP)}x{round(width / CROP)}"
        if self.resize is not None:
            scaled = f"the shorter side is scaled to {self.resize}"
        return (
            f"{colours}, {height}x{width} ({scaled}, and the centre cut out), "
            f"pixels in 0..1 minus {_listed(self.mean)}, divided by {_listed(self.std)}"
        )

    def array_from_image(self, path: pathlib.Path) -> NDArray[np.float32]:
        """Reads an image file; returns (1, channels, height, width).

        Raises:
            InputRejected: not an image of 8 bits per channel that can be read, or too large to be meant.
            SdkMissing: Pillow is not installed.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = self.pixels_from_image(path)
        except SdkMissing:
            raise
        except FileNotFoundError:
            raise InputRejected(f"{path}: no such image; check the path") from None
        except Exception as error:  # a damaged image raises whatever its decoder pleases
            raise InputRejected(f"{path}: no image can be read here ({first_line(error)})") from error
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        normalised = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(normalised[None], np.float32)

    def pixels_from_image(
        self, file: pathlib.Path | IO[bytes], formats: tuple[str, ...] | None = None
    ) -> NDArray[np.uint8]:
        """All steps but the last: (channels, height, width), uint8.

        It may run in many threads at once, so it leaves the filters of warnings, which are the whole process's, as they
        are: Pillow's own warnings are for the caller to turn off.

        Args:
            file: a path, or a file that is open.
            formats: those of Pillow that are tried; None for all that it knows.

        Raises:
            SdkMissing: Pillow is not installed.
            Exception: whatever the decoder of a damaged image pleases.
        """
        image_module = pillow_image()
        from PIL import ImageOps

        with image_module.open(file, formats=formats) as image:
            if image.mode not in EIGHT_BIT_MODES:
                raise ValueError(f"pixels of kind {image.mode}; convert it to 8 bits per channel")
            count, most = image.width * image.height, image_module.MAX_IMAGE_PIXELS
            if most is not None and count > most:
                raise ValueError(f"Image size ({count} pixels) exceeds {most}, so it may be a decompression bomb")
            turned = ImageOps.exif_transpose(image).convert(MODES[self.channels])
            pixels = np.asarray(self._resized(turned), np.uint8)
        return np.ascontiguousarray(pixels.reshape(*self.size, self.channels).transpose(2, 0, 1))

    def _resized(self, image: Any) -> Any:
        """See the module; all sizes are (height, width) but for Pillow's own, which are (width, height)."""
        height, width = self.size
        if self.resize is None and (image.height, image.width) == self.size:
            return image
        least = (round(height / CROP), round(width / CROP)) if self.resize is None else (self.resize, self.resize)
        scaled = _covering((image.height, image.width), least)
        if scaled[0] * scaled[1] > LARGEST_SCALED:
            raise ValueError(f"{image.width}x{image.height} pixels are too narrow for {width}x{height}; cut it first")
        larger = image.resize((scaled[1], scaled[0]), pillow_image().Resampling.BILINEAR)
        top, left = round((scaled[0] - height) / 2), round((scaled[1] - width) / 2)
        return larger.crop((left, top, left + width, top + height))


def pillow_image() -> Any:
    """Pillow's module ``Image``.

    Raises:
        SdkMissing: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise SdkMissing(
            "Pillow, which reads images, is not installed here; pip install 'repvgg-exporter[images]'"
        ) from error
    return Image


def resize_from_assumptions(assumptions: Mapping[str, str]) -> int | None:
    """What ``assumptions.resize`` says, in pixels; None where nothing is said.

    Raises:
        ValueError: it is not a whole number above 0.
    """
    text = assumptions.get("resize")
    if text is None:
        return None
    if re.fullmatch(r"[1-9]\d{0,8}", text, re.ASCII) is None:
        raise ValueError(f"resize: {text!r} is not a number of pixels")
    return int(text)


def preprocessing_from_manifest(manifest: Manifest, where: str) -> Preprocessing:
    """What an engine's sidecar says.

    Raises:
        InputRejected: the network takes something else than grey or RGB images.
    """
    fields = manifest.preprocessing
    height, width = fields["size"]
    found = Preprocessing(fields["mean"], fields["std"], (height, width), fields["channels"], fields.get("resize"))
    return _checked(found, where)


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
        said = value.items().get("resize")
        resize = resize_from_assumptions({} if said is None else {"resize": said.text()})
    except (Malformed, ValueError) as error:
        raise InputRejected(f"{where}: metadata assumptions: {first_line(error)}; export it again") from error
    made = (description.shape[1], *size)
    found = Preprocessing(mean, std, size, description.shape[1] or len(mean), resize)
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
    if found.resize is not None and found.resize < max(found.size):
        height, width = found.size
        raise InputRejected(f"{where}: images scaled to {found.resize} do not cover {height}x{width}; export it again")
    return found


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
