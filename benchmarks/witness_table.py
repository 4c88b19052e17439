"""What the batch norms of a trained network say to right and wrong input, as a Markdown table.

    python benchmarks/witness_table.py [--images 128] [--checkpoint examples/fashion.pt] [--calib FILE.npz]

Measured, for each case: the largest drift and the largest spread over the batch norms beyond what so many images
explain (``exporter.witness``), the verdict, the first layer that departs, and what is proposed instead
(``exporter.proposals``). The cases are the right normalisation, every other that is known for as many channels, no
division by the standard deviation, BGR, inverted brightness, noise, other image sizes, and every stride that the
tensors allow, one stage at a time.

With its defaults it takes the network and the images that ship with the project, and makes that part of the table on
which the thresholds stand.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from exporter.architecture import Architecture, joined
from exporter.checkpoint import checkpoint_from_path
from exporter.dataset import dataset_from_npz
from exporter.images import Normalisation, normalisation
from exporter.proposals import COLOUR_NORMALISATIONS, GREY_NORMALISATIONS, proposal_from_images
from exporter.repvgg import network_from_checkpoint
from exporter.request import Request, floats_from_text, strides_from_text
from exporter.strides import stride_choices, with_strides
from exporter.witness import CLEAR, witness_from_images

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
HEADINGS = ("case", "drift", "spread", "verdict", "first departure", "proposed")
SIZES = (0.75, 1.25, 2.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One mistake, or none. ``images`` are what the network is given, or bytes (n, C, H, W) for ``normalise``."""

    name: str
    architecture: Architecture
    images: NDArray[Any]
    normalise: Normalisation

    @property
    def batch(self) -> NDArray[np.float32]:
        """What the network is given: (n, C, H, W)."""
        return normalised(self.images, self.normalise) if self.images.dtype == np.uint8 else self.images


def normalised(pixels: NDArray[Any], normalise: Normalisation) -> NDArray[np.float32]:
    """(pixel / 255 - mean) / std, per channel."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (normalise.mean, normalise.std))
    return np.ascontiguousarray((pixels.astype(np.float32) / np.float32(255) - mean) / std)


def cases(architecture: Architecture, pixels: NDArray[np.uint8], right: Normalisation) -> Iterator[Case]:
    """Every case, the right one first; ``pixels`` are (n, C, H, W)."""
    channels = architecture.in_channels
    yield Case("right", architecture, pixels, right)
    for name, mean, std in COLOUR_NORMALISATIONS if channels == 3 else GREY_NORMALISATIONS:
        if (mean, std) != (right.mean, right.std):
            yield Case(f"normalised as {name}", architecture, pixels, Normalisation(mean, std, assumed=False))
    no_std = Normalisation(right.mean, (1.0,) * channels, assumed=False)
    yield Case("mean, but no std", architecture, pixels, no_std)
    if channels == 3:
        yield Case("BGR", architecture, np.ascontiguousarray(pixels[:, ::-1]), right)
    yield Case("inverted", architecture, 255 - pixels, right)
    noise = np.random.default_rng(0).standard_normal(pixels.shape, np.float32)
    yield Case("noise", architecture, noise, right)
    for factor in SIZES:
        images = torch.from_numpy(normalised(pixels, right))
        resized = functional.interpolate(images, scale_factor=factor, mode="bilinear", antialias=True)
        yield Case(f"{factor:g} times the size", architecture, resized.numpy(), right)
    for stage, allowed in enumerate(stride_choices(architecture)):
        for stride in set(allowed) - {architecture.stage_strides[stage]}:
            strides = (*architecture.stage_strides[:stage], stride, *architecture.stage_strides[stage + 1 :])
            yield Case(f"strides {joined(strides)}", with_strides(architecture, strides), pixels, right)


def row(case: Case, tensors: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """The cells of a case, in the order of HEADINGS."""
    witness = witness_from_images(case.architecture, tensors, [case.batch])
    drift = max(layer.excess_drift for layer in witness.layers)
    spread = max(layer.excess_spread for layer in witness.layers)
    proposed = "not asked"
    if witness.verdict != CLEAR:
        proposal = proposal_from_images(case.architecture, tensors, case.images, case.normalise)
        order = "reverse the channels" if proposal.reversed_channels else ""
        proposed = ", ".join(filter(None, (proposal.flags, order))) or "nothing"
    return case.name, f"{drift:.3g}", f"{spread:.3g}", witness.verdict, witness.first_departure or "none", proposed


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=pathlib.Path, default=EXAMPLES / "fashion.pt")
    parser.add_argument("--calib", type=pathlib.Path, default=EXAMPLES / "fashion_calibration.npz")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--strides", type=strides_from_text)
    parser.add_argument("--mean", type=lambda text: floats_from_text("--mean", text))
    parser.add_argument("--std", type=lambda text: floats_from_text("--std", text))
    parser.add_argument("--images", type=int, default=128)
    given = parser.parse_args(arguments)
    request = Request(path=given.checkpoint, out=given.checkpoint.parent, strides=given.strides)
    network = network_from_checkpoint(checkpoint_from_path(given.checkpoint), request)
    architecture, tensors = network.architecture, network.tensors
    right = normalisation(architecture.in_channels, given.mean, given.std)
    dataset = dataset_from_npz(given.calib, architecture.in_channels, (given.size, given.size), right)
    if not dataset.holds_pixels:
        parser.error("--calib: images that are normalised already cannot be normalised wrongly; give uint8")
    pixels = next(dataset.raw(given.images, given.images))
    print(table([row(case, tensors) for case in cases(architecture, pixels, right)]))


if __name__ == "__main__":
    main()
