"""The files that a benchmark compares, opened, and the ways in which each computes a batch.

    a session of ONNX Runtime   numpy to numpy, on the host's clock
    an engine on a GPU          launches or a CUDA graph, with transfers or the compute alone, by events on the GPU

What is computed are the golden images, over and over until the batch is full, so that the answers of the very queries
that were timed can be judged; without golden vectors it is noise, and nothing is judged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.backend import Arrays, Backend, check_extents
from engines.bench.options import Options
from engines.bench.record import Parity
from engines.errors import InputRejected, UsageError
from engines.files import sha256_of
from engines.golden import GOLDEN_NAME, Golden
from engines.judgement import gate_of_engine, judgement, telling_golden
from engines.kind import ONNX, kind_of_file
from engines.manifest import Manifest
from engines.parity import Gate
from engines.report_file import REPORT_NAME, report_from_file
from engines.runner import Runner, described, opened_file
from engines.sizes import Size
from engines.timing import Clock, Queries, Timing
from engines.verification import answers_to_golden, gate_of_precision

SEED = 0


@dataclasses.dataclass(frozen=True)
class Way:
    """How a batch is computed; ``graph`` and ``transfers`` are None where there is no choice."""

    title: str
    graph: bool | None = None
    transfers: bool | None = None


ON_HOST = (Way("numpy to numpy"),)
ON_DEVICE = tuple(
    Way(f"{launching}, {moving}", graph, transfers)
    for launching, graph in (("launches", False), ("CUDA graph", True))
    for moving, transfers in (("with transfers", True), ("compute alone", False))
)


class HostQueries:
    """A batch computed by a backend's ``run``; see ``engines.timing.Queries``."""

    graphed = False
    first_seconds = None

    def __init__(self, backend: Backend, feeds: Arrays, clock: Clock) -> None:
        self._backend, self._feeds, self._clock = backend, feeds, clock
        self._results: Arrays = {}

    def run(self, count: int) -> Timing:
        """Computes the batch ``count`` times; the clock is read once between two of them."""
        run, feeds, clock = self._backend.run, self._feeds, self._clock
        moments = [0.0] * (count + 1)
        moments[0] = clock()
        for index in range(1, count + 1):
            results = run(feeds)
            moments[index] = clock()
        self._results = results
        return Timing(np.diff(moments), moments[-1] - moments[0])

    def results(self) -> Arrays:
        """Of the last query."""
        return self._results

    def close(self) -> None:
        """Holds nothing but arrays."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """An open file; ``load_seconds`` is what opening took, ``golden`` the vectors beside it, or why there are none."""

    path: pathlib.Path
    bytes: int
    sha256: str
    kind: str
    precision: str
    backend: Backend
    load_seconds: float
    gate: Gate | None
    golden: Golden | str

    @property
    def ways(self) -> tuple[Way, ...]:
        """An engine's, if the backend can time its parts."""
        return ON_DEVICE if hasattr(self.backend, "queries") else ON_HOST

    def takes(self, batch: int) -> bool:
        """Whether the file computes so many images at once."""
        least, most = self.backend.batch
        return least <= batch and (most is None or batch <= most)

    def queries(self, way: Way, images: NDArray[np.float32], clock: Clock) -> Queries:
        """A batch of ``images``, computed in this way.

        Raises:
            DeviceFailed: a call to the GPU failed.
        """
        feeds = {self.backend.inputs[0].name: images}
        if way.graph is None:
            return HostQueries(self.backend, feeds, clock)
        backend: Any = self.backend
        queries: Queries = backend.queries(feeds, graph=way.graph, transfers=way.transfers, clock=clock)
        return queries

    def images(self, batch: int, size: Size | None) -> tuple[NDArray[np.float32], list[int] | None]:
        """A batch (batch, C, H, W), and which golden image each row is; None where it is noise.

        Raises:
            UsageError: height and width are free, and nothing says what they should be; or they cannot be ``size``.
        """
        shape = (self.backend.inputs[0].shape[1] or 0, *self.size(size))
        if isinstance(self.golden, Golden) and self.golden.images.shape[1:] == shape:
            rows = [row % len(self.golden.images) for row in range(batch)]
            return np.ascontiguousarray(self.golden.images[rows]), rows
        return np.random.default_rng(SEED).standard_normal((batch, *shape), np.float32), None

    def parity(self, results: Arrays, rows: list[int] | None) -> Parity:
        """Judges what was computed for golden images; ``rows`` are those of ``images``."""
        if isinstance(self.golden, str):
            return Parity(None, self.golden)
        if self.gate is None:
            return Parity(None, f"there is no gate for its precision, {self.precision or 'unnamed'}")
        if rows is None:
            return Parity(None, f"its {GOLDEN_NAME} has images of another size")
        try:
            judged = judgement(self.golden, results, self.gate, rows)
        except ValueError as error:
            return Parity(passed=False, detail=str(error))
        return Parity(judged.failure is None, judged.line)

    def parity_of_all(self) -> Parity:
        """Runs and judges every golden image, as ``engines verify`` does."""
        if isinstance(self.golden, str) or self.gate is None:
            return self.parity({}, [])
        try:
            runner = Runner(self.backend, title=str(self.path))
            return self.parity(answers_to_golden(runner, self.golden), list(range(len(self.golden.images))))
        except UsageError as error:
            return Parity(passed=False, detail=f"the images of its {GOLDEN_NAME} do not fit: {error}")
        except InputRejected as error:
            return Parity(passed=False, detail=str(error).removeprefix(f"{self.path}: "))

    def size(self, asked: Size | None) -> Size:
        """Height and width of the images: as ``asked`` for, else the file's own, else those of the golden images.

        Raises:
            UsageError: nothing says what they should be, or they cannot be as asked for.
        """
        description = self.backend.inputs[0]
        _, channels, height, width = description.shape
        own = None if height is None or width is None else (height, width)
        golden = self.golden.images.shape[2:] if isinstance(self.golden, Golden) else None
        chosen = asked or own or golden
        if chosen is None:
            raise UsageError(f"--size: {self.path} takes images of any size, and has no {GOLDEN_NAME}; say which")
        if not all(fixed in (None, extent) for fixed, extent in zip((height, width), chosen, strict=True)):
            takes = "x".join("?" if extent is None else str(extent) for extent in (height, width))
            raise UsageError(f"--size: {self.path} takes images of {takes} alone")
        try:
            shape = (1, channels or 0, *chosen)
            check_extents(description.name, shape, getattr(self.backend, "profile", {}))
        except UsageError as error:
            raise UsageError(f"--size: {self.path}: {error}") from None
        return chosen[0], chosen[1]


