"""Equalization by what it is for: the factors with which codes do the least harm to the network's outputs.

Cross-layer and activation-aware equalization (``exporter.quantization.equalization``) each have a rule for the factors;
this has the aim. A code's rounding error is all but uniform over its step s, of variance s^2 / 12. So for factors f_in
of a layer's input channels and f_out of its output channels, all in units of the network before equalization, the noise
in output channel o is

    from its input      (s_x^2 / 12) sum_j (p_j / f_in,j^2) sum_k W_ojk^2       s_x = max_j f_in,j x_j / L
    from its weights    (s_o^2 / 12 f_out,o^2) sum_j f_in,j^2 m_j k^2           s_o = max_jk f_out,o |W_ojk| / f_in,j L

with x_j, m_j and p_j how large, the mean square and the share of non-zeros of input channel j; with one scale for all
of a weight, s is the largest of the s_o. What noise in channel o does to the outputs is, to first order,

    w_o = sum over positions of the mean of (d output / d y_o)^2

estimated with random signs (Hutchinson 1990). The sum over all layers of w_o times the noise predicts the noise of the
outputs, and log f of all convolutions together are found by gradient descent on it. It has no rule to tune; where
cross-layer equalization begins does not matter, since rescaled channels are the same problem in other units. One factor
for all channels of a convolution changes nothing, and is chosen so that they peak at 16, where half is at ease.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.onnx_graph import Graph
from exporter.quantization.equalization import LARGEST_FACTOR, Factors, free_seams
from exporter.quantization.form import Bits, levels
from exporter.quantization.simulation import Step, linear, run_steps, steps_of_graph, unweighted

PROBES = 4
DESCENT_STEPS = 100
LOOKED_AT, SETTLED = 10, 2e-3
"""The descent ends when so many steps lower the noise by no more than this."""
RATE = 0.06
SQUARINGS = 4  # of what a maximum is taken over while descending: the norm of order 2^4
PEAK = 16.0
SEED = 20213
SPREAD = float(np.log(LARGEST_FACTOR))


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of a layer's input (in,): how large it becomes, its mean square, and the share of values that are not 0."""

    peak: NDArray[np.float64]
    mean_square: NDArray[np.float64]
    non_zero: NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What the noise of one layer depends on; ``source`` and ``name`` are the convolutions whose factors count."""

    name: str
    source: str | None
    groups: int
    area: int
    largest: Tensor  # (out, in / groups) of |W|
    energy: Tensor  # (groups, in / groups): sum over o and k of w_o W^2
    weight: Tensor  # (out,): w_o
    statistics: tuple[Tensor, Tensor, Tensor]


def noise_aware_factors(
    graph: Graph,
    statistics: Mapping[str, Statistics],
    importance: Mapping[str, Tensor],
    *,
    per_channel: bool,
    bits: Bits,
    weight_share: float,
) -> Factors:
    """The factors (C,) by the convolution's name.

    Args:
        graph: float32.
        statistics: of each Conv's and Gemm's input that may be quantized, by its name.
        importance: of their output channels, as ``importance_of_channels`` gives it.
        per_channel: whether each output channel of a weight has a scale of its own.
        bits: of the codes.
        weight_share: how much of the weights' noise their rounding leaves: 1 for rounding to the nearest.
    """
    seams = free_seams(graph)
    sources = {node.name: seam.convolution.name for seam in seams for node in seam.readers}
    steps = {step.name: step for step, _ in steps_of_graph(graph)}
    layers = [_layer(graph, steps[name], sources.get(name), statistics[name], importance[name]) for name in statistics]
    with torch.inference_mode(mode=False), torch.enable_grad():
        logarithms = {
            seam.convolution.name: torch.zeros(len(graph.weights[seam.convolution.input[1]]), requires_grad=True)
            for seam in seams
        }
        if not logarithms:
            return {}
        descent = _Descent(logarithms)
        earlier = float("inf")
        for step in range(DESCENT_STEPS):
            noise = [_noise(layer, logarithms, weight_share, per_channel=per_channel, bits=bits) for layer in layers]
            total = torch.stack(noise).sum()
            descent.step(total)
            if step % LOOKED_AT == LOOKED_AT - 1:
                if total.item() > (1 - SETTLED) * earlier:
                    break
                earlier = total.item()
    found = {name: value.detach().clamp(-SPREAD, SPREAD).double().exp().numpy() for name, value in logarithms.items()}
    peaks = {sources[name]: of.peak for name, of in statistics.items() if name in sources}
    return {name: _at_ease(factor, peaks.get(name)) for name, factor in found.items()}


def importance_of_channels(graph: Graph, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """How much the outputs' squared error grows with noise of variance 1 in a channel of a layer's result.

    Args:
        graph: float32.
        images: (n, C, H, W).
        names: of the Convs and Gemms.

    Returns:
        (out,) by name, relative to the outputs' own mean square.
    """
    steps = steps_of_graph(graph)
    results: dict[str, Tensor] = {}

    def noticed(step: Step, x: Tensor) -> Tensor:
        weight, bias = (torch.from_numpy(graph.weights[name]) for name in (step.weight, step.bias))
        result = linear(step, x, weight, bias)
        if step.name in names:
            results[step.name] = result if result.requires_grad else result.requires_grad_()
        return results.get(step.name, result)

    with torch.inference_mode(mode=False), torch.enable_grad():
        outputs = list(run_steps(steps, images.clone(), noticed, unweighted=_kept_for_gradient).values())
        generator = torch.Generator().manual_seed(SEED)
        found = {name: torch.zeros(value.shape[1]) for name, value in results.items()}
        scales = [output.detach().square().sum().clamp_min(1e-30).rsqrt() for output in outputs]
        for probe in range(PROBES):
            signs = [torch.randint(0, 2, output.shape, generator=generator) * 2 - 1 for output in outputs]
            total = torch.stack([(s * y * scale).sum() for s, y, scale in zip(signs, outputs, scales, strict=True)])
            gradients = torch.autograd.grad(total.sum(), list(results.values()), retain_graph=probe + 1 < PROBES)
            for name, gradient in zip(results, gradients, strict=True):
                others = [dimension for dimension in range(gradient.dim()) if dimension != 1]
                found[name] += gradient.square().sum(others) / PROBES
    return found


class _Descent:
    """Adam (Kingma and Ba, ICLR 2015) with its usual constants; torch's own imports a compiler when it is made."""

    def __init__(self, unknowns: Mapping[str, Tensor]) -> None:
        self._unknowns = list(unknowns.values())
        self._means = [torch.zeros_like(unknown) for unknown in self._unknowns]
        self._squares = [torch.zeros_like(unknown) for unknown in self._unknowns]
        self._steps = 0

    def step(self, value: Tensor) -> None:
        """Moves the unknowns to where ``value`` is less."""
        gradients = torch.autograd.grad(value, self._unknowns, allow_unused=True)
        self._steps += 1
        with torch.no_grad():
            for unknown, gradient, mean, square in zip(
                self._unknowns, gradients, self._means, self._squares, strict=True
            ):
                if gradient is None:  # nothing reads it in INT8
                    continue
                mean.lerp_(gradient, 0.1)
                square.lerp_(gradient.square(), 0.001)
                slope = mean / (1 - 0.9**self._steps)
                unknown.sub_(RATE * slope / ((square / (1 - 0.999**self._steps)).sqrt() + 1e-8))


