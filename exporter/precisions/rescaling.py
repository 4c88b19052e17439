"""Powers of two moved from one convolution to the next, so that more of a network fits float16.

ReLU, the mean over an image and the product with squeeze-and-excitation's factors are positively homogeneous: s > 0
times their input gives s times their output. So for each channel c of a convolution's result and any exponent e

    the convolution     weight[c] and bias[c] times 2^e
    in between          channel c of every tensor is 2^e times what it was
    every reader        weight[:, c] times 2^-e: the next convolution's (with groups, of the group that c is in), the
                        one that squeezes, the classifier's behind global average pooling

and everything behind the readers is what it was. A product with a power of two is exact in floating point: a float32
network gives the same bits. What is an output of the graph, or read by anything else (a Sigmoid), keeps its range.

A channel is left alone (e = 0) unless something in it is too large for half. There are three steps. Each goes through
the convolutions in the graph's order, with the smallest exponents that help:

    peaks         of less than SAFETY times room: e < 0. Where the readers' weights are so small that half is coarse,
                  further, up to where the convolution's own kernel is as small
    readers       of weights beyond half: e > 0, where the channel has that much room
    own weights   beyond half: e < 0, where the channel's peak stays large enough for half
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.onnx_graph import Graph
from exporter.precisions.precision import Exponents, Peaks

HALF_MAX = float(np.finfo(np.float16).max)
SAFETY = 4.0
"""Peaks are those of a few images; others may reach so many times as far."""
PRECISE = 2.0**-3
"""Values down to 2^-11 times this are normal in half: what is as large keeps its precision."""

Floats = NDArray[np.float64]
SMALLEST_NORMAL, LARGEST = float(np.finfo(np.float32).smallest_normal), float(np.finfo(np.float32).max)
HOMOGENEOUS = ("Relu", "GlobalAveragePool", "Flatten", "Reshape", "Mul")


@dataclasses.dataclass(frozen=True)
class Seam:
    """A convolution, the ``tensors`` whose channels are its own times something, and the nodes that end them.

    ``fixed`` says why the channels cannot be rescaled, where they cannot.
    """

    convolution: onnx.NodeProto
    tensors: tuple[str, ...]
    readers: tuple[onnx.NodeProto, ...]
    fixed: str | None


@dataclasses.dataclass(frozen=True)
class Rescaled:
    """A float32 graph that gives the same bits, with its peaks and ``largest``, the largest weight of each tensor.

    ``exponents`` (C,) says by the Conv's name what its channels were multiplied by; it has only those that were.
    """

    graph: Graph
    peaks: dict[str, NDArray[np.float64]]
    largest: dict[str, float]
    exponents: Exponents


def rescaled(graph: Graph, peaks: Peaks) -> Rescaled:
    """The float32 ``graph`` with powers of two moved to where ``peaks`` and weights fit half, as far as they can be.

    Weights that do not change are the same arrays.
    """
    weights, scaled = dict(graph.weights), dict(peaks)
    exponents: dict[str, NDArray[np.int64]] = {}
    largest = {name: _largest(array) for name, array in weights.items()}
    free = [seam for seam in seams_of_graph(graph) if seam.fixed is None]
    for step, seam in itertools.product((_for_peaks, _for_readers, _for_own_weights), free):
        if not _beyond(seam, scaled, largest):
            continue
        chosen = _exact(seam, weights, step(_extent(seam, weights, scaled)))
        if not chosen.any():
            continue
        changes = dict(_changes(seam, weights, chosen))
        weights |= changes
        largest |= {name: _largest(array) for name, array in changes.items()}
        scaled |= {name: np.ldexp(scaled[name], chosen) for name in seam.tensors if name in scaled}
        exponents[seam.convolution.name] = exponents.get(seam.convolution.name, 0) + chosen
    moved = {name: total for name, total in exponents.items() if total.any()}
    return Rescaled(Graph(graph.structure, weights), scaled, largest, moved)


def seams_of_graph(graph: Graph) -> list[Seam]:
    """A seam for each Conv, in the graph's order."""
    nodes = list(graph.structure.graph.node)
    outputs = {value.name for value in graph.structure.graph.output}
    makers = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return [_seam(node, makers, readers, outputs) for node in nodes if node.op_type == "Conv"]


def peak_of_seam(seam: Seam, peaks: Peaks, channels: int) -> NDArray[np.float64]:
    """The largest absolute value (C,) in any of its tensors; 0 where none was seen, or what was seen is not finite."""
    peak = np.zeros(channels)
    for name in seam.tensors:
        if name in peaks:
            peak = np.fmax(peak, peaks[name])
    return np.where(np.isfinite(peak), peak, 0.0)


def _seam(
    convolution: onnx.NodeProto,
    makers: Mapping[str, onnx.NodeProto],
    readers: Mapping[str, Sequence[onnx.NodeProto]],
    outputs: set[str],
) -> Seam:
    tensors, ends, between = [convolution.output[0]], [], []
    fixed = None
    for tensor in tensors:  # grows on the way
        if tensor in outputs:
            fixed = fixed or f"{tensor} is an output"
        for node in readers.get(tensor, ()):
            if _takes_channels(node, tensor):
                ends.append(node)
            elif node.op_type in HOMOGENEOUS and _keeps_channels(node, makers[tensor]):
                between.append(node)
                tensors += [name for name in node.output if name not in tensors]
            else:
                fixed = fixed or f"{node.name} reads {tensor}"
    for node in between:
        if node.op_type == "Mul" and sum(name in tensors for name in node.input) != 1:
            fixed = fixed or f"{node.name} multiplies it with itself"
    return Seam(convolution, tuple(tensors), tuple(ends), fixed)


