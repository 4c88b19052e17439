"""int8: codes where ``exporter.quantization`` put them, and the form's own dtype elsewhere.

The rewrite needs more than a graph and its peaks, namely images: ``exporter.int8`` calibrates on them and writes the
graph. ONNX Runtime computes such a graph as it is written, so that it is its own twin.
"""

from __future__ import annotations

from engines.parity import GATES
from exporter.errors import UsageError
from exporter.onnx_graph import Graph
from exporter.precisions.precision import Peaks, Precision, Rewritten


def _uncalibrated(_graph: Graph, _peaks: Peaks) -> Rewritten:
    raise UsageError("int8: codes come from calibration on images; give some with --calib")


INT8 = Precision(
    name="int8",
    dtype="int8",
    rewrite=_uncalibrated,
    twin=lambda graph: graph,
    computed_by="as it is written",
    gate=GATES["int8"],
)