def _kept_for_gradient(step: Step, inputs: Sequence[Tensor]) -> Tensor:
    """As ``unweighted``, but not in place."""
    return torch.relu(inputs[0]) if step.operation == "Relu" else unweighted(step, inputs)


def _layer(graph: Graph, step: Step, source: str | None, of: Statistics, importance: Tensor) -> _Layer:
    weight = torch.from_numpy(graph.weights[step.weight]).flatten(2) if step.operation == "Conv" else None
    if weight is None:
        weight = torch.from_numpy(graph.weights[step.weight])[:, :, None]
    energy = (weight.square().sum(2) * importance[:, None]).reshape(step.groups, -1, weight.shape[1]).sum(1)
    numbers = [torch.from_numpy(value).float() for value in (of.peak, of.mean_square, of.non_zero)]
    return _Layer(
        step.name,
        source,
        step.groups,
        weight.shape[2],
        weight.abs().amax(2),
        energy,
        importance,
        (numbers[0], numbers[1], numbers[2]),
    )


def _noise(
    layer: _Layer, logarithms: Mapping[str, Tensor], weight_share: float, *, per_channel: bool, bits: Bits
) -> Tensor:
    """What one layer adds to the noise of the outputs."""
    peak, mean_square, non_zero = layer.statistics
    inner = torch.ones_like(peak) if layer.source is None else logarithms[layer.source].exp()
    step = _largest(inner * peak) / levels(bits.activations)
    of_input = step**2 / 12 * ((non_zero / inner**2).reshape(layer.groups, -1) * layer.energy).sum()

    groups = (layer.groups, len(layer.largest) // layer.groups, -1)
    ratios = layer.largest.reshape(groups) / inner.reshape(layer.groups, 1, -1)
    energy = (inner**2 * mean_square).reshape(layer.groups, -1).sum(1, keepdim=True) * layer.area
    outer = logarithms[layer.name].exp() if layer.name in logarithms else torch.ones(len(layer.largest))
    if per_channel:
        steps = _largest(ratios)
    else:
        steps = _largest((ratios * outer.reshape(*groups[:2], 1)).flatten()) / outer.reshape(groups[:2])
    of_weights = ((steps / levels(bits.weights)) ** 2 / 12 * energy * layer.weight.reshape(groups[:2])).sum()
    return of_input + weight_share * of_weights


def _largest(values: Tensor) -> Tensor:
    """A smooth maximum over the last dimension, so that more than one channel is told to move."""
    top = values.detach().amax(-1, keepdim=True).clamp_min(1e-30)
    powers = values / top
    for _ in range(SQUARINGS):  # far faster than a power
        powers = powers.square()
    total: Tensor = powers.sum(-1).clamp_min(1e-30) ** (0.5**SQUARINGS)  # a root has no slope at 0
    return total * top.squeeze(-1)


def _at_ease(factor: NDArray[np.float64], peak: NDArray[np.float64] | None) -> NDArray[np.float64]:
    largest = 0.0 if peak is None else float((factor * peak).max())
    return factor * (PEAK / largest) if largest > 0 else factor
