"""``golden.bin``: the golden vectors for programs without numpy, such as ``repvgg_verify`` of ``engines/cpp``.

Everything is little-endian and stands without gaps, in this order:

    magic       8 bytes, ``RVGOLDEN``
    version     u32, 1
    size        u64, of the whole file in bytes
    images      u32, how many there are: n
    gates       u32, how many follow, then for each
                    precision     text
                    top1          u32, 1 where the top-1 of every image must agree as far as the error allows, else 0
                    relative      f64, largest max|difference| / max|reference|
                    least SQNR    f64, in dB; NaN where there is none
    arrays      u32, how many follow: the input, then each output; for each
                    name          text
                    rank          u32, then so many u32: the shape, which begins with n
    values      for each array in the same order, all its float32, row by row
    checksum    32 bytes, SHA-256 of everything before

A text is a u32, its length in bytes, and UTF-8. Inputs are normalised images (n, C, H, W). The outputs are those of the
training-time network in float64, rounded to float32: (n, classes), or (n, channels, height, width) for a feature map.
The gates are ``engines.parity.GATES``. An engine's sidecar says its precision, and its ``tolerance``, which holds where
it is smaller than the relative error here. A file is read only if every byte of it is accounted for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputRejected
from engines.golden import INPUT, OUTPUT_RANKS, golden_from_file
from engines.parity import GATES, Gate

GOLDEN_FILE_NAME = "golden.bin"
MAGIC = b"RVGOLDEN"
VERSION = 1
CHECKSUM_BYTES = 32
LARGEST_COUNT = 1 << 16
"""Of images, gates, arrays, dimensions and the letters of a text: far more than there ever are."""


@dataclasses.dataclass(frozen=True)
class GoldenFile:
    """``images`` (n, C, H, W) and ``outputs`` (n, ...) by name, in the graph's order, all float32.

    ``outputs`` are those of the network in float64, rounded; ``gates`` are by precision.
    """

    images: NDArray[np.float32]
    outputs: Mapping[str, NDArray[np.float32]]
    gates: Mapping[str, Gate]

    def to_bytes(self) -> bytes:
        """The whole file."""
        arrays = {INPUT: self.images, **self.outputs}
        parts = [struct.pack("<I", len(self.images)), struct.pack("<I", len(self.gates))]
        for precision, gate in self.gates.items():
            least = math.nan if gate.min_sqnr_db is None else gate.min_sqnr_db
            parts += [_text(precision), struct.pack("<Idd", gate.top1, gate.max_relative_error, least)]
        parts.append(struct.pack("<I", len(arrays)))
        parts += [_text(name) + struct.pack(f"<{1 + x.ndim}I", x.ndim, *x.shape) for name, x in arrays.items()]
        parts += [np.ascontiguousarray(array, "<f4").tobytes() for array in arrays.values()]
        body = b"".join(parts)
        start = MAGIC + struct.pack("<I", VERSION)
        size = len(start) + 8 + len(body) + CHECKSUM_BYTES
        content = start + struct.pack("<Q", size) + body
        return content + hashlib.sha256(content).digest()


def golden_file_from_vectors(path: pathlib.Path) -> GoldenFile:
    """What stands in the ``golden.npz`` at ``path``.

    Raises:
        InputRejected: it cannot be read, or a value is too large for float32.
    """
    golden = golden_from_file(path)
    with np.load(path, allow_pickle=False) as archive, np.errstate(over="ignore"):
        outputs = {name: np.asarray(archive[name]).astype(np.float32) for name in golden.shapes}
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise InputRejected(f"{path}: {name} holds values that float32 cannot; export with other images")
    return GoldenFile(golden.images, outputs, GATES)


def golden_file_from_bytes(content: bytes, where: str) -> GoldenFile:
    """Reads a whole file; ``where`` names it in errors.

    Raises:
        InputRejected: a byte of it is not what it must be.
    """
    try:
        return _golden_file(content)
    except ValueError as problem:
        raise InputRejected(
            f"{where}: {problem}; copy the file again, or write it with python -m engines golden"
        ) from problem


def _golden_file(content: bytes) -> GoldenFile:
    body, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError("not a golden.bin")
    if len(checksum) != CHECKSUM_BYTES or hashlib.sha256(body).digest() != checksum:
        raise ValueError("its checksum is not that of its content: damaged, or cut short")
    reader = _Reader(body, len(MAGIC))
    version = reader.count(at_least=0)
    if version != VERSION:
        raise ValueError(f"of version {version}, and {VERSION} is read here")
    if reader.numbers("<Q") != (len(content),):
        raise ValueError("it says another size than it has")
    images = reader.count()
    gates = dict(reader.gate() for _ in range(reader.count()))
    shapes = dict(reader.shape(images) for _ in range(reader.count(at_least=2)))
    arrays = {name: reader.array(shape) for name, shape in shapes.items()}
    if reader.position != len(body) or reader.read != len(gates) + len(shapes):
        raise ValueError("something is in it twice, or stands behind its end")
    if next(iter(arrays)) != INPUT or arrays[INPUT].ndim != 4:
        raise ValueError("its first array is not images")
    outputs = {name: array for name, array in arrays.items() if name != INPUT}
    if any(array.ndim not in OUTPUT_RANKS for array in outputs.values()):
        raise ValueError("an output has neither two dimensions nor four")
    return GoldenFile(arrays[INPUT], outputs, gates)


class _Reader:
    """Takes ``body`` apart from ``position`` on; raises ``ValueError`` for what cannot be. ``read`` counts entries."""

    def __init__(self, body: bytes, position: int) -> None:
        self._body, self.position, self.read = body, position, 0

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        if size > len(self._body) - self.position:
            raise ValueError("it ends too early")
        self.position += size
        return self._body[self.position - size : self.position]

    def numbers(self, form: str) -> tuple[float, ...]:
        """The next numbers, of a form as ``struct`` has it."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def count(self, at_least: int = 1) -> int:
        """The next u32, one that can be."""
        (number,) = struct.unpack("<I", self.take(4))
        if not at_least <= number <= LARGEST_COUNT:
            raise ValueError(f"it has a count of {number}")
        return int(number)

    def text(self) -> str:
        """The next text, which is not empty."""
        return self.take(self.count()).decode("utf-8")

    def gate(self) -> tuple[str, Gate]:
        """The next precision and its gate."""
        self.read += 1
        precision = self.text()
        top1, relative, least = self.numbers("<Idd")
        if top1 not in (0, 1) or not 0 < relative < 1 or math.isinf(least):
            raise ValueError(f"its gate for {precision} is none")
        return precision, Gate(relative, bool(top1), None if math.isnan(least) else least)

    def shape(self, images: int) -> tuple[str, tuple[int, ...]]:
        """The next name and shape."""
        self.read += 1
        name = self.text()
        shape = tuple(self.count() for _ in range(self.count(at_least=2)))
        if shape[0] != images:
            raise ValueError(f"{images} images, and {shape[0]} of {name}")
        return name, shape

    def array(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next values, all finite."""
        array = np.frombuffer(self.take(4 * math.prod(shape)), "<f4").reshape(shape).astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError("it holds NaN or infinite values")
        return array


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<I", len(encoded)) + encoded
