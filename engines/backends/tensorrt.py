"""Compiled engines on a GPU, by TensorRT or by TensorRT for RTX.

The two have the same Python interface, so the SDK is a parameter here, as in ``engines.compiler``. What only TensorRT
for RTX has is asked for by name: its cache of kernels, and whether a context can be recorded.

    run       numpy in, numpy out: pinned staging, copies and kernels on one stream of its own, one synchronisation
    enqueue   device arrays in and out on the caller's stream: no copy, no synchronisation

Everything is allocated once, for the profile's maximum, and freed in reverse order by ``close``, also after a failure.
With ``graph``, ``run`` records the copies and kernels of each input shape as a CUDA graph after the first run of that
shape, and launches it from then on. A recorded graph is bound to the state of its execution context, so each has a
context of its own that nothing touches afterwards. All contexts share one block of memory for activations; their work
is therefore always ordered, across streams by an event. Where recording fails, that shape goes on without.

The engine's bytes are hashed as they are read, and those very bytes are deserialized: a file that is replaced after
``engines.integrity`` looked at it is refused. One thread at a time is let in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.backend import Arrays, TensorDescription
from engines.backends.loaded_engine import EngineTensor, LoadedEngine, Shapes
from engines.backends.sdk_calls import SdkCalls, imported_sdk
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
from engines.device_arrays import DeviceArray, device_array, require, stream_handle
from engines.errors import DeviceFailed, InputRejected, UsageError, listed
from engines.integrity import check_card, check_sdk_installed, check_sdk_version
from engines.manifest import Manifest
from engines.plan import Header
from engines.runtime_cache import RuntimeCacheFile
from engines.sdk import SDKS, gpu_compute_capability

MOST_GRAPHS = 16
"""Input shapes that are recorded, each with a context of its own; those that come later run plainly."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """An input or output with its memory on the device and its staging on the host."""

    description: TensorDescription
    dtype: np.dtype[Any]
    device: DeviceBuffer
    pinned: PinnedBuffer

    @property
    def name(self) -> str:
        return self.description.name

    def size(self, shape: tuple[int, ...]) -> int:
        """In bytes."""
        return math.prod(shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """A graph, the context that it is bound to, and the shapes of the outputs."""

    graph: Graph
    context: Any
    outputs: Shapes


class TensorRT:
    """A deserialized engine; see ``engines.backends.backend.Backend``."""

    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]
    batch: tuple[int, int | None]

    @classmethod
    def open(
        cls,
        path: pathlib.Path,
        header: Header,
        manifest: Manifest | None,
        *,
        sdk_module_name: str,
        device: int = 0,
        graph: bool = True,
    ) -> TensorRT:
        """Checks SDK, version, GPU and card, in this order, then deserializes the engine.

        Args:
            path: the engine.
            header: as ``engines.integrity.checked_engine`` gives it.
            manifest: as ``engines.integrity.checked_engine`` gives it; None for an engine that is loaded unverified.
            sdk_module_name: ``"tensorrt"`` or ``"tensorrt_rtx"``.
            device: index of the GPU.
            graph: records a CUDA graph per input shape.

        Raises:
            SdkMissing: the SDK, cuda-bindings or a fitting GPU is not here.
            UsageError: there is no GPU of that index.
            InputRejected: the file is not the one that was checked, or is no engine that can be run this way.
            DeviceFailed: a call of CUDA or TensorRT failed.
        """
        sdk = next(sdk for sdk in SDKS if sdk.module == sdk_module_name)
        check_sdk_installed(path, header, manifest)
        trt = imported_sdk(sdk)
        version = str(trt.__version__)
        check_sdk_version(path, header, manifest, version)
        if gpu_compute_capability() is None:
            check_card(path, header, manifest, None)
        cuda = cuda_runtime(sdk.install)
        card = compute_capability(cuda, device)
        check_card(path, header, manifest, card)
        engine = _read(path)
        cache_file = None
        if manifest is not None:
            digest = hashlib.sha256(engine).hexdigest()
            if digest != manifest.sha256["engine"]:
                raise InputRejected(f"{path}: was replaced while it was loaded; load it again")
            cache_file = RuntimeCacheFile.beside(path, digest, version, card)
        calls = SdkCalls(trt, f"{path}: {sdk.title}")
        return cls(calls, cuda, engine, cache_file, device=device, graph=graph)

    def __init__(
        self,
        calls: SdkCalls,
        cuda: Any,
        engine: bytes,
        cache_file: RuntimeCacheFile | None,
        *,
        device: int,
        graph: bool,
    ) -> None:
        """Deserializes ``engine`` unchecked; ``open`` is the way in."""
        self._calls, self._cuda, self._device, self._graph = calls, cuda, device, graph
        self._lock = threading.Lock()
        self._resources = contextlib.ExitStack()
        self._graphs: dict[tuple[tuple[int, ...], ...], _Recorded | None] = {}
        self._closed = self._failed = self._in_flight = False
        try:
            with selected_device(cuda, device):
                self._loaded = LoadedEngine(calls, cuda, engine, cache_file)
                self._resources.callback(self._close_loaded)
                self.batch = self._loaded.batch
                self._allocate()
                self.inputs = tuple(tensor.description for tensor in self._inputs)
                self.outputs = tuple(tensor.description for tensor in self._outputs)
        except BaseException:
            self._failed = True
            self.close()
            raise

    @property
    def graphs(self) -> int:
        """How many input shapes are launched as a CUDA graph by now."""
        return sum(recorded is not None for recorded in self._graphs.values())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Computes one batch; the arrays returned are the caller's.

        Raises:
            DeviceFailed: a call of CUDA or TensorRT failed.
            UsageError: the engine was closed.
        """
        with self._entered(self._stream.handle):
            if self._in_flight:
                self._done.hold_back(self._stream.handle)
            for tensor in self._inputs:
                tensor.pinned.array(tensor.dtype, feeds[tensor.name].shape)[...] = feeds[tensor.name]
            shapes = {tensor.name: feeds[tensor.name].shape for tensor in self._inputs}
            key = tuple(shapes.values())
            recorded = self._graphs.get(key)
            if recorded is None:
                outputs = self._prepare(self._context, shapes)
                self._enqueue_staged(self._context, shapes, outputs)
            else:
                outputs = recorded.outputs
                recorded.graph.launch()
            self._stream.synchronize()
            self._in_flight = False
            arrays = {
                tensor.name: tensor.pinned.array(tensor.dtype, outputs[tensor.name]).copy() for tensor in self._outputs
            }
            if self._graph and key not in self._graphs:
                self._record(key, shapes)
            return arrays

    def enqueue(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], stream: Any) -> None:
        """Enqueues one batch on the caller's stream and returns at once; nothing is copied.

        The arrays must stay alive, and the inputs unchanged, until the stream has come past this work.

        Args:
            inputs: a device array per input, with the engine's dtype; the first extent is the batch.
            outputs: a device array per output, of the right shape, to be written.
            stream: a handle as an ``int``, or a stream of PyTorch, CuPy, PyCUDA or cuda.core.

        Raises:
            UsageError: names, dtypes, shapes, device or batch are not the engine's; the stream is recording a graph;
                the engine was closed.
            DeviceFailed: a call of CUDA or TensorRT failed.
        """
        handle = stream_handle(stream)
        with self._entered(handle):
            if is_capturing(self._cuda, handle):
                raise UsageError(
                    "stream: it is recording a CUDA graph, which would be bound to a state of this engine that the "
                    "next call changes; enqueue outside of the recording"
                )
            arrays = self._device_arrays(self._inputs, inputs, handle)
            batch = self._batch_of(arrays)
            for tensor in self._inputs:
                array = arrays[tensor.name]
                require(tensor.name, array, tensor.dtype, _with_batch(tensor, array.shape, batch), written=False)
            shapes = {name: array.shape for name, array in arrays.items()}
            written = self._device_arrays(self._outputs, outputs, handle)
            expected = self._loaded.set_shapes(self._context, shapes)
            for tensor in self._outputs:
                require(tensor.name, written[tensor.name], tensor.dtype, expected[tensor.name], written=True)
            arrays.update(written)
            for name, array in arrays.items():
                self._calls.answer(self._context.set_tensor_address, name, array.address)
            self._hold_back_for(arrays, handle)
            self._in_flight = True
            self._calls.answer(self._context.execute_async_v3, handle)
            self._done.record(handle)

    def close(self) -> None:
        """Frees everything, newest first; whatever fails, the rest is freed too. The second time it does nothing.

        Raises:
            DeviceFailed: freeing failed, and nothing before it had.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            status, before = self._cuda.cudaGetDevice()
            try:
                with contextlib.ExitStack() as steps:  # last in, first out, whichever of them fails
                    if status == self._cuda.cudaError_t.cudaSuccess and before != self._device:
                        steps.callback(self._cuda.cudaSetDevice, before)
                    steps.push(self._resources)
                    steps.callback(checked, self._cuda, self._cuda.cudaSetDevice, self._device)
            except DeviceFailed:
                if not self._failed:
                    raise

    @contextlib.contextmanager
    def _entered(self, stream: int) -> Iterator[None]:
        """One thread, the right device, still open. After a failure nothing of it goes on on ``stream``."""
        with self._lock:
            if self._closed:
                raise UsageError("this engine was closed; load it again")
            with selected_device(self._cuda, self._device):
                try:
                    yield
                except UsageError:
                    raise
                except BaseException as error:
                    self._failed = self._failed or isinstance(error, DeviceFailed)
                    self._cuda.cudaStreamSynchronize(stream)
                    raise

    def _allocate(self) -> None:
        loaded = self._loaded
        self._stream = self._owned(Stream(self._cuda))
        self._done, self._produced = self._owned(Event(self._cuda)), self._owned(Event(self._cuda))
        self._context = loaded.new_context()
        self._resources.callback(setattr, self, "_context", None)
        largest = {
            tensor.description.name: tensor.profile[1] for tensor in loaded.tensors if tensor.profile is not None
        }
        largest |= loaded.set_shapes(self._context, largest)
        self._inputs = tuple(self._staged(tensor, largest) for tensor in loaded.tensors if tensor.is_input)
        self._outputs = tuple(self._staged(tensor, largest) for tensor in loaded.tensors if not tensor.is_input)
        self._resources.callback(self._drain)

    def _staged(self, tensor: EngineTensor, largest: Shapes) -> _Tensor:
        dtype, shape = np.dtype(tensor.description.dtype), largest[tensor.description.name]
        if min(shape, default=0) < 0:
            name = tensor.description.name
            raise InputRejected(
                f"{self._calls.where}: the shape of {name} depends on its input; build the engine again"
            )
        size = math.prod(shape) * dtype.itemsize
        device = self._owned(DeviceBuffer(self._cuda, size))
        return _Tensor(tensor.description, dtype, device, self._owned(PinnedBuffer(self._cuda, size)))

    def _owned(self, thing: Any) -> Any:
        self._resources.callback(thing.close)
        return thing

    def _close_loaded(self) -> None:
        self._loaded.close(failed=self._failed)

    def _drain(self) -> None:
        """Nothing that was enqueued, on any stream, needs what is freed next."""
        if self._in_flight:
            self._done.hold_back(self._stream.handle)
        self._stream.synchronize()

    def _prepare(self, context: Any, shapes: Shapes) -> Shapes:
        """Lets the context work on the staged buffers; returns the outputs' shapes."""
        for tensor in (*self._inputs, *self._outputs):
            self._calls.answer(context.set_tensor_address, tensor.name, tensor.device.address)
        return self._loaded.set_shapes(context, shapes)

    def _enqueue_staged(self, context: Any, shapes: Shapes, outputs: Shapes) -> None:
        for tensor in self._inputs:
            self._stream.copy_to_device(tensor.device, tensor.pinned, tensor.size(shapes[tensor.name]))
        self._calls.answer(context.execute_async_v3, self._stream.handle)
        for tensor in self._outputs:
            self._stream.copy_to_host(tensor.pinned, tensor.device, tensor.size(outputs[tensor.name]))

    def _record(self, key: tuple[tuple[int, ...], ...], shapes: Shapes) -> None:
        """Records a graph for these shapes, once the context has done what a new shape makes it do."""
        full = self.graphs >= MOST_GRAPHS
        self._graphs[key] = None  # whatever comes now, it is not tried again
        if full:
            return
        handle = self._stream.handle
        try:
            context = self._loaded.new_context()
            outputs = self._prepare(context, shapes)
            self._enqueue_staged(context, shapes, outputs)
            self._stream.synchronize()
            if hasattr(context, "is_stream_capturable"):
                self._calls.answer(context.is_stream_capturable, handle)
            graph = Graph(self._cuda, self._stream, lambda: self._enqueue_staged(context, shapes, outputs))
        except DeviceFailed:
            self._cuda.cudaStreamSynchronize(handle)  # a broken device says so again in the next run
            return
        self._graphs[key] = _Recorded(graph, context, outputs)
        self._resources.callback(self._graphs.pop, key)
        self._owned(graph)

    def _device_arrays(
        self, tensors: tuple[_Tensor, ...], given: Mapping[str, Any], stream: int
    ) -> dict[str, DeviceArray]:
        names = [tensor.name for tensor in tensors]
        if sorted(given) != sorted(names):
            raise UsageError(f"device arrays were given for {listed(sorted(given))}, the engine has {listed(names)}")
        return {name: device_array(name, given[name], device=self._device, stream=stream) for name in names}

    def _batch_of(self, arrays: Mapping[str, DeviceArray]) -> int:
        name, array = next(iter(arrays.items()))
        batch = array.shape[0] if array.shape else 0
        least, most = self.batch
        if not least <= batch <= (most or batch):
            raise UsageError(f"{name}: a batch of {batch} is outside of the engine's profile, {least} to {most}")
        return batch

    def _hold_back_for(self, arrays: Mapping[str, DeviceArray], stream: int) -> None:
        """Lets ``stream`` wait for those who compute the arrays, and for whoever uses the activations' memory."""
        for producer in {array.stream for array in arrays.values()} - {None, stream}:
            self._produced.record(producer)
            self._produced.hold_back(stream)
        if self._in_flight:
            self._done.hold_back(stream)


def _with_batch(tensor: _Tensor, shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """The engine's shape of an input, with its free extents from ``shape``."""
    fixed = tensor.description.shape
    if len(shape) != len(fixed):
        return tuple(extent or batch for extent in fixed)
    free = (batch, *shape[1:])
    return tuple(given if extent is None else extent for extent, given in zip(fixed, free, strict=True))


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
