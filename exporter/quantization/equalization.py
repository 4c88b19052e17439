"""Factors moved from one convolution to the next, so that channels need less different scales.

A ReLU, the mean over an image and the product with squeeze-and-excitation's factors are positively homogeneous
(``exporter.precisions.rescaling``), so for any f > 0, channel by channel,

    the convolution     weight[c] f_c and bias[c] f_c
    every reader        weight[:, c] / f_c       the next convolution, the one that squeezes, the classifier

leave the network what it was: exactly in real numbers, to rounding in floating point. Cross-layer equalization (Nagel
et al., ICCV 2019) takes

    f_c = sqrt(r_c / w_c)        w_c = max(|weight[c]|, |bias[c]|),  r_c = max over the readers' |weight[:, c]|

so that both ranges of channel c become sqrt(w_c r_c). With the bias, since a channel that weight decay has left nothing
but that would be made as loud as its weights are small. It looks at no activations; ``noise``, which begins with its
factors, does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.onnx_graph import Graph
from exporter.precisions.rescaling import Seam, seams_of_graph

Factors = Mapping[str, NDArray[np.float64]]
"""By a Conv's name, what the channels (C,) of its result are multiplied by."""

SWEEPS = 20
SETTLED = 1.01
LARGEST_FACTOR = 2.0**20
"""A channel that is all but dead is left with what it has."""


def free_seams(graph: Graph) -> list[Seam]:
    """The convolutions whose channels can be multiplied, with their readers."""
    return [seam for seam in seams_of_graph(graph) if seam.fixed is None and seam.readers]


def with_factors(graph: Graph, factors: Factors) -> Graph:
    """The same network with channels multiplied; weights that do not change are the same arrays.

    Products are made in float64 and rounded to the weights' own dtype.
    """
    weights = dict(graph.weights)
    for seam in free_seams(graph):
        if seam.convolution.name in factors:
            weights |= changed_weights(seam, weights, factors[seam.convolution.name])
    return Graph(graph.structure, weights)


def changed_weights(
    seam: Seam, weights: Mapping[str, NDArray[Any]], factor: NDArray[np.float64]
) -> dict[str, NDArray[Any]]:
    """A seam's weights, with its channels multiplied by ``factor`` (C,)."""
    changed = {}
    for name in seam.convolution.input[1:]:
        changed[name] = _multiplied(weights[name], factor.reshape(-1, *[1] * (weights[name].ndim - 1)))
    for node in seam.readers:
        weight, groups = weights[node.input[1]], _groups(node)
        columns = np.repeat((1 / factor).reshape(groups, -1), len(weight) // groups, axis=0)
        changed[node.input[1]] = _multiplied(weight, columns.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2)))
    return changed


def cross_layer_factors(graph: Graph) -> dict[str, NDArray[np.float64]]:
    """Factors that equalize the ranges of each channel's weights on its two sides, over the whole network."""
    seams = free_seams(graph)
    nodes = {node.name: node for seam in seams for node in (seam.convolution, *seam.readers)}
    largest = {name: _by_group(node, graph.weights) for name, node in nodes.items()}
    biases = {
        seam.convolution.name: np.abs(graph.weights[seam.convolution.input[2]]).astype(np.float64) for seam in seams
    }
    total = {name: np.ones_like(bias) for name, bias in biases.items()}
    for _ in range(SWEEPS):
        largest_change = 1.0
        for seam in seams:
            own = largest[seam.convolution.name]
            readers = np.max([largest[node.name].max(axis=1).reshape(-1) for node in seam.readers], axis=0)
            bias = biases[seam.convolution.name]
            factor = bounded(np.sqrt(_ratio(readers, np.maximum(own.max(axis=2).reshape(-1), bias))))
            bias *= factor
            own *= factor.reshape(*own.shape[:2], 1)
            for node in seam.readers:
                largest[node.name] /= factor.reshape(len(largest[node.name]), 1, -1)
            total[seam.convolution.name] *= factor
            largest_change = max(largest_change, float(np.maximum(factor, 1 / factor).max()))
        if largest_change < SETTLED:
            break
    return total


def bounded(factor: NDArray[np.float64]) -> NDArray[np.float64]:
    """Factors that are no larger, or smaller, than a weight can bear."""
    return np.clip(factor, 1 / LARGEST_FACTOR, LARGEST_FACTOR)


def _by_group(node: onnx.NodeProto, weights: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """The largest absolute weight in each kernel: (groups, out / groups, in / groups)."""
    weight, groups = weights[node.input[1]], _groups(node)
    largest = np.asarray(np.abs(weight).reshape(*weight.shape[:2], -1).max(axis=2), np.float64)
    return largest.reshape(groups, len(weight) // groups, -1)


def _ratio(upper: NDArray[np.float64], lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where either is 0: a dead channel asks for nothing."""
    safe = (upper > 0) & (lower > 0)
    return np.where(safe, upper / np.where(safe, lower, 1.0), 1.0)


def _multiplied(weight: NDArray[Any], factor: NDArray[np.float64]) -> NDArray[Any]:
    return (weight.astype(np.float64) * factor).astype(weight.dtype)


def _groups(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
