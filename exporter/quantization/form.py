"""The two forms of an INT8 graph, and the numbers that codes are made of.

A code c stands for c times a scale; there is no zero point (it is 0), so that a product of codes is one of integers:

    x  ~  scale * clip(round(x / scale), -L - 1, L)         activations: one scale for a tensor
    w  ~  scale * clip(round(w / scale), -L, L)             weights: a scale for each output channel, or one for all

with L = 2^(bits - 1) - 1. TensorRT takes signed codes alone, so what a ReLU leaves uses half of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["EIGHT", "FORMS", "PORTABLE", "RTX", "Bits", "Form", "levels"]


@dataclasses.dataclass(frozen=True)
class Form:
    """How the graph is written.

    Attributes:
        name: ends the file's name, as in ``<stem>.int8.rtx.onnx``.
        per_channel: whether each output channel of a weight has a scale of its own.
        dtype: of the scales, the biases and everything that is not INT8.
        title: for people.
    """

    name: str
    per_channel: bool
    dtype: np.dtype[np.floating]
    title: str


PORTABLE = Form(
    "int8", per_channel=True, dtype=np.dtype(np.float32), title="a weight scale for each channel, float32 elsewhere"
)
RTX = Form(
    "int8.rtx",
    per_channel=False,
    dtype=np.dtype(np.float16),
    title="one weight scale for each convolution, float16 elsewhere",
)
FORMS = (PORTABLE, RTX)
"""The first, for full TensorRT and ONNX Runtime, is always written; the second is what TensorRT for RTX fuses best."""


@dataclasses.dataclass(frozen=True)
class Bits:
    """How many bits codes have. Files hold 8; fewer put the algorithm to a harder test."""

    weights: int = 8
    activations: int = 8


EIGHT = Bits()


def levels(bits: int) -> int:
    """The largest code of so many bits: 127 of 8."""
    return int(2 ** (bits - 1) - 1)
