"""What whole sets of images show: how large a network's tensors become, its outputs, and how far INT8 is from them.

Images go through a few at a time, and what is kept does not grow with their number, but for the scores of a classifier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.compilation import Progress
from exporter.errors import VerificationFailed
from exporter.onnx_graph import Graph
from exporter.quantization.histogram import Histogram
from exporter.quantization.layerwise import Fitted, candidates_of, counted, decibels
from exporter.quantization.noise import Statistics
from exporter.quantization.simulation import Simulation, Step, float_layer, run_steps, steps_of_graph

AT_ONCE = 16
USUAL = 0.99
"""The share of images whose largest value in a channel is no more than what equalization goes by: ranges clip what only
a few images reach, and the more images there are, the farther these lie.
"""


class Images(Protocol):
    """What calibration needs of a dataset."""

    @property
    def count(self) -> int:
        """How many images there are."""

    def batches(self, size: int, count: int | None = None) -> Iterator[NDArray[np.float32]]:
        """All images, or the first ``count``, (n, C, H, W) float32 normalised, ``size`` at a time."""


def statistics_of_inputs(graph: Graph, images: Tensor, names: tuple[str, ...]) -> dict[str, Statistics]:
    """Of the inputs of these layers in the float network."""
    layer = float_layer(graph)
    found: dict[str, list[Tensor]] = {}

    def noticed(step: Step, x: Tensor) -> Tensor:
        if step.name in names:
            spread = x.flatten(2) if x.dim() == 4 else x[:, :, None]
            peaks = torch.maximum(spread.amax(2), -spread.amin(2))
            sums = torch.stack([spread.square().sum((0, 2)), spread.count_nonzero((0, 2)).float()]) / spread.shape[2]
            found.setdefault(step.name, []).append(torch.cat([peaks, sums]))
        return layer(step, x)

    with torch.inference_mode():
        for batch in torch.split(images, AT_ONCE):
            run_steps(steps_of_graph(graph), batch, noticed)
    return {name: _statistics_of(parts, len(images)) for name, parts in found.items()}


def _statistics_of(parts: list[Tensor], images: int) -> Statistics:
    """From each batch's peaks by image, above the sum of the means of squares and that of the shares of non-zeros."""
    peaks = torch.cat([part[:-2] for part in parts]).double()
    squares, shares = (sum(part[row].double() for part in parts) / images for row in (-2, -1))
    return Statistics(
        torch.quantile(peaks, USUAL, dim=0).numpy(), torch.as_tensor(squares).numpy(), torch.as_tensor(shares).numpy()
    )


class FloatPass:
    """The float network over all images: its outputs, and how large the inputs of its layers become."""

    def __init__(self, graph: Graph, progress: Progress) -> None:
        self._steps, self._layer, self._progress = steps_of_graph(graph), float_layer(graph), progress
        self._names = candidates_of(graph)
        self.histograms: dict[str, Histogram] = {}
        self.outputs: list[dict[str, Tensor]] = []

    def stream(self, images: Images, skip: int, *, counted: bool) -> None:
        """Goes through all images but the first ``skip``; magnitudes are ``counted``, or only outputs kept."""
        if images.count <= skip:
            return
        self.histograms = {name: Histogram() for name in self._names} if counted else {}
        done = 0
        for batch in images.batches(AT_ONCE):
            fresh = batch[max(0, skip - done) :]
            done += len(batch)
            if len(fresh):
                given = torch.tensor(fresh).contiguous(memory_format=torch.channels_last)
                with torch.inference_mode():
                    self._keep(run_steps(self._steps, given, self._noticed))
                self._progress("INT8 ranges", done, images.count)

    def prepend(self, outputs: dict[str, Tensor]) -> None:
        """The outputs of the first images, which were computed elsewhere."""
        self._keep(outputs, first=True)

    def _keep(self, outputs: dict[str, Tensor], *, first: bool = False) -> None:
        """Scores; feature maps are large, and computed again where they are needed."""
        if all(value.dim() == 2 for value in outputs.values()):
            self.outputs.insert(0 if first else len(self.outputs), outputs)

    def truths(self, images: Images) -> Iterator[tuple[NDArray[np.float32], dict[str, Tensor]]]:
        """Each batch of all images, with the outputs for it."""
        names = self.outputs[0] if self.outputs else ()
        kept = {name: torch.cat([part[name] for part in self.outputs]) for name in names}
        done = 0
        for batch in images.batches(AT_ONCE):
            if kept:
                yield batch, {name: value[done : done + len(batch)] for name, value in kept.items()}
            else:
                given = torch.tensor(batch).contiguous(memory_format=torch.channels_last)
                with torch.inference_mode():
                    exact = run_steps(self._steps, given, self._layer)
                yield batch, exact
            done += len(batch)

    def _noticed(self, step: Step, x: Tensor) -> Tensor:
        if step.name in self.histograms:
            try:
                self.histograms[step.name].add(counted(x))
            except ValueError as error:
                raise VerificationFailed(f"INT8: the input of {step.name}: {error}; look at the images") from error
        return self._layer(step, x)


@dataclasses.dataclass(frozen=True)
class Final:
    """The SQNR of the worst output over all images, and how often the top-1 agrees, where there are classes."""

    sqnr_db: float
    agreement: float | None


def measured(fitted: Fitted, images: Images, exact: FloatPass, activation_bits: int, progress: Progress) -> Final:
    """Runs the simulation over all images.

    Args:
        fitted: the quantized network.
        images: all of them.
        exact: of the same float network, whose outputs are known or computed again.
        activation_bits: of the codes between layers.
        progress: told how many images are done, of how many.
    """
    simulation = Simulation(fitted.quantized, activation_bits)
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    same, done, ranked = 0, 0, True
    for batch, truth in exact.truths(images):
        for name, found in simulation.run(batch).items():
            y = truth[name].double().numpy()
            signal[name] = signal.get(name, 0.0) + float((y**2).sum())
            noise[name] = noise.get(name, 0.0) + float(((y - found) ** 2).sum())
            ranked = y.ndim == 2
            same += int((y.argmax(1) == found.argmax(1)).sum()) if ranked else 0
        done += len(batch)
        progress("INT8 SQNR", done, images.count)
    worst = min(decibels(signal[name], noise[name]) for name in signal)
    return Final(worst, same / done if ranked else None)
