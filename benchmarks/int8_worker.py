"""One quantization in a process of its own, which measures itself: the same way for every side.

A worker reads a float32 ONNX file of the exporter, which says in its metadata how images are normalised, quantizes it
with a calibration ``.npz`` and writes the INT8 file. It prints one line of JSON, a ``Cost``:

    seconds       wall time from the float32 file to the INT8 file, behind the side's own imports
    cpu_seconds   processor time of the same, on all cores
    loaded_mb     resident memory before it, with everything imported and the float32 file loaded
    peak_mb       VmHWM, the largest resident memory of the process, which the kernel keeps
    images        how many different images its algorithm was given
    digest        of those images as it was given them, normalised; the order does not count
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.dataset import NpzDataset, dataset_from_npz
from exporter.images import Normalisation

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one quantization took, and which images it saw; the module says what the fields are."""

    seconds: float
    cpu_seconds: float
    loaded_mb: float
    peak_mb: float
    images: int
    digest: str

    @property
    def above_mb(self) -> float:
        """The peak above the loaded model."""
        return self.peak_mb - self.loaded_mb


@dataclasses.dataclass(frozen=True, eq=False)
class Watched(NpzDataset):
    """A dataset that remembers which images it gave away, by their digests."""

    given: set[bytes] = dataclasses.field(default_factory=set)

    def batches(self, size: int, count: int | None = None) -> Iterator[NDArray[np.float32]]:
        """As ``Dataset.batches``."""
        for batch in super().batches(size, count):
            self.given.update(hashlib.sha256(image).digest() for image in batch)
            yield batch


def watched_dataset(calibration: pathlib.Path, float32: pathlib.Path) -> Watched:
    """The images of ``calibration`` as the network in ``float32`` takes them."""
    dataset = dataset_of(calibration, float32)
    return Watched(**{field.name: getattr(dataset, field.name) for field in dataclasses.fields(NpzDataset)})


def dataset_of(images: pathlib.Path, float32: pathlib.Path) -> NpzDataset:
    """An ``.npz`` of images, normalised as the metadata of the float32 ONNX file says."""
    model = onnx.load(str(float32), load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assumptions = json.loads(properties["assumptions"])
    mean, std = (tuple(float(value) for value in assumptions[name].split(",")) for name in ("mean", "std"))
    height, width = (int(side) for side in assumptions["size"].split("x"))
    return dataset_from_npz(images, len(mean), (height, width), Normalisation(mean, std, assumed=False))


def cost_of(quantize: Callable[[], None], images: Watched) -> Cost:
    """Runs ``quantize``, which takes its images from ``images``."""
    loaded, processor, started = _memory("VmRSS"), time.process_time(), time.perf_counter()
    quantize()
    return Cost(
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - processor,
        loaded_mb=loaded,
        peak_mb=_memory("VmHWM"),
        images=len(images.given),
        digest=hashlib.sha256(b"".join(sorted(images.given))).hexdigest(),
    )


def check_same_images(costs: Sequence[Cost]) -> None:
    """Sees that every side was given the very same images.

    Raises:
        SystemExit: they differ.
    """
    found = {(cost.images, cost.digest) for cost in costs}
    if len(found) != 1:
        counts = ", ".join(str(images) for images, _ in sorted(found))
        raise SystemExit(f"error: the sides did not calibrate on the same images ({counts} of them)")


def _memory(name: str) -> float:
    """One of the sizes in /proc/self/status, in MB."""
    for line in pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"error: this kernel does not tell {name}")


def worker_parser(documentation: str | None) -> argparse.ArgumentParser:
    """The arguments that every worker takes."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float32", type=pathlib.Path, help="a float32 ONNX file of the exporter")
    parser.add_argument("calibration", type=pathlib.Path, help="an .npz of images")
    parser.add_argument("out", type=pathlib.Path, help="the INT8 file")
    parser.add_argument("--weight-bits", type=int, choices=(4, 8), default=8)
    return parser


def print_cost(cost: Cost) -> None:
    """The worker's answer."""
    print(json.dumps(dataclasses.asdict(cost)))


def cost_of_worker(module: str, arguments: Sequence[object]) -> Cost:
    """Starts ``python -m MODULE ARGUMENTS`` and waits for it.

    Raises:
        SystemExit: it failed; the message ends with its last line.
    """
    command = [sys.executable, "-m", module, *(str(argument) for argument in arguments)]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with status {done.returncode}: {last_line(done.stderr)}")
    return Cost(**json.loads(last_line(done.stdout)))


def last_line(text: str) -> str:
    """Without what a library said before it."""
    return text.strip().rpartition("\n")[2]
