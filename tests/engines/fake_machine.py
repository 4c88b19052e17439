"""A machine with a GPU and an SDK, pretended: the fakes in the places of the real modules, and engines for them."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import pathlib
import sys
import tempfile
from collections.abc import Callable

import cuda.bindings
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.backends import tensorrt as backend_module
from engines.errors import ReportedError
from engines.manifest import Manifest, sidecar_path
from tests.engines.fake_cuda import FakeCuda, Journal
from tests.engines.fake_nvml import FakeNvml
from tests.engines.fake_tensorrt import FakeTensorRT, engine_bytes, session_of
from tests.engines.sdk_bindings import RTX, bindings_of

BATCH = (2, 4, 6)
CLASSES, SIZE = 5, 8
INPUT = ("N", 3, SIZE, SIZE)
FREE_INPUT, FREE_FEATURES = ("N", 3, "height", "width"), ("N", 4, "features_height", "features_width")
SIZES = ((4, 6), (8, 8), (12, 16))


def small_onnx(*, free: bool = False) -> bytes:
    """Conv, Relu, mean, Gemm and a second output; random weights, so that no row or channel equals another.

    With ``free``, images are of any size, and the second output is a feature map of half that size.
    """
    generator = np.random.default_rng(3)
    weights = {
        "w": generator.normal(size=(4, 3, 3, 3)),
        "b": generator.normal(size=4),
        "m": generator.normal(size=(4, CLASSES)),
    }
    relu, mean = ("features", "mean") if free else ("r", "features")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "w", "b"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2] if free else [1, 1]),
            helper.make_node("Relu", ["c"], [relu]),
            helper.make_node("ReduceMean", [relu], [mean], axes=[2, 3], keepdims=0),
            helper.make_node("MatMul", [mean, "m"], ["output"]),
        ],
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, FREE_INPUT if free else INPUT)],
        [
            helper.make_tensor_value_info("output", TensorProto.FLOAT, ("N", CLASSES)),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, FREE_FEATURES if free else ("N", 4)),
        ],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


ONNX, FREE_ONNX = small_onnx(), small_onnx(free=True)


def images(rows: int, seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 3, *size)).astype(np.float32)


def answers(feeds: np.ndarray, onnx: bytes = ONNX) -> dict[str, np.ndarray]:
    """ONNX Runtime's own."""
    session = session_of(onnx)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": feeds}), strict=True))


def assert_answers(found: dict[str, np.ndarray], feeds: np.ndarray, onnx: bytes = ONNX) -> None:
    expected = answers(feeds, onnx)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)


@dataclasses.dataclass
class FakeMachine:
    """The fakes of one test, and the directory of its engines."""

    sdk: str
    version: str
    journal: Journal
    cuda: FakeCuda
    trt: FakeTensorRT
    nvml: FakeNvml
    folder: pathlib.Path

    @property
    def names(self) -> list[str]:
        return self.journal.names()

    def engine(
        self,
        name: str = "small.fp16.engine",
        *,
        batch: tuple[int, int, int] = BATCH,
        free: bool = False,
        version: str | None = None,
        cards: tuple[int, ...] = (80, 86, 89, 120, 121),
        seconds: tuple[float, float] = (0.0, 0.0),
        **changes: object,
    ) -> pathlib.Path:
        """An engine with its sidecar; ``free`` for images of SIZES, ``seconds`` for a batch and for each image."""
        path = self.folder / name
        onnx = FREE_ONNX if free else ONNX
        sizes = SIZES if free else ((SIZE, SIZE),) * 3
        profile = [(rows, 3, *size) for rows, size in zip(batch, sizes, strict=True)]
        content = engine_bytes(onnx, self.sdk, version or self.version, profile, seconds=seconds)
        path.write_bytes(content)
        manifest = Manifest(
            name=path.name,
            precision="fp16",
            sha256={
                "checkpoint": "0" * 64,
                "onnx": hashlib.sha256(onnx).hexdigest(),
                "engine": hashlib.sha256(content).hexdigest(),
            },
            sdk={"name": self.sdk, "version": version or self.version},
            compute_capabilities=cards,
            inputs=({"name": "input", "dtype": "float32", "shape": list(FREE_INPUT if free else INPUT)},),
            outputs=(
                {"name": "output", "dtype": "float32", "shape": ["N", CLASSES]},
                {"name": "features", "dtype": "float32", "shape": list(FREE_FEATURES) if free else ["N", 4]},
            ),
            profile={"input": tuple(profile)},
            preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3, "size": [SIZE, SIZE], "channels": 3},
            assumptions={},
            tolerance=5e-3,
            audit={"audited": False, "line": "not audited", "problems": []},
            golden="golden.npz",
        )
        sidecar_path(path).write_text(dataclasses.replace(manifest, **changes).to_json())
        return path

    def assert_nothing_left(self) -> None:
        """Every allocation freed, every object of the SDK gone, and nothing done that a real GPU would punish."""
        if self.trt._alive:
            gc.collect()
        assert self.cuda.live() == {}
        assert [type(thing).__name__ for thing in self.trt._alive] == []
        assert self.nvml.open == 0
        assert self.journal.violations == []


def fake_machine(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, version: str = RTX) -> FakeMachine:
    """Puts the fakes in the places of the SDK, of cuda-bindings, of pynvml and of the driver."""
    sdk = "tensorrt_rtx" if version == RTX else "tensorrt"
    journal = Journal()
    fake_cuda = FakeCuda(journal)
    trt = FakeTensorRT(bindings_of(version), journal, fake_cuda)
    nvml = FakeNvml(fake_cuda)
    monkeypatch.setitem(sys.modules, sdk, trt)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(cuda.bindings, "runtime", fake_cuda)
    monkeypatch.setattr(backend_module, "gpu_compute_capability", lambda: 86)
    return FakeMachine(sdk, version, journal, fake_cuda, trt, nvml, folder)


Life = Callable[[FakeMachine, pathlib.Path], None]
"""Everything that is done with an engine, from its opening to its end."""


def calls_of(life: Life, version: str) -> list[str]:
    """The names of the calls that ``life`` makes where none fails."""
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        machine = fake_machine(monkeypatch, folder, version)
        life(machine, machine.engine())
        machine.assert_nothing_left()
        return machine.names


def failure_of(life: Life, machine: FakeMachine, path: pathlib.Path) -> ReportedError | None:
    """What a user is told, without the frames that keep objects of the SDK alive; anything else comes out of it."""
    try:
        life(machine, path)
    except ReportedError as error:
        return error.with_traceback(None)
    return None
