"""Modules as PyTorch runs them, operation by operation: measured in rounds and judged as files are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engines.backends.backend import Arrays, TensorDescription
from engines.bench.contenders import HostQueries
from engines.bench.record import FileRow, Parity, Row
from engines.bench.rounds import measured
from engines.bench.rows import row_from_measurement
from engines.bench.speed_ups import with_speed_ups
from engines.bench.workload import Workload
from engines.golden import Golden
from engines.judgement import judgement
from engines.parity import Gate
from engines.timing import Clock

WAY = "numpy to numpy"
UNKNOWN = Workload((), "a module has no graph to count in")


class EagerModule:
    """A module as a backend; see ``engines.backends.backend.Backend``. On a GPU, a query ends when the copy is back."""

    batch: tuple[int, int | None] = (1, None)

    def __init__(self, module: nn.Module, size: int, device: str = "cpu") -> None:
        self._module, self._device = module.to(device), device
        self.inputs: tuple[TensorDescription, ...] = (TensorDescription("input", "float32", (None, 3, size, size)),)
        self.outputs: tuple[TensorDescription, ...] = (TensorDescription("output", "float32", (None, None)),)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Computes one batch."""
        with torch.inference_mode():
            result = self._module(torch.from_numpy(feeds["input"]).to(self._device))
        return {"output": result.cpu().numpy()}

    def close(self) -> None:
        """Back to where it came from."""
        self._module.cpu()


def measured_modules(
    modules: Mapping[str, nn.Module],
    golden: Golden,
    gate: Gate,
    *,
    batch: int,
    duration: float,
    device: str = "cpu",
    clock: Clock = time.perf_counter,
) -> tuple[list[Row], list[FileRow]]:
    """Measures modules side by side.

    Args:
        modules: by what they are called; speed-ups are against the first.
        golden: what they must answer.
        gate: how near.
        batch: images at once; those of ``golden`` over and over.
        duration: seconds for each, if its windows agree at once.
        device: "cpu" or "cuda".
        clock: in seconds.
    """
    rows = np.arange(batch) % len(golden.images)
    images = np.ascontiguousarray(golden.images[rows])
    backends = {name: EagerModule(module, images.shape[-1], device) for name, module in modules.items()}
    firsts = {}
    try:
        queries = {name: HostQueries(backend, {"input": images}, clock) for name, backend in backends.items()}
        for name, one in queries.items():
            firsts[name] = one.run(1).wall
        found = dict(zip(modules, measured(list(queries.values()), duration, clock), strict=True))
        timed = {name: one.results() for name, one in queries.items()}
        parities = {
            name: parity_of(golden, gate, [(timed[name], rows.tolist()), (answers(backend, golden), None)])
            for name, backend in backends.items()
        }
    finally:
        for backend in backends.values():
            backend.close()
    files = [_file(name, parities[name]) for name in modules]
    unpaired = [
        row_from_measurement(
            measurement,
            file=name,
            batch=batch,
            way=WAY,
            first_seconds=firsts[name],
            workload=UNKNOWN,
            card=None,
            telemetry=None,
        )
        for name, measurement in found.items()
    ]
    return with_speed_ups(unpaired, files), files


def parity_of(golden: Golden, gate: Gate, computed: list[tuple[Arrays, list[int] | None]]) -> Parity:
    """The first failure among answers to golden images, else what the last of them are like.

    Args:
        golden: the vectors.
        gate: how near answers must be.
        computed: answers, and which golden image each row of them is for; None for each once.
    """
    judged = [judgement(golden, results, gate, rows) for results, rows in computed]
    shown = next((one for one in judged if one.failure is not None), judged[-1])
    return Parity(shown.failure is None, shown.line)


def answers(backend: EagerModule, golden: Golden) -> Arrays:
    """To every golden image, one alone and the others together."""
    parts = [backend.run({"input": images}) for images in (golden.images[:1], golden.images[1:])]
    return {"output": np.concatenate([part["output"] for part in parts])}


def _file(name: str, parity: Parity) -> FileRow:
    return FileRow(
        file=name,
        sha256="",
        bytes=0,
        precision="fp32",
        kind="module",
        load_seconds=0.0,
        parity=parity,
        operations_per_image=None,
    )
