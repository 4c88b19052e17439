"""A file, opened to be run: numpy arrays in, numpy arrays out, on whatever it was made for.

    with engines.load("model.fp16.engine") as runner:
        outputs = runner.run({"input": images})["output"]

``load`` looks at the file's content, checks an engine (``engines.integrity``) and opens it with one of
``engines.backends.BACKENDS``. ``Runner`` holds every array that it is given against the file's inputs, and makes any
batch fit: larger ones are split, smaller ones padded by repeating their last row, which is cut off again. The first
dimension of every input and output is the batch, and rows do not influence each other.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends import Source, backend_for
from engines.backends.backend import Arrays, Backend, Profile, TensorDescription, check_extents
from engines.errors import InputRejected, UsageError
from engines.integrity import checked_engine
from engines.kind import ONNX, kind_of_file
from engines.manifest import Manifest


def load(
    path: str | os.PathLike[str],
    *,
    device: int = 0,
    graph: bool = True,
    provider: str | None = None,
    allow_unverified: bool = False,
) -> Runner:
    """Opens an ONNX file or an engine; the file's content says which it is.

    Args:
        path: the file; an engine's sidecar, ``<engine>.json``, stands beside it.
        device: the GPU to run on, from 0.
        graph: whether an engine's launches are captured in a CUDA graph per shape.
        provider: of ONNX Runtime for an ONNX file: "cpu" (the default), "cuda", "tensorrt". There is no falling back.
        allow_unverified: opens an engine without a sidecar or with another SHA-256. A plan is native code.

    Raises:
        UsageError: arguments that do not fit the file.
        InputRejected: the file, or the sidecar, is not what it should be.
        SdkMissing: the SDK, in the engine's version, or a GPU that the engine was built for is not here.
        DeviceFailed: a call to the GPU failed.
    """
    opened = opened_file(
        pathlib.Path(path), device=device, graph=graph, provider=provider, allow_unverified=allow_unverified
    )
    return Runner(opened.backend, title=opened.title, manifest=opened.manifest)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A file's backend, which whoever opened it closes; ``manifest`` is an engine's sidecar, if it was verified."""

    backend: Backend
    title: str
    manifest: Manifest | None


def opened_file(
    path: pathlib.Path,
    *,
    device: int = 0,
    graph: bool = True,
    provider: str | None = None,
    threads: int | None = None,
    spinning: bool = True,
    allow_unverified: bool = False,
) -> Opened:
    """What ``load`` makes a runner of; ``threads`` and ``spinning`` are ONNX Runtime's on the CPU (``OnnxRuntime``)."""
    if device < 0:
        raise UsageError(f"device {device}: GPUs are counted from 0")
    kind = kind_of_file(path)
    header, manifest = None, None
    if kind != ONNX:
        if provider is not None:
            raise UsageError(f"{path}: an engine takes no provider; that is for ONNX files")
        header, manifest = checked_engine(path, allow_unverified=allow_unverified)
    entry = backend_for(kind)
    source = Source(path, header, manifest, device, graph=graph, provider=provider, threads=threads, spinning=spinning)
    return Opened(entry.open(source), entry.title, manifest)


