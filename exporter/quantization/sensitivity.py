"""Which layers cost the most in INT8, and as few of them as possible kept out of it for a budget.

    SQNR                10 log10(sum y^2 / sum (y - y_q)^2), in dB, of all outputs together; y are the float network's
    alone               with this layer as the only one in INT8
    all but it          with all layers in INT8, this one excepted

Either is measured for each layer on the same images. What lies before a layer is what it was, so only the layer and
what lies behind it is computed anew: behind the float network's tensors for the one, the quantized network's for the
other.

**A budget.** Layers are kept out of INT8 one after the other, always the one that lowers the noise most, until the SQNR
is reached. How much each lowers it is measured again at every step, beginning with those that lowered it most before,
until none of the others did as much as the best so far. At last layers are put back, the least helpful first, until
none is kept that need not be. At least one layer is in INT8, or there would be no INT8 network.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.compilation import Progress
from exporter.errors import VerificationFailed
from exporter.quantization.quantized import Quantized
from exporter.quantization.simulation import Step, float_layer, quantized_layer, run_steps, steps_of_graph, unweighted

__all__ = ["IMAGES", "Kept", "Sensitivity", "kept_for_budget", "sensitivities", "with_kept"]

IMAGES = 64
"""How many images are looked at, at most."""
AT_ONCE = 8  # the tensors before every layer are in memory for so many images
WORST_NOISE = 1e300

Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The SQNR of the outputs, in dB, with only this layer in INT8, and with all others."""

    name: str
    alone_db: float
    all_but_db: float


@dataclasses.dataclass(frozen=True)
class Kept:
    """Layers to keep out of INT8, in the graph's order, and the SQNR in dB with the others in INT8."""

    names: tuple[str, ...]
    sqnr_db: float


def sensitivities(
    quantized: Quantized, images: NDArray[np.float32], progress: Progress, activation_bits: int = 8
) -> tuple[Sensitivity, ...]:
    """How much each layer in INT8 costs, in the graph's order.

    Args:
        quantized: with all layers in INT8 that can be.
        images: (n, C, H, W), normalised; the first ``IMAGES`` are used.
        progress: told how many batches are done, of how many.
        activation_bits: of the codes between layers.
    """
    network = _Network(quantized, images, activation_bits)
    names = tuple(quantized.layers)
    alone, all_but = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for index, batch in enumerate(network.batches):
        in_float, in_codes = network.before_layers(batch, kept=names), network.before_layers(batch, kept=())
        for name in names:
            alone[name] += network.noise_behind(name, in_float[name], index, kept=set(names) - {name})
            all_but[name] += network.noise_behind(name, in_codes[name], index, kept={name})
        progress("INT8 sensitivity", index + 1, len(network.batches))
    return tuple(Sensitivity(name, network.sqnr_db(alone[name]), network.sqnr_db(all_but[name])) for name in names)


def kept_for_budget(
    quantized: Quantized,
    images: NDArray[np.float32],
    budget_db: float,
    rows: Sequence[Sensitivity],
    progress: Progress,
    activation_bits: int = 8,
) -> Kept:
    """As few layers as were found whose absence from INT8 makes the SQNR at least ``budget_db``.

    Args:
        quantized: as for ``sensitivities``.
        images: as for ``sensitivities``.
        budget_db: the least SQNR, in dB.
        rows: what ``sensitivities`` gave for the same network and images.
        progress: told how many layers are kept, of how many.
        activation_bits: of the codes between layers.

    Raises:
        VerificationFailed: not even one layer can be in INT8.
    """
    best = max(rows, key=lambda row: row.alone_db)
    if not best.alone_db >= budget_db:
        raise VerificationFailed(
            f"an SQNR of {budget_db:g} dB cannot be reached: even with no layer but {best.name} in INT8 it is "
            f"{best.alone_db:.1f} dB; ask for less, or take fp16"
        )
    network = _Network(quantized, images, activation_bits)
    search = _Search(network, {row.name: network.noise_of(row.all_but_db) for row in rows}, network.noise_of(budget_db))
    for count in range(len(rows) - 1):
        if search.reached:
            break
        search.keep_one()
        progress("INT8 budget", count + 1, len(rows))
    if not search.reached:
        search.keep_all_but(best.name)
    search.give_back()
    progress("INT8 budget", len(rows), len(rows))
    return Kept(tuple(name for name in quantized.layers if name in search.kept), network.sqnr_db(search.noise))


def with_kept(quantized: Quantized, names: Collection[str], reason: str) -> Quantized:
    """The network with these layers out of INT8, for a reason."""
    layers = {name: layer for name, layer in quantized.layers.items() if name not in names}
    return dataclasses.replace(quantized, layers=layers, kept={**quantized.kept, **dict.fromkeys(names, reason)})


