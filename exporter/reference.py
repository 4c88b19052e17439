"""The training-time network's own answers in float64: the one truth that everything else is held against."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.architecture import Architecture
from exporter.model import logits

GOLDEN_NAME = "golden.npz"


@dataclasses.dataclass(frozen=True)
class Reference:
    """``images`` (n, C, H, W) float32, ``outputs`` (n, classes) float64.

    ``peaks`` has the largest absolute value of every tensor on the way, by its name in the ONNX graph.
    """

    images: NDArray[np.float32]
    outputs: NDArray[np.float64]
    peaks: dict[str, float]


def reference_from_repvgg(
    architecture: Architecture, tensors: Mapping[str, Tensor], images: NDArray[np.float32]
) -> Reference:
    """Runs the branches themselves, unfused, in float64."""
    peaks: dict[str, float] = {}

    def observe(name: str, value: Tensor) -> None:
        low, high = torch.aminmax(value)
        peaks[name] = max(peaks.get(name, 0.0), float(high), -float(low))

    outputs = logits(architecture, tensors, torch.from_numpy(images).double(), observe)
    return Reference(images, outputs.numpy(), peaks)


def write_golden(reference: Reference, path: pathlib.Path) -> None:
    """``golden.npz``: ``input`` float32 and ``output`` float64, what any engine of this network must reproduce."""
    with open(path, "wb") as file:
        np.savez(file, input=reference.images, output=reference.outputs)
