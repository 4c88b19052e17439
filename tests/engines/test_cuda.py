"""The calls to the CUDA runtime: errors name call and cause, memory is bounded, graphs end in any case."""

from __future__ import annotations

import contextlib
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
    TimingEvent,
    checked,
    close_on_device,
    compute_capability,
    cuda_runtime,
    is_capturing,
    selected_device,
)
from engines.errors import DeviceFailed, SdkMissing
from tests.conftest import ROOT
from tests.engines.fake_cuda import BUS_IDS, Costs, FakeCuda


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


# --- time


def test_events_tell_the_devices_time_between_them(fake):
    fake.costs = Costs(to_device=1e-4, to_host=3e-4)
    stream, device, pinned = Stream(fake), DeviceBuffer(fake, 64), PinnedBuffer(fake, 64)
    start, copied, end = TimingEvent(fake), TimingEvent(fake), TimingEvent(fake)
    for size in (64, 16):
        start.record(stream.handle)
        stream.copy_to_device(device, pinned, size)
        copied.record(stream.handle)
        stream.copy_to_host(pinned, device, size)
        end.record(stream.handle)
        end.synchronize()
        assert copied.elapsed_seconds(since=start) == pytest.approx(size * 1e-4, rel=1e-6)
        assert end.elapsed_seconds(since=copied) == pytest.approx(size * 3e-4, rel=1e-6)
        assert end.elapsed_seconds(since=start) == pytest.approx(size * 4e-4, rel=1e-6)
        assert copied.elapsed_seconds(since=end) == pytest.approx(-size * 3e-4, rel=1e-6)
    assert fake.clock() == pytest.approx(80 * 4e-4)
    for thing in (start, copied, end, stream, device, pinned):
        thing.close()


def test_time_is_not_told_before_it_is_known_nor_by_an_event_that_keeps_none(fake):
    fake.costs = Costs(to_device=1e-4)
    stream, device, pinned = Stream(fake), DeviceBuffer(fake, 4), PinnedBuffer(fake, 4)
    start, end, order = TimingEvent(fake), TimingEvent(fake), Event(fake)
    start.record(stream.handle)
    with pytest.raises(DeviceFailed, match="cudaEventElapsedTime failed: cudaErrorInvalidResourceHandle"):
        end.elapsed_seconds(since=start)  # never recorded
    stream.copy_to_device(device, pinned, 4)
    end.record(stream.handle)
    start.synchronize()
    with pytest.raises(DeviceFailed, match="cudaEventElapsedTime failed: cudaErrorNotReady"):
        end.elapsed_seconds(since=start)
    end.synchronize()
    assert end.elapsed_seconds(since=start) == pytest.approx(4e-4)
    order.record(stream.handle)
    stream.synchronize()
    with pytest.raises(DeviceFailed, match="cudaEventElapsedTime failed: cudaErrorInvalidResourceHandle"):
        TimingEvent.elapsed_seconds(start, since=order)
    for thing in (start, end, order, stream, device, pinned):
        thing.close()


def test_waiting_for_an_event_is_not_waiting_for_what_comes_after_it(fake):
    fake.costs = Costs(to_device=1.0)
    stream, device, pinned, event = Stream(fake), DeviceBuffer(fake, 4), PinnedBuffer(fake, 4), TimingEvent(fake)
    stream.copy_to_device(device, pinned, 1)
    event.record(stream.handle)
    stream.copy_to_device(device, pinned, 4)
    event.synchronize()
    assert fake.clock() == 1.0
    stream.synchronize()
    assert fake.clock() == 5.0
    for thing in (event, stream, device, pinned):
        thing.close()


def test_a_stream_that_waits_for_another_goes_on_at_its_time_and_no_work_begins_before_it_is_enqueued(fake):
    fake.costs = Costs(to_device=1.0, calls={"cudaStreamWaitEvent": 10.0})
    first, second, event = Stream(fake), Stream(fake), Event(fake)
    device, pinned, start, end = DeviceBuffer(fake, 4), PinnedBuffer(fake, 4), TimingEvent(fake), TimingEvent(fake)
    first.copy_to_device(device, pinned, 4)
    event.record(first.handle)
    start.record(second.handle)
    event.hold_back(second.handle)  # the host is at 10 after it, the first stream at 4
    second.copy_to_device(device, pinned, 2)
    end.record(second.handle)
    second.synchronize()
    assert fake.clock() == 12.0
    assert end.elapsed_seconds(since=start) == pytest.approx(12.0)
    for thing in (first, second, event, device, pinned, start, end):
        thing.close()


def test_resources_are_closed_on_their_device_whatever_fails_and_the_callers_is_put_back(fake):
    on, closed = [], []
    resources = contextlib.ExitStack()
    resources.callback(lambda: closed.append("first") or on.append(fake.current))
    resources.callback(lambda: closed.append("second") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        close_on_device(fake, 1, resources)
    assert (closed, on, fake.current) == (["second", "first"], [1], 0)
    close_on_device(fake, 1, resources)
    assert closed == ["second", "first"]


@pytest.mark.parametrize("name", ["cudaGetDevice", "cudaSetDevice"])
def test_resources_are_closed_also_where_the_device_cannot_be_chosen(fake, name):
    closed = []
    resources = contextlib.ExitStack()
    resources.callback(closed.append, "all")
    fake.journal.fail_names = {name}
    with contextlib.suppress(DeviceFailed):
        close_on_device(fake, 0, resources)
    assert closed == ["all"]


# --- the fake itself sees what it is there to see


@pytest.mark.parametrize("device", BUS_IDS)
def test_the_fake_hands_out_the_place_on_the_bus_as_the_binding_does(device):
    status, padded = FakeCuda().cudaDeviceGetPCIBusId(64, device)
    assert status == real.cudaError_t.cudaSuccess
    assert len(padded) == 64
    assert padded.startswith(BUS_IDS[device].encode() + b"\0 ")
    assert FakeCuda().cudaDeviceGetPCIBusId(12, device)[0] == real.cudaError_t.cudaErrorInvalidValue
    assert FakeCuda().cudaDeviceGetPCIBusId(64, 7)[0] == real.cudaError_t.cudaErrorInvalidDevice


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
