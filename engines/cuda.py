"""The few operations of the CUDA runtime that running an engine takes: each checked, and each thing taken given back.

The binding is ``cuda.bindings.runtime`` of the package cuda-bindings. Its runtime API works in a device's primary
context, the one that PyTorch, CuPy and TensorRT share; nothing here makes another. Importing this module starts
nothing. What a class takes from the device is freed by its ``close``, once; a pointer is an ``int`` throughout.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engines.errors import DeviceFailed, SdkMissing, first_line

INSTALL = "pip install 'repvgg-exporter[tensorrt]'"

REMEDIES = {
    "cudaErrorMemoryAllocation": "free memory on the GPU, or build the engine with a smaller maximum batch",
    "cudaErrorInsufficientDriver": "update the GPU's driver",
    "cudaErrorNoDevice": "check with nvidia-smi that this process may see a GPU",
    "cudaErrorInvalidDevice": "check with nvidia-smi that this process may see that GPU",
}
USUAL_REMEDY = "check the GPU with nvidia-smi and start the process again"


def cuda_runtime(install: str = INSTALL) -> Any:
    """The module ``cuda.bindings.runtime``.

    Args:
        install: the line that installs what is missing.

    Raises:
        SdkMissing: cuda-bindings is not installed, or cannot be imported.
    """
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError as error:
        raise SdkMissing(f"cuda-bindings is not installed here; {install}") from error
    except Exception as error:  # a broken installation raises whatever it pleases
        raise SdkMissing(f"cuda-bindings cannot be imported ({first_line(error)}); {install}") from error
    return runtime


def checked(runtime: Any, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Calls ``function`` of the runtime; returns its result without the status, None when there is none.

    Raises:
        DeviceFailed: the status is not success; the message names the call and CUDA's error.
    """
    status, *results = function(*arguments)
    if status != runtime.cudaError_t.cudaSuccess:
        name, text = error_name(runtime, status), error_text(runtime, status)
        raise DeviceFailed(f"{function.__name__} failed: {name} ({text}); {REMEDIES.get(name, USUAL_REMEDY)}")
    return results[0] if results else None


def error_name(runtime: Any, status: Any) -> str:
    """As in ``cudaErrorMemoryAllocation``."""
    return str(runtime.cudaGetErrorName(status)[1].decode())


def error_text(runtime: Any, status: Any) -> str:
    """As in ``out of memory``."""
    return str(runtime.cudaGetErrorString(status)[1].decode())


def compute_capability(runtime: Any, device: int) -> int:
    """As in 86 for 8.6. Makes no context on the device.

    Raises:
        DeviceFailed: there is no such device.
    """
    attributes = runtime.cudaDeviceAttr
    major = checked(runtime, runtime.cudaDeviceGetAttribute, attributes.cudaDevAttrComputeCapabilityMajor, device)
    minor = checked(runtime, runtime.cudaDeviceGetAttribute, attributes.cudaDevAttrComputeCapabilityMinor, device)
    return int(major) * 10 + int(minor)


@contextlib.contextmanager
def selected_device(runtime: Any, device: int) -> Iterator[None]:
    """Makes ``device`` this thread's current one inside the block, and the caller's again after it."""
    before = checked(runtime, runtime.cudaGetDevice)
    checked(runtime, runtime.cudaSetDevice, device)
    try:
        yield
    finally:
        if before != device:
            runtime.cudaSetDevice(before)  # an error here would hide the block's own


def close_on_device(runtime: Any, device: int, resources: contextlib.ExitStack) -> None:
    """Closes ``resources`` with ``device`` as this thread's current one; whatever fails, all the rest is closed too.

    Raises:
        DeviceFailed: something failed.
    """
    status, before = runtime.cudaGetDevice()
    with contextlib.ExitStack() as steps:  # last in, first out, whichever of them fails
        if status == runtime.cudaError_t.cudaSuccess and before != device:
            steps.callback(runtime.cudaSetDevice, before)
        steps.push(resources)
        steps.callback(checked, runtime, runtime.cudaSetDevice, device)


class DeviceBuffer:
    """Memory of the current device: ``size`` bytes at ``address``."""

    def __init__(self, runtime: Any, size: int) -> None:
        self._runtime = runtime
        self.size = max(size, 1)
        self.address = int(checked(runtime, runtime.cudaMalloc, self.size))

    def close(self) -> None:
        """Frees it."""
        checked(self._runtime, self._runtime.cudaFree, self.address)


