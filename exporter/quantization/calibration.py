"""From a float32 graph and images to a quantized network, and what that costs: the page of this package to read first.

    images, the first few   --statistics--> ranges and shares by channel --noise_aware_factors--> equalized graph
    some of these           --fitted_layers--> the equalized network in INT8, and the network as it is; the better stays
    all others, a stream    --histograms--> magnitudes at every layer's input, in the float network
    the first few           --fitted_layers--> codes, scales and biases, with the ranges of all
    all images, a stream    --Simulation--> SQNR of the outputs against float32, and how often the top-1 agrees

Layers are fitted to as many images as 64 of 224 x 224 have pixels, and never to more than 512; that many are in memory.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from engines.compilation import Progress
from exporter.errors import VerificationFailed
from exporter.onnx_graph import Graph
from exporter.quantization.equalization import Factors, cross_layer_factors, with_factors
from exporter.quantization.form import EIGHT, Bits, Form
from exporter.quantization.image_passes import AT_ONCE, Final, FloatPass, Images, measured, statistics_of_inputs
from exporter.quantization.layerwise import (
    Fitted,
    LayerFit,
    NotRepresentable,
    candidates_of,
    fitted_layers,
    sqnr_db,
)
from exporter.quantization.noise import importance_of_channels, noise_aware_factors
from exporter.quantization.quantized import Quantized
from exporter.quantization.sensitivity import Sensitivity, kept_for_budget, sensitivities

ALGORITHM = "1"
"""Raised whenever the same images would give other codes."""
FITTED_PIXELS = 64 * 224 * 224
MOST_FITTED = 512
PROBED_PIXELS = 16 * 224 * 224
ATTEMPTS = 3
MARGIN_DB = 0.2
WEIGHT_SHARE = {"default": 1.0, "high": 0.3}
"""Of the noise of rounding to the nearest; GPTQ leaves about a third."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to quantize. ``budget_db`` is the SQNR to reach; ``report`` asks what each layer costs."""

    form: Form
    effort: str = "default"
    bits: Bits = EIGHT
    budget_db: float | None = None
    report: bool = False


@dataclasses.dataclass(frozen=True)
class Known:
    """What an earlier calibration from the same found: by convolution, factors or none; by layer, ranges."""

    factors: Factors
    ranges: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A quantized network and its figures.

    Attributes:
        quantized: codes and scales, on the equalized graph where that was better.
        factors: by convolution; empty where it is the graph as it was.
        equalized_db: SQNR of the outputs on a few images, with equalization; None where that was known.
        plain_db: and without; minus infinity where the form's dtype cannot hold its scales.
        sqnr_db: of the outputs against float32, over all images; of several outputs, the worst.
        agreement: the share of images that both name the same class of; None where there are no classes.
        images: how many there are.
        fitted: to how many of them layers are fitted.
        whole: with every layer in INT8, also those that a budget kept out of it.
        ranges: of every layer's input in that: what ``Known`` needs.
        fits: by layer in INT8.
        sensitivities: by layer, where they were asked for.
        seconds: wall time.
    """

    quantized: Quantized
    factors: Factors
    equalized_db: float | None
    plain_db: float | None
    sqnr_db: float
    agreement: float | None
    images: int
    fitted: int
    whole: Quantized
    ranges: Mapping[str, float]
    fits: Mapping[str, LayerFit]
    sensitivities: tuple[Sensitivity, ...]
    seconds: float

    @property
    def equalized(self) -> bool:
        """Whether the network was equalized."""
        return bool(self.factors)


def calibrated_from_graph(
    graph: Graph, images: Images, settings: Settings, progress: Progress, known: Known | None = None
) -> Calibrated:
    """Quantizes the float32 ``graph``.

    Args:
        graph: of the plain network.
        images: to calibrate on.
        settings: how.
        progress: told what is being done, how much of it is, and of how much.
        known: what does not have to be found again.

    Raises:
        VerificationFailed: the budget cannot be reached, or the form's dtype cannot hold this network.
    """
    started = time.monotonic()
    some = fitted_images(images)
    choice = _chosen(graph, some, settings, progress) if known is None else _Choice(known.factors, None, None)
    chosen = with_factors(graph, choice.factors)
    exact = FloatPass(chosen, progress)
    ranges = {} if known is None else known.ranges
    exact.stream(images, skip=len(some), counted=known is None)

    def fitted_without(kept: Mapping[str, str]) -> Fitted:
        try:
            return fitted_layers(
                chosen, some, settings.form, settings.effort, settings.bits, kept, exact.histograms, ranges, progress
            )
        except NotRepresentable as problem:
            raise VerificationFailed(f"INT8: {problem}; take fp16") from problem

    fitted = fitted_without({})
    whole = fitted.quantized
    ranges = {name: fit.input_range for name, fit in fitted.fits.items()}  # from now on, also with layers kept
    exact.prepend(fitted.exact)
    rows: tuple[Sensitivity, ...] = ()
    if settings.report or settings.budget_db is not None:
        rows = sensitivities(fitted.quantized, some.numpy(), progress, settings.bits.activations)
    final = measured(fitted, images, exact, settings.bits.activations, progress)
    if settings.budget_db is not None and final.sqnr_db < settings.budget_db:
        budget = _Budget(settings.budget_db, whole, some, rows, settings.bits, progress)
        fitted, final = budget.met(
            fitted_without, lambda one: measured(one, images, exact, settings.bits.activations, progress)
        )
    return Calibrated(
        fitted.quantized,
        choice.factors,
        choice.equalized_db,
        choice.plain_db,
        final.sqnr_db,
        final.agreement,
        images.count,
        len(some),
        whole,
        ranges,
        fitted.fits,
        rows,
        time.monotonic() - started,
    )


def fitted_images(images: Images) -> Tensor:
    """The first images, as many as layers are fitted to: (n, C, H, W), channels last."""
    first = next(images.batches(1))
    count = min(images.count, MOST_FITTED, max(1, FITTED_PIXELS // (first.shape[2] * first.shape[3])))
    found = torch.cat([torch.from_numpy(batch) for batch in images.batches(AT_ONCE, count)])
    return found.contiguous(memory_format=torch.channels_last)


def factors_from_images(graph: Graph, images: Tensor, settings: Settings) -> Factors:
    """What each channel is to be multiplied by, from cross-layer equalization on."""
    first = cross_layer_factors(graph)
    begun = with_factors(graph, first)
    candidates = candidates_of(begun)
    statistics = statistics_of_inputs(begun, images, candidates)
    for name, of in statistics.items():
        if not np.isfinite(of.mean_square).all():
            raise VerificationFailed(f"INT8: the input of {name}: a value is NaN or infinite; look at the images")
    second = noise_aware_factors(
        begun,
        statistics,
        importance_of_channels(begun, _probed(images), candidates),
        per_channel=settings.form.per_channel,
        bits=settings.bits,
        weight_share=WEIGHT_SHARE[settings.effort],
    )
    return {name: factor * second.get(name, 1.0) for name, factor in first.items()}


def _probed(images: Tensor) -> Tensor:
    """As many of them as a trial takes."""
    return images[: max(1, PROBED_PIXELS // (images.shape[2] * images.shape[3]))]


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The better of the equalized network and the network as it is, and the SQNR of both on a few images."""

    factors: Factors
    equalized_db: float | None
    plain_db: float | None


