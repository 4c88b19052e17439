"""A CUDA runtime without a GPU, as hard on its caller as the real one may be.

Its functions are those of ``cuda.bindings.runtime``: any other name fails, and so does another number of arguments.
Device memory is host memory at real addresses, full of NaN until something is copied to it. What is enqueued on a
stream is done when somebody synchronises that stream, and not before; waiting for an event brings the other stream just
that far. Whoever forgets to wait therefore reads NaN. What the real runtime would not forgive is noted in
``violations``: a copy out of bounds, a use after or a free during use, a double free, the wrong device, two streams at
one memory.

Time is pretended too, and stands still unless a test sets ``costs``. The host has a clock, ``clock``, which calls move
by what they cost; each stream has one of its own. Work begins when the stream has come to it, and not before the host
has enqueued it; an event keeps the stream's time; who waits for a stream or an event goes on at that time.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import runtime as real

ERROR = real.cudaError_t
NAN_BYTE = 0xFF
CAPABILITIES = {0: (8, 6), 1: (8, 9)}
BUS_IDS = {0: "0000:41:00.0", 1: "0000:01:00.0"}


class Journal:
    """Every call to a fake, in order; the one with the number ``fail_at`` fails."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.violations: list[str] = []
        self.fail_at: int | None = None
        self.fail_names: set[str] = set()

    def enter(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Notes the call; whether it has to fail."""
        # Only the type of an object of the SDK: a reference here would keep it alive.
        plain = tuple(x if isinstance(x, int | str | tuple | bytes) else type(x).__name__ for x in arguments)
        self.calls.append((name, plain))
        return len(self.calls) - 1 == self.fail_at or name in self.fail_names

    def violated(self, what: str) -> None:
        self.violations.append(what)

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@dataclasses.dataclass
class Block:
    """Memory that was allocated: on a device, or pinned."""

    memory: np.ndarray
    kind: str
    device: int

    @functools.cached_property
    def address(self) -> int:
        return self.memory.ctypes.data

    def holds(self, address: int, size: int) -> bool:
        return self.address <= address and address + size <= self.address + self.memory.size


@dataclasses.dataclass
class Costs:
    """What takes how long, in seconds.

    ``to_device`` and ``to_host`` are for a byte that is copied. ``launches`` is what an engine takes longer on the
    device when it is not launched as a graph, ``graph_launch`` what a graph takes there before its work begins, and
    ``calls`` what the host spends in a call of the given name, also in one of the SDK. What an engine takes itself
    stands in its file (``tests.engines.fake_tensorrt``).
    """

    to_device: float = 0.0
    to_host: float = 0.0
    launches: float = 0.0
    graph_launch: float = 0.0
    calls: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Work:
    """Something on a stream: what it does, the memory it touches as (address, size), and what it needs alone.

    It takes ``seconds`` on the device, was ``enqueued`` at this time of the host, and ``ended`` at that of the stream.
    """

    name: str
    action: Callable[[], None]
    touches: tuple[tuple[int, int], ...] = ()
    alone: int | None = None
    done: bool = False
    seconds: float = 0.0
    enqueued: float = 0.0
    ended: float = 0.0

    def again(self) -> Work:
        return dataclasses.replace(self, done=False)


class StreamState:
    def __init__(self, device: int) -> None:
        self.device = device
        self.queue: list[Work] = []
        self.capture: list[Work] | None = None
        self.broken = False
        self.time = 0.0


@dataclasses.dataclass
class EventState:
    """Whether it measures time, and what was recorded last: a stream and a mark on it."""

    timing: bool
    recorded: tuple[int, Work] | None = None


signature_of = functools.cache(inspect.signature)


class FakeCuda:
    """Stands in for the module ``cuda.bindings.runtime``."""

    def __init__(self, journal: Journal | None = None) -> None:
        self.journal = journal or Journal()
        self.blocks: dict[int, Block] = {}
        self.streams: dict[int, StreamState] = {0: StreamState(0)}
        self.events: dict[int, EventState] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self.sharers: dict[int, list[Work]] = {}
        self.current = 0
        self.costs = Costs()
        self.time = 0.0
        self.error = ERROR.cudaSuccess
        self._next = 0x1000

    def __getattr__(self, name: str) -> Any:
        original = getattr(real, name)  # AttributeError for what the real runtime has not
        if isinstance(original, type | int) or name in ("cudaGetErrorName", "cudaGetErrorString"):
            return original
        implementation = getattr(self, f"_{name}")
        signature = signature_of(original)

        def call(*arguments: Any) -> tuple[Any, ...]:
            signature.bind(*arguments)
            self.spend(name)
            if self.journal.enter(name, arguments):
                if name.startswith("cudaFree") or name.endswith("Destroy"):
                    implementation(*arguments)  # it was asked for: that is all that a caller can do
                self.error = ERROR.cudaErrorUnknown
                if name == "cudaStreamEndCapture":
                    self.streams[int(arguments[0])].capture = None
                return (ERROR.cudaErrorUnknown, None)
            status, *results = implementation(*arguments)
            if status != ERROR.cudaSuccess and name != "cudaGetLastError":
                self.error = status
                return (status, *(None for _ in results))
            return (status, *results)

        call.__name__ = name
        return call

    # --- time

    def clock(self) -> float:
        """The host's, in seconds."""
        return self.time

    def spend(self, name: str) -> None:
        """What the host takes to make a call of this name."""
        self.time += self.costs.calls.get(name, 0.0)

    # --- what a test asks

    def live(self) -> dict[str, int]:
        """How many of each kind were not freed."""
        kinds = {
            "device memory": sum(block.kind == "device" for block in self.blocks.values()),
            "pinned memory": sum(block.kind == "pinned" for block in self.blocks.values()),
            "streams": len(self.streams) - 1,
            "events": len(self.events),
            "graphs": len(self.graphs) + len(self.executables),
            "captures": sum(stream.capture is not None for stream in self.streams.values()),
        }
        return {kind: count for kind, count in kinds.items() if count}

    def device_array(self, array: np.ndarray) -> int:
        """Puts an array on the current device; returns its address."""
        address = self._cudaMalloc(max(array.nbytes, 1))[1]
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return address

    def host_array(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """What is at a device address by now, copied."""
        count = int(np.prod(shape))
        size = count * np.dtype(dtype).itemsize
        assert self.block_of(address, size) is not None
        return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)

    def new_stream(self) -> int:
        """A stream of the caller's."""
        return int(self._cudaStreamCreateWithFlags(1)[1])

    def block_of(self, address: int, size: int) -> Block | None:
        return next((block for block in self.blocks.values() if block.holds(address, size)), None)

    # --- what streams do

    def enqueue(self, stream: int, work: Work) -> Any:
        state = self.streams.get(stream)
        if state is None:
            return ERROR.cudaErrorInvalidResourceHandle
        if state.device != self.current:
            self.journal.violated(f"{work.name}: stream of device {state.device} used on device {self.current}")
        if state.capture is not None:
            state.capture.append(work)
            return ERROR.cudaSuccess
        work.enqueued = self.time
        state.queue.append(work)
        if work.alone is not None:
            self.sharers.setdefault(work.alone, []).append(work)
        return ERROR.cudaSuccess

    def run_until(self, stream: int, last: Work | None = None) -> None:
        state = self.streams[stream]
        while state.queue and not (last is not None and last.done):
            work = state.queue.pop(0)
            waiting = self.sharers.get(work.alone, [work])  # in the order in which they were enqueued
            if waiting[0] is not work:
                self.journal.violated(f"{work.name}: two streams use the memory at {work.alone:#x} at once")
            for address, size in work.touches:
                if self.block_of(address, size) is None:
                    self.journal.violated(f"{work.name} uses {size} bytes at {address:#x}, which are not allocated")
                    break
            else:
                work.action()
            waiting.remove(work)
            state.time = work.ended = max(state.time, work.enqueued) + work.seconds
            work.done = True

    def _pending(self) -> list[Work]:
        return [work for stream in self.streams.values() for work in stream.queue]

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def _forbidden_while_capturing(self, name: str) -> bool:
        """cudaMalloc and the like, by a thread that captures, end the capture."""
        capturing = [stream for stream in self.streams.values() if stream.capture is not None]
        for stream in capturing:
            stream.broken = True
        return bool(capturing)

    # --- the runtime

    def _cudaGetLastError(self) -> Any:
        error, self.error = self.error, ERROR.cudaSuccess
        return (ERROR.cudaSuccess if error == ERROR.cudaSuccess else error,)

    def _cudaGetDevice(self) -> Any:
        return ERROR.cudaSuccess, self.current

    def _cudaSetDevice(self, device: int) -> Any:
        if device not in CAPABILITIES:
            return (ERROR.cudaErrorInvalidDevice,)
        self.current = device
        return (ERROR.cudaSuccess,)

    def _cudaDeviceGetAttribute(self, attribute: Any, device: int) -> Any:
        if device not in CAPABILITIES:
            return ERROR.cudaErrorInvalidDevice, None
        attributes = real.cudaDeviceAttr
        wanted = (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
        return ERROR.cudaSuccess, CAPABILITIES[device][wanted.index(attribute)]

    def _cudaDeviceGetPCIBusId(self, length: int, device: int) -> Any:
        if device not in BUS_IDS:
            return ERROR.cudaErrorInvalidDevice, None
        terminated = BUS_IDS[device].encode() + b"\0"
        if length < len(terminated):
            return ERROR.cudaErrorInvalidValue, None
        return ERROR.cudaSuccess, terminated.ljust(length, b" ")  # as the binding hands its buffer out

    def _allocate(self, size: int, kind: str) -> Any:
        if self._forbidden_while_capturing(kind):
            return ERROR.cudaErrorStreamCaptureUnsupported, None
        if size <= 0:
            return ERROR.cudaErrorInvalidValue, None
        block = Block(np.full(size, NAN_BYTE, np.uint8), kind, self.current)
        self.blocks[block.address] = block
        return ERROR.cudaSuccess, block.address

    def _release(self, address: int, kind: str) -> Any:
        block = self.blocks.get(address)
        if block is None or block.kind != kind:
            self.journal.violated(f"{kind} memory at {address:#x} freed, which is not allocated")
            return (ERROR.cudaErrorInvalidValue,)
        for work in self._pending():
            if any(block.holds(start, 1) for start, _ in work.touches):
                self.journal.violated(f"{kind} memory freed that {work.name} still needs")
        del self.blocks[address]
        block.memory.fill(NAN_BYTE)
        return (ERROR.cudaSuccess,)

    def _cudaMalloc(self, size: int) -> Any:
        return self._allocate(size, "device")

    def _cudaMallocHost(self, size: int) -> Any:
        return self._allocate(size, "pinned")

    def _cudaFree(self, address: int) -> Any:
        return self._release(address, "device")

    def _cudaFreeHost(self, address: int) -> Any:
        return self._release(address, "pinned")

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Any) -> Any:
        to_device = kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice
        kinds = ("device", "pinned") if to_device else ("pinned", "device")
        blocks = self.block_of(target, size), self.block_of(source, size)
        if None in blocks or tuple(block.kind for block in blocks) != kinds:
            self.journal.violated(f"cudaMemcpyAsync of {size} bytes: not {kinds[1]} to {kinds[0]} memory")
            return (ERROR.cudaErrorInvalidValue,)
        touches = ((target, size), (source, size))
        seconds = size * (self.costs.to_device if to_device else self.costs.to_host)
        copy = Work("cudaMemcpyAsync", lambda: ctypes.memmove(target, source, size) and None, touches, seconds=seconds)
        return (self.enqueue(int(stream), copy),)

    def _cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == real.cudaStreamNonBlocking
        handle = self._handle()
        self.streams[handle] = StreamState(self.current)
        return ERROR.cudaSuccess, real.cudaStream_t(handle)

    def _cudaStreamDestroy(self, stream: Any) -> Any:
        if self.streams.pop(int(stream), None) is None:
            self.journal.violated(f"stream {int(stream)} destroyed, which does not exist")
            return (ERROR.cudaErrorInvalidResourceHandle,)
        return (ERROR.cudaSuccess,)

    def _cudaStreamSynchronize(self, stream: Any) -> Any:
        state = self.streams.get(int(stream))
        if state is None:
            return (ERROR.cudaErrorInvalidResourceHandle,)
        if state.capture is not None:
            state.broken = True
            return (ERROR.cudaErrorStreamCaptureUnsupported,)
        self.run_until(int(stream))
        self.time = max(self.time, state.time)
        return (ERROR.cudaSuccess,)

    def _cudaEventCreateWithFlags(self, flags: int) -> Any:
        assert flags in (real.cudaEventDefault, real.cudaEventDisableTiming)
        handle = self._handle()
        self.events[handle] = EventState(timing=flags == real.cudaEventDefault)
        return ERROR.cudaSuccess, real.cudaEvent_t(handle)

    def _cudaEventDestroy(self, event: Any) -> Any:
        if int(event) not in self.events:
            self.journal.violated("an event was destroyed that does not exist")
            return (ERROR.cudaErrorInvalidResourceHandle,)
        del self.events[int(event)]
        return (ERROR.cudaSuccess,)

    def _cudaEventRecord(self, event: Any, stream: Any) -> Any:
        mark = Work("cudaEventRecord", lambda: None)
        status = self.enqueue(int(stream), mark)
        if status == ERROR.cudaSuccess:
            self.events[int(event)].recorded = (int(stream), mark)
        return (status,)

    def _reach(self, recorded: tuple[int, Work] | None) -> float:
        """Brings a stream as far as a mark on it; returns the mark's time."""
        if recorded is None:
            return 0.0
        stream, mark = recorded
        if not mark.done and stream in self.streams:
            self.run_until(stream, mark)
        return mark.ended

    def _cudaEventSynchronize(self, event: Any) -> Any:
        if int(event) not in self.events:
            return (ERROR.cudaErrorInvalidResourceHandle,)
        if self._forbidden_while_capturing("cudaEventSynchronize"):
            return (ERROR.cudaErrorStreamCaptureUnsupported,)
        self.time = max(self.time, self._reach(self.events[int(event)].recorded))
        return (ERROR.cudaSuccess,)

    def _cudaEventElapsedTime(self, start: Any, end: Any) -> Any:
        states = [self.events.get(int(event)) for event in (start, end)]
        if any(state is None or not state.timing or state.recorded is None for state in states):
            return ERROR.cudaErrorInvalidResourceHandle, None
        first, last = (state.recorded[1] for state in states)
        if not (first.done and last.done):
            return ERROR.cudaErrorNotReady, None
        return ERROR.cudaSuccess, float(np.float32((last.ended - first.ended) * 1e3))

    def _cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> Any:
        state, recorded = self.streams.get(int(stream)), self.events[int(event)].recorded

        def wait() -> None:
            state.time = max(state.time, self._reach(recorded))

        return (self.enqueue(int(stream), Work("cudaStreamWaitEvent", wait)),)

    def _cudaStreamIsCapturing(self, stream: Any) -> Any:
        state = self.streams.get(int(stream))
        if state is None:
            return ERROR.cudaErrorInvalidResourceHandle, None
        status = real.cudaStreamCaptureStatus
        active = status.cudaStreamCaptureStatusNone if state.capture is None else status.cudaStreamCaptureStatusActive
        return ERROR.cudaSuccess, active

    def _cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Any:
        assert isinstance(mode, real.cudaStreamCaptureMode)
        state = self.streams[int(stream)]
        state.capture, state.broken = [], False
        return (ERROR.cudaSuccess,)

    def _cudaStreamEndCapture(self, stream: Any) -> Any:
        state = self.streams[int(stream)]
        if state.capture is None:
            return ERROR.cudaErrorIllegalState, None
        recorded, state.capture = state.capture, None
        if state.broken:
            return ERROR.cudaErrorStreamCaptureInvalidated, None
        handle = self._handle()
        self.graphs[handle] = recorded
        return ERROR.cudaSuccess, real.cudaGraph_t(handle)

    def _cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        assert flags == 0
        handle = self._handle()
        self.executables[handle] = list(self.graphs[int(graph)])
        return ERROR.cudaSuccess, real.cudaGraphExec_t(handle)

    def _cudaGraphLaunch(self, executable: Any, stream: Any) -> Any:
        self.enqueue(int(stream), Work("cudaGraphLaunch", lambda: None, seconds=self.costs.graph_launch))
        for work in self.executables[int(executable)]:
            self.enqueue(int(stream), work.again())
        return (ERROR.cudaSuccess,)

    def _cudaGraphDestroy(self, graph: Any) -> Any:
        if self.graphs.pop(int(graph), None) is None:
            self.journal.violated("a graph was destroyed that does not exist")
        return (ERROR.cudaSuccess,)

    def _cudaGraphExecDestroy(self, executable: Any) -> Any:
        if self.executables.pop(int(executable), None) is None:
            self.journal.violated("an executable graph was destroyed that does not exist")
        return (ERROR.cudaSuccess,)
