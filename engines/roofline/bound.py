"""The roofline: how fast a graph could be at best on a card, by its arithmetic, its bytes and the card's peaks.

A kernel (``fused_kernels``) cannot end before its arithmetic is done at the card's peak for its precision, nor before
its bytes have been moved at the peak of the memory; kernels run one after the other:

    seconds of a batch  >=  sum over kernels of  max( batch * operations / peak,
                                                      (batch * (read + written) + weights) / bandwidth )

Nothing is measured. Launches are left out, and so are caches, as in ``engines.traffic``: a feature map that is small
enough to stay in the L2 cache is written and read faster than this counts, and weights may stay there from one batch to
the next. Where those matter, at small batches of small images and on cards with much L2, a measurement can exceed 100 %
of this bound; that is then printed as it is. So it can on a GeForce card where a compiler sums in half, at twice the
peak in ``cards.json``.

The bound is of the graph, fused at best, and not of what one compiler makes of it: INT8 by TensorRT for RTX moves more
bytes than this, which ``engines.traffic`` counts.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

from engines.errors import InputRejected
from engines.kind import ONNX, graph_of_engine, graphs_beside, kind_of_file
from engines.manifest import manifest_from_file, sidecar_path
from engines.onnx_file import onnx_file_from_path
from engines.roofline.cards import Card
from engines.roofline.fused_kernels import Work, works_from_onnx
from engines.sizes import Size

ARITHMETIC, MEMORY = "arithmetic", "memory"


class PeakUnknown(ValueError):
    """The card's peak for a precision is not known; the message is one line without an end mark."""


def binding_limit(arithmetic: float, memory: float) -> str:
    """Which of the two takes longer: "arithmetic" or "memory"."""
    return ARITHMETIC if arithmetic > memory else MEMORY


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time that a batch takes: ``seconds``, the sum of what goes into kernels that either limit binds."""

    arithmetic_seconds: float
    memory_seconds: float
    arithmetic_kernels: int
    memory_kernels: int

    @property
    def seconds(self) -> float:
        """Of the whole batch."""
        return self.arithmetic_seconds + self.memory_seconds

    @property
    def binds(self) -> str:
        """What limits the larger part of the time: "arithmetic" or "memory"."""
        return binding_limit(self.arithmetic_seconds, self.memory_seconds)


def works_of_file(path: pathlib.Path, size: Size | None = None) -> tuple[Work, ...]:
    """The work of an ONNX file, or of the typed graph beside an engine that it was compiled from.

    Args:
        path: the file.
        size: height and width of the images, where the graph takes any.

    Raises:
        InputRejected: the file cannot be read, an engine's graph is not beside it, or see ``works_from_onnx``.
    """
    if kind_of_file(path) == ONNX:
        return works_from_onnx(onnx_file_from_path(path), size)
    sidecar = sidecar_path(path)
    graph = graph_of_engine(path, manifest_from_file(sidecar).sha256["onnx"] if sidecar.exists() else None)
    if graph is None:
        names = " or ".join(graph.name for graph in graphs_beside(path))
        raise InputRejected(f"{path}: the graph that it was compiled from, {names}, is not beside it; put it there")
    return works_from_onnx(onnx_file_from_path(graph), size)


def operations_per_image(works: Sequence[Work]) -> int:
    """Additions and multiplications for one image, in all precisions."""
    return sum(work.operations for work in works)


def bytes_per_image(works: Sequence[Work], batch: int) -> float:
    """Bytes that are moved for one image of a batch, with its share of the weights."""
    return sum(work.read_bytes + work.written_bytes + work.weight_bytes / batch for work in works)


def bound_of(works: Sequence[Work], card: Card, batch: int) -> Bound:
    """The least time that a batch takes on a card.

    Raises:
        PeakUnknown: arithmetic is in a precision that the card has no peak for.
    """
    seconds: dict[str, list[float]] = {ARITHMETIC: [], MEMORY: []}
    for work in works:
        arithmetic, memory = seconds_of_kernel(work, card, batch)
        seconds[binding_limit(arithmetic, memory)].append(max(arithmetic, memory))
    return Bound(
        arithmetic_seconds=math.fsum(seconds[ARITHMETIC]),
        memory_seconds=math.fsum(seconds[MEMORY]),
        arithmetic_kernels=len(seconds[ARITHMETIC]),
        memory_kernels=len(seconds[MEMORY]),
    )


def seconds_of_kernel(work: Work, card: Card, batch: int) -> tuple[float, float]:
    """What the arithmetic of a kernel takes at least for a batch, and what its bytes do.

    Raises:
        PeakUnknown: see ``bound_of``.
    """
    peak = card.operations_per_second.get(work.dtype)
    if work.operations and peak is None:
        raise PeakUnknown(f"no peak of {work.dtype} is known for {card.title}")
    moved = batch * (work.read_bytes + work.written_bytes) + work.weight_bytes
    return batch * work.operations / peak if peak else 0.0, moved / card.bytes_per_second
