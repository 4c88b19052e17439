"""``golden.npz``: four inputs and the float64 answers of the training-time network, which travel with every engine."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputRejected, first_line
from engines.parity import Gate, compare

GOLDEN_NAME = "golden.npz"
MIXED_UP_FACTOR = 0.5
"""Rounding alone moves an answer away from all others at once, and hardly ever this much nearer to one of them."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """``images`` (n, C, H, W) float32, normalised; ``outputs`` (n, classes) float64."""

    images: NDArray[np.float32]
    outputs: NDArray[np.float64]

    @property
    def contrast(self) -> float:
        """How far apart the two most alike answers to different images are: max|difference| / max|output|.

        Infinite for a single image; 0 where every class, or every image, has the same answer: then nothing can be told
        from these vectors.
        """
        scale = float(np.abs(self.outputs).max())
        if scale == 0 or (self.outputs.shape[1] > 1 and (self.outputs == self.outputs[:, :1]).all()):
            return 0.0
        pairs = itertools.combinations(range(len(self.outputs)), 2)
        apart = [
            float(np.abs(self.outputs[a] - self.outputs[b]).max())
            for a, b in pairs
            if not np.array_equal(self.images[a], self.images[b])
        ]
        return min(apart) / scale if apart else float("inf")

    def tells_apart(self, gate: Gate) -> bool:
        """Whether a network that gave one and the same answer to everything would be beyond ``gate``."""
        constant = (self.outputs.min(axis=0) + self.outputs.max(axis=0)) / 2
        error = compare(self.outputs, np.broadcast_to(constant, self.outputs.shape)).relative_error
        return error > gate.max_relative_error

    def mixed_up(self, outputs: NDArray[np.floating], rows: Sequence[int] | None = None) -> list[int]:
        """The places in ``outputs`` that are much nearer to the answer for another image than to their own.

        On noise the answers of many networks are within a percent of each other, so that a network that mixes its batch
        up, or answers the same to everything, may well be within the gate of a precision. It is not nearest to each.

        Args:
            outputs: (m, classes).
            rows: which image each of them is for; None for every image once, in order.
        """
        images = [hash(image.tobytes()) for image in self.images]
        places = []
        for place, row in enumerate(range(len(outputs)) if rows is None else rows):
            distances = np.abs(self.outputs - outputs[place].astype(np.float64)).max(axis=1)
            others = [distance for distance, image in zip(distances, images, strict=True) if image != images[row]]
            if min(others, default=np.inf) < MIXED_UP_FACTOR * distances[row]:
                places.append(place)
        return places


def golden_from_file(path: pathlib.Path) -> Golden:
    """Reads the vectors.

    Raises:
        InputRejected: not an ``.npz`` of finite ``input`` float32 (n, C, H, W) and ``output`` float64 (n, classes).
    """
    images, outputs = _arrays(path)
    for name, array, dtype, rank in (("input", images, "float32", 4), ("output", outputs, "float64", 2)):
        if array.dtype != dtype or array.ndim != rank or array.size == 0:
            raise _rejected(path, f"{name} is {array.dtype} {array.shape}; expected {dtype} of {rank} dimensions")
        if not np.isfinite(array).all():
            raise _rejected(path, f"{name} holds NaN or infinite values")
    if len(images) != len(outputs):
        raise _rejected(path, f"{len(images)} inputs and {len(outputs)} outputs")
    return Golden(images, outputs)


def _arrays(path: pathlib.Path) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # about old headers, which are either read or refused
            with np.load(file, allow_pickle=False) as archive:
                return np.asarray(archive["input"]), np.asarray(archive["output"])
    except FileNotFoundError:
        raise InputRejected(f"{path}: no such file, so there is nothing to compare with; copy it along") from None
    except Exception as error:  # damaged archives raise from zipfile, zlib and numpy alike
        raise _rejected(path, f"not an .npz with input and output ({first_line(error)})") from error


def _rejected(path: pathlib.Path, problem: str) -> InputRejected:
    return InputRejected(f"{path}: {problem}; export again, or copy the file again")
