"""Compiled engines on a GPU, by TensorRT or by TensorRT for RTX.

The two have the same Python interface, so the SDK is a parameter here, as in ``engines.compiler``. What only TensorRT
for RTX has is asked for by name: its cache of kernels, and whether a context can be recorded.

    run       numpy in, numpy out: pinned staging, copies and kernels on one stream of its own, one synchronisation
    enqueue   device arrays in and out on the caller's stream: no copy, no synchronisation
    queries   one batch again and again, timed by the GPU (``engines.backends.device_queries``)

Everything is allocated once, for the largest shapes, and freed in reverse order by ``close``, also after a failure.
With ``graph``, ``run`` launches a shape that it has seen before as a CUDA graph (``engines.backends.recordings``). All
contexts share one block of memory for activations; their work is therefore always ordered, across streams by an event.

The engine's bytes are hashed as they are read, and those very bytes are deserialized: a file that is replaced after
``engines.integrity`` looked at it is refused. One thread at a time is let in.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from engines.backends.backend import Arrays, Profile, TensorDescription
from engines.backends.callers_arrays import checked_shapes, device_arrays
from engines.backends.device_queries import DeviceQueries, Turns
from engines.backends.loaded_engine import LoadedEngine, engine_bytes
from engines.backends.recordings import Recordings
from engines.backends.sdk_calls import SdkCalls, imported_sdk
from engines.backends.staging import Staging
from engines.cuda import (
    Event,
    Stream,
    close_on_device,
    compute_capability,
    cuda_runtime,
    is_capturing,
    selected_device,
)
from engines.device_arrays import DeviceArray, require, stream_handle
from engines.errors import DeviceFailed, InputRejected, UsageError
from engines.integrity import check_card, check_sdk_installed, check_sdk_version
from engines.manifest import Manifest
from engines.plan import Header
from engines.runtime_cache import RuntimeCacheFile
from engines.sdk import SDKS, gpu_compute_capability


class TensorRT:
    """A deserialized engine; see ``engines.backends.backend.Backend``."""

    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]
    batch: tuple[int, int | None]
    profile: Profile

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
            InputRejected: the file is not the one that was checked, or is no engine that can be run this way.
            DeviceFailed: there is no GPU of that index, or a call of CUDA or TensorRT failed.
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
        engine = engine_bytes(path)
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
        self._calls, self._cuda, self._device = calls, cuda, device
        self._lock = threading.Lock()
        self._resources = contextlib.ExitStack()
        self._recordings: Recordings | None = None
        self._closed = self._failed = self._in_flight = False
        try:
            with selected_device(cuda, device):
                self._loaded = LoadedEngine(calls, cuda, engine, cache_file)
                self._resources.callback(self._close_loaded)
                self.batch = self._loaded.batch
                self.profile = self._loaded.profile
                self._allocate(self._loaded, graph=graph)
                self.inputs = tuple(tensor.description for tensor in self._staging.inputs)
                self.outputs = tuple(tensor.description for tensor in self._staging.outputs)
        except BaseException:
            self._failed = True
            self.close()
            raise

    @property
    def graphs(self) -> int:
        """How many input shapes are launched as a CUDA graph by now."""
        return 0 if self._recordings is None else self._recordings.count

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Computes one batch; the arrays returned are the caller's.

        Raises:
            DeviceFailed: a call of CUDA or TensorRT failed.
            UsageError: the engine was closed.
        """
        staging = self._staging
        with self._entered(staging.stream.handle):
            if self._in_flight:
                self._done.hold_back(staging.stream.handle)
            shapes = staging.fill(feeds)
            outputs = None if self._recordings is None else self._recordings.launch(shapes)
            if outputs is None:
                staging.bind(self._context)
                outputs = self._loaded.set_shapes(self._context, shapes)
                staging.enqueue(self._context, shapes, outputs)
            staging.stream.synchronize()
            self._in_flight = False
            arrays = staging.results(outputs)
            if self._recordings is not None:
                self._recordings.record(shapes)
            return arrays

    def enqueue(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], stream: Any) -> None:
        """Enqueues one batch on the caller's stream and returns at once; nothing is copied.

        The arrays must stay alive, and the inputs unchanged, until the stream has come past this work.

        Args:
            inputs: a device array per input, with the engine's dtype; the first extent is the batch.
            outputs: a device array per output, of the right shape, to be written.
            stream: a handle as an ``int``, or a stream of PyTorch, CuPy, PyCUDA or cuda.core.

        Raises:
            UsageError: an array or the batch does not fit, the stream is recording a graph, the engine was closed.
            DeviceFailed: a call of CUDA or TensorRT failed.
        """
        handle = stream_handle(stream)
        with self._entered(handle):
            if is_capturing(self._cuda, handle):
                raise UsageError(
                    "stream: it is recording a CUDA graph, which would be bound to a state of this engine that the "
                    "next call changes; enqueue outside of the recording"
                )
            arrays = device_arrays(self._staging.inputs, inputs, device=self._device, stream=handle)
            shapes = checked_shapes(self._staging.inputs, arrays, self.batch, self.profile)
            arrays |= device_arrays(self._staging.outputs, outputs, device=self._device, stream=handle)
            expected = self._loaded.set_shapes(self._context, shapes)
            for tensor in self._staging.outputs:
                require(tensor.name, arrays[tensor.name], tensor.dtype, expected[tensor.name], written=True)
            for name, array in arrays.items():
                self._calls.answer(self._context.set_tensor_address, name, array.address)
            self._hold_back_for(arrays, handle)
            self._in_flight = True
            self._calls.answer(self._context.execute_async_v3, handle)
            self._done.record(handle)

    def queries(
        self, feeds: Mapping[str, NDArray[Any]], *, graph: bool, transfers: bool, clock: Callable[[], float]
    ) -> DeviceQueries:
        """One batch to be computed again and again, and timed; closing the engine closes it too.

        Args:
            feeds: as ``run`` takes them.
            graph: whether to launch the engine as a CUDA graph.
            transfers: whether the copies to the GPU and back belong to a query.
            clock: the host's, in seconds.

        Raises:
            DeviceFailed: a call of CUDA or TensorRT failed.
            UsageError: the engine was closed.
        """
        turns = Turns(self._entered, self._settle, self._free_in_turn)
        with self._entered(self._staging.stream.handle):
            self._settle(self._staging.stream)
            resources = contextlib.ExitStack()
            self._resources.push(resources)
            return DeviceQueries(
                turns, self._loaded, self._cuda, resources, feeds, graph=graph, transfers=transfers, clock=clock
            )

    def close(self) -> None:
        """Frees everything, newest first; whatever fails, the rest is freed too. The second time it does nothing.

        Raises:
            DeviceFailed: freeing failed, and nothing before it had.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._free(self._resources)

    def _free(self, resources: contextlib.ExitStack) -> None:
        """Closes ``resources``; of this engine's failures only the first is told."""
        try:
            close_on_device(self._cuda, self._device, resources)
        except DeviceFailed:
            if not self._failed:
                self._failed = True
                raise

    def _free_in_turn(self, resources: contextlib.ExitStack) -> None:
        with self._lock:
            self._free(resources)

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

    def _allocate(self, loaded: LoadedEngine, *, graph: bool) -> None:
        """Contexts and memory, in the order opposite to that in which they are freed."""
        self._context = loaded.new_context()
        self._resources.callback(setattr, self, "_context", None)
        self._done = Event(self._cuda)
        self._resources.callback(self._done.close)
        self._produced = Event(self._cuda)
        self._resources.callback(self._produced.close)
        largest = {name: most for name, (_, most) in self.profile.items()}
        largest |= loaded.set_shapes(self._context, largest)
        self._staging = Staging(self._calls, self._cuda, self._resources, loaded.tensors, largest)
        self._resources.callback(self._settle, self._staging.stream)
        if graph:
            self._recordings = Recordings(self._cuda, self._resources, loaded, self._staging)

    def _close_loaded(self) -> None:
        self._loaded.close(failed=self._failed)

    def _settle(self, stream: Stream) -> None:
        """Waits on ``stream`` until nothing that was enqueued on any other uses the activations' memory."""
        if self._in_flight:
            self._done.hold_back(stream.handle)
        stream.synchronize()
        self._in_flight = False

    def _hold_back_for(self, arrays: Mapping[str, DeviceArray], stream: int) -> None:
        """Lets ``stream`` wait for those who compute the arrays, and for whoever uses the activations' memory."""
        producers = {array.stream for array in arrays.values() if array.stream is not None}
        for producer in producers - {stream}:
            self._produced.record(producer)
            self._produced.hold_back(stream)
        if self._in_flight:
            self._done.hold_back(stream)
