"""What a network's own batch norms say about its input: a witness that comes with every training checkpoint.

Each batch norm keeps the mean m and the variance v of what it saw in training, per channel. Real images that go through
the reconstruction in eval mode must give nearly the same. Per batch norm, observed m', v', averaged over its channels:

    drift     |m' - m| / sqrt(v + eps)
    spread    |log((v' + eps) / (v + eps))|
    excess    sqrt(max(0, x^2 - (1.5 e)^2)) of each, with e the standard error that so many images allow, from how much
              they differ among themselves

and without images, in a block with an identity and a 1x1 branch, which see the same x, so that their means obey W E[x]:

    disagreement    |W m_identity - m_1x1| / sqrt(v_1x1 + eps)

A batch norm behind a sum of branches sees whether an identity without tensors (QARepVGG) is where it is assumed.

The verdict takes the largest excess over the layers. Thresholds stand on six trained networks (Fashion-MNIST and
CIFAR-10, 28 and 32 pixels; with little and with heavy augmentation, one with SE, one in the middle of its training;
benchmarks/witness_table.py makes the part of the table that needs nothing but this project):

    largest excess, 128 images                        drift           spread
    right, trained with little augmentation           0.02 to 0.04    0.00 to 0.09     clear
    right, trained with heavy augmentation            0.10 to 0.25    0.18 to 0.33     suspicious
    BGR                                               0.11 to 0.20    0.13 to 0.25     suspicious
    another data set's mean and std                   0.11 to 1.4     0.28 to 1.7      mostly wrong
    no division by std, or neither mean nor std       0.33 to 1.1     1.4 to 3.1       wrong
    std a tenth too large                             0.05 to 0.42    0.23 to 0.68     mostly suspicious
    noise                                             0.69 to 1.6     1.5 to 2.9       wrong
    pixels of 0 to 255                                79 and more     8 to 13          wrong
    a wrong stride in stages 0 to 3                   0.10 to 0.36    0.12 to 1.6      mostly wrong
    a wrong stride in stage 4                         0.11 to 0.33    0.07 to 0.98     wrong, suspicious
    images of another size                            0.08 to 0.47    0.20 to 2.1      mostly wrong

So "suspicious" does not tell a mild mistake from images that were augmented in training; what fits better does
(``exporter.proposals``). With 128 images none of these mistakes was clear; with 32, BGR was in 1 of 12 draws. Not seen,
or not told from augmentation: epsilon, whatever comes behind the last batch norm, the stride of a last stage whose
input is larger than a few pixels. Images of one class only depart, too. No network of ImageNet's size was measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from exporter.architecture import Architecture, Block
from exporter.model import (
    Observer,
    block_output,
    block_tensors,
    branch_convolution,
    branch_sum,
    head_output,
    normalised,
    unobserved,
)

CLEAR_DRIFT, CLEAR_SPREAD = 0.075, 0.15
WRONG_DRIFT, WRONG_SPREAD = 0.4, 0.5
GROSS_DRIFT = 10.0
"""Wrong with any number of images: pixels of 0 to 255 give 44 and more, single images of the right kind up to 1.5."""
CLEAR_DISAGREEMENT, WRONG_DISAGREEMENT = 0.05, 0.25
CHANCE_FACTOR = 1.5
FEWEST_IMAGES = 32
PIXELS_AT_ONCE = 8 * 224 * 224

CLEAR, SUSPICIOUS, WRONG, UNAVAILABLE = "clear", "suspicious", "wrong", "unavailable"


@dataclasses.dataclass(frozen=True)
class LayerWitness:
    """One batch norm, named by block and branch, against what it sees now; the figures of the module's docstring."""

    layer: str
    drift: float
    spread: float
    drift_by_chance: float
    spread_by_chance: float

    @property
    def excess_drift(self) -> float:
        """The part of ``drift`` that the number of images does not explain. NaN counts as infinite."""
        return _excess(self.drift, self.drift_by_chance)

    @property
    def excess_spread(self) -> float:
        """The part of ``spread`` that the number of images does not explain. NaN counts as infinite."""
        return _excess(self.spread, self.spread_by_chance)

    @property
    def distance(self) -> float:
        """One figure for comparing hypotheses on the same images: twice the drift plus the spread."""
        return 2 * self.drift + self.spread if math.isfinite(self.drift + self.spread) else math.inf


@dataclasses.dataclass(frozen=True)
class BlockAgreement:
    """How far the 1x1 branch's running mean is from what the identity branch's says it must be."""

    block: str
    disagreement: float


