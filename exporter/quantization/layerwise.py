"""Layer by layer from the images on: each is fitted to what the quantized layers before it give.

Two networks go through the same images side by side, the float one and the quantized one. At each Conv or Gemm

    x -> range -> input scale               of the quantized network's x, with what was seen of other images
    weight -> scale -> codes                unclipped: the largest weight has the largest code
    product of codes, float result -> bias  (``exporter.quantization.correction``), and the scale of the channel

and what the layer then gives goes on to the next. Only tensors that are still to be read are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from engines.compilation import Progress
from exporter.onnx_graph import Graph
from exporter.precisions.rescaling import HALF_MAX, SAFETY
from exporter.quantization.correction import moments_of, refitted, sum_by_channel
from exporter.quantization.form import Bits, Form, levels
from exporter.quantization.gptq import (
    cross_covariance,
    input_covariance,
    retargeted,
    rounded_by_gptq,
    rounded_to_nearest,
)
from exporter.quantization.histogram import Histogram
from exporter.quantization.quantized import Quantized, QuantizedLayer
from exporter.quantization.ranges import range_from_histogram
from exporter.quantization.simulation import Layer, Step, codes_of, float_layer, linear, steps_of_graph, unweighted

EFFORTS = ("default", "high")
METHOD = "mse"
LARGE_MAP = 28 * 28
FINE_BITS = 8
"""With fewer, weights also make up for what the layers before have done (``gptq.retargeted``)."""


@dataclasses.dataclass(frozen=True)
class LayerFit:
    """What is told of a layer: the range of its input's codes, the share of values beyond it, its result's SQNR."""

    input_range: float
    method: str
    clipped: float
    sqnr_db: float


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A quantized network, its layers' figures by name, and the outputs of both networks for the fitted images."""

    quantized: Quantized
    fits: dict[str, LayerFit]
    exact: dict[str, Tensor]
    outputs: dict[str, Tensor]


class NotRepresentable(Exception):
    """A scale is beyond what the form's dtype holds."""


def candidates_of(graph: Graph) -> tuple[str, ...]:
    """The Convs and Gemms that can be INT8, in order: all but those inside squeeze-and-excitation."""
    return tuple(step.name for step, _ in steps_of_graph(graph) if step.weighted and "/se/" not in step.name)


def fitted_layers(
    graph: Graph,
    images: Tensor,
    form: Form,
    effort: str,
    bits: Bits,
    kept: Mapping[str, str],
    seen: Mapping[str, Histogram],
    ranges: Mapping[str, float],
    progress: Progress,
) -> Fitted:
    """Quantizes every candidate that is not ``kept``.

    Args:
        graph: float32, equalized or not.
        images: (n, C, H, W) that layers are fitted to.
        form: how the result is to be written.
        effort: of EFFORTS.
        bits: of the codes.
        kept: what stays in the form's dtype, and why.
        seen: by layer, magnitudes of its input that other images had.
        ranges: by layer, those of its input that are known; they do not have to be found.
        progress: told how many layers are done, of how many.

    Raises:
        NotRepresentable: a scale or bias is beyond the form's dtype.
    """
    steps = steps_of_graph(graph)
    candidates = candidates_of(graph)
    fitting = _Fitting(graph, form, effort, bits, seen, ranges)
    exact, quantized = {steps.image: images}, {steps.image: images.clone()}
    done = 0
    with torch.inference_mode():
        for step, forgotten in steps:
            is_fitted = step.name in candidates and step.name not in kept
            x = exact[step.inputs[0]] if is_fitted and bits.weights < FINE_BITS else None
            exact[step.output] = _computed(step, exact, fitting.computed)
            for name in forgotten:  # before the quantized network needs room for the same
                exact.pop(name, None)
            if is_fitted:
                quantized[step.output] = fitting.fitted(step, x, exact[step.output], quantized[step.inputs[0]])
                done += 1
                progress(f"INT8 {effort}", done, len(candidates) - len(kept))
            else:
                quantized[step.output] = _computed(step, quantized, fitting.computed)
            for name in forgotten:
                quantized.pop(name, None)
    never = [step.name for step, _ in steps if step.weighted and step.name not in candidates]
    why = dict.fromkeys(never, "inside squeeze-and-excitation, on one value a channel")
    return Fitted(
        Quantized(form, graph, fitting.layers, {**why, **kept}),
        fitting.fits,
        {name: exact[name] for name in steps.outputs},
        {name: quantized[name] for name in steps.outputs},
    )


def _computed(step: Step, tensors: Mapping[str, Tensor], layer: Layer) -> Tensor:
    """A step of the float network."""
    inputs = [tensors[name] for name in step.inputs]
    return layer(step, inputs[0]) if step.weighted else unweighted(step, inputs)


