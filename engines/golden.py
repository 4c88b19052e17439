"""``golden.npz``: four inputs and the float64 answers of the training-time network, which travel with every engine.

It holds ``input`` (n, C, H, W) float32, and for each output of the graph a float64 array of its name: (n, classes), or
(n, channels, height, width) for a feature map. They are compared joined into rows (``engines.outputs``).
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputRejected, first_line
from engines.outputs import Layout, layout_from_outputs
from engines.parity import Gate, compare

GOLDEN_NAME = "golden.npz"
INPUT = "input"
OUTPUT_RANKS = (2, 4)
LARGEST_SIZE = 4 << 30
"""Bytes that the arrays take; four images of the largest size take a quarter of it."""
MIXED_UP_FACTOR = 0.5
"""Rounding alone moves an answer away from all others at once, and hardly ever this much nearer to one of them."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """``images`` (n, C, H, W) float32, normalised; ``outputs`` (n, values) float64, joined by ``layout``.

    ``shapes`` has the shape of each output for one image, by its name; empty where they are not known.
    """

    images: NDArray[np.float32]
    outputs: NDArray[np.float64]
    layout: Layout
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def joined(self, outputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The same outputs of something else, by name, as rows that can be compared with ``outputs``.

        Raises:
            ValueError: one is missing, or is there beside them, or has another shape.
        """
        for name, shape in self.shapes.items():
            if name in outputs and outputs[name].shape[1:] != shape:
                found = outputs[name].shape[1:]
                raise ValueError(f"{name} is {_shape(found)} for each image, and {_shape(shape)} in the golden vectors")
        others = [name for name in outputs if name not in self.layout.names]
        if others:
            raise ValueError(f"the golden vectors have no output {', '.join(others)}")
        return self.layout.joined(outputs)

    def worst_output(self, outputs: NDArray[np.floating], rows: Sequence[int] | None = None) -> str:
        """The name of the output that is the farthest off in its own scale.

        Args:
            outputs: (m, values).
            rows: which image each of them is for; None for every image once, in order.
        """
        reference = self.outputs if rows is None else self.outputs[list(rows)]
        widths = [int(np.prod(shape)) for shape in self.shapes.values()]
        parts = np.split(np.abs(reference - outputs), np.cumsum(widths)[:-1], axis=1)
        errors = [float(np.nan_to_num(part, nan=np.inf).max()) for part in parts]
        return list(self.shapes)[int(np.argmax(errors))]

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
        """Whether a network that gave one and the same answer to everything would be beyond ``gate``.

        The answer that is nearest in the relative error lies halfway between the extremes; in the SQNR, at the mean.
        """
        halfway, mean = (self.outputs.min(axis=0) + self.outputs.max(axis=0)) / 2, self.outputs.mean(axis=0)
        nearest, least_noise = (
            compare(self.outputs, np.broadcast_to(constant, self.outputs.shape)) for constant in (halfway, mean)
        )
        if nearest.relative_error > gate.max_relative_error:
            return True
        return gate.min_sqnr_db is not None and least_noise.sqnr_db < gate.min_sqnr_db

    def mixed_up(self, outputs: NDArray[np.floating], rows: Sequence[int] | None = None) -> list[int]:
        """The places in ``outputs`` that are much nearer to the answer for another image than to their own.

        On noise the answers of many networks are within a percent of each other, so that a network that mixes its batch
        up, or answers the same to everything, may well be within the gate of a precision. It is not nearest to each.

        Args:
            outputs: (m, values).
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
        InputRejected: not an ``.npz`` of finite ``input`` float32 (n, C, H, W) and outputs float64 of the same n, each
            (n, classes) or (n, channels, height, width).
    """
    arrays = _arrays(path)
    for name, array in arrays.items():
        dtype, ranks = ("float32", (4,)) if name == INPUT else ("float64", OUTPUT_RANKS)
        if array.dtype != dtype or array.ndim not in ranks or array.size == 0:
            wanted = f"{dtype} of {' or '.join(map(str, ranks))} dimensions"
            raise _rejected(path, f"{name} is {array.dtype} {array.shape}; expected {wanted}")
        if not np.isfinite(array).all():
            raise _rejected(path, f"{name} holds NaN or infinite values")
    images = arrays.pop(INPUT)
    for name, array in arrays.items():
        if len(array) != len(images):
            raise _rejected(path, f"{len(images)} inputs and {len(array)} of {name}")
    layout = layout_from_outputs(arrays)
    return Golden(images, layout.joined(arrays), layout, {name: array.shape[1:] for name, array in arrays.items()})


def _arrays(path: pathlib.Path) -> dict[str, NDArray[Any]]:
    """``input`` and at least one more."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no plain file")
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # about old headers, which are either read or refused
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > LARGEST_SIZE:
                    raise ValueError(f"it would take more than {LARGEST_SIZE >> 30} GiB")
            file.seek(0)
            with np.load(file, allow_pickle=False) as loaded:
                arrays = {name: np.asarray(loaded[name]) for name in loaded.files}
    except FileNotFoundError:
        raise InputRejected(f"{path}: no such file, so there is nothing to compare with; copy it along") from None
    except Exception as error:  # damaged archives raise from zipfile, zlib and numpy alike
        raise _rejected(path, f"not an .npz of input and outputs ({first_line(error)})") from error
    if INPUT not in arrays or len(arrays) < 2:
        raise _rejected(path, f"not an .npz of input and outputs (it holds {', '.join(arrays) or 'nothing'})")
    return arrays


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _rejected(path: pathlib.Path, problem: str) -> InputRejected:
    return InputRejected(f"{path}: {problem}; export again, or copy the file again")