class Runner:
    """An open file; a context manager. Calls from several threads take turns."""

    def __init__(self, backend: Backend, *, title: str, manifest: Manifest | None = None) -> None:
        """Takes ``backend`` over; ``close`` closes it. ``title`` names it in errors."""
        self._backend: Backend | None = backend
        self._title = title
        self._lock = threading.Lock()
        self._names = frozenset(description.name for description in backend.inputs)
        self._expected = tuple(
            (description, np.dtype(description.dtype), description.shape[1:], None not in description.shape[1:])
            for description in backend.inputs
        )
        self._minimum, self._maximum = backend.batch
        self._profile: Profile = getattr(backend, "profile", {})
        self._limit = math.inf if self._maximum is None else self._maximum
        self.inputs: tuple[TensorDescription, ...] = backend.inputs
        self.outputs: tuple[TensorDescription, ...] = backend.outputs
        self.batch: tuple[int, int | None] = backend.batch
        """The smallest and the largest batch that are computed at once; None where there is no largest."""
        self.manifest: Manifest | None = manifest
        """An engine's sidecar; None for an ONNX file, and for an engine that was not verified."""
        self.metadata: dict[str, str] = dict(getattr(backend, "metadata", {}))
        """An ONNX file's ``metadata_props``; empty for an engine."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees everything; may be called twice."""
        with self._lock:
            backend, self._backend = self._backend, None
            if backend is not None:
                backend.close()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Computes a batch of any size from 1.

        Args:
            feeds: for each of ``inputs``, by name, an array of its dtype and shape; the first dimension is the batch.

        Returns:
            For each of ``outputs``, by name, an array of its own with a row for each row of the batch.

        Raises:
            UsageError: a name, dtype, shape or batch is not what the file takes, or the runner is closed.
            DeviceFailed: a call to the GPU failed.
        """
        with self._lock:
            backend = self._open_backend()
            arrays, rows = self._checked(feeds)
            if self._minimum <= rows <= self._limit:
                return backend.run(arrays)
            return self._run_in_parts(backend, arrays, rows)

    def enqueue(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], stream: Any) -> None:
        """Starts a computation on arrays that are on the GPU already, without a copy and without waiting for it.

        Args:
            inputs: device arrays by name, with ``__cuda_array_interface__`` or DLPack.
            outputs: device arrays to write, by name.
            stream: the CUDA stream to work in, which whoever reads the outputs waits for.

        Raises:
            UsageError: the backend has no GPU arrays, an array is not what the file takes, or the runner is closed.
            DeviceFailed: a call to the GPU failed.
        """
        with self._lock:
            enqueue = getattr(self._open_backend(), "enqueue", None)
            if enqueue is None:
                raise UsageError(f"{self._title} takes no arrays on a GPU; call run() with numpy arrays")
            enqueue(inputs, outputs, stream)

    def _open_backend(self) -> Backend:
        if self._backend is None:
            raise UsageError("this runner is closed; load the file again")
        return self._backend

    def _checked(self, feeds: Mapping[str, NDArray[Any]]) -> tuple[Arrays, int]:
        """The feeds as contiguous arrays, and how many rows they have; see ``run``."""
        if feeds.keys() != self._names:
            given = ", ".join(map(str, feeds)) or "none"
            raise UsageError(f"inputs {given}: expected {', '.join(map(described, self.inputs))}")
        arrays: Arrays = {}
        rows = -1
        for description, dtype, row, fixed in self._expected:
            array = feeds[description.name]
            if type(array) is not np.ndarray:
                array = _plain_array(array, description)
            shape = array.shape
            if array.dtype != dtype or not (shape[1:] == row if fixed else _fits(shape[1:], row)) or not shape:
                raise _unexpected(array, description)
            if not fixed:
                check_extents(description.name, shape, self._profile)
            if rows not in (-1, shape[0]):
                raise UsageError(f"{description.name}: a batch of {shape[0]}, and {rows} before it; give one batch")
            rows = shape[0]
            flags = array.flags
            arrays[description.name] = (
                array if flags.c_contiguous and flags.aligned else np.require(array, None, ["C", "A"])
            )
        if rows < 1:
            raise UsageError(f"an empty batch: expected {', '.join(map(described, self.inputs))} with N at least 1")
        return arrays, rows

    def _run_in_parts(self, backend: Backend, arrays: Arrays, rows: int) -> Arrays:
        whole: Arrays = {}
        for start, stop in parts_of_batch(rows, self._maximum):
            part = {name: _padded(array[start:stop], self._minimum) for name, array in arrays.items()}
            given = max(stop - start, self._minimum)
            for name, output in backend.run(part).items():
                if output.shape[:1] != (given,):
                    raise InputRejected(
                        f"{name}: {output.shape} for a batch of {given}: its first dimension is not the batch, so a "
                        f"batch of {rows} can be neither split nor padded"
                    )
                if name not in whole:
                    whole[name] = np.empty((rows, *output.shape[1:]), output.dtype)
                whole[name][start:stop] = output[: stop - start]
        return whole


def parts_of_batch(rows: int, maximum: int | None) -> Iterator[tuple[int, int]]:
    """Start and stop of each part of a batch, each of ``maximum`` rows but the last."""
    step = maximum or rows
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def described(description: TensorDescription) -> str:
    """As in ``input float32 (N, 3, 224, 224)``."""
    first, *others = ["?" if extent is None else str(extent) for extent in description.shape]
    return f"{description.name} {description.dtype} ({', '.join(['N' if first == '?' else first, *others])})"


def _padded(array: NDArray[Any], minimum: int) -> NDArray[Any]:
    missing = minimum - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing > 0 else array


def _fits(row: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(row) == len(expected) and all(
        extent >= 1 if fixed is None else extent == fixed for extent, fixed in zip(row, expected, strict=True)
    )


def _plain_array(array: Any, description: TensorDescription) -> NDArray[Any]:
    """A subclass of numpy's array as such; a mask cannot be left out in silence, nor a list be given a dtype."""
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise UsageError(
            f"{description.name}: a {type(array).__name__}; expected a numpy array {described(description)}"
        )
    return np.asarray(array)


def _unexpected(array: NDArray[Any], description: TensorDescription) -> UsageError:
    shape = ", ".join(map(str, array.shape))
    return UsageError(f"{description.name}: {array.dtype} ({shape}); expected {described(description)}")