class PinnedBuffer:
    """Page-locked host memory, which the device can copy from and to while the host goes on."""

    def __init__(self, runtime: Any, size: int) -> None:
        self._runtime = runtime
        self.size = max(size, 1)
        self.address = int(checked(runtime, runtime.cudaMallocHost, self.size))

    def array(self, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
        """The beginning of the memory as an array, without a copy; of no use after ``close``."""
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.address))
        return memory[: math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def close(self) -> None:
        """Frees it."""
        checked(self._runtime, self._runtime.cudaFreeHost, self.address)


class Event:
    """A point in a stream's work that another stream can wait for; it measures no time."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._event = checked(runtime, runtime.cudaEventCreateWithFlags, runtime.cudaEventDisableTiming)

    def record(self, stream: int) -> None:
        """Marks what ``stream`` has been given so far."""
        checked(self._runtime, self._runtime.cudaEventRecord, self._event, stream)

    def hold_back(self, stream: int) -> None:
        """Lets what ``stream`` is given from now on begin after the marked work; the host goes on."""
        checked(self._runtime, self._runtime.cudaStreamWaitEvent, stream, self._event, 0)

    def close(self) -> None:
        """Frees it."""
        checked(self._runtime, self._runtime.cudaEventDestroy, self._event)


class TimingEvent:
    """A point in a stream's work whose time is kept when the device comes to it."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._event = checked(runtime, runtime.cudaEventCreateWithFlags, runtime.cudaEventDefault)

    def record(self, stream: int) -> None:
        """Marks what ``stream`` has been given so far, and no longer what was marked before."""
        checked(self._runtime, self._runtime.cudaEventRecord, self._event, stream)

    def synchronize(self) -> None:
        """Waits until the marked work is done."""
        checked(self._runtime, self._runtime.cudaEventSynchronize, self._event)

    def elapsed_seconds(self, since: TimingEvent) -> float:
        """The device's time from ``since`` to this point, to about half a microsecond; both have been reached.

        Raises:
            DeviceFailed: one of them was not recorded, or has not been reached yet.
        """
        return float(checked(self._runtime, self._runtime.cudaEventElapsedTime, since._event, self._event)) / 1e3

    def close(self) -> None:
        """Frees it."""
        checked(self._runtime, self._runtime.cudaEventDestroy, self._event)


class Stream:
    """A stream that does not wait for the default stream. ``handle`` is what TensorRT takes."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._stream = checked(runtime, runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def copy_to_device(self, target: DeviceBuffer, source: PinnedBuffer, size: int) -> None:
        """Enqueues a copy of the first ``size`` bytes."""
        self._copy(target, source, size, self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def copy_to_host(self, target: PinnedBuffer, source: DeviceBuffer, size: int) -> None:
        """Enqueues a copy of the first ``size`` bytes."""
        self._copy(target, source, size, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def _copy(self, target: Any, source: Any, size: int, kind: Any) -> None:
        if size > min(target.size, source.size):
            raise ValueError(f"a copy of {size} bytes between buffers of {target.size} and {source.size}")
        runtime = self._runtime
        checked(runtime, runtime.cudaMemcpyAsync, target.address, source.address, size, kind, self.handle)

    def synchronize(self) -> None:
        """Waits until everything that was enqueued is done."""
        checked(self._runtime, self._runtime.cudaStreamSynchronize, self.handle)

    def close(self) -> None:
        """Frees it."""
        checked(self._runtime, self._runtime.cudaStreamDestroy, self._stream)


def is_capturing(runtime: Any, stream: int) -> bool:
    """Whether ``stream`` records a graph at the moment."""
    status = checked(runtime, runtime.cudaStreamIsCapturing, stream)
    return bool(status != runtime.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone)


class Graph:
    """Work of a stream, recorded once and launched with one call."""

    def __init__(self, runtime: Any, stream: Stream, work: Callable[[], None]) -> None:
        """Records what ``work`` enqueues on ``stream``; none of it runs before ``launch``.

        Raises:
            DeviceFailed: something in ``work`` cannot be recorded. The stream is usable again then.
        """
        self._runtime, self._stream = runtime, stream
        template = self._recorded(work)
        try:
            self._executable = checked(runtime, runtime.cudaGraphInstantiate, template, 0)
        finally:
            runtime.cudaGraphDestroy(template)  # the executable stands alone

    def _recorded(self, work: Callable[[], None]) -> Any:
        runtime, handle = self._runtime, self._stream.handle
        # Other threads may use the device meanwhile; only this one's calls are recorded.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        checked(runtime, runtime.cudaStreamBeginCapture, handle, mode)
        try:
            work()
        except BaseException:
            status, template = runtime.cudaStreamEndCapture(handle)
            if status == runtime.cudaError_t.cudaSuccess:
                runtime.cudaGraphDestroy(template)
            raise
        return checked(runtime, runtime.cudaStreamEndCapture, handle)

    def launch(self) -> None:
        """Enqueues the recorded work on the stream that it was recorded from."""
        checked(self._runtime, self._runtime.cudaGraphLaunch, self._executable, self._stream.handle)

    def close(self) -> None:
        """Frees it."""
        checked(self._runtime, self._runtime.cudaGraphExecDestroy, self._executable)
