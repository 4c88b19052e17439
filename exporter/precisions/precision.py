"""What a precision is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from engines.parity import Gate
from exporter.onnx_graph import Graph
from exporter.report import HeadroomRow

Peaks = Mapping[str, NDArray[np.float64]]
"""The largest absolute value (C,) seen in each channel of each tensor of a float32 graph, by the tensor's name."""

Exponents = Mapping[str, NDArray[np.int64]]
"""By a Conv's name, the powers of two (C,) that the channels of its result were multiplied by, where any was."""


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A typed graph; ``kept`` maps each node left in float32 to the reason.

    ``exponents`` says which channels are powers of two of what they are in the float32 graph, and ``headroom`` how far
    each convolution's results are from the precision's largest number; empty where that is float32's.
    """

    graph: Graph
    kept: dict[str, str]
    exponents: Exponents
    headroom: tuple[HeadroomRow, ...]


@dataclasses.dataclass(frozen=True)
class Precision:
    """A name for the command line and file names, the rewrite, the graph to check it with, and its gate.

    ``rewrite`` takes the float32 graph and its peaks. ``twin`` turns a typed graph into one that ONNX Runtime's CPU
    provider computes with the typed graph's rounding and range, which the ledger calls ``computed_by``; it is None
    where the float32 graph has shown that already.
    """

    name: str
    dtype: str
    rewrite: Callable[[Graph, Peaks], Rewritten]
    twin: Callable[[Graph], Graph] | None
    computed_by: str
    gate: Gate
