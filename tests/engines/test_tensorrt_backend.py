"""The TensorRT backend over the fakes: its answers, what it calls in which order, and that it frees everything.

Nothing here ran on a GPU. The fakes have the names and signatures of the real bindings, ONNX Runtime does the
arithmetic, and whatever a GPU would punish (``tests.engines.fake_cuda``) is a failure.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading

import cuda.bindings
import numpy as np
import pytest
import tensorrt_rtx as real

import engines.runner
from engines.backends import recordings
from engines.backends import tensorrt as backend_module
from engines.errors import DeviceFailed, InputRejected, SdkMissing, UsageError
from engines.manifest import sidecar_path
from engines.runtime_cache import RuntimeCacheFile
from tests.engines.fake_cuda import CAPABILITIES, ERROR
from tests.engines.fake_machine import (
    BATCH,
    CLASSES,
    SIZE,
    answers,
    assert_answers,
    calls_of,
    failure_of,
    fake_machine,
    images,
)
from tests.engines.fake_tensorrt import EngineState
from tests.engines.sdk_bindings import FULL, RTX, VERSIONS

ROW = 3 * SIZE * SIZE * 4  # bytes


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """TensorRT for RTX; nothing may be left at the end."""
    made = fake_machine(monkeypatch, tmp_path)
    yield made
    made.assert_nothing_left()


@pytest.fixture
def overrides(monkeypatch):
    """What the engine says of itself."""
    changed = {}
    monkeypatch.setattr(EngineState, "overrides", changed)
    return changed


def load(machine, path=None, **options):
    return engines.runner.load(path or machine.engine(), **options)


def device_arrays(machine, feeds):
    """The images on the device, room for the outputs, and the addresses."""
    rows = len(feeds)
    places = {
        "input": machine.cuda.device_array(feeds),
        "output": machine.cuda.device_array(np.full((rows, CLASSES), np.nan, np.float32)),
        "features": machine.cuda.device_array(np.full((rows, 4), np.nan, np.float32)),
    }
    shapes = {"input": feeds.shape, "output": (rows, CLASSES), "features": (rows, 4)}
    return places, {name: Interface(address, shapes[name]) for name, address in places.items()}


class Interface:
    """An array with a ``__cuda_array_interface__`` alone, as PyCUDA's."""

    def __init__(self, address, shape, typestr="<f4", stream=None, **changes):
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": shape, "typestr": typestr, "version": 3, "strides": None,
            "stream": stream, **changes,
        }  # fmt: skip


def outputs_of(machine, places, rows):
    shapes = {"output": (rows, CLASSES), "features": (rows, 4)}
    return {name: machine.cuda.host_array(places[name], np.float32, shape) for name, shape in shapes.items()}


def split_arrays(arrays):
    return {"input": arrays["input"]}, {name: arrays[name] for name in ("output", "features")}


# --- answers


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_batch_is_answered_as_onnx_runtime_does_it(monkeypatch, tmp_path, version, graph):
    machine = fake_machine(monkeypatch, tmp_path, version)
    with load(machine, graph=graph) as runner:
        assert runner.batch == (BATCH[0], BATCH[-1])
        assert [(d.name, d.dtype, d.shape) for d in runner.inputs] == [("input", "float32", (None, 3, SIZE, SIZE))]
        assert [(d.name, d.shape) for d in runner.outputs] == [("output", (None, CLASSES)), ("features", (None, 4))]
        for seed, rows in enumerate((1, 2, 3, 6, 7, 13, 6, 2, 12)):
            feeds = images(rows, seed)
            assert_answers(runner.run({"input": feeds}), feeds)
    machine.assert_nothing_left()


def test_two_engines_at_once_do_not_disturb_each_other(machine):
    first, second = images(4, 1), images(4, 2)
    with load(machine) as one, load(machine, machine.engine("other.fp16.engine")) as two:
        for _ in range(3):
            assert_answers(one.run({"input": first}), first)
            assert_answers(two.run({"input": second}), second)


def test_outputs_are_the_callers_own(machine):
    with load(machine) as runner:
        first = runner.run({"input": images(4, 1)})
        kept = {name: array.copy() for name, array in first.items()}
        runner.run({"input": images(4, 2)})
        for name, array in first.items():
            assert array.flags.owndata
            assert array.flags.writeable
            np.testing.assert_array_equal(array, kept[name])


