"""How far each convolution's results are from the largest number in half, as the network is and as it was rescaled."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from exporter.onnx_graph import Graph
from exporter.precisions.precision import Exponents, Peaks
from exporter.precisions.rescaling import HALF_MAX, peak_of_seam, seams_of_graph
from exporter.report import Headroom, HeadroomRow


def headroom_of_graph(graph: Graph, peaks: Peaks, exponents: Exponents) -> tuple[HeadroomRow, ...]:
    """A row for each Conv of the float32 ``graph`` that any value of was seen, in the graph's order.

    Args:
        graph: as it is before it is rescaled.
        peaks: of that graph.
        exponents: what its channels are multiplied by.
    """
    rows = []
    for seam in seams_of_graph(graph):
        name, channels = seam.convolution.name, len(graph.weights[seam.convolution.input[1]])
        if any(tensor in peaks for tensor in seam.tensors):
            peak = peak_of_seam(seam, peaks, channels)
            powers = exponents.get(name)
            after = peak if powers is None else np.ldexp(peak, powers)
            written = () if powers is None else tuple(powers.tolist())
            rows.append(HeadroomRow(name, _headroom(peak), _headroom(after), written, seam.fixed))
    return tuple(rows)


def _headroom(peak: NDArray[np.float64]) -> Headroom:
    channel = int(peak.argmax())
    largest = float(peak[channel])
    factor = HALF_MAX / largest if largest else math.inf
    return Headroom(largest, channel, factor, math.log2(factor))