class _Network:
    """A quantized network on a few images, with any of its layers ``kept`` in float."""

    def __init__(self, quantized: Quantized, images: NDArray[np.float32], activation_bits: int) -> None:
        steps = steps_of_graph(quantized.graph)
        self._steps, self._image, self._outputs = list(steps), steps.image, steps.outputs
        self._position = {step.name: index for index, step in enumerate(steps.steps)}
        self._layers, self._bits = quantized.layers, activation_bits
        half = quantized.form.dtype == np.float16
        self._kept = float_layer(quantized.graph, torch.float16 if half else torch.float32)
        self.batches = torch.split(torch.tensor(images[:IMAGES]), AT_ONCE)
        exact = float_layer(quantized.graph)
        self._references = [list(run_steps(steps, batch, exact).values()) for batch in self.batches]
        self._signal = sum(float(y.double().square().sum()) for found in self._references for y in found)

    def before_layers(self, batch: Tensor, kept: Collection[str]) -> dict[str, Tensors]:
        """By each layer's name, the tensors that are there before it."""
        before: dict[str, Tensors] = {}
        self._computed({self._image: batch}, 0, kept, before)
        return before

    def noise_behind(self, name: str, tensors: Tensors, index: int, kept: Collection[str]) -> float:
        """Of the batch with this index, computed from a layer on."""
        return self._noise(self._computed(dict(tensors), self._position[name], kept), index)

    def noise(self, kept: Collection[str]) -> float:
        """Of all images."""
        return min(
            sum(self._noise(self._computed({self._image: b}, 0, kept), i) for i, b in enumerate(self.batches)),
            WORST_NOISE,
        )

    def sqnr_db(self, noise: float) -> float:
        """The noise as SQNR."""
        return math.inf if noise == 0 else 10 * math.log10(max(self._signal, 1 / WORST_NOISE) / noise)

    def noise_of(self, sqnr_db: float) -> float:
        """The SQNR as noise."""
        return self._signal / 10 ** (sqnr_db / 10)

    def _noise(self, found: list[Tensor], index: int) -> float:
        parts = zip(found, self._references[index], strict=True)
        noise = sum(float((y.double() - reference).square().sum()) for y, reference in parts)
        return min(noise, WORST_NOISE) if math.isfinite(noise) else WORST_NOISE

    def _computed(
        self, tensors: Tensors, start: int, kept: Collection[str], before: dict[str, Tensors] | None = None
    ) -> list[Tensor]:
        """The outputs, computed from the step at ``start`` on; notes what was there ``before`` each layer."""
        with torch.inference_mode():
            for step, forgotten in itertools.islice(self._steps, start, None):
                if before is not None and step.name in self._layers:
                    before[step.name] = dict(tensors)
                inputs = [tensors[name] for name in step.inputs]
                tensors[step.output] = self._layer(step, inputs[0], kept) if step.weighted else unweighted(step, inputs)
                for name in forgotten:
                    tensors.pop(name, None)
            return [tensors[name] for name in self._outputs]

    def _layer(self, step: Step, x: Tensor, kept: Collection[str]) -> Tensor:
        layer = self._layers.get(step.name)
        return (
            self._kept(step, x) if layer is None or step.name in kept else quantized_layer(step, x, layer, self._bits)
        )


class _Search:
    """Layers kept so far, the noise with them, and how much each of the others was last seen to lower it."""

    def __init__(self, network: _Network, all_but: Mapping[str, float], limit: float) -> None:
        self._network, self._limit = network, limit
        self.kept: set[str] = set()
        self.noise = network.noise(())
        self._gains = {name: self.noise - noise for name, noise in all_but.items()}

    @property
    def reached(self) -> bool:
        """Whether the noise is low enough."""
        return self.noise <= self._limit

    def keep_one(self) -> None:
        """Keeps the layer that lowers the noise most."""
        best, least = "", math.inf
        for name in sorted(self._gains.keys() - self.kept, key=self._gains.__getitem__, reverse=True):
            if self._gains[name] <= self.noise - least:
                break
            noise = self._network.noise({*self.kept, name})
            self._gains[name] = self.noise - noise
            if noise < least:
                best, least = name, noise
        self.kept.add(best)
        self.noise = least

    def keep_all_but(self, name: str) -> None:
        """Keeps every layer but one."""
        self.kept = self._gains.keys() - {name}
        self.noise = self._network.noise(self.kept)

    def give_back(self) -> None:
        """Puts layers back into INT8 until none is kept that need not be."""
        while any(self._given_back(name) for name in sorted(self.kept, key=self._gains.__getitem__)):
            pass

    def _given_back(self, name: str) -> bool:
        noise = self._network.noise(self.kept - {name})
        if noise > self._limit:
            return False
        self.kept, self.noise = self.kept - {name}, noise
        return True
