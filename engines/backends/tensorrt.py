"""Compiled engines on a GPU, by TensorRT or by TensorRT for RTX.

The two have the same Python interface, so the SDK is a parameter here, as in ``engines.compiler``. What only TensorRT
for RTX has is asked for by name: its cache of kernels, and whether a context can be recorded.

    run       numpy in, numpy out: pinned staging, copies and kernels on one stream of its own, one synchronisation
    enqueue   device arrays in and out on the caller's stream: no copy, no synchronisation

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
from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from engines.backends.backend import Arrays, Profile, TensorDescription, check_extents
from engines.backends.loaded_engine import LoadedEngine, Shapes
from engines.backends.recordings import Recordings
from engines.backends.sdk_calls import SdkCalls, imported_sdk
from engines.backends.staging import StagedTensor, Staging
from engines.cuda import (
    Event,
    checked,
    compute_capability,
    cuda_runtime,
    is_capturing,
    selected_device,
)
from engines.device_arrays import DeviceArray, device_array, fitting_shape, require, stream_handle
from engines.errors import DeviceFailed, InputRejected, UsageError, listed
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
            arrays = self._device_arrays(self._staging.inputs, inputs, handle)
            shapes = self._checked_shapes(arrays)
            arrays |= self._device_arrays(self._staging.outputs, outputs, handle)
            expected = self._loaded.set_shapes(self._context, shapes)
            for tensor in self._staging.outputs:
                require(tensor.name, arrays[tensor.name], tensor.dtype, expected[tensor.name], written=True)
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
        self._resources.callback(self._drain)
        if graph:
            self._recordings = Recordings(self._cuda, self._resources, loaded, self._staging)

    def _close_loaded(self) -> None:
        self._loaded.close(failed=self._failed)

    def _drain(self) -> None:
        """Nothing that was enqueued, on any stream, needs what is freed next."""
        if self._in_flight:
            self._done.hold_back(self._staging.stream.handle)
        self._staging.stream.synchronize()

    def _device_arrays(
        self, tensors: tuple[StagedTensor, ...], given: Mapping[str, Any], stream: int
    ) -> dict[str, DeviceArray]:
        names = [tensor.name for tensor in tensors]
        if sorted(given) != sorted(names):
            raise UsageError(f"device arrays were given for {listed(sorted(given))}, the engine has {listed(names)}")
        return {name: device_array(name, given[name], device=self._device, stream=stream) for name in names}

    def _checked_shapes(self, arrays: Mapping[str, DeviceArray]) -> Shapes:
        """The inputs' shapes, which agree with the engine's and with one batch of its profile."""
        least, most = self.batch
        name, first = next(iter(arrays.items()))
        batch = first.shape[0] if first.shape else 0
        if not least <= batch <= (most or batch):
            raise UsageError(f"{name}: a batch of {batch} is outside of the engine's profile, {least} to {most}")
        for tensor in self._staging.inputs:
            array, (_, largest) = arrays[tensor.name], self.profile[tensor.name]
            expected = fitting_shape(tensor.description.shape, largest, array.shape, batch)
            require(tensor.name, array, tensor.dtype, expected, written=False)
            check_extents(tensor.name, array.shape, self.profile)
        return {name: array.shape for name, array in arrays.items()}

    def _hold_back_for(self, arrays: Mapping[str, DeviceArray], stream: int) -> None:
        """Lets ``stream`` wait for those who compute the arrays, and for whoever uses the activations' memory."""
        producers = {array.stream for array in arrays.values() if array.stream is not None}
        for producer in producers - {stream}:
            self._produced.record(producer)
            self._produced.hold_back(stream)
        if self._in_flight:
            self._done.hold_back(stream)


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