class _Fitting:
    """Fits one layer after the other, and keeps what it found."""

    def __init__(
        self,
        graph: Graph,
        form: Form,
        effort: str,
        bits: Bits,
        seen: Mapping[str, Histogram],
        ranges: Mapping[str, float],
    ) -> None:
        self._weights, self._form, self._effort, self._bits = graph.weights, form, effort, bits
        self._seen, self._ranges = seen, ranges
        self.computed = float_layer(graph)
        self.layers: dict[str, QuantizedLayer] = {}
        self.fits: dict[str, LayerFit] = {}

    def fitted(self, step: Step, x: Tensor | None, y: Tensor, quantized_x: Tensor) -> Tensor:
        """What the layer makes of the quantized network's input; y is what the float network makes of its own, x.

        ``x`` is needed of less than FINE_BITS alone.
        """
        limit = self._ranges.get(step.name) or self._range(step, quantized_x)
        input_scale = float(self._representable(torch.tensor(limit / levels(self._bits.activations)), step))
        codes = codes_of(quantized_x, input_scale, self._bits.activations)

        weight = torch.from_numpy(self._weights[step.weight])
        scale, rounded = self._rounded(step, weight, x, codes, input_scale)
        product = linear(step, codes, rounded.float(), None)
        factor, bias = refitted(
            moments_of(y, product), scale.expand(len(weight)) * input_scale, per_channel=self._form.per_channel
        )
        weight_scale = self._representable(factor / input_scale if scale.dim() else factor[0] / input_scale, step)
        bias = self._representable_bias(bias, step)
        shape = (-1, *[1] * (product.dim() - 2))
        result = product.mul_((weight_scale.expand(len(weight)) * input_scale).float().reshape(shape))
        result = result.add_(bias.float().reshape(shape))
        self.layers[step.name] = QuantizedLayer(
            input_scale,
            rounded.numpy(),
            weight_scale.numpy().astype(self._form.dtype),
            bias.numpy().astype(np.float32),
        )
        covered = input_scale * levels(self._bits.activations)
        self.fits[step.name] = LayerFit(covered, METHOD, _share_beyond(quantized_x, covered), sqnr_db(y, result))
        return result

    def _range(self, step: Step, x: Tensor) -> float:
        """Of the layer's input; 1 where it is always 0."""
        histogram = Histogram()
        try:
            histogram.add(counted(x))
        except ValueError as error:
            raise NotRepresentable(f"the input of {step.name}: {error}") from error
        if step.name in self._seen:
            histogram = histogram.merged(self._seen[step.name])
        if self._form.dtype == np.float16 and histogram.largest * SAFETY > HALF_MAX:
            raise NotRepresentable(
                f"{step.name}: its input reaches {histogram.largest:.3g}, too near to half's largest"
            )
        return range_from_histogram(histogram, METHOD, levels(self._bits.activations)) if histogram.largest else 1.0

    def _rounded(
        self, step: Step, weight: Tensor, x: Tensor | None, codes: Tensor, input_scale: float
    ) -> tuple[Tensor, Tensor]:
        """The weight's scale (out,) or (), and its int8 codes, in its shape."""
        flat = weight.double().flatten(1)
        if self._effort == "default":
            scale = self._scale_of(flat, step)
            return scale, rounded_to_nearest(weight, scale, levels(self._bits.weights))
        given = _as_image(codes)
        kernel = weight.shape[-1] if weight.dim() == 4 else 1
        window = (kernel, step.stride, step.padding, step.groups)
        covariance = input_covariance(given, *window) * input_scale**2
        rows = torch.chunk(flat, step.groups)
        if x is not None:
            cross = cross_covariance(_as_image(x), given, *window) * input_scale
            rows = tuple(retargeted(row, cross[g], covariance[g]) for g, row in enumerate(rows))
        aim = torch.cat(rows)
        scale = self._scale_of(aim, step)
        each = scale.expand(len(aim)).chunk(step.groups)
        largest = levels(self._bits.weights)
        found = [rounded_by_gptq(row, covariance[g], each[g], largest) for g, row in enumerate(rows)]
        return scale, torch.cat(found).reshape(weight.shape)

    def _scale_of(self, weight: Tensor, step: Step) -> Tensor:
        """(out,), or () where the form has one for all; a weight that is all zeros has a scale, too."""
        largest = weight.abs().amax(1) if self._form.per_channel else weight.abs().amax()
        safe = torch.where(largest > 0, largest, 1.0)
        return self._representable(safe / levels(self._bits.weights), step)

    def _representable(self, scale: Tensor, step: Step) -> Tensor:
        """The nearest numbers of the form's dtype, in float64."""
        kind = torch.finfo(torch.float16 if self._form.dtype == np.float16 else torch.float32)
        rounded: Tensor = scale.to(torch.float16 if self._form.dtype == np.float16 else torch.float32).double()
        if not bool(((rounded >= kind.smallest_normal) & (rounded <= kind.max)).all()):
            raise NotRepresentable(f"{step.name}: a scale is beyond {self._form.dtype}")
        return rounded

    def _representable_bias(self, bias: Tensor, step: Step) -> Tensor:
        rounded = bias.to(torch.float16 if self._form.dtype == np.float16 else torch.float32).double()
        if not bool(torch.isfinite(rounded).all()):
            raise NotRepresentable(f"{step.name}: a bias is beyond {self._form.dtype}")
        return rounded


def sqnr_db(exact: Tensor, approximate: Tensor) -> float:
    """10 log10(sum y^2 / sum (y - y_q)^2); infinite where they are equal."""
    signal = noise = 0.0
    for y, found in zip(torch.split(exact, 8), torch.split(approximate, 8), strict=True):
        signal += float(sum_by_channel(y.square()).sum())
        noise += float(sum_by_channel((y - found).square()).sum())
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """The ratio of two sums of squares; a NaN is minus infinity."""
    if not (np.isfinite(noise) and np.isfinite(signal)):
        return float("-inf")
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(max(signal, 1e-300) / noise))


def counted(x: Tensor) -> Tensor:
    """The values of a layer's input that a range is chosen by: of large maps, every other row and column."""
    return x[:, :, ::2, ::2] if x.dim() == 4 and x.shape[2] * x.shape[3] >= LARGE_MAP else x


def _share_beyond(x: Tensor, limit: float) -> float:
    return (int((x > limit).count_nonzero()) + int((x < -limit).count_nonzero())) / x.numel()


def _as_image(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x[:, :, None, None]
