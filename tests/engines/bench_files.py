"""Small ONNX files with their golden vectors, and ONNX Runtime on a clock that only computing moves."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines import backends
from engines.backends import BackendEntry, Source
from engines.backends.onnx_runtime import OnnxRuntime
from tests.engines.fake_tensorrt import session_of

CLASSES, SIZE = 5, 8
IMAGE = ("N", 3, SIZE, SIZE)
FREE = ("N", 3, "height", "width")


class VirtualClock:
    """Gives seconds, which pass only where something says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now


def onnx_bytes(
    shape: Sequence[str | int] = IMAGE,
    *,
    dtype: int = TensorProto.FLOAT,
    second_input: bool = False,
    changed: float = 0.0,
    precision: str | None = "fp32",
) -> bytes:
    """Conv, Relu, mean, Gemm; ``changed`` is added to one weight, ``precision`` stands in the metadata."""
    generator = np.random.default_rng(3)
    weights = {
        "w": generator.normal(size=(4, 3, 3, 3)),
        "b": generator.normal(size=4),
        "m": generator.normal(size=(4, CLASSES)),
        "n": generator.normal(size=CLASSES),
    }
    weights["m"][2, 1] += changed
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["a"], "pool"),
        helper.make_node("Flatten", ["a"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "m", "n"], ["scores"], "gemm"),
        helper.make_node("Add" if second_input else "Identity", ["scores", "more"][: 1 + second_input], ["output"]),
    ]
    nodes.insert(0, helper.make_node("Cast", ["input"], ["image"], "cast", to=TensorProto.FLOAT))
    inputs = [helper.make_tensor_value_info("input", dtype, shape)]
    if second_input:
        inputs.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, (shape[0], CLASSES)))
    graph = helper.make_graph(
        nodes,
        "small",
        inputs,
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, (shape[0], CLASSES))],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    if precision is not None:
        helper.set_model_props(model, {"precision": precision})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def images(rows: int = 4, size: tuple[int, int] = (SIZE, SIZE), seed: int = 0) -> np.ndarray:
    """Of different means, so that the answers differ."""
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(rows, 3, *size)) + np.arange(rows)[:, None, None, None]).astype(np.float32)


def save_golden(folder: pathlib.Path, feeds: np.ndarray | None = None, **outputs: np.ndarray) -> pathlib.Path:
    """The vectors that the unchanged network of ``onnx_bytes`` answers, or other ``outputs``."""
    feeds = images() if feeds is None else feeds
    if not outputs:
        outputs = {"output": session_of(onnx_bytes(FREE)).run(None, {"input": feeds})[0].astype(np.float64)}
    path = folder / "golden.npz"
    np.savez(path, input=feeds, **outputs)
    return path


def folder_with(parent: pathlib.Path, name: str, content: bytes | None = None, *, golden: bool = True) -> pathlib.Path:
    """``<name>.onnx`` in a directory of that name; returns the file."""
    folder = parent / name
    folder.mkdir()
    path = folder / f"{name}.onnx"
    path.write_bytes(onnx_bytes() if content is None else content)
    if golden:
        save_golden(folder)
    return path


Harm = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass
class Sessions:
    """ONNX Runtime with a clock of its own.

    By file name: the ``seconds`` of a batch, or what gives them for so many images; the ``harm`` done to the output;
    and what ``fails``, by the images of the batch. Opening takes ``opening`` seconds, a session's first run ``first``
    besides.
    """

    clock: VirtualClock
    seconds: dict[str, float | Callable[[int], float]] = dataclasses.field(default_factory=dict)
    harm: dict[str, Harm] = dataclasses.field(default_factory=dict)
    fails: dict[str, Callable[[int], BaseException | None]] = dataclasses.field(default_factory=dict)
    first: float = 0.0
    opening: float = 0.0
    opened: list[str] = dataclasses.field(default_factory=list)
    closed: list[str] = dataclasses.field(default_factory=list)
    batches: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    sources: list[Source] = dataclasses.field(default_factory=list)

    def open(self, source: Source) -> TimedSession:
        """A backend of this file."""
        self.sources.append(source)
        session = TimedSession(self, source)
        self.clock.now += self.opening
        self.opened.append(source.path.name)
        return session


class TimedSession:
    """One file; see ``Sessions``."""

    def __init__(self, sessions: Sessions, source: Source) -> None:
        self._inner = OnnxRuntime(source.path, provider=source.provider, threads=source.threads)
        self._sessions, self._name, self._ran = sessions, source.path.name, False
        self.inputs, self.outputs, self.batch = self._inner.inputs, self._inner.outputs, self._inner.batch
        self.metadata = self._inner.metadata

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        sessions, rows = self._sessions, len(feeds["input"])
        sessions.batches.append((self._name, rows))
        failure = sessions.fails.get(self._name, lambda rows: None)(rows)
        if failure is not None:
            raise failure
        found = self._inner.run(feeds)
        seconds = sessions.seconds.get(self._name, 0.010)
        sessions.clock.now += seconds(rows) if callable(seconds) else seconds
        if not self._ran:
            sessions.clock.now += sessions.first
        self._ran = True
        harm = sessions.harm.get(self._name, lambda output: output)
        return {name: harm(output) for name, output in found.items()}

    def close(self) -> None:
        self._inner.close()
        self._sessions.closed.append(self._name)


def timed_sessions(monkeypatch: pytest.MonkeyPatch) -> Sessions:
    """From now on ONNX files are computed by ``Sessions``."""
    sessions = Sessions(VirtualClock())
    entries = [entry for entry in backends.BACKENDS if entry.kind != "onnx"]
    entry = BackendEntry("onnx", "ONNX Runtime", "ONNX files", sessions.open)
    monkeypatch.setattr(backends, "BACKENDS", (entry, *entries))
    return sessions