@dataclasses.dataclass(frozen=True)
class Witness:
    """The finding. ``verdict`` is clear, suspicious, wrong or unavailable; ``first_departure`` names a layer."""

    verdict: str
    images: int
    layers: tuple[LayerWitness, ...]
    agreements: tuple[BlockAgreement, ...]
    first_departure: str | None
    line: str

    def record(self) -> dict[str, Any]:
        """The report's ``witness``: nothing but numbers, text, lists and dictionaries; infinite becomes None."""
        fields = dataclasses.asdict(self)
        for row, layer in zip(fields["layers"], self.layers, strict=True):
            row.update(excess_drift=layer.excess_drift, excess_spread=layer.excess_spread)
        for row in (*fields["layers"], *fields["agreements"]):
            row.update(
                {key: None for key, value in row.items() if not isinstance(value, str) and not math.isfinite(value)}
            )
        return {**fields, "layers": list(fields["layers"]), "agreements": list(fields["agreements"])}


def witness_from_images(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    batches: Iterable[NDArray[np.float32]],
    observe: Observer = unobserved,
) -> Witness:
    """Asks the batch norms. Memory does not grow with the number of images.

    Args:
        architecture: in any form; fused blocks compute, but have nothing to say.
        tensors: by canonical name.
        batches: normalised images, (n, C, H, W) each; without any, only the branches are held against each other.
        observe: told what the blocks compute on the way, in float32.
    """
    agreements = agreements_from_tensors(architecture, tensors)
    if architecture.form == "deployed":
        return Witness(UNAVAILABLE, 0, (), (), None, "no batch norm is left in a deployed file to witness anything")
    images, layers = layers_from_images(architecture, tensors, batches, observe=observe)
    verdict, departure = _verdict(images, layers, agreements)
    return Witness(verdict, images, layers, agreements, departure, _line(verdict, images, layers, agreements))