def _chosen(graph: Graph, images: Tensor, settings: Settings, progress: Progress) -> _Choice:
    factors = factors_from_images(graph, images, settings)
    images = _probed(images)
    tried = {}
    problem = ""
    for equalized in (True, False):
        one = with_factors(graph, factors) if equalized else graph
        try:
            fitted = fitted_layers(one, images, settings.form, settings.effort, settings.bits, {}, {}, {}, progress)
            tried[equalized] = min(sqnr_db(y, fitted.outputs[name]) for name, y in fitted.exact.items())
        except NotRepresentable as found:
            tried[equalized], problem = float("-inf"), str(found)
    if max(tried.values()) == float("-inf"):
        raise VerificationFailed(f"INT8: {problem or 'its outputs are NaN or infinite'}; take fp16")
    return _Choice(factors if tried[True] >= tried[False] else {}, tried[True], tried[False])


@dataclasses.dataclass(frozen=True)
class _Budget:
    """An SQNR to reach on all images, by keeping layers out of INT8; which ones is decided on the fitted images."""

    decibels: float
    whole: Quantized
    images: Tensor
    rows: tuple[Sensitivity, ...]
    bits: Bits
    progress: Progress

    def met(
        self, fitted_without: Callable[[Mapping[str, str]], Fitted], figures: Callable[[Fitted], Final]
    ) -> tuple[Fitted, Final]:
        """The network with few layers kept, and its figures.

        Raises:
            VerificationFailed: it cannot be reached.
        """
        wanted, reason = self.decibels, f"to reach {self.decibels:g} dB"
        for _ in range(ATTEMPTS):
            kept = kept_for_budget(
                self.whole, self.images.numpy(), wanted, self.rows, self.progress, self.bits.activations
            )
            fitted = fitted_without(dict.fromkeys(kept.names, reason))
            final = figures(fitted)
            if final.sqnr_db >= self.decibels:
                return fitted, final
            wanted += self.decibels - final.sqnr_db + MARGIN_DB
        raise VerificationFailed(
            f"--int8-budget: {len(kept.names)} layers kept out of INT8 give {final.sqnr_db:.1f} dB over all images, "
            f"not {self.decibels:g}; ask for less, or take fp16"
        )