def test_threads_take_turns(machine):
    feeds = {seed: images(4, seed) for seed in range(4)}
    wrong = []

    def work(seed):
        for _ in range(5):
            try:
                assert_answers(backend.run({"input": feeds[seed]}), feeds[seed])
            except BaseException as error:
                wrong.append(error)

    runner = load(machine)
    backend = runner._backend
    threads = [threading.Thread(target=work, args=(seed,)) for seed in feeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runner.close()
    assert wrong == []


# --- the order of calls


def test_nothing_is_deserialized_before_everything_is_checked_and_all_is_freed_in_reverse(machine):
    load(machine, graph=False).close()
    names = machine.names
    assert names[:6] == [
        "cudaDeviceGetAttribute", "cudaDeviceGetAttribute", "cudaGetDevice", "cudaSetDevice", "Runtime",
        "deserialize_cuda_engine",
    ]  # fmt: skip
    taken = [name for name in names if name.startswith(("cudaMalloc", "cudaStreamCreate", "cudaEventCreate"))]
    freed = [name for name in names if name.startswith("cudaFree") or name.endswith("Destroy")]
    assert taken == [
        "cudaMalloc", "cudaEventCreateWithFlags", "cudaEventCreateWithFlags", "cudaStreamCreateWithFlags",
        *["cudaMalloc", "cudaMallocHost"] * 3,
    ]  # fmt: skip
    assert freed == [
        *["cudaFreeHost", "cudaFree"] * 3, "cudaStreamDestroy", "cudaEventDestroy", "cudaEventDestroy", "cudaFree"
    ]  # fmt: skip
    assert machine.trt._destroyed == ["IExecutionContext", "IRuntimeConfig", "IRuntimeCache", "ICudaEngine", "Runtime"]


def test_memory_is_that_of_the_largest_batch_and_copies_that_of_the_batch(machine):
    with load(machine, graph=False) as runner:
        sizes = [arguments[0] for name, arguments in machine.journal.calls if name in ("cudaMalloc", "cudaMallocHost")]
        largest = BATCH[-1]
        assert sizes[1:] == [largest * ROW] * 2 + [largest * CLASSES * 4] * 2 + [largest * 4 * 4] * 2
        runner.run({"input": images(3)})
        copies = [arguments[2] for name, arguments in machine.journal.calls if name == "cudaMemcpyAsync"]
        assert copies == [3 * ROW, 3 * CLASSES * 4, 3 * 4 * 4]
        runner.run({"input": images(5)})
        after = [name for name in machine.names if name in ("cudaMalloc", "cudaMallocHost")]
        assert len(after) == len(sizes)


def test_a_plain_run_is_copies_execution_copies_and_one_synchronisation(machine):
    with load(machine, graph=False) as runner:
        before = len(machine.journal.calls)
        runner.run({"input": images(4)})
        calls = machine.journal.calls[before:]
    assert [name for name, _ in calls] == [
        "cudaGetDevice", "cudaSetDevice", "set_tensor_address", "set_tensor_address", "set_tensor_address",
        "set_input_shape", "get_tensor_shape", "get_tensor_shape",
        "cudaMemcpyAsync", "execute_async_v3", "cudaMemcpyAsync", "cudaMemcpyAsync", "cudaStreamSynchronize",
    ]  # fmt: skip
    addresses = {arguments[0]: arguments[1] for name, arguments in calls if name == "set_tensor_address"}
    copies = [arguments for name, arguments in calls if name == "cudaMemcpyAsync"]
    assert copies[0][0] == addresses["input"]
    assert [copy[1] for copy in copies[1:]] == [addresses["output"], addresses["features"]]
    handles = {arguments[-1] for name, arguments in calls if name in ("cudaMemcpyAsync", "execute_async_v3")}
    assert len(handles) == 1
    assert 0 not in handles


def test_leaving_out_the_synchronisation_would_be_seen(machine, monkeypatch):
    """The negative twin: the fake gives NaN to whoever does not wait."""
    with load(machine, graph=False) as runner:
        monkeypatch.setattr(runner._backend._staging.stream, "synchronize", lambda: None)
        assert np.isnan(runner.run({"input": images(4)})["output"]).all()
        monkeypatch.undo()
        feeds = images(4)
        assert_answers(runner.run({"input": feeds}), feeds)


# --- graphs


def test_a_shape_is_recorded_after_its_first_run_and_launched_from_then_on(machine):
    with load(machine) as runner:
        for seed in range(3):
            before = len(machine.names)
            feeds = images(4, seed)
            assert_answers(runner.run({"input": feeds}), feeds)
            names = machine.names[before:]
            assert names.count("cudaStreamBeginCapture") == (seed == 0)
            if seed:
                assert names == ["cudaGetDevice", "cudaSetDevice", "cudaGraphLaunch", "cudaStreamSynchronize"]
        assert runner._backend.graphs == 1
        for seed, rows in enumerate((5, 4, 5, 2, 4)):
            feeds = images(rows, 10 + seed)
            assert_answers(runner.run({"input": feeds}), feeds)
        assert runner._backend.graphs == 3
        assert machine.names.count("cudaStreamBeginCapture") == 3
    assert machine.names.count("cudaGraphExecDestroy") == 3


def test_without_graph_nothing_is_recorded(machine):
    with load(machine, graph=False) as runner:
        for _ in range(3):
            runner.run({"input": images(4)})
        assert runner._backend.graphs == 0
    assert "cudaStreamBeginCapture" not in machine.names


def test_graphs_and_plain_runs_give_the_same_bits(machine):
    feeds = images(6)
    with load(machine) as recorded, load(machine, graph=False) as plain:
        for _ in range(2):
            first, second = recorded.run({"input": feeds}), plain.run({"input": feeds})
            for name, array in first.items():
                np.testing.assert_array_equal(array, second[name])


RECORDING_FAILS = ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "is_stream_capturable"]