def _takes_channels(node: onnx.NodeProto, tensor: str) -> bool:
    """Whether the node has a weight for each channel of ``tensor``, and sums over them."""
    if node.input[0] != tensor:
        return False
    return node.op_type == "Conv" or (node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1)


def _keeps_channels(node: onnx.NodeProto, maker: onnx.NodeProto) -> bool:
    """Whether channel c of the node's result is made of channel c: flattened, only behind the mean over an image."""
    return node.op_type not in ("Flatten", "Reshape") or maker.op_type == "GlobalAveragePool"


def _beyond(seam: Seam, peaks: Peaks, largest: Mapping[str, float]) -> bool:
    """Whether anything about the seam is beyond half, or leaves less room than it should."""
    involved = [*seam.convolution.input[1:], *(node.input[1] for node in seam.readers)]
    if any(largest[name] > HALF_MAX for name in involved):
        return True
    return any(bool((peaks[name] * SAFETY > HALF_MAX).any()) for name in seam.tensors if name in peaks)


@dataclasses.dataclass(frozen=True)
class _Extent:
    """What is largest in each channel (C,): of the seam's tensors, the convolution's kernel and bias, the readers."""

    peak: Floats
    kernel: Floats
    bias: Floats
    readers: Floats

    @property
    def own(self) -> Floats:
        return np.maximum(self.kernel, self.bias)


def _extent(seam: Seam, weights: Mapping[str, NDArray[Any]], peaks: Peaks) -> _Extent:
    own = [np.abs(weights[name]) for name in seam.convolution.input[1:]]
    kernel, bias = (array.reshape(len(array), -1).max(axis=1).astype(np.float64) for array in own)
    readers = np.zeros(len(kernel))
    for node in seam.readers:
        readers = np.maximum(readers, _by_channel(node, weights, np.abs, np.max))
    readers = np.where(readers > 0, readers, 1.0)  # what nothing reads asks for nothing
    return _Extent(peak_of_seam(seam, peaks, len(kernel)), kernel, bias, readers)


def _for_peaks(of: _Extent) -> NDArray[np.int64]:
    down = _ceil_log2(of.peak * SAFETY / HALF_MAX)
    balanced = np.minimum(_floor_log2(of.kernel / of.readers) // 2, _floor_log2(of.peak / PRECISE))
    further = np.minimum(_ceil_log2(PRECISE / of.readers), balanced)
    return np.where(down > 0, -np.maximum(down, further), 0)


def _for_readers(of: _Extent) -> NDArray[np.int64]:
    up = _ceil_log2(of.readers / HALF_MAX)
    taken = np.maximum(_ceil_log2(of.peak * SAFETY / HALF_MAX), _ceil_log2(of.own / HALF_MAX))
    return np.where((up > 0) & (up <= -taken) & (of.peak > 0), up, 0)


def _for_own_weights(of: _Extent) -> NDArray[np.int64]:
    down = _ceil_log2(of.own / HALF_MAX)
    return np.where((down > 0) & (down <= _floor_log2(of.peak / PRECISE)), -down, 0)


def _exact(seam: Seam, weights: Mapping[str, NDArray[Any]], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """``chosen`` (C,) where every weight stays among float32's normal numbers, so that none is rounded; else 0."""
    own = [weights[name].reshape(len(chosen), -1) for name in seam.convolution.input[1:]]
    least = np.minimum.reduce([_smallest(array).min(axis=1) for array in own])
    exact = np.ldexp(least.astype(np.float64), chosen) >= SMALLEST_NORMAL
    for node in seam.readers:
        least, most = (_by_channel(node, weights, of, over) for of, over in ((_smallest, np.min), (np.abs, np.max)))
        exact &= (np.ldexp(least, -chosen) >= SMALLEST_NORMAL) & (np.ldexp(most, -chosen) <= LARGEST)
    return np.where(exact, chosen, 0)


def _changes(
    seam: Seam, weights: Mapping[str, NDArray[Any]], chosen: NDArray[np.int64]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The seam's weights, multiplied."""
    for name in seam.convolution.input[1:]:
        yield name, np.ldexp(weights[name], chosen.reshape(-1, *[1] * (weights[name].ndim - 1)))
    for node in seam.readers:
        weight, groups = weights[node.input[1]], _attribute(node, "group", 1)
        columns = np.repeat(-chosen.reshape(groups, -1), len(weight) // groups, axis=0)
        yield node.input[1], np.ldexp(weight, columns.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2)))


def _by_channel(
    node: onnx.NodeProto,
    weights: Mapping[str, NDArray[Any]],
    of: Callable[[NDArray[Any]], NDArray[Any]],
    over: Callable[..., NDArray[Any]],
) -> Floats:
    """``over`` all of a reader's weights (out, in / groups, ...) for each channel that it reads (in,)."""
    weight, groups = weights[node.input[1]], _attribute(node, "group", 1)
    grouped = of(weight).reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return over(grouped, axis=(1, 3)).reshape(-1).astype(np.float64)


def _smallest(array: NDArray[Any]) -> NDArray[Any]:
    """Absolute values, with infinity for 0, which stays 0 whatever it is multiplied by."""
    return np.where(array == 0, np.inf, np.abs(array))


def _largest(array: NDArray[Any]) -> float:
    return max(float(array.max()), -float(array.min()))


def _ceil_log2(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The smallest k with values <= 2^k; far below every other for 0."""
    mantissa, exponent = np.frexp(np.maximum(values, 2.0**-1000))
    return np.asarray(exponent - (mantissa == 0.5), np.int64)


def _floor_log2(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The largest k with 2^k <= values; far below every other for 0."""
    return np.asarray(np.frexp(np.maximum(values, 2.0**-1000))[1] - 1, np.int64)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