def layers_from_images(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    batches: Iterable[NDArray[np.float32]],
    blocks: int | None = None,
    observe: Observer = unobserved,
) -> tuple[int, tuple[LayerWitness, ...]]:
    """The number of images, and a row for each batch norm of the first ``blocks`` blocks (None: of all), in order."""
    asked = [_Asked(block, tensors, architecture.bn_eps) for block in architecture.blocks[:blocks]]
    images = 0
    with torch.inference_mode():
        for batch in batches:
            images += len(batch)
            pixels = batch.shape[2] * batch.shape[3]
            for part in torch.split(torch.from_numpy(batch), max(1, PIXELS_AT_ONCE // pixels)):
                x = part.contiguous(memory_format=torch.channels_last)
                for one in asked:
                    x = one.output(x, observe)
                    observe(architecture.tensor_names[one.block.name], x)
                if architecture.classes is not None and blocks is None:
                    head_output(tensors, x, observe)
    return images, tuple(layer for one in asked for layer in one.layers(images)) if images else ()


def agreements_from_tensors(architecture: Architecture, tensors: Mapping[str, Tensor]) -> tuple[BlockAgreement, ...]:
    """Each block whose identity and a 1x1 branch see the same x, held against itself; needs no images."""
    found = []
    for block in architecture.blocks:
        if "identity" not in block.branches:
            continue
        own = block_tensors(tensors, block, torch.float64)
        seen = own["identity.bn.running_mean"].reshape(1, -1, 1, 1)
        for branch in block.branches:
            weight = own.get(f"{branch}.weight")
            if weight is None or weight.shape[2:] != (1, 1) or f"{branch}.bn.weight" not in own:
                continue
            expected = functional.conv2d(seen, weight, groups=block.groups).flatten()
            deviation = torch.sqrt(own[f"{branch}.bn.running_var"] + architecture.bn_eps)
            disagreement = ((expected - own[f"{branch}.bn.running_mean"]).abs() / deviation).mean()
            found.append(BlockAgreement(block.name, float(disagreement)))
    return tuple(found)


class _Asked:
    """One block, and what its batch norms were given so far.

    ``sums`` has per branch, over images: m, q, m^2, q^2 and m q, where m and q are an image's mean and mean square per
    channel.
    """

    def __init__(self, block: Block, tensors: Mapping[str, Tensor], eps: float) -> None:
        self.block, self.eps = block, eps
        self.own = block_tensors(tensors, block, torch.float32)
        self.sums: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.shift = torch.zeros(block.out_channels)
        for owner in (*block.branches, "post"):
            if f"{owner}.bn.weight" not in self.own:
                continue
            scale = self._of(owner, "weight") / torch.sqrt(self._of(owner, "running_var") + eps)
            if owner != "post":  # which is no part of the branches' sum
                self.shift += (self._of(owner, "bias") - self._of(owner, "running_mean") * scale).float()
            self.scales[owner] = scale.float().reshape(-1, 1, 1)
            self.sums[owner] = torch.zeros(5, len(scale), dtype=torch.float64)

    def output(self, x: Tensor, observe: Observer) -> Tensor:
        """What leaves the block for ``x`` (n, in, H, W)."""
        if self.block.deployed and not self.block.post_batch_norm:
            return block_output(self.block, self.own, branch_sum(self.block, self.own, x, self.eps), observe)
        total = self.shift.reshape(-1, 1, 1)
        for branch in self.block.branches:
            y = branch_convolution(self.block, branch, self.own, x)
            if branch in self.scales:
                self._ask(branch, y)
                total = torch.addcmul(total, y, self.scales[branch])
            else:
                total = total + y
        if self.block.post_batch_norm:
            self._ask("post", total)
            total = normalised(self.own, "post", total, self.eps)
        return block_output(self.block, self.own, total, observe)

    def _ask(self, owner: str, y: Tensor) -> None:
        """Adds up what the batch norm of ``owner`` is given: ``y`` (n, C, h, w)."""
        mean, square = y.mean(dim=(2, 3)).double(), y.square().mean(dim=(2, 3)).double()
        self.sums[owner] += torch.stack([mean, square, mean**2, square**2, mean * square]).sum(dim=1)

    def layers(self, images: int) -> Iterator[LayerWitness]:
        """A row for each batch norm. A variance's standard error is that of q - 2 m' m."""
        for branch, sums in self.sums.items():
            mean, square, mean_mean, square_square, mean_square = sums / images
            of_mean = mean_mean - mean**2
            of_square = square_square - square**2 + 4 * mean**2 * of_mean - 4 * mean * (mean_square - mean * square)
            chance = [(values.clamp(min=0) / max(1, images - 1)).sqrt() for values in (of_mean, of_square)]
            expected = self._of(branch, "running_var") + self.eps
            observed = (square - mean**2).clamp(min=0) + self.eps
            yield LayerWitness(
                layer=f"{self.block.name}.{branch}",
                drift=float(((mean - self._of(branch, "running_mean")).abs() / expected.sqrt()).mean()),
                spread=float((observed / expected).log().abs().mean()),
                drift_by_chance=float((chance[0] / expected.sqrt()).mean()),
                spread_by_chance=float((chance[1] / observed).mean()),
            )

    def _of(self, branch: str, name: str) -> Tensor:
        return self.own[f"{branch}.bn.{name}"].double()


def _excess(value: float, chance: float) -> float:
    if not math.isfinite(value):
        return math.inf
    return math.sqrt(max(0.0, value**2 - (CHANCE_FACTOR * chance) ** 2))


def _verdict(
    images: int, layers: tuple[LayerWitness, ...], agreements: tuple[BlockAgreement, ...]
) -> tuple[str, str | None]:
    drift = max((layer.excess_drift for layer in layers), default=0.0)
    spread = max((layer.excess_spread for layer in layers), default=0.0)
    disagreement = max((_number(agreement.disagreement) for agreement in agreements), default=0.0)
    departures = [
        *(one.layer for one in layers if one.excess_drift > CLEAR_DRIFT or one.excess_spread > CLEAR_SPREAD),
        *(one.block for one in agreements if _number(one.disagreement) > CLEAR_DISAGREEMENT),
    ]
    first = departures[0] if departures else None
    if disagreement > WRONG_DISAGREEMENT or drift > GROSS_DRIFT:
        return WRONG, first
    if images < FEWEST_IMAGES:
        return UNAVAILABLE if disagreement <= CLEAR_DISAGREEMENT else SUSPICIOUS, first
    if drift > WRONG_DRIFT or spread > WRONG_SPREAD:
        return WRONG, first
    return SUSPICIOUS if departures else CLEAR, first


def _number(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _line(verdict: str, images: int, layers: tuple[LayerWitness, ...], agreements: tuple[BlockAgreement, ...]) -> str:
    worst = max(agreements, key=lambda one: _number(one.disagreement), default=None)
    if worst is not None and _number(worst.disagreement) > CLEAR_DISAGREEMENT:
        return (
            f"{verdict}: the branches of {worst.block} contradict each other (by {worst.disagreement:.2g} of a "
            f"standard deviation): weights and statistics are not of the same training; export another checkpoint"
        )
    if verdict == UNAVAILABLE:
        few = f"{images} images are too few to tell ({FEWEST_IMAGES} are needed, 128 are better)"
        return f"{verdict}: {few if images else 'no images were given'}; --calib takes them"
    far = [one for one in layers if one.excess_drift > CLEAR_DRIFT or one.excess_spread > CLEAR_SPREAD]
    most = max(layers, key=lambda one: max(one.excess_drift / CLEAR_DRIFT, one.excess_spread / CLEAR_SPREAD))
    figures = (
        f"{most.layer}: mean off by {most.excess_drift:.2g} of a standard deviation, "
        f"variance by a factor of {math.exp(min(most.excess_spread, 700)):.3g}, beyond chance"
    )
    if verdict == CLEAR:
        return f"{verdict}: {images} images reproduce the statistics of {len(layers)} batch norms (most off, {figures})"
    causes = "normalisation, channel order, strides or size are not those of the training"
    doubt = "" if verdict == WRONG else ", or it augmented its images more than these are"
    return (
        f"{verdict}: {images} images depart from the statistics of {len(far)} of {len(layers)} batch norms, first in "
        f"{far[0].layer}, most in {figures}: {causes}{doubt}; check --mean, --std, --strides, --size"
    )
