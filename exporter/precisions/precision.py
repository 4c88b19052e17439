"""What a precision is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from engines.parity import Gate
from exporter.onnx_graph import Graph

Peaks = Mapping[str, float]
"""The largest absolute value seen in each tensor of a float32 graph, by the tensor's name."""


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A typed graph; ``kept`` maps each node left in float32 to the reason."""

    graph: Graph
    kept: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Precision:
    """A name for the command line and file names, the rewrite, the graph to check it with, and its gate.

    ``rewrite`` takes the float32 graph and its peaks. ``twin`` turns a typed graph into one that ONNX Runtime's CPU
    provider computes with the typed graph's rounding and range; None where it does so with the typed file itself.
    """

    name: str
    dtype: str
    rewrite: Callable[[Graph, Peaks], Rewritten]
    twin: Callable[[Graph], Graph] | None
    gate: Gate
