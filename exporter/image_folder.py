"""A folder of images, read as a stream and prepared as ``engines.preprocessing`` prepares what an engine is asked.

Opening reads and decodes every file once, since only that shows which are whole. It keeps, of each, eight bytes of the
hash of the file, eight of what the network gets, and whether all pixels are alike. Those that cannot be read are left
out for good; of more than one in a hundred, the folder is refused. Every later pass decodes again, and compares the
hash: a file that has changed, or is gone, is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import stat
import warnings
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engines.preprocessing import MODES, Preprocessing
from exporter.errors import InputRejected, SdkMissing, first_line, listed
from exporter.image_files import ImageFiles, image_files_from_folder, shown
from exporter.image_stream import Dataset, ImageFacts, Progress, facts_of_batch, normalised_pixels
from exporter.images import GOLDEN_IMAGES, Normalisation
from exporter.read_ahead import in_order

FORMATS = ("JPEG", "PNG", "WEBP")
THREADS = 2
LARGEST_AHEAD = 64
"""Decoded images that wait for whoever reads: at 224 px, 10 MB."""
LARGEST_FILE = 1 << 29
NAMED = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """What opening found: of each image that can be read, its name, the hash of its file, and the facts."""

    names: tuple[str, ...]
    hashes: NDArray[np.uint64]
    facts: ImageFacts
    digest: str


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder(Dataset):
    """A folder whose images have all been read once; what could not be is in ``notes``.

    Attributes:
        preprocessing: how an image is prepared.
        files: which there are, without those that cannot be read.
        survey: what was found in them when they were read first.
    """

    preprocessing: Preprocessing
    files: ImageFiles
    survey: Survey

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.files.names)

    @property
    def holds_pixels(self) -> bool:
        """Always: a file of an image holds bytes."""
        return True

    @property
    def digest(self) -> str:
        """SHA-256 of each file's path in the folder and of its bytes."""
        return self.survey.digest

    @property
    def facts(self) -> ImageFacts:
        """What every image is known by."""
        return self.survey.facts

    def raw(self, size: int, count: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """As ``batches``, before normalisation: (n, C, H, W) uint8."""
        count = self.count if count is None else min(count, self.count)
        _quieten_pillow()
        ahead = min(size + THREADS, LARGEST_AHEAD)
        with contextlib.closing(in_order(self._again, range(count), threads=THREADS, ahead=ahead)) as images:
            for start in range(0, count, size):
                yield np.stack([next(images) for _ in range(min(size, count - start))])

    def labels(self, classes: int) -> NDArray[np.int64]:
        """The class of each image's folder, (N,). See ``ImageFiles.classes``."""
        numbers = self.files.classes(classes)
        return np.array([numbers[name.partition("/")[0]] for name in self.files.names], np.int64)

    def name_of(self, index: int) -> str:
        """What an image is called in messages: its path in the folder."""
        return shown(self.files.names[index])

    def _again(self, index: int) -> NDArray[np.uint8]:
        name = self.files.names[index]
        try:
            content = _content(self.path / name)
            pixels = self.preprocessing.pixels_from_image(io.BytesIO(content), FORMATS)
        except SdkMissing:
            raise
        except Exception as error:
            raise InputRejected(
                f"{shown(self.path / name)}: was read before and cannot be now ({_reason(error)}); run it again"
            ) from error
        if _short(hashlib.sha256(content).digest()) != self.survey.hashes[index]:
            raise InputRejected(f"{shown(self.path / name)}: changed while the run went on; run it again")
        return pixels


def image_folder_from_path(
    path: pathlib.Path,
    channels: int,
    size: tuple[int, int],
    normalise: Normalisation,
    flag: str,
    resize: int | None,
    progress: Progress,
) -> ImageFolder:
    """Looks through a folder and reads every image in it once; see ``exporter.dataset.dataset_from_path``.

    Raises:
        InputRejected: no or too few images, too many that cannot be read, or a network that is not for images.
        SdkMissing: Pillow is not installed.
    """
    if channels not in MODES:
        raise InputRejected(
            f"{shown(path)}: the network takes {channels} channels and images have 1 or 3; "
            f"give an .npz with images (N, {channels}, H, W) in float32"
        )
    files = image_files_from_folder(path)
    preprocessing = Preprocessing(normalise.mean, normalise.std, size, channels, resize)
    survey, unread = _survey(files, preprocessing, flag, progress)
    found = f"{len(unread)} of {len(files.names)} images cannot be read"
    if 100 * len(unread) > len(files.names):
        raise InputRejected(
            f"{shown(path)}: {found}, more than 1 in 100: {listed(unread, NAMED)}; repair or remove them"
        )
    if len(survey.names) < GOLDEN_IMAGES:
        raise InputRejected(f"{shown(path)}: holds {len(survey.names)} images; expected at least {GOLDEN_IMAGES}")
    notes = (f"{shown(path)}: {found} and are left out: {listed(unread, NAMED)}",) if unread else ()
    whole = dataclasses.replace(files, names=survey.names)
    return ImageFolder(path, flag, normalise, preprocessing, whole, survey, notes=notes)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """One file: the SHA-256 of its bytes, or why it is no image."""

    sha256: bytes
    facts: ImageFacts | None
    reason: str


def _survey(files: ImageFiles, preprocessing: Preprocessing, flag: str, progress: Progress) -> tuple[Survey, list[str]]:
    """Reads every file once; those that cannot be read, with the reasons, are the second."""
    _quieten_pillow()
    total = len(files.names)
    hashes, fingerprints = np.zeros(total, np.uint64), np.zeros(total, np.uint64)
    constant, kept = np.zeros(total, np.bool_), np.zeros(total, np.bool_)
    digest, unread = hashlib.sha256(), []
    pending = in_order(
        lambda name: _seen(files.root / name, preprocessing), files.names, threads=THREADS, ahead=LARGEST_AHEAD
    )
    with contextlib.closing(pending):
        for index, (name, seen) in enumerate(zip(files.names, pending, strict=True)):
            if seen.facts is None:
                unread.append(f"{shown(name)} ({seen.reason})")
            else:
                kept[index], hashes[index] = True, _short(seen.sha256)
                fingerprints[index], constant[index] = seen.facts.fingerprints[0], seen.facts.constant[0]
                encoded = os.fsencode(name)
                digest.update(b"%d %b" % (len(encoded), encoded) + seen.sha256)
            progress(f"reading {flag}", index + 1, total)
    names = tuple(name for name, is_kept in zip(files.names, kept, strict=True) if is_kept)
    facts = ImageFacts(fingerprints[kept], constant[kept])
    return Survey(names, hashes[kept], facts, digest.hexdigest()), unread


def _seen(path: pathlib.Path, preprocessing: Preprocessing) -> _Seen:
    try:
        content = _content(path)
        pixels = preprocessing.pixels_from_image(io.BytesIO(content), FORMATS)
    except SdkMissing:
        raise
    except Exception as error:  # a damaged image raises whatever its decoder pleases
        return _Seen(b"", None, _reason(error))
    normalised = normalised_pixels(pixels[None], Normalisation(preprocessing.mean, preprocessing.std, assumed=False))
    return _Seen(hashlib.sha256(content).digest(), facts_of_batch(normalised), "")


def _content(path: pathlib.Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise ValueError("not a file")
    if status.st_size > LARGEST_FILE:
        raise ValueError(f"{status.st_size} bytes are more than an image is meant to have")
    return path.read_bytes()


def _short(sha256: bytes) -> int:
    return int.from_bytes(sha256[:8], "little")


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "no JPEG, PNG or WebP image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error, 80)


def _quieten_pillow() -> None:
    """Turns Pillow's warnings off, for good: what it warns of is an error here, or does not matter.

    The filters are the whole process's, so the threads that decode cannot turn them off for their own time.
    """
    warnings.filterwarnings("ignore", module="PIL")