@pytest.mark.parametrize("name", RECORDING_FAILS)
def test_a_shape_that_cannot_be_recorded_runs_plainly_and_is_not_tried_again(machine, name):
    machine.journal.fail_names = {name}
    with load(machine) as runner:
        for seed in range(3):
            feeds = images(4, seed)
            assert_answers(runner.run({"input": feeds}), feeds)
        assert runner._backend.graphs == 0
        assert machine.names.count(name) == 1
        machine.journal.fail_names = set()
        for seed in range(3):
            feeds = images(5, seed)
            assert_answers(runner.run({"input": feeds}), feeds)
        assert runner._backend.graphs == 1
        assert machine.cuda.error == ERROR.cudaSuccess


def test_an_engine_that_says_it_cannot_be_recorded_is_not(machine, overrides):
    overrides["capturable"] = False
    with load(machine) as runner:
        for seed in range(2):
            feeds = images(4, seed)
            assert_answers(runner.run({"input": feeds}), feeds)
        assert runner._backend.graphs == 0
    assert "cudaStreamBeginCapture" not in machine.names


def test_only_so_many_shapes_are_recorded(machine, monkeypatch):
    monkeypatch.setattr(recordings, "MOST_GRAPHS", 2)
    with load(machine) as runner:
        for rows in (2, 3, 4, 5, 4, 5):
            feeds = images(rows, rows)
            assert_answers(runner.run({"input": feeds}), feeds)
        assert runner._backend.graphs == 2
    assert machine.names.count("cudaStreamBeginCapture") == 2


def test_a_context_that_is_changed_after_its_recording_would_be_seen(machine):
    """The negative twin of one context for each graph."""
    with load(machine) as runner:
        runner.run({"input": images(4)})
        recorded = next(iter(runner._backend._recordings._made.values()))
        recorded.context.set_input_shape("input", (5, 3, SIZE, SIZE))
    assert machine.journal.violations == ["set_input_shape on a context whose graph may still be launched"]
    machine.journal.violations.clear()


# --- device arrays on the caller's stream


@pytest.mark.parametrize("rows", [2, 4, 6])
@pytest.mark.parametrize("version", VERSIONS)
def test_device_arrays_are_used_where_they_lie(monkeypatch, tmp_path, version, rows):
    machine = fake_machine(monkeypatch, tmp_path, version)
    feeds = images(rows)
    stream = machine.cuda.new_stream()
    places, arrays = device_arrays(machine, feeds)
    with load(machine) as runner:
        before = len(machine.journal.calls)
        runner.enqueue(*split_arrays(arrays), stream)
        calls = machine.journal.calls[before:]
        names = [name for name, _ in calls]
        assert "cudaMemcpyAsync" not in names
        assert "cudaStreamSynchronize" not in names
        assert {arguments for name, arguments in calls if name == "set_tensor_address"} == set(places.items())
        assert [arguments for name, arguments in calls if name == "execute_async_v3"] == [(stream,)]
        assert np.isnan(outputs_of(machine, places, rows)["output"]).all()  # not done yet: nobody waited
        machine.cuda._cudaStreamSynchronize(stream)
        assert_answers(outputs_of(machine, places, rows), feeds)
    release(machine, places, stream)
    machine.assert_nothing_left()


