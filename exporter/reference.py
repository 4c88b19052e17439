"""The training-time network's own answers in float64: the one truth that everything else is held against."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.outputs import Layout, layout_from_outputs
from exporter.architecture import Architecture
from exporter.model import outputs_of_network

GOLDEN_NAME = "golden.npz"


@dataclasses.dataclass(frozen=True)
class Reference:
    """``images`` (n, C, H, W) float32; ``named`` has each output in float64, (n, classes) or (n, C, h, w).

    ``peaks`` has the largest absolute value per channel (C,) of every tensor on the way, by its name in the ONNX graph.
    """

    images: NDArray[np.float32]
    named: dict[str, NDArray[np.float64]]
    peaks: dict[str, NDArray[np.float64]]

    @functools.cached_property
    def layout(self) -> Layout:
        """How outputs are joined, so that one comparison judges them all."""
        return layout_from_outputs(self.named)

    @functools.cached_property
    def outputs(self) -> NDArray[np.float64]:
        """The outputs joined: (n, values)."""
        return np.asarray(self.layout.joined(self.named), np.float64)


class PeakObserver:
    """An observer that keeps the largest absolute value per channel (C,) of every tensor that it is told."""

    def __init__(self) -> None:
        self.peaks: dict[str, NDArray[np.float64]] = {}

    def __call__(self, name: str, value: Tensor) -> None:
        """Takes ``value`` (n, C, ...) into account."""
        if value.is_contiguous():
            others = [dim for dim in range(value.dim()) if dim != 1]
            extreme = torch.maximum(value.amax(others), -value.amin(others))
        else:  # channels last: three times as fast
            extreme = value.abs().amax((2, 3)).amax(0)
        largest = extreme.double().numpy()
        self.peaks[name] = np.maximum(self.peaks[name], largest) if name in self.peaks else largest


def reference_from_repvgg(
    architecture: Architecture, tensors: Mapping[str, Tensor], images: NDArray[np.float32]
) -> Reference:
    """Runs the branches themselves, unfused, in float64."""
    observe = PeakObserver()
    outputs = outputs_of_network(architecture, tensors, torch.from_numpy(images).double(), observe)
    return Reference(images, {name: value.numpy() for name, value in outputs.items()}, observe.peaks)


def with_peaks_of(reference: Reference, others: Sequence[Mapping[str, NDArray[np.float64]]]) -> Reference:
    """``reference`` with the largest peaks that were seen anywhere."""
    peaks = dict(reference.peaks)
    for other in others:
        peaks = {name: np.fmax(values, other.get(name, values)) for name, values in peaks.items()}
    return dataclasses.replace(reference, peaks=peaks)


def write_golden(reference: Reference, path: pathlib.Path) -> None:
    """``golden.npz``: ``input`` float32 and each output in float64, what any engine of this network must reproduce."""
    with open(path, "wb") as file:
        np.savez(file, input=reference.images, **reference.named)  # type: ignore[arg-type]