@contextlib.contextmanager
def opened_contenders(paths: list[pathlib.Path], options: Options, clock: Clock) -> Iterator[list[Contender]]:
    """Opens the files one after the other, timing each, and closes them all.

    Raises:
        UsageError: settings of ONNX Runtime, and no ONNX file.
        InputRejected: a file cannot be run, or takes something else than images; or there are golden vectors or a
            report beside it that cannot be read, or cannot tell a wrong answer.
        SdkMissing: what it runs on is not here.
    """
    if all(kind_of_file(path) != ONNX for path in paths):
        for flag, given in (("--provider", options.provider), ("--threads", options.threads)):
            if given is not None:
                raise UsageError(f"{flag} is for ONNX files, and only engines are given; leave it out")
    elif options.device and options.provider in (None, "cpu") and all(kind_of_file(path) == ONNX for path in paths):
        raise UsageError(f"--device {options.device} is a GPU, and nothing here runs on one; leave it out")
    with contextlib.ExitStack() as resources:
        yield [_opened(path, options, clock, resources) for path in paths]


def _opened(path: pathlib.Path, options: Options, clock: Clock, resources: contextlib.ExitStack) -> Contender:
    kind = kind_of_file(path)
    started = clock()
    opened = opened_file(
        path,
        device=options.device,
        provider=options.provider if kind == ONNX else None,
        threads=options.threads if kind == ONNX else None,
        spinning=False,
    )
    seconds = clock() - started
    backend = opened.backend
    resources.callback(backend.close)
    if len(backend.inputs) != 1 or len(backend.inputs[0].shape) != 4 or not backend.inputs[0].shape[1]:
        takes = ", ".join(map(described, backend.inputs))
        raise InputRejected(f"{path}: takes {takes}; expected one input of images (N, C, H, W)")
    if backend.inputs[0].dtype != "float32":
        raise InputRejected(f"{path}: its input is {backend.inputs[0].dtype}; expected float32")
    metadata: dict[str, str] = getattr(backend, "metadata", {})
    precision = metadata.get("precision", "") if opened.manifest is None else opened.manifest.precision
    return Contender(
        path=path,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        kind=kind,
        precision=precision,
        backend=backend,
        load_seconds=seconds,
        gate=_gate(path, precision, opened.manifest),
        golden=_golden(path.with_name(GOLDEN_NAME if opened.manifest is None else opened.manifest.golden)),
    )


def _gate(path: pathlib.Path, precision: str, manifest: Manifest | None) -> Gate | None:
    if manifest is not None:
        return gate_of_engine(precision, manifest.tolerance)
    report = path.with_name(REPORT_NAME)
    return gate_of_precision(precision, report_from_file(report) if report.is_file() else None)


def _golden(path: pathlib.Path) -> Golden | str:
    """The vectors; none are no reason not to measure, but those that nothing can be told by are an error."""
    return telling_golden(path) if os.path.lexists(path) else f"there is no {path.name} beside it"