def release(machine, places, *streams):
    for address in places.values():
        machine.cuda._cudaFree(address)
    for stream in streams:
        machine.cuda._cudaStreamDestroy(stream)


def test_runs_and_streams_that_share_the_activations_wait_for_each_other(machine):
    """Two streams of the caller's and a run between; only the last is synchronised."""
    one, two = machine.cuda.new_stream(), machine.cuda.new_stream()
    first, second, third = images(4, 1), images(6, 2), images(4, 3)
    first_places, first_arrays = device_arrays(machine, first)
    second_places, second_arrays = device_arrays(machine, second)
    with load(machine) as runner:
        runner.enqueue(*split_arrays(first_arrays), one)
        runner.enqueue(*split_arrays(second_arrays), two)
        assert_answers(runner.run({"input": third}), third)
        assert_answers(outputs_of(machine, first_places, 4), first)
        assert_answers(outputs_of(machine, second_places, 6), second)
        runner.enqueue(*split_arrays(first_arrays), two)
    assert machine.cuda.streams[two].queue == []  # closing waited
    release(machine, first_places, one)
    release(machine, second_places, two)


def test_two_streams_at_the_same_activations_would_be_seen(machine, monkeypatch):
    """The negative twin: with the waiting left out, the fake notes it."""
    stream = machine.cuda.new_stream()
    places, arrays = device_arrays(machine, images(4))
    with load(machine, graph=False) as runner:
        monkeypatch.setattr(runner._backend._done, "hold_back", lambda stream: None)
        runner.enqueue(*split_arrays(arrays), stream)
        runner.run({"input": images(4)})
        machine.cuda._cudaStreamSynchronize(stream)
    assert any("two streams use the memory" in violation for violation in machine.journal.violations)
    machine.journal.violations.clear()
    release(machine, places, stream)


def test_what_another_stream_still_computes_is_waited_for(machine):
    producer, consumer = machine.cuda.new_stream(), machine.cuda.new_stream()
    feeds = images(4)
    places, arrays = device_arrays(machine, np.full_like(feeds, np.nan))
    pinned = machine.cuda._cudaMallocHost(feeds.nbytes)[1]
    ctypes.memmove(pinned, feeds.ctypes.data, feeds.nbytes)
    copy = cuda.bindings.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    machine.cuda._cudaMemcpyAsync(places["input"], pinned, feeds.nbytes, copy, producer)
    arrays["input"] = Interface(places["input"], feeds.shape, stream=producer)
    with load(machine) as runner:
        runner.enqueue(*split_arrays(arrays), consumer)
        machine.cuda._cudaStreamSynchronize(consumer)
        assert_answers(outputs_of(machine, places, 4), feeds)
    machine.cuda._cudaFreeHost(pinned)
    release(machine, places, producer, consumer)


class Stream:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


@pytest.mark.parametrize("attribute", ["cuda_stream", "ptr", "handle"])
def test_streams_of_other_libraries_are_taken(machine, attribute):
    stream = machine.cuda.new_stream()
    places, arrays = device_arrays(machine, images(4))
    with load(machine) as runner:
        runner.enqueue(*split_arrays(arrays), Stream(**{attribute: stream}))
        machine.cuda._cudaStreamSynchronize(stream)
        assert_answers(outputs_of(machine, places, 4), images(4))
    release(machine, places, stream)


