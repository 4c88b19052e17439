"""What proving an export costs: the same export with nothing compared, with the default ledger, and with --layers.

    python benchmarks/verification_time.py [--network A0] [--rounds 5] [--json FILE]

All sides run in this one process and take turns, after one unmeasured turn of each: checkpoint to float32 ONNX and an
FP16 engine, random weights, 224 px. "nothing compared" replaces ``exporter.measured.Measured`` by a stand-in that runs
no form of the network and passes every check; what an export needs for its own files (the float64 reference that
golden.npz holds, the fusion and its certificates, the graph contract, the audit) is done on all sides. Seconds are
medians of wall time; the difference to "nothing compared" is what the verification adds.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from numpy.typing import NDArray

import exporter
from benchmarks.plain_export import NETWORKS
from benchmarks.random_checkpoint import random_repvgg
from exporter.ledger import Run
from exporter.measured import Judge, Measured
from exporter.report import Check

NOTHING, DEFAULT, LAYERS = "nothing compared", "default", "--layers"


class Unmeasured(Measured):
    """Runs nothing."""

    def keep(self, name: str, opened: Callable[[], Run], count: int | None = None) -> None:
        """Leaves it out."""

    def keep_outputs(self, name: str, outputs: Mapping[str, NDArray[np.floating]]) -> None:
        """Leaves it out."""

    def check(
        self,
        name: str,
        title: str,
        opened: Callable[[], Run],
        judge: Judge,
        *,
        largest: bool = False,
    ) -> Check:
        """Passes."""
        return Check(title, passed=True, value=None, gate=None, detail="")


def seconds_of(side: str, checkpoint: pathlib.Path, folder: pathlib.Path) -> float:
    """One export of ``checkpoint``."""
    out = folder / "out"
    measured = Unmeasured if side == NOTHING else Measured
    with mock.patch("exporter.pipeline.Measured", measured):
        start = time.perf_counter()
        exporter.export(checkpoint, out, trt=["fp16"], sdk="tensorrt_rtx", layers=side == LAYERS)
        return time.perf_counter() - start


def measured_seconds(network: str, rounds: int) -> dict[str, list[float]]:
    """Each side's seconds, in turns."""
    found: dict[str, list[float]] = {side: [] for side in (NOTHING, DEFAULT, LAYERS)}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        checkpoint = folder / "model.pt"
        torch.save(random_repvgg(*NETWORKS[network]).state_dict(), checkpoint)
        for turn in range(rounds + 1):
            for side, seconds in found.items():
                taken = seconds_of(side, checkpoint, folder)
                if turn:
                    seconds.append(taken)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="A0", choices=NETWORKS)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args(argv)
    found = measured_seconds(arguments.network, arguments.rounds)
    medians = {side: statistics.median(seconds) for side, seconds in found.items()}
    print(f"{arguments.network}, {arguments.rounds} rounds, {torch.get_num_threads()} threads")
    print(f"{'what':18} {'median s':>9} {'min-max s':>13} {'adds s':>7} {'ratio':>6}")
    for side, seconds in found.items():
        spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
        added = medians[side] - medians[NOTHING]
        print(f"{side:18} {medians[side]:9.2f} {spread:>13} {added:7.2f} {medians[side] / medians[NOTHING]:6.2f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"network": arguments.network, "seconds": found, "medians": medians}))


if __name__ == "__main__":
    main()
