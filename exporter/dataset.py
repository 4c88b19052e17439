"""Images, and perhaps labels, of an ``.npz``, read as a stream: memory does not grow with their number.

images   uint8 (N, H, W, C) or (N, H, W); or float32 (N, C, H, W), normalised already
labels   N integers, the classes
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import warnings
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import InputRejected, first_line
from exporter.images import GOLDEN_IMAGES, Normalisation

Batch = NDArray[np.float32]
_PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An ``.npz`` whose images fit the network. ``flag`` is what named it, for messages."""

    path: pathlib.Path
    flag: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    normalise: Normalisation

    @property
    def count(self) -> int:
        """How many images there are."""
        return self.shape[0]

    @property
    def holds_pixels(self) -> bool:
        """Whether the images are bytes, which still have to be normalised."""
        return bool(self.dtype == np.uint8)

    def first(self, count: int) -> Batch:
        """The first ``count`` images, normalised, or as many as there are: (n, C, H, W)."""
        return next(self.batches(count))

    def batches(self, size: int, count: int | None = None) -> Iterator[Batch]:
        """All images, or the first ``count``, normalised, ``size`` at a time: (n, C, H, W) float32.

        Raises:
            InputRejected: the file ends early, or holds NaN or infinity.
        """
        for images in self.raw(size, count):
            batch = self.normalised(images)
            if not np.isfinite(batch).all():
                raise InputRejected(f"{self.path}: images hold NaN or infinite values; make the file again")
            yield batch

    def raw(self, size: int, count: int | None = None) -> Iterator[NDArray[Any]]:
        """As ``batches``, in the file's own dtype and before normalisation, but already (n, C, H, W)."""
        for images in self._rows(size, self.count if count is None else min(count, self.count)):
            if not self.holds_pixels:
                yield images
            else:
                shaped = images[..., None] if images.ndim == 3 else images
                yield shaped.transpose(0, 3, 1, 2)

    def normalised(self, images: NDArray[Any]) -> Batch:
        """What the network is given for ``images`` as ``raw`` yields them."""
        if self.holds_pixels:
            mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.normalise.mean, self.normalise.std))
            images = (images.astype(np.float32) / np.float32(255) - mean) / std
        return np.array(images, np.float32, order="C")

    def labels(self, classes: int) -> NDArray[np.int64]:
        """The labels, (N,).

        Raises:
            InputRejected: there are none, too few, too many, or some that are not classes of the network.
        """
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                labels = np.asarray(archive["labels"])
        except KeyError:
            raise InputRejected(
                f"{self.path}: holds no array called labels; np.savez it beside images for {self.flag}"
            ) from None
        except Exception as error:
            raise InputRejected(f"{self.path}: its labels cannot be read ({first_line(error)})") from error
        if labels.shape != (self.count,) or labels.dtype.kind not in "iu":
            raise InputRejected(
                f"{self.path}: labels are {labels.dtype} {labels.shape}; expected {self.count} integers, one an image"
            )
        if labels.min() < 0 or labels.max() >= classes:
            raise InputRejected(
                f"{self.path}: labels go from {labels.min()} to {labels.max()}; the network has classes 0 to "
                f"{classes - 1}"
            )
        return labels.astype(np.int64)

    def _rows(self, size: int, count: int) -> Iterator[NDArray[Any]]:
        if self.fortran_order:  # its images are not one after the other
            with np.load(self.path, allow_pickle=False) as archive:
                images = archive["images"]
            yield from (images[start : start + size] for start in range(0, count, size))
            return
        with _member(self.path, self.flag) as member:
            _header(member)
            row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
            for start in range(0, count, size):
                rows = min(size, count - start)
                data = member.read(rows * row)
                yield np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])


def dataset_from_npz(
    path: pathlib.Path, channels: int, size: tuple[int, int], normalise: Normalisation, flag: str = "--calib"
) -> Dataset:
    """Opens an ``.npz`` and sees that it is whole and fits a network for ``channels`` and ``size`` (height, width).

    Raises:
        InputRejected: the file cannot be read, or its images have another size or number of channels.
    """
    if path.is_dir():
        raise InputRejected(f"{path}: folders of images are not read in this version; save them as an .npz with images")
    with _member(path, flag) as member:
        shape, fortran_order, dtype = _header(member)
        if dtype not in (np.uint8, np.float32):
            raise InputRejected(f"{path}: images are {dtype}; expected uint8 or float32; np.savez them as such")
        fits = shape[1:] == (channels, *size)
        if dtype == np.uint8:
            fits = shape[1:] == (*size, channels) or (channels == 1 and shape[1:] == size)
        if not fits or shape[0] < GOLDEN_IMAGES:
            raise InputRejected(
                f"{path}: images are {dtype} {shape or (1,)}; expected at least {GOLDEN_IMAGES} "
                f"with {channels} channels of {size[0]}x{size[1]}: uint8 (N, H, W, C) or float32 (N, C, H, W); "
                f"set --size, or resize them"
            )
        found = 0
        while piece := member.read(_PIECE):  # the archive's checksum is compared at its end
            found += len(piece)
    if found != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise InputRejected(f"{path}: its images are cut short; np.savez the images")
    return Dataset(path, flag, shape, dtype, fortran_order, normalise)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old headers, which are either read or refused
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(member)
        return tuple(shape), fortran_order, dtype


@contextlib.contextmanager
def _member(path: pathlib.Path, flag: str) -> Iterator[IO[bytes]]:
    """The array called images, as a stream; whatever goes wrong on the way is an ``InputRejected``."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            names = [name for name in ("images.npy", "images") if name in archive.namelist()]
            if not names:
                raise InputRejected(f"{path}: holds no array called images; np.savez it under that name")
            with archive.open(names[0]) as member:
                yield member
    except InputRejected:
        raise
    except FileNotFoundError:
        raise InputRejected(f"{path}: no such file; check {flag}") from None
    except Exception as error:  # damaged archives raise from zipfile, zlib and numpy alike
        raise InputRejected(f"{path}: not an .npz of arrays ({first_line(error)}); np.savez the images") from error
