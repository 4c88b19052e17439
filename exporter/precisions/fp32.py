"""float32: the graph as it is."""

from __future__ import annotations

from engines.parity import GATES
from exporter.precisions.precision import Precision, Rewritten

FP32 = Precision(
    name="fp32",
    dtype="float32",
    rewrite=lambda graph, peaks: Rewritten(graph, kept={}, exponents={}, headroom=()),
    twin=None,
    computed_by="graph",
    gate=GATES["fp32"],
)
