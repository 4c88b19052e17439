"""What the tests of families share: one export through the command line in a directory, and what came out of it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.cli import main
from tests.conftest import Outcome
from tests.families import Network
from tests.family_states import save

SIZE = ("--size", "40x48")
GATE = 5e-6


@dataclasses.dataclass(frozen=True)
class Export:
    """One run; ``directory`` is where it wrote."""

    outcome: Outcome
    directory: pathlib.Path

    @property
    def error(self) -> str:
        """The one line on stderr, of a run that left no file behind."""
        return self.outcome.error

    @functools.cached_property
    def path(self) -> pathlib.Path:
        """The float32 ONNX file, of a run that passed."""
        assert (self.outcome.code, self.outcome.stderr) == (0, ""), self.outcome.stderr or self.outcome.stdout
        (path,) = self.directory.glob("*.onnx")
        return path

    @functools.cached_property
    def operations(self) -> dict[str, int]:
        """How many nodes of each kind the file has."""
        return dict(collections.Counter(node.op_type for node in onnx.load(self.path).graph.node))

    @functools.cached_property
    def metadata(self) -> dict[str, str]:
        return {entry.key: entry.value for entry in onnx.load(self.path).metadata_props}

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.directory / "report.json").read_text())
        return loaded

    @functools.cached_property
    def golden(self) -> dict[str, NDArray[Any]]:
        with np.load(self.directory / "golden.npz") as arrays:
            return dict(arrays)

    @functools.cached_property
    def session(self) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """The file's outputs by name."""
        names = [output.name for output in self.session.get_outputs()]
        values = self.session.run(names, {"input": images.float().numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def export(directory: pathlib.Path, content: object, *flags: object, name: str = "model.pt") -> Export:
    """Exports ``directory``/``name`` in this process into ``directory``/out; saves ``content`` there first, if any."""
    directory.mkdir(parents=True, exist_ok=True)
    if content is not None:
        save(content, directory / name)
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main([name, "--out", "out", *(str(flag) for flag in flags)])
    return Export(Outcome(code, stdout.getvalue(), stderr.getvalue()), directory / "out")


def difference(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max|expected|; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def operations_of(network: Network, *, head: bool) -> dict[str, int]:
    """What the paper's plain network has: a convolution and a ReLU a block, SE's own, and the head's three."""
    blocks, excited = len(network.blocks), sum(block.se > 0 for block in network.blocks)
    counts = {
        "Conv": blocks + 2 * excited,
        "Relu": blocks + excited,
        "GlobalAveragePool": excited + head,
        "Sigmoid": excited,
        "Mul": excited,
        "Flatten": int(head),
        "Gemm": int(head),
    }
    return {kind: count for kind, count in counts.items() if count}


def assert_answers(made: Export, network: Network, state: Mapping[str, Tensor]) -> None:
    """The file gives the naive answer of ``state`` for images of the test's own, the golden vectors in float64."""
    images = network.noise()
    expected = network.answer(images, state)
    gate = max(GATE, 4 * network.loss_of_float32(images, state))
    assert gate < 1e-4
    assert difference(made.run(images)["output"], expected) < gate
    golden = made.golden
    assert (
        difference(torch.from_numpy(golden["output"]), network.answer(torch.from_numpy(golden["input"]), state)) < 1e-11
    )


def save_expectation(
    directory: pathlib.Path, images: Tensor, outputs: Tensor | Mapping[str, Tensor], name: str = "io.npz"
) -> pathlib.Path:
    """An ``--expect`` file of ``images`` and the naive answers."""
    named = outputs if isinstance(outputs, Mapping) else {"output": outputs}
    directory.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"input": images.float().numpy()} | {key: value.numpy() for key, value in named.items()}
    np.savez(directory / name, **arrays)
    return directory / name
