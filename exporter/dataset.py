"""Images, and perhaps labels, of an ``.npz`` or a folder, read as a stream: memory does not grow with their number.

A folder is read by ``exporter.image_folder``; what both have in common is ``exporter.image_stream.Dataset``. In an
``.npz``,

    images   uint8 (N, H, W, C) or (N, H, W); or float32 (N, C, H, W), normalised already
    labels   N integers, the classes
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import warnings
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import InputRejected, UsageError, first_line
from exporter.image_folder import image_folder_from_path
from exporter.image_stream import Batch, Dataset, ImageFacts, Progress, facts_of_dataset, unreported
from exporter.images import GOLDEN_IMAGES, Normalisation

__all__ = ["Batch", "Dataset", "NpzDataset", "dataset_from_npz", "dataset_from_path"]

_PIECE = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class NpzDataset(Dataset):
    """An ``.npz`` whose images fit the network."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool

    @property
    def count(self) -> int:
        """How many images there are."""
        return self.shape[0]

    @property
    def holds_pixels(self) -> bool:
        """Whether the images are bytes, which still have to be normalised."""
        return bool(self.dtype == np.uint8)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the array's type, shape and numbers, however the file orders or compresses them."""
        content = hashlib.sha256(f"{self.dtype.str} {self.shape}".encode())
        for images in self._rows(max(1, _PIECE // self._row), self.count):
            content.update(np.ascontiguousarray(images).data.cast("B"))
        return content.hexdigest()

    @functools.cached_property
    def facts(self) -> ImageFacts:
        """What every image is known by; reads all of them when it is first asked for."""
        return facts_of_dataset(self)

    def raw(self, size: int, count: int | None = None) -> Iterator[NDArray[Any]]:
        """As ``batches``, in the file's own dtype and before normalisation, but already (n, C, H, W)."""
        for images in self._rows(size, self.count if count is None else min(count, self.count)):
            if not self.holds_pixels:
                yield images
            else:
                shaped = images[..., None] if images.ndim == 3 else images
                yield shaped.transpose(0, 3, 1, 2)

    def name_of(self, index: int) -> str:
        """What an image is called in messages: its number in the array."""
        return f"image {index}"

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

    @property
    def _row(self) -> int:
        """Bytes of one image."""
        return int(np.prod(self.shape[1:])) * self.dtype.itemsize

    def _rows(self, size: int, count: int) -> Iterator[NDArray[Any]]:
        if self.fortran_order:  # its images are not one after the other
            with np.load(self.path, allow_pickle=False) as archive:
                images = archive["images"]
            yield from (images[start : start + size] for start in range(0, count, size))
            return
        with _member(self.path, self.flag) as member:
            _header(member)
            for start in range(0, count, size):
                rows = min(size, count - start)
                data = member.read(rows * self._row)
                yield np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])


def dataset_from_path(
    path: pathlib.Path,
    channels: int,
    size: tuple[int, int],
    normalise: Normalisation,
    flag: str = "--calib",
    resize: int | None = None,
    progress: Progress = unreported,
) -> Dataset:
    """Opens a folder of images, or an ``.npz``, for a network of ``channels`` and ``size`` (height, width).

    Args:
        path: of either.
        channels: 1 or 3 for a folder.
        size: what images are prepared in, or have, in pixels.
        normalise: how pixels become what the network gets.
        flag: what named ``path``, for messages.
        resize: what the shorter side of a folder's images is scaled to; None for the usual. An ``.npz`` holds what was
            prepared already.
        progress: told how many images of a folder have been read.

    Raises:
        InputRejected: nothing is there, it cannot be read, or its images do not fit.
        SdkMissing: a folder, and Pillow is not installed.
        UsageError: ``resize`` is less than ``size``.
    """
    if resize is not None and resize < max(size):
        raise UsageError(
            f"--resize: images scaled to {resize} do not cover {size[0]}x{size[1]}; give {max(size)} or more"
        )
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises where a folder above may not be read)
        return image_folder_from_path(path, channels, size, normalise, flag, resize, progress)
    return dataset_from_npz(path, channels, size, normalise, flag)


def dataset_from_npz(
    path: pathlib.Path, channels: int, size: tuple[int, int], normalise: Normalisation, flag: str = "--calib"
) -> NpzDataset:
    """Opens an ``.npz`` and sees that it is whole and fits a network for ``channels`` and ``size`` (height, width).

    Raises:
        InputRejected: the file cannot be read, or its images have another size or number of channels.
    """
    if path.is_dir():
        raise InputRejected(f"{path}: is a folder; give an .npz with images")
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
    return NpzDataset(path, flag, normalise, shape, dtype, fortran_order)


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
    except PermissionError as error:
        raise InputRejected(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except Exception as error:  # damaged archives raise from zipfile, zlib and numpy alike
        raise InputRejected(f"{path}: not an .npz of arrays ({first_line(error)}); np.savez the images") from error
