"""The calls to the CUDA runtime: errors name call and cause, memory is bounded, graphs end in any case."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from cuda.bindings import runtime as real

from engines.cuda import (
    DeviceBuffer,
    Event,
    Graph,
    PinnedBuffer,
    Stream,
    checked,
    compute_capability,
    cuda_runtime,
    is_capturing,
    selected_device,
)
from engines.errors import DeviceFailed, SdkMissing
from tests.conftest import ROOT
from tests.engines.fake_cuda import FakeCuda


@pytest.fixture
def fake():
    made = FakeCuda()
    yield made
    assert made.live() == {}
    assert made.journal.violations == []


def failing(status):
    def cuda_call(*arguments):
        return (status, None)

    return cuda_call


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            real.cudaError_t.cudaErrorMemoryAllocation,
            "cuda_call failed: cudaErrorMemoryAllocation (out of memory); free memory on the GPU, or build the engine "
            "with a smaller maximum batch",
        ),
        (
            real.cudaError_t.cudaErrorIllegalAddress,
            "cuda_call failed: cudaErrorIllegalAddress (an illegal memory access was encountered); check the GPU with "
            "nvidia-smi and start the process again",
        ),
    ],
)
def test_a_failed_call_is_one_line_with_cudas_own_name_for_it(status, message):
    with pytest.raises(DeviceFailed) as raised:
        checked(real, failing(status), 1, 2)
    assert str(raised.value) == message
    assert raised.value.exit_code == 4


@pytest.mark.parametrize(("results", "expected"), [((), None), ((7,), 7)])
def test_a_call_that_succeeds_returns_its_result(results, expected):
    assert checked(real, lambda *arguments: (real.cudaError_t.cudaSuccess, *results), 1) == expected


def test_the_runtime_is_that_of_cuda_bindings():
    assert cuda_runtime() is real


def test_without_cuda_bindings_the_line_that_installs_it_is_given(monkeypatch):
    import cuda.bindings

    monkeypatch.delattr(cuda.bindings, "runtime")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(SdkMissing) as raised:
        cuda_runtime()
    assert str(raised.value) == "cuda-bindings is not installed here; pip install 'repvgg-exporter[tensorrt]'"
    with pytest.raises(SdkMissing, match=r"pip install 'x'"):
        cuda_runtime("pip install 'x'")


def test_importing_starts_nothing():
    script = "import sys, engines.cuda, engines.device_arrays, engines.backends.tensorrt; print('cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_compute_capability_is_that_of_the_device(fake):
    assert compute_capability(fake, 0) == 86
    assert compute_capability(fake, 1) == 89


def test_the_callers_device_is_put_back_whatever_happens(fake):
    def work():
        with selected_device(fake, 1):
            assert fake.current == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert fake.current == 0


def test_numbers_go_to_the_device_and_back(fake):
    stream, device = Stream(fake), DeviceBuffer(fake, 64)
    there, back = PinnedBuffer(fake, 64), PinnedBuffer(fake, 64)
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    there.array(np.float32, (3, 4))[...] = numbers
    stream.copy_to_device(device, there, numbers.nbytes)
    stream.copy_to_host(back, device, numbers.nbytes)
    assert np.isnan(back.array(np.float32, (3, 4))).all()
    stream.synchronize()
    np.testing.assert_array_equal(back.array(np.float32, (3, 4)), numbers)
    for thing in (stream, device, there, back):
        thing.close()


@pytest.mark.parametrize("size", [65, 1000])
def test_a_copy_out_of_bounds_is_not_made(fake, size):
    stream, device, pinned = Stream(fake), DeviceBuffer(fake, 64), PinnedBuffer(fake, 1000)
    with pytest.raises(ValueError, match=f"a copy of {size} bytes between buffers of 64 and 1000"):
        stream.copy_to_device(device, pinned, size)
    assert "cudaMemcpyAsync" not in fake.journal.names()
    for thing in (stream, device, pinned):
        thing.close()


def test_a_pinned_array_has_no_more_than_the_memory(fake):
    pinned = PinnedBuffer(fake, 64)
    with pytest.raises(ValueError, match="cannot reshape"):
        pinned.array(np.float32, (17,))
    pinned.close()


def test_a_graph_repeats_what_was_recorded_and_runs_nothing_before(fake):
    stream, device, pinned = Stream(fake), DeviceBuffer(fake, 4), PinnedBuffer(fake, 4)
    pinned.array(np.int32, (1,))[...] = 1
    graph = Graph(fake, stream, lambda: stream.copy_to_device(device, pinned, 4))
    stream.synchronize()
    assert fake.host_array(device.address, np.int32, (1,))[0] == -1  # as it was: all bits set
    for value in (5, 6):
        pinned.array(np.int32, (1,))[...] = value
        graph.launch()
        stream.synchronize()
        assert fake.host_array(device.address, np.int32, (1,))[0] == value
    for thing in (graph, stream, device, pinned):
        thing.close()


def test_a_recording_that_fails_ends_and_leaves_no_graph(fake):
    stream = Stream(fake)

    def work():
        assert is_capturing(fake, stream.handle)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Graph(fake, stream, work)
    assert not is_capturing(fake, stream.handle)
    assert fake.live() == {"streams": 1}
    stream.close()


def test_waiting_inside_a_recording_fails_it(fake):
    stream = Stream(fake)
    with pytest.raises(DeviceFailed, match="cudaStreamSynchronize failed: cudaErrorStreamCaptureUnsupported"):
        Graph(fake, stream, stream.synchronize)
    assert not is_capturing(fake, stream.handle)
    stream.close()


def test_an_event_orders_two_streams(fake):
    first, second, event = Stream(fake), Stream(fake), Event(fake)
    device, one, two = DeviceBuffer(fake, 4), PinnedBuffer(fake, 4), PinnedBuffer(fake, 4)
    one.array(np.int32, (1,))[...] = 9
    first.copy_to_device(device, one, 4)
    event.record(first.handle)
    event.hold_back(second.handle)
    second.copy_to_host(two, device, 4)
    second.synchronize()
    assert two.array(np.int32, (1,))[0] == 9
    for thing in (first, second, event, device, one, two):
        thing.close()


# --- the fake itself sees what it is there to see


def test_the_fake_sees_what_is_freed_twice_used_after_it_or_copied_out_of_bounds():
    fake = FakeCuda()
    stream, device, pinned = Stream(fake), DeviceBuffer(fake, 4), PinnedBuffer(fake, 4)
    stream.copy_to_device(device, pinned, 4)
    device.close()
    assert "still needs" in fake.journal.violations[-1]
    stream.synchronize()
    assert "which are not allocated" in fake.journal.violations[-1]
    with pytest.raises(DeviceFailed, match="cudaFree failed"):
        device.close()
    assert "freed, which is not allocated" in fake.journal.violations[-1]
    kind = real.cudaMemcpyKind.cudaMemcpyHostToDevice
    with pytest.raises(DeviceFailed, match="cudaMemcpyAsync failed"):
        checked(fake, fake.cudaMemcpyAsync, pinned.address, pinned.address, 4, kind, stream.handle)
    assert "not pinned to device memory" in fake.journal.violations[-1]
    assert fake.live() == {"pinned memory": 1, "streams": 1}
    with pytest.raises(AttributeError):
        fake.cudaMallocEverything  # noqa: B018
    with pytest.raises(TypeError):
        fake.cudaMalloc()