ENQUEUE_REFUSALS = {
    "batch above": (
        lambda a, p: a.update(input=Interface(p["input"], (7, 3, SIZE, SIZE))),
        "input: a batch of 7 is outside of the engine's profile, 2 to 6",
    ),
    "batch below": (
        lambda a, p: a.update(input=Interface(p["input"], (1, 3, SIZE, SIZE))),
        "input: a batch of 1 is outside of the engine's profile, 2 to 6",
    ),
    "no dimensions": (
        lambda a, p: a.update(input=Interface(p["input"], ())),
        "input: a batch of 0 is outside of the engine's profile, 2 to 6",
    ),
    "shape": (
        lambda a, p: a.update(input=Interface(p["input"], (4, 3, SIZE, 7))),
        "input: this array cannot be used on the GPU: its shape is (4, 3, 8, 7), the engine's is (4, 3, 8, 8)",
    ),
    "dimensions": (
        lambda a, p: a.update(input=Interface(p["input"], (4, 3 * SIZE * SIZE))),
        "input: this array cannot be used on the GPU: its shape is (4, 192), the engine's is (4, 3, 8, 8)",
    ),
    "dtype": (
        lambda a, p: a.update(input=Interface(p["input"], (4, 3, SIZE, SIZE), "<f2")),
        "input: this array cannot be used on the GPU: its dtype is float16, the engine's is float32",
    ),
    "output shape": (
        lambda a, p: a.update(output=Interface(p["output"], (5, CLASSES))),
        "output: this array cannot be used on the GPU: its shape is (5, 5), the engine's is (4, 5)",
    ),
    "read-only output": (
        lambda a, p: a.update(output=Interface(p["output"], (4, CLASSES), data=(p["output"], True))),
        "output: this array cannot be used on the GPU: it is read-only, and an output is written",
    ),
    "no memory": (
        lambda a, p: a.update(input=Interface(0, (4, 3, SIZE, SIZE))),
        "input: this array cannot be used on the GPU: it has no memory",
    ),
    "missing": (lambda a, p: a.pop("features"), "device arrays were given for output, the engine has output, features"),
    "numpy": (
        lambda a, p: a.update(input=images(4)),
        "input: this array cannot be used on the GPU: it is on a device of DLPack's type 1, not on a CUDA GPU (2); "
        "move it there, or use run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENQUEUE_REFUSALS)
def test_device_arrays_that_do_not_fit_are_refused_before_anything_is_enqueued(machine, case):
    change, message = ENQUEUE_REFUSALS[case]
    stream = machine.cuda.new_stream()
    places, arrays = device_arrays(machine, images(4))
    whole = dict(arrays)
    change(arrays, places)
    with load(machine) as runner:
        given = [
            {name: arrays[name] for name in names if name in arrays} for names in (["input"], ["output", "features"])
        ]
        with pytest.raises(UsageError) as raised:
            runner.enqueue(*given, stream)
        assert str(raised.value) == message
        assert "execute_async_v3" not in machine.names
        runner.enqueue(*split_arrays(whole), stream)  # and it still works
        machine.cuda._cudaStreamSynchronize(stream)
        assert_answers(outputs_of(machine, places, 4), images(4))
    release(machine, places, stream)


@pytest.mark.parametrize("stream", ["a stream", True, -1, Stream(handle=None), Stream(), None, 1.5])
def test_what_is_no_stream_is_refused(machine, stream):
    with load(machine) as runner, pytest.raises(UsageError, match=r"^stream: "):
        runner.enqueue({}, {}, stream)


def test_a_stream_that_records_a_graph_is_refused(machine):
    stream = machine.cuda.new_stream()
    places, arrays = device_arrays(machine, images(4))
    mode = cuda.bindings.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
    with load(machine) as runner:
        machine.cuda._cudaStreamBeginCapture(stream, mode)
        with pytest.raises(UsageError, match="it is recording a CUDA graph"):
            runner.enqueue(*split_arrays(arrays), stream)
        _, graph = machine.cuda._cudaStreamEndCapture(stream)
        machine.cuda._cudaGraphDestroy(graph)
    release(machine, places, stream)


# --- the device


def test_another_gpu_is_used_and_the_callers_is_put_back(machine):
    with load(machine, device=1) as runner:
        assert machine.cuda.current == 0
        assert {block.device for block in machine.cuda.blocks.values()} == {1}
        for seed in range(3):
            feeds = images(4, seed)
            assert_answers(runner.run({"input": feeds}), feeds)
            assert machine.cuda.current == 0
    assert machine.cuda.current == 0
    assert [path.name for path in machine.folder.glob("*.cache")] == ["small.fp16.engine.sm89.cache"]


def test_a_thread_whose_device_is_another_computes_on_the_engines(machine):
    with load(machine) as runner:
        machine.cuda.current = 1
        feeds = images(4)
        assert_answers(runner.run({"input": feeds}), feeds)
        assert machine.cuda.current == 1


def test_a_gpu_that_is_not_there_is_named(machine):
    with pytest.raises(DeviceFailed) as raised:
        load(machine, device=5)
    assert str(raised.value) == (
        "cudaDeviceGetAttribute failed: cudaErrorInvalidDevice (invalid device ordinal); check with nvidia-smi that "
        "this process may see that GPU"
    )


# --- failures


def life(machine, path):
    """A normal life: loaded, a shape run twice, another, device arrays, closed."""
    feeds = images(4)
    stream = machine.cuda.new_stream()
    places, arrays = device_arrays(machine, feeds)
    try:
        with load(machine, path) as runner:
            for rows in (4, 4, 3):
                found = runner.run({"input": feeds[:rows]})
                assert_answers(found, feeds[:rows])
            runner.enqueue(*split_arrays(arrays), stream)
            machine.cuda._cudaStreamSynchronize(stream)
            assert_answers(outputs_of(machine, places, 4), feeds)
    finally:
        release(machine, places, stream)


MAY_FAIL_UNSEEN = {
    *RECORDING_FAILS, "cudaGraphDestroy", "cudaGetLastError", "create_runtime_cache", "deserialize",
    "set_runtime_cache", "serialize",
}  # fmt: skip
"""Recording and caching save time and change nothing; a template of a graph is freed as well as it can be."""


@pytest.mark.parametrize("raises", [False, True], ids=["refuses", "raises"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_may_fail_and_everything_is_freed(monkeypatch, tmp_path, version, raises):
    names = calls_of(life, version)
    assert len(names) > 100
    reported = []
    for position, name in enumerate(names):
        if raises and name.startswith("cuda"):
            continue
        machine = fake_machine(monkeypatch, tmp_path, version)
        for cache in tmp_path.glob("*.cache"):
            cache.unlink()
        path = machine.engine()
        machine.trt._raises = raises
        machine.journal.fail_at = position
        where = f"call {position}, {name}"
        error = failure_of(life, machine, path)
        if error is None:
            # The last cudaGetDevice is that of close, which asks for the caller's device to put it back.
            last_device = len(names) - 1 - names[::-1].index("cudaGetDevice")
            unseen = name in MAY_FAIL_UNSEEN or during_recording(names, position) or position == last_device
            assert unseen, f"{where}: failed and nobody said so"
        else:
            reported.append(name)
            assert (type(error), error.exit_code) == (DeviceFailed, 4), where
            assert name in str(error), f"{where}: {error}"
            assert "\n" not in str(error)
            assert ("planted" in str(error)) == (not name.startswith("cuda")), f"{where}: {error}"
        del error
        assert len(machine.names) > position
        machine.assert_nothing_left()
    assert {"deserialize_cuda_engine", "execute_async_v3", "set_tensor_address", "create_execution_context"} <= set(
        reported
    )
    assert raises or {"cudaMalloc", "cudaMallocHost", "cudaStreamSynchronize", "cudaFree", "cudaGraphLaunch"} <= set(
        reported
    )


def during_recording(names, position):
    """Between the synchronisation of a shape's first run and the end of its recording."""
    starts = [index for index, name in enumerate(names) if name == "create_execution_context"][1:]
    ends = [index for index, name in enumerate(names) if name == "cudaGraphDestroy"]
    return any(start <= position <= end for start, end in zip(starts, ends, strict=True))


def test_after_a_failed_run_the_next_one_answers_rightly(machine):
    with load(machine, graph=False) as runner:
        machine.journal.fail_names = {"execute_async_v3"}
        with pytest.raises(DeviceFailed) as raised:
            runner.run({"input": images(4, 1)})
        engine = machine.folder / "small.fp16.engine"
        assert (
            str(raised.value)
            == f"{engine}: TensorRT for RTX: execute_async_v3 failed: IFake::execute_async_v3: planted"
        )
        machine.journal.fail_names = set()
        feeds = images(4, 2)
        assert_answers(runner.run({"input": feeds}), feeds)


def test_when_freeing_fails_as_well_the_first_error_is_the_one_that_is_told(machine):
    def work():
        with load(machine) as runner:
            machine.journal.fail_names = {"execute_async_v3", "cudaFree", "cudaFreeHost"}
            runner.run({"input": images(4)})

    with pytest.raises(DeviceFailed, match="execute_async_v3 failed"):
        work()


def test_when_only_freeing_fails_that_is_told(machine):
    runner = load(machine)
    machine.journal.fail_names = {"cudaFreeHost"}
    with pytest.raises(DeviceFailed, match=r"^cudaFreeHost failed: cudaErrorUnknown "):
        runner.close()


def test_an_interruption_leaves_nothing_behind(machine, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with load(machine) as runner:
        monkeypatch.setattr(runner._backend._staging.stream, "copy_to_host", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.run({"input": images(4)})
        assert all(stream.queue == [] for stream in machine.cuda.streams.values())


def test_an_interruption_while_loading_leaves_nothing_behind(machine, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(backend_module, "Staging", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(machine)


def test_a_closed_engine_says_so_and_closing_twice_is_nothing(machine):
    runner = load(machine)
    backend = runner._backend
    runner.close()
    calls = len(machine.names)
    runner.close()
    backend.close()
    assert len(machine.names) == calls
    with pytest.raises(UsageError, match="closed"):
        backend.run({"input": images(4)})
    with pytest.raises(UsageError, match="closed"):
        backend.enqueue({}, {}, 0)


# --- refusals before anything is deserialized


def no_gpu(machine, monkeypatch):
    monkeypatch.setattr(backend_module, "gpu_compute_capability", lambda: None)
    return machine.engine()


def other_version(machine, monkeypatch):
    machine.trt.__version__ = "9.9.9.9"
    return machine.engine()


def tampered(machine, monkeypatch):
    path = machine.engine()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return path


def replaced_after_the_check(machine, monkeypatch):
    path = machine.engine()
    original = backend_module.check_sdk_installed

    def replace(*arguments):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        return original(*arguments)

    monkeypatch.setattr(backend_module, "check_sdk_installed", replace)
    return path


def no_sidecar(machine, monkeypatch):
    path = machine.engine()
    sidecar_path(path).unlink()
    return path


def other_card(machine, monkeypatch):
    monkeypatch.setitem(CAPABILITIES, 0, (7, 5))
    return machine.engine()


def no_cuda_bindings(machine, monkeypatch):
    monkeypatch.delattr(cuda.bindings, "runtime")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    return machine.engine()


REFUSALS = {
    "no GPU": (no_gpu, SdkMissing, "no GPU answers here"),
    "another version": (other_version, SdkMissing, "made by TensorRT for RTX 1.7.1.116, and 9.9.9.9 is installed here"),
    "tampered": (tampered, InputRejected, "its SHA-256 is "),
    "replaced after the check": (
        replaced_after_the_check,
        InputRejected,
        "was replaced while it was loaded; load it again",
    ),
    "no sidecar": (no_sidecar, InputRejected, "its sidecar small.fp16.engine.json is missing"),
    "another card": (other_card, SdkMissing, "and this GPU is sm75; python -m engines build small.fp16.onnx"),
    "no cuda-bindings": (no_cuda_bindings, SdkMissing, "cuda-bindings "),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_must_not_be_loaded_is_refused_before_it_is_deserialized(machine, monkeypatch, case):
    prepare, kind, message = REFUSALS[case]
    path = prepare(machine, monkeypatch)
    with pytest.raises(kind) as raised:
        load(machine, path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not {"Runtime", "deserialize_cuda_engine", "cudaMalloc", "cudaSetDevice"} & set(machine.names)
    assert list(machine.folder.glob("*.cache")) == []


def test_an_unverified_engine_is_loaded_when_asked_for_and_without_a_cache(machine):
    load(machine).close()
    path = machine.folder / "small.fp16.engine"
    with load(machine, path) as runner:
        runner.run({"input": images(4)})
    assert (machine.folder / f"{path.name}.sm86.cache").exists()
    sidecar_path(path).unlink()
    before = len(machine.names)
    with load(machine, path, allow_unverified=True) as runner:
        feeds = images(4)
        assert_answers(runner.run({"input": feeds}), feeds)
    assert not {"create_runtime_cache", "deserialize", "serialize"} & set(machine.names[before:])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"location": "host"}, "is not a plain array on the GPU"),
        ({"format": "chw32"}, "is not a plain array on the GPU"),
        ({"dtype": "bf16"}, "has a type that numpy has not"),
        ({"output batch": -1}, "the shape of output depends on its input"),
    ],
    ids=str,
)
def test_an_engine_that_plain_arrays_cannot_feed_is_refused(machine, overrides, override, message):
    named = {
        "host": real.TensorLocation.HOST, "chw32": real.TensorFormat.CHW32, "bf16": real.DataType.BF16, -1: -1
    }  # fmt: skip
    overrides.update({name: named[value] for name, value in override.items()})
    with pytest.raises(InputRejected, match=message):
        load(machine)


# --- the cache of kernels


def cache_of(machine):
    return machine.folder / "small.fp16.engine.sm86.cache"


def used(machine, rows=(4,), path=None):
    """Runs; returns the kernels that had to be compiled."""
    machine.trt._compiled.clear()
    with load(machine, path or machine.folder / "small.fp16.engine") as runner:
        for count in rows:
            feeds = images(count)
            assert_answers(runner.run({"input": feeds}), feeds)
    return list(machine.trt._compiled)


def test_kernels_that_were_compiled_are_there_the_next_time(machine):
    machine.engine()
    assert len(used(machine)) == 1
    assert used(machine) == []
    written = cache_of(machine).stat().st_mtime_ns
    assert used(machine) == []
    assert cache_of(machine).stat().st_mtime_ns == written  # nothing new, nothing written
    assert len(used(machine, (4, 5))) == 1
    assert used(machine, (5, 4)) == []


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"x",
    "header only": lambda content: content[: content.index(b"kernels:")],
    "another engine": lambda content: flipped(content, 30),
    "another version": lambda content: content.replace(RTX.encode(), b"1.7.1.115"),
    "another card": lambda content: content.replace(b"sm86", b"sm89"),
    "kernels damaged": lambda content: flipped(content, len(content) - 3),
    "not a cache": lambda content: b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cache_that_is_not_this_engines_is_ignored_and_replaced(machine, damage):
    machine.engine()
    used(machine)
    whole = cache_of(machine).read_bytes()
    cache_of(machine).write_bytes(DAMAGES[damage](whole))
    before = len(machine.names)
    assert len(used(machine)) == 1
    assert "deserialize" not in machine.names[before:]
    assert cache_of(machine).read_bytes() == whole
    assert used(machine) == []


def test_a_cache_that_the_sdk_refuses_is_ignored_and_replaced(machine):
    machine.engine()
    used(machine)
    whole = cache_of(machine).read_bytes()
    engine = hashlib.sha256((machine.folder / "small.fp16.engine").read_bytes()).hexdigest()
    RuntimeCacheFile(cache_of(machine), engine, RTX, 86).write(b"of another driver")
    assert len(used(machine)) == 1
    assert cache_of(machine).read_bytes() == whole


def test_a_cache_that_cannot_be_written_or_read_is_no_error(machine):
    machine.engine()
    cache_of(machine).mkdir()
    assert len(used(machine)) == 1
    assert len(used(machine)) == 1
    assert cache_of(machine).is_dir()
    assert [path.name for path in machine.folder.iterdir() if path.name.startswith(".")] == []


def test_nothing_is_kept_of_a_process_in_which_a_call_failed(machine):
    machine.engine()
    with load(machine, machine.folder / "small.fp16.engine") as runner:
        runner.run({"input": images(4)})
        machine.journal.fail_names = {"cudaGraphLaunch"}
        with pytest.raises(DeviceFailed, match="cudaGraphLaunch failed"):
            runner.run({"input": images(4)})
    assert not cache_of(machine).exists()


def test_kernels_do_not_change_between_the_runs_of_a_shape(machine):
    with load(machine) as runner:
        config = runner._backend._loaded._config
        eager = real.DynamicShapesKernelSpecializationStrategy.EAGER
        assert config.dynamic_shapes_kernel_specialization_strategy == eager


@pytest.mark.parametrize("version", FULL)
def test_full_tensorrt_has_no_cache(monkeypatch, tmp_path, version):
    machine = fake_machine(monkeypatch, tmp_path, version)
    with load(machine) as runner:
        runner.run({"input": images(4)})
    assert list(tmp_path.glob("*.cache")) == []


def test_the_answers_of_the_fake_are_those_of_the_network():
    """The fakes' arithmetic: rows differ, and none is NaN."""
    found = answers(images(4))["output"]
    assert np.isfinite(found).all()
    assert len({tuple(row) for row in found}) == 4
