"""How long INT8 of RepVGG-A0 takes at 224 px, and how much memory, by the number of calibration images.

The network's weights are random (``benchmarks/random_checkpoint.py``). The images are seeded: blocks of colour in two
sizes under noise, so that neighbouring pixels have something in common, as in photographs. What is quantized is worth
nothing and is not looked at. Both sides read the images from an ``.npz``, as a stream.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

import exporter
from benchmarks.int8_table import OURS, THEIRS, TimingRow
from benchmarks.int8_worker import Cost, check_same_images, cost_of_worker
from benchmarks.plain_export import NETWORKS
from benchmarks.random_checkpoint import random_repvgg

SIZE = 224
TIMED = 512
FEW, MANY = 128, 1024
PERCENTILE = (32, 64)
"""Few, since ONNX Runtime's histograms keep every activation of every image until the end."""


def structured_images(count: int, size: int = SIZE, seed: int = 0) -> NDArray[np.uint8]:
    """(count, size, size, 3) of blocks and noise; ``size`` is a multiple of 32. The first ones never change."""
    random = np.random.default_rng(seed)
    images = np.empty((count, size, size, 3), np.uint8)
    for image in images:
        coarse, fine = (
            random.random((size // block, size // block, 3)).repeat(block, 0).repeat(block, 1) for block in (32, 8)
        )
        image[:] = 255 * (0.6 * coarse + 0.3 * fine + 0.1 * random.random(image.shape))
    return images


def timing_rows(directory: pathlib.Path, rounds: int) -> list[TimingRow]:
    """Both sides' seconds and memory with 512 images, their memory with fewer and more, and that of Percentile.

    Raises:
        SystemExit: a side fails, or they did not see the same images.
    """
    float32 = random_network(directory)
    images = structured_images(MANY)
    files = {}
    for count in sorted({TIMED, FEW, MANY, *PERCENTILE}):
        files[count] = directory / f"images{count}.npz"
        np.savez(files[count], images=images[:count])
    del images

    def runs(side: str, count: int, *flags: str) -> Callable[[], Cost]:
        out = directory / "timed.onnx"
        return lambda: cost_of_worker(f"benchmarks.int8_{side}", [float32, files[count], out, *flags])

    rows = []
    for count, measured in ((FEW, 1), (TIMED, rounds), (MANY, 1)):
        sides = {(THEIRS, "MinMax"): runs(THEIRS, count), (OURS, "default"): runs(OURS, count)}
        rows += in_turns(count, sides, measured, warm_up=count == TIMED)
    for count in PERCENTILE:
        percentile = {(THEIRS, "Percentile"): runs(THEIRS, count, "--method", "Percentile")}
        rows += in_turns(count, percentile, 1, warm_up=False)
    return rows


def in_turns(
    images: int, sides: Mapping[tuple[str, str], Callable[[], Cost]], rounds: int, *, warm_up: bool
) -> list[TimingRow]:
    """Runs the sides one after the other, ``rounds`` times, behind one that does not count."""
    runs: dict[tuple[str, str], list[Cost]] = {side: [] for side in sides}
    for number in range(0 if warm_up else 1, rounds + 1):
        for side, run in sides.items():
            cost = run()
            print(
                f"{images} images, round {number}, {' '.join(side)}: {cost.seconds:.1f} s", file=sys.stderr, flush=True
            )
            if number:
                runs[side].append(cost)
    check_same_images([cost for costs in runs.values() for cost in costs])
    return [TimingRow(images, *side, tuple(costs)) for side, costs in runs.items()]


def random_network(directory: pathlib.Path) -> pathlib.Path:
    """RepVGG-A0's float32 ONNX file, made in ``directory``."""
    checkpoint, out = directory / "A0.pt", directory / "A0"
    torch.save(random_repvgg(*NETWORKS["A0"]).state_dict(), checkpoint)
    exporter.export(checkpoint, out, onnx=True)
    return out / "A0.onnx"
