"""A deserialized engine: what it says of its inputs and outputs, and the contexts that it is executed in.

Its contexts are given the memory for their activations, one block for all of them: only one may be at work at a time.
The SDK frees an object when nothing refers to it any more, which ``close`` sees to, newest first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np

from engines.backends.backend import TensorDescription
from engines.backends.sdk_calls import SdkCalls
from engines.cuda import DeviceBuffer
from engines.errors import DeviceFailed, InputRejected
from engines.runtime_cache import RuntimeCacheFile

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class EngineTensor:
    """An input or output as the engine describes it; ``profile`` is the smallest and largest shape of an input."""

    description: TensorDescription
    profile: tuple[tuple[int, ...], tuple[int, ...]] | None

    @property
    def is_input(self) -> bool:
        """Whether it is read; only inputs have a profile."""
        return self.profile is not None


class LoadedEngine:
    """An engine in GPU memory; ``tensors`` in its own order, ``batch`` the smallest and the largest that it takes.

    ``profile`` has the smallest and the largest shape of each input.
    """

    def __init__(self, calls: SdkCalls, cuda: Any, engine: bytes, cache_file: RuntimeCacheFile | None) -> None:
        """Deserializes ``engine`` on the current device, unchecked.

        Args:
            calls: of the SDK that made it.
            cuda: as ``engines.cuda.cuda_runtime`` gives it.
            engine: a whole plan: native code.
            cache_file: where TensorRT for RTX keeps its kernels; None for nowhere.

        Raises:
            DeviceFailed: a call failed; everything is freed.
            InputRejected: it cannot be run by giving it plain arrays on the GPU; everything is freed.
        """
        self.calls = calls
        self._failed = False
        self._resources = contextlib.ExitStack()
        try:
            self._deserializer = calls.answer(calls.trt.Runtime, calls.logger)
            self._resources.callback(self._drop, "_deserializer")
            self._engine = calls.answer(self._deserializer.deserialize_cuda_engine, engine)
            self._resources.callback(self._drop, "_engine")
            self.tensors = engine_tensors(calls, self._engine)
            self.batch = common_batch(calls, self.tensors)
            self.profile = {tensor.description.name: tensor.profile for tensor in self.tensors if tensor.profile}
            self._configure(cache_file)
            self._activations = DeviceBuffer(cuda, self._engine.device_memory_size_v2)
            self._resources.callback(self._activations.close)
        except BaseException:
            with contextlib.suppress(DeviceFailed):
                self.close(failed=True)
            raise

    def new_context(self) -> Any:
        """An ``IExecutionContext`` on the shared memory for activations.

        Raises:
            DeviceFailed: a call failed.
        """
        context = self.calls.answer(self._engine.create_execution_context, self._config)
        self.calls.command(context.set_device_memory, self._activations.address, self._activations.size)
        return context

    def set_shapes(self, context: Any, shapes: Shapes) -> Shapes:
        """Sets the shapes of all inputs; returns those of the outputs.

        Raises:
            DeviceFailed: a call failed, as it does for a shape outside of the profile.
            InputRejected: an output's shape does not follow from them.
        """
        for name, shape in shapes.items():
            self.calls.answer(context.set_input_shape, name, shape)
        names = [tensor.description.name for tensor in self.tensors if not tensor.is_input]
        outputs = {name: _extents(self.calls.answer(context.get_tensor_shape, name)) for name in names}
        for name, shape in outputs.items():
            if min(shape, default=0) < 0:
                where = self.calls.where
                raise InputRejected(f"{where}: the shape of {name} depends on its input; build the engine again")
        return outputs

    def close(self, *, failed: bool) -> None:
        """Frees everything; its contexts are gone by then.

        Args:
            failed: a call failed before, so that nothing is worth keeping.

        Raises:
            DeviceFailed: freeing failed; the rest was freed all the same.
        """
        self._failed = failed
        self._resources.close()

    def _drop(self, name: str) -> None:
        setattr(self, name, None)

    def _configure(self, cache_file: RuntimeCacheFile | None) -> None:
        calls, trt = self.calls, self.calls.trt
        self._config = calls.answer(self._engine.create_runtime_config)
        self._resources.callback(self._drop, "_config")
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        calls.command(self._config.set_execution_context_allocation_strategy, strategy)
        if hasattr(self._config, "create_runtime_cache"):
            # By default the first few runs of a shape would use other kernels than the later ones, and a graph too.
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._config.dynamic_shapes_kernel_specialization_strategy = eager
            if cache_file is not None:
                with contextlib.suppress(DeviceFailed):  # it only saves time
                    self._use_cache(cache_file)

    def _use_cache(self, cache_file: RuntimeCacheFile) -> None:
        self._cache = self.calls.answer(self._config.create_runtime_cache)
        self._resources.callback(self._drop, "_cache")
        kernels = cache_file.read()
        if kernels is not None and self.calls.command(self._cache.deserialize, kernels) is not True:
            kernels = None
        self.calls.answer(self._config.set_runtime_cache, self._cache)
        self._resources.callback(self._save_cache, cache_file, kernels and _digest(kernels))

    def _save_cache(self, cache_file: RuntimeCacheFile, known: bytes | None) -> None:
        """Writes the kernels if there are others than the ``known`` ones."""
        if self._failed:
            return
        with contextlib.suppress(DeviceFailed):
            kernels = bytes(self.calls.answer(self._cache.serialize))
            if kernels and _digest(kernels) != known:
                cache_file.write(kernels)


def engine_bytes(path: pathlib.Path) -> bytes:
    """The file's content.

    Raises:
        InputRejected: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _extents(dims: Any) -> tuple[int, ...]:
    return tuple(int(extent) for extent in tuple(dims))


