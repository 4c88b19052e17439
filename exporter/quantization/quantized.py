"""What a quantized network is: codes and scales by node, beside the float graph that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.onnx_graph import Graph
from exporter.quantization.form import Form


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """A Conv or Gemm in INT8.

    Attributes:
        input_scale: of the codes of its input; a number that the form's dtype holds exactly.
        weight: int8 codes, in the shape of the float weight: (out, in / groups, height, width) or (classes, channels).
        weight_scale: (out,) or (), in the form's dtype.
        bias: (out,) float32, never quantized; a number that the form's dtype holds exactly.
    """

    input_scale: float
    weight: NDArray[np.int8]
    weight_scale: NDArray[Any]
    bias: NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A network with some of its layers in INT8.

    Attributes:
        form: how it is to be written.
        graph: the float32 graph, equalized where that was better; what is not in ``layers`` computes with its weights.
        layers: by the Conv's or Gemm's name, in the graph's order.
        kept: the Convs and Gemms that stay in the form's own dtype, and why.
    """

    form: Form
    graph: Graph
    layers: Mapping[str, QuantizedLayer]
    kept: Mapping[str, str]
