"""Images, and perhaps labels, as a stream that is read as often as needed: memory does not grow with their number.

What is known of each image is eight bytes of hash and one bit. ``fingerprints`` are taken of the normalised float32
numbers, which is what the network gets, so that an image is known again in another file and in another kind of file:
where one bit differs, it is another image.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import InputRejected
from exporter.images import Normalisation

Batch = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""
IMAGES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFacts:
    """What every image is known by: both (n,), in the order of the stream.

    Attributes:
        fingerprints: uint64, of what the network gets.
        constant: whether all pixels of the image are alike.
    """

    fingerprints: NDArray[np.uint64]
    constant: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset(abc.ABC):
    """Images that fit the network, in an order that never changes. ``flag`` is what named them, for messages.

    ``notes`` are lines for the user: what was left out, and why.
    """

    path: pathlib.Path
    flag: str
    normalise: Normalisation
    notes: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """How many images there are."""

    @property
    @abc.abstractmethod
    def holds_pixels(self) -> bool:
        """Whether the images are bytes, which still have to be normalised."""

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """SHA-256 of the images as they are stored, hexadecimal; neither labels nor preprocessing are in it."""

    @property
    @abc.abstractmethod
    def facts(self) -> ImageFacts:
        """What every image is known by; found once."""

    @abc.abstractmethod
    def raw(self, size: int, count: int | None = None) -> Iterator[NDArray[Any]]:
        """As ``batches``, before normalisation, but already (n, C, H, W)."""

    @abc.abstractmethod
    def labels(self, classes: int) -> NDArray[np.int64]:
        """The labels, (N,).

        Raises:
            InputRejected: there are none, too few, too many, or some that are not classes of the network.
        """

    @abc.abstractmethod
    def name_of(self, index: int) -> str:
        """What an image is called in messages."""

    def fingerprints(self) -> NDArray[np.uint64]:
        """(n,) hashes of the images as the network gets them."""
        return self.facts.fingerprints

    def first(self, count: int) -> Batch:
        """The first ``count`` images, normalised, or as many as there are: (n, C, H, W)."""
        return next(self.batches(count, count))

    def batches(self, size: int, count: int | None = None) -> Iterator[Batch]:
        """All images, or the first ``count``, normalised, ``size`` at a time: (n, C, H, W) float32.

        Raises:
            InputRejected: the images end early, or hold NaN or infinity.
        """
        for images in self.raw(size, count):
            batch = self.normalised(images)
            if not np.isfinite(batch).all():
                raise InputRejected(f"{self.path}: images hold NaN or infinite values; make the file again")
            yield batch

    def normalised(self, images: NDArray[Any]) -> Batch:
        """What the network is given for ``images`` as ``raw`` yields them."""
        if not self.holds_pixels:
            return np.array(images, np.float32, order="C")
        return normalised_pixels(images, self.normalise)


def normalised_pixels(pixels: NDArray[np.uint8], normalise: Normalisation) -> Batch:
    """(pixel / 255 - mean) / std of (n, C, H, W), in float32."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (normalise.mean, normalise.std))
    return np.array((pixels.astype(np.float32) / np.float32(255) - mean) / std, np.float32, order="C")


def facts_of_batch(batch: Batch) -> ImageFacts:
    """Of normalised images, (n, C, H, W)."""
    hashes = [hashlib.sha256(image.data.cast("B")).digest()[:8] for image in np.ascontiguousarray(batch)]
    return ImageFacts(np.frombuffer(b"".join(hashes), np.uint64), (batch == batch[:, :, :1, :1]).all(axis=(1, 2, 3)))


def facts_of_dataset(dataset: Dataset) -> ImageFacts:
    """Reads all images once.

    Raises:
        InputRejected: as ``Dataset.batches``.
    """
    return joined_facts(facts_of_batch(batch) for batch in dataset.batches(IMAGES_AT_ONCE))


def joined_facts(parts: Iterator[ImageFacts]) -> ImageFacts:
    """Those of one batch after the other."""
    fingerprints, constant = zip(*((part.fingerprints, part.constant) for part in parts), strict=True)
    return ImageFacts(np.concatenate(fingerprints), np.concatenate(constant))


def unreported(step: str, done: int, total: int) -> None:
    """The progress that tells nobody."""