def engine_tensors(calls: SdkCalls, engine: Any) -> tuple[EngineTensor, ...]:
    """Every input and output, in the engine's order. Of its optimization profiles the first is used.

    Args:
        calls: of the SDK that the engine is of.
        engine: an ``ICudaEngine``.

    Raises:
        InputRejected: a tensor that is not a plain array in GPU memory.
    """
    trt = calls.trt
    tensors = []
    for index in range(engine.num_io_tensors):
        name = calls.answer(engine.get_tensor_name, index)
        on_gpu = calls.answer(engine.get_tensor_location, name) == trt.TensorLocation.DEVICE
        if not on_gpu or calls.answer(engine.get_tensor_format, name) != trt.TensorFormat.LINEAR:
            raise InputRejected(f"{calls.where}: {name} is not a plain array on the GPU; build the engine again")
        try:
            dtype = np.dtype(trt.nptype(calls.answer(engine.get_tensor_dtype, name)))
        except TypeError as error:
            raise InputRejected(
                f"{calls.where}: {name} has a type that numpy has not; build the engine again"
            ) from error
        extents = _extents(calls.answer(engine.get_tensor_shape, name))
        shape = tuple(None if extent < 0 else extent for extent in extents)
        profile = None
        if calls.answer(engine.get_tensor_mode, name) == trt.TensorIOMode.INPUT:
            least, _, most = calls.answer(engine.get_tensor_profile_shape, name, 0)
            profile = (_extents(least), _extents(most))
        tensors.append(EngineTensor(TensorDescription(name, str(dtype), shape), profile))
    return tuple(tensors)


def common_batch(calls: SdkCalls, tensors: tuple[EngineTensor, ...]) -> tuple[int, int]:
    """The smallest and largest batch that every input takes.

    Raises:
        InputRejected: there is no input, or none of its shapes has a batch, or they have no batch in common.
    """
    profiles = [tensor.profile for tensor in tensors if tensor.profile is not None]
    if not profiles or not all(least and most for least, most in profiles):
        raise InputRejected(f"{calls.where}: its inputs have no batch as their first extent; build the engine again")
    least, most = max(least[0] for least, _ in profiles), min(most[0] for _, most in profiles)
    if least > most:
        raise InputRejected(f"{calls.where}: its inputs have no batch in common; build the engine again")
    return least, most
