"""The TensorRT backend on engines for images of several sizes, over the fakes of ``test_tensorrt_backend``."""

from __future__ import annotations

import numpy as np
import pytest

import engines.runner
from engines.errors import UsageError
from tests.engines.fake_machine import BATCH, CLASSES, FREE_ONNX, SIZES, assert_answers, fake_machine, images
from tests.engines.sdk_bindings import VERSIONS

LEAST, BEST, MOST = SIZES
RANGE = "outside of the engine's profile, 3x4x6 to 3x12x16"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """TensorRT for RTX; nothing may be left at the end."""
    made = fake_machine(monkeypatch, tmp_path)
    yield made
    made.assert_nothing_left()


def load(machine, **options):
    return engines.runner.load(machine.engine(free=True), **options)


def assert_run(runner, rows, size, seed=0):
    feeds = images(rows, seed, size)
    found = runner.run({"input": feeds})
    assert_answers(found, feeds, FREE_ONNX)
    assert found["features"].shape == (rows, 4, -(-size[0] // 2), -(-size[1] // 2))


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_size_and_batch_is_answered_as_onnx_runtime_does_it(monkeypatch, tmp_path, version, graph):
    machine = fake_machine(monkeypatch, tmp_path, version)
    with load(machine, graph=graph) as runner:
        assert runner.inputs[0].shape == (None, 3, None, None)
        assert [output.shape for output in runner.outputs] == [(None, CLASSES), (None, 4, None, None)]
        for seed, (rows, size) in enumerate(
            ((2, BEST), (2, LEAST), (6, MOST), (2, BEST), (1, MOST), (13, (5, 16)), (4, (12, 6)), (13, (5, 16)))
        ):
            assert_run(runner, rows, size, seed)
    machine.assert_nothing_left()


def test_memory_is_that_of_the_largest_shape_and_copies_that_of_the_shape(machine):
    with load(machine, graph=False) as runner:
        sizes = [arguments[0] for name, arguments in machine.journal.calls if name in ("cudaMalloc", "cudaMallocHost")]
        largest = BATCH[-1] * 4
        assert sizes[1:] == [largest * 3 * 12 * 16] * 2 + [largest * CLASSES] * 2 + [largest * 4 * 6 * 8] * 2
        runner.run({"input": images(3, size=(5, 7))})
        copies = [arguments[2] for name, arguments in machine.journal.calls if name == "cudaMemcpyAsync"]
        assert copies == [3 * 4 * 3 * 5 * 7, 3 * 4 * CLASSES, 3 * 4 * 4 * 3 * 4]
        after = [name for name in machine.names if name in ("cudaMalloc", "cudaMallocHost")]
        assert len(after) == len(sizes)


def test_each_size_is_a_graph_of_its_own(machine):
    with load(machine) as runner:
        for seed, size in enumerate((BEST, LEAST, BEST, MOST, LEAST, (8, 10), BEST)):
            before = len(machine.names)
            assert_run(runner, 4, size, seed)
            launched = "cudaGraphLaunch" in machine.names[before:]
            assert launched == (seed in (2, 4, 6))
        assert runner._backend.graphs == 4


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((4, 3, 3, 8), f"input: 3x3x8 is {RANGE}"),
        ((4, 3, 8, 5), f"input: 3x8x5 is {RANGE}"),
        ((4, 3, 13, 16), f"input: 3x13x16 is {RANGE}"),
        ((9, 3, 12, 17), f"input: 3x12x17 is {RANGE}"),
        ((4, 1, 8, 8), "input: float32 (4, 1, 8, 8); expected input float32 (N, 3, ?, ?)"),
        ((4, 3, 8), "input: float32 (4, 3, 8); expected input float32 (N, 3, ?, ?)"),
        ((4, 3, 8, 0), "input: float32 (4, 3, 8, 0); expected input float32 (N, 3, ?, ?)"),
    ],
)
def test_a_size_outside_of_the_profile_is_refused_by_the_name_of_the_range(machine, shape, said):
    with load(machine) as runner:
        before = len(machine.names)
        with pytest.raises(UsageError) as raised:
            runner.run({"input": np.ones(shape, np.float32)})
        assert str(raised.value) == said
        assert machine.names[before:] == []
        assert_run(runner, 4, BEST)  # and it still works


# --- device arrays


class Interface:
    """An array with a ``__cuda_array_interface__``."""

    def __init__(self, address, shape):
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": shape, "typestr": "<f4", "version": 3, "strides": None, "stream": None,
        }  # fmt: skip


@pytest.fixture
def device(machine):
    """``device(rows, size)``: images on the device and room for the outputs; freed at the end."""
    made = []

    def arrays(rows, size):
        feeds = images(rows, 0, size)
        shapes = {"input": feeds.shape, "output": (rows, CLASSES), "features": (rows, 4, *(-(-s // 2) for s in size))}
        blank = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()} | {"input": feeds}
        places = {name: machine.cuda.device_array(array) for name, array in blank.items()}
        made.extend(places.values())
        return feeds, places, {name: Interface(places[name], shape) for name, shape in shapes.items()}

    yield arrays
    for address in made:
        machine.cuda._cudaFree(address)


def enqueued(machine, runner, arrays, **others):
    stream = machine.cuda.new_stream()
    outputs = {name: others.get(name, arrays[name]) for name in ("output", "features")}
    try:
        runner.enqueue({"input": arrays["input"]}, outputs, stream)
        machine.cuda._cudaStreamSynchronize(stream)
    finally:
        machine.cuda._cudaStreamDestroy(stream)


@pytest.mark.parametrize("size", [LEAST, BEST, MOST, (11, 7)])
def test_device_arrays_of_every_size_are_used_where_they_lie(machine, device, size):
    feeds, places, arrays = device(4, size)
    with load(machine) as runner:
        enqueued(machine, runner, arrays)
        shapes = {"output": (4, CLASSES), "features": (4, 4, *(-(-s // 2) for s in size))}
        found = {name: machine.cuda.host_array(places[name], np.float32, shape) for name, shape in shapes.items()}
        assert_answers(found, feeds, FREE_ONNX)


def test_device_arrays_of_sizes_that_do_not_fit_are_refused_before_anything_is_enqueued(machine, device):
    _, _, large = device(4, (12, 17))
    _, _, flat = device(4, BEST)
    flat["input"] = Interface(flat["input"].__cuda_array_interface__["data"][0], (4, 192))
    _, _, fitting = device(4, BEST)
    unusable = "this array cannot be used on the GPU: its shape is"
    with load(machine) as runner:
        for arrays, others, said in (
            (large, {}, f"input: 3x12x17 is {RANGE}"),
            (flat, {}, f"input: {unusable} (4, 192), the engine's is (4, 3, 12, 16)"),
            (
                fitting,
                {"features": large["features"]},
                f"features: {unusable} (4, 4, 6, 9), the engine's is (4, 4, 4, 4)",
            ),
        ):
            with pytest.raises(UsageError) as raised:
                enqueued(machine, runner, arrays, **others)
            assert str(raised.value) == said
        assert "execute_async_v3" not in machine.names
        enqueued(machine, runner, fitting)
