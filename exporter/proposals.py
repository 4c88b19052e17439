"""What fits the images better: other normalisations, the channels reversed, other strides, judged by the batch norms.

Hypotheses are compared on the same images by their distance, twice the drift plus the spread (``exporter.witness``).
For normalisation and channel order it is that of the first block, which sees the images themselves and costs little;
for strides that of all layers, where one stage is changed, or two exchanged, at a time, as long as that helps. A
hypothesis is proposed only where it is clearly better, and strides that fit nearly as well are named beside it. No
network of the witness's table was touched where it was right, 32 or 64 images taken. Made wrong, one with little
augmentation was put right always; with heavy augmentation some last stages were not, neighbouring data sets' mean and
std were taken for each other, and 1,2 and 2,1 looked alike.

Channel order has no flag: images have to be read in another one. Images that come as floats are normalised already, so
that only their order and the strides can be tried. An image size cannot be tried at all, and a wrong one may look like
other strides.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from exporter.architecture import Architecture, joined
from exporter.images import IMAGENET_MEAN, IMAGENET_STD, Normalisation
from exporter.strides import neighbours, stride_choices, with_strides
from exporter.witness import LayerWitness, layers_from_images
from exporter.workload import multiply_accumulates

RAW_STD = 0.00392157
COLOUR_NORMALISATIONS = (
    ("ImageNet", IMAGENET_MEAN, IMAGENET_STD),
    ("-1..1", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ("0..1", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ("0..255", (0.0, 0.0, 0.0), (RAW_STD, RAW_STD, RAW_STD)),
    ("ImageNet mean in 0..255, no std", IMAGENET_MEAN, (RAW_STD, RAW_STD, RAW_STD)),
    ("CIFAR-10", (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    ("CIFAR-10, std of single images", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)),
    ("CIFAR-100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ("CLIP", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
)
GREY_NORMALISATIONS = (
    ("-1..1", (0.5,), (0.5,)),
    ("0..1", (0.0,), (1.0,)),
    ("0..255", (0.0,), (RAW_STD,)),
    ("MNIST", (0.1307,), (0.3081,)),
    ("Fashion-MNIST", (0.286,), (0.353,)),
    ("ImageNet in grey", (0.449,), (0.226,)),
)
STEM_FACTOR, WHOLE_FACTOR = 0.75, 0.9
STRIDE_FACTOR, STEP_FACTOR, NOT_WORSE = 0.7, 0.9, 1.05
LARGEST_WORK = 100e9
"""Multiply-accumulates that one hypothesis may take: so many images, and no hypothesis too expensive for a few."""
LARGEST_COUNT, SMALLEST_COUNT = 64, 8


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The best that was found. ``found`` says whether it is clearly better than what was assumed.

    ``drift_before`` and ``drift_after`` are means over the batch norms of their distance. ``tried`` names everything
    that was compared.
    ``flags`` is what to add to the command, empty where nothing needs a flag.
    """

    found: bool
    flags: str
    reversed_channels: bool
    drift_before: float
    drift_after: float
    tried: tuple[str, ...]
    line: str

    def record(self) -> dict[str, Any]:
        """As data for the report."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Hypothesis:
    """A network and how its images are made from those that were given.

    ``normalised`` is what images that come as floats went through already; it is undone where their channels are
    reversed before it.
    """

    architecture: Architecture
    normalise: Normalisation | None
    reversed_channels: bool = False
    normalised: Normalisation | None = None

    def batch(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """What the network is given for ``images``."""
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / np.float32(255)
        if self.normalised is not None:
            mean, std = _columns(self.normalised)
            images = images * std + mean
        if self.reversed_channels:
            images = images[:, ::-1]
        if self.normalise is not None:
            mean, std = _columns(self.normalise)
            images = (images - mean) / std
        return np.ascontiguousarray(images, np.float32)


def proposal_from_images(
    architecture: Architecture, tensors: Mapping[str, Tensor], images: NDArray[Any], normalise: Normalisation
) -> Proposal:
    """Looks for what fits better than ``architecture`` and ``normalise`` do. For when the witness is not clear.

    Args:
        architecture: as assumed; not in deployed form, whose witness is unavailable.
        tensors: by canonical name.
        images: (n, C, H, W), uint8 before normalisation or float32 after it; 64 are used at most.
        normalise: what was assumed for uint8 images.
    """
    assumed = _Hypothesis(architecture, normalise if images.dtype == np.uint8 else None)
    fit = _Fit(tensors, images[:LARGEST_COUNT], architecture)
    best, names = _best_input(assumed, normalise, fit)
    best, equals, patterns = _best_strides(best, fit)
    tried = (*names, *(f"strides {joined(one.architecture.stage_strides)}" for one in patterns))
    count = fit.count(assumed, best)
    before, after = (_mean(fit.layers(one, count)) for one in (assumed, best))
    return Proposal(
        found=best != assumed,
        flags=_flags(assumed, best),
        reversed_channels=best.reversed_channels,
        drift_before=before,
        drift_after=after,
        tried=tried,
        line=_line(assumed, best, equals, before, after, len(tried)),
    )


class _Fit:
    """Distances of hypotheses on the same images."""

    def __init__(self, tensors: Mapping[str, Tensor], images: NDArray[Any], assumed: Architecture) -> None:
        self.tensors, self.images = tensors, images
        self.largest_work = max(LARGEST_WORK, SMALLEST_COUNT * multiply_accumulates(assumed, images.shape[2:]))
        self._found: dict[tuple[_Hypothesis, int, int | None], tuple[LayerWitness, ...]] = {}

    def layers(self, hypothesis: _Hypothesis, count: int, blocks: int | None = None) -> tuple[LayerWitness, ...]:
        """The rows of the first ``blocks`` blocks on the first ``count`` images."""
        key = (hypothesis, count, blocks)
        if key not in self._found:
            batch = hypothesis.batch(self.images[:count])
            self._found[key] = layers_from_images(hypothesis.architecture, self.tensors, [batch], blocks)[1]
        return self._found[key]

    def count(self, *hypotheses: _Hypothesis) -> int:
        """How many of the images all of them may take; 0 where that is too few to tell anything."""
        size = self.images.shape[2:]
        work = max(multiply_accumulates(one.architecture, size) for one in hypotheses)
        count = min(len(self.images), int(self.largest_work / work))
        return count if count >= min(SMALLEST_COUNT, len(self.images)) else 0


def _best_input(assumed: _Hypothesis, normalise: Normalisation, fit: _Fit) -> tuple[_Hypothesis, list[str]]:
    """The normalisation and channel order that suit the first batch norm, and the names of those tried."""
    blocks = assumed.architecture.blocks
    stem = next(number for number, block in enumerate(blocks, 1) if not block.deployed or block.post_batch_norm)
    named = list(_inputs(assumed, normalise))
    names = [name for name, _ in named]
    if not named:
        return assumed, names
    at_stem = [(_mean(fit.layers(one, len(fit.images), stem)), one) for _, one in named]
    nearest, best = min(at_stem, key=lambda pair: pair[0])
    if not nearest <= STEM_FACTOR * _mean(fit.layers(assumed, len(fit.images), stem)):
        return assumed, names
    count = fit.count(assumed)
    better = _mean(fit.layers(best, count)) <= WHOLE_FACTOR * _mean(fit.layers(assumed, count))
    return (best if better else assumed), names


def _inputs(assumed: _Hypothesis, normalise: Normalisation) -> Iterator[tuple[str, _Hypothesis]]:
    """Every other way of making the input, with its name."""
    architecture, colour = assumed.architecture, assumed.architecture.in_channels == 3
    if assumed.normalise is None:
        if colour:
            yield "channels reversed", _Hypothesis(architecture, None, reversed_channels=True)
            yield (
                "channels reversed before normalising",
                _Hypothesis(architecture, normalise, reversed_channels=True, normalised=normalise),
            )
        return
    if colour:
        yield "channels reversed", dataclasses.replace(assumed, reversed_channels=True)
    for name, mean, std in COLOUR_NORMALISATIONS if colour else GREY_NORMALISATIONS:
        if (mean, std) != (assumed.normalise.mean, assumed.normalise.std):
            other = _Hypothesis(architecture, Normalisation(mean, std, assumed=True))
            yield name, other
            if colour:
                yield f"{name}, channels reversed", dataclasses.replace(other, reversed_channels=True)


def _best_strides(start: _Hypothesis, fit: _Fit) -> tuple[_Hypothesis, list[_Hypothesis], list[_Hypothesis]]:
    """The strides that suit all batch norms; others that suit them nearly as well; all those tried.

    The nearest is reached one change at a time. Of those that it is not clearly nearer than, the one with the fewest
    changes wins, since what the user said is right more often than not.
    """
    choices = stride_choices(start.architecture)
    tried: list[_Hypothesis] = []
    nearest = start
    while True:
        found = nearest
        for pattern in neighbours(nearest.architecture.stage_strides, choices):
            candidate = dataclasses.replace(start, architecture=with_strides(start.architecture, pattern))
            if candidate not in tried and (count := fit.count(candidate, found)):
                tried.append(candidate)
                if _nearer(fit.layers(candidate, count), fit.layers(found, count), STEP_FACTOR):
                    found = candidate
        if found is nearest:
            break
        nearest = found

    def clearly(one: _Hypothesis, other: _Hypothesis) -> bool:
        count = fit.count(one, other)
        return _nearer(fit.layers(one, count), fit.layers(other, count), STRIDE_FACTOR)

    if not clearly(nearest, start):
        return start, [], tried
    equals = [one for one in tried if clearly(one, start) and not clearly(nearest, one)]
    equals.sort(key=lambda one: (_changes(one, start), _mean(fit.layers(one, fit.count(one, start)))))
    return equals[0], equals[1:], tried


def _changes(one: _Hypothesis, other: _Hypothesis) -> int:
    pairs = zip(one.architecture.stage_strides, other.architecture.stage_strides, strict=True)
    return sum(stride != theirs for stride, theirs in pairs)


def _nearer(candidate: Sequence[LayerWitness], other: Sequence[LayerWitness], factor: float) -> bool:
    """Whether the mean distance falls to ``factor``, or the largest to STRIDE_FACTOR while the mean does not rise."""
    mean, largest = _mean(candidate), max(layer.distance for layer in candidate)
    mean_before, largest_before = _mean(other), max(layer.distance for layer in other)
    if mean > NOT_WORSE * mean_before or largest > NOT_WORSE * largest_before:
        return False
    return mean <= factor * mean_before or largest <= STRIDE_FACTOR * largest_before


def _mean(layers: Sequence[LayerWitness]) -> float:
    return statistics.fmean(layer.distance for layer in layers)


def _flags(assumed: _Hypothesis, best: _Hypothesis) -> str:
    flags = []
    if best.architecture.stage_strides != assumed.architecture.stage_strides:
        flags.append(f"--strides {joined(best.architecture.stage_strides)}")
    if assumed.normalise is not None and best.normalise is not None and best.normalise != assumed.normalise:
        mean, std = (",".join(f"{value:g}" for value in values) for values in (best.normalise.mean, best.normalise.std))
        flags.append(f"--mean {mean} --std {std}")
    return " ".join(flags)


def _line(
    assumed: _Hypothesis, best: _Hypothesis, equals: Sequence[_Hypothesis], before: float, after: float, tried: int
) -> str:
    if best == assumed:
        return f"none of {tried} other normalisations, channel orders and strides fits your images clearly better"
    parts = " and ".join(part for part in (_flags(assumed, best), _order(best)) if part)
    others = " or ".join(joined(one.architecture.stage_strides) for one in equals[:2])
    doubt = f"; strides {others} nearly as well" if equals else ""
    return f"your images fit {parts} far better (drift {after:.2g} instead of {before:.2g}){doubt}"


def _order(best: _Hypothesis) -> str:
    if not best.reversed_channels:
        return ""
    return f"BGR order (reverse the channels of the images{' before normalising them' if best.normalised else ''})"


def _columns(normalise: Normalisation) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (normalise.mean, normalise.std))
    return mean, std
