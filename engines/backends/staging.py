"""Where arrays wait on their way to and from the GPU: memory for the largest, on the device and pinned on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.backend import Arrays, TensorDescription
from engines.backends.loaded_engine import EngineTensor, Shapes
from engines.backends.sdk_calls import SdkCalls
from engines.cuda import DeviceBuffer, PinnedBuffer, Stream

NAN_BYTE = 0xFF
"""A float32 or float16 of these bytes is NaN."""


@dataclasses.dataclass(frozen=True)
class StagedTensor:
    """An input or output with its two places."""

    description: TensorDescription
    dtype: np.dtype[Any]
    device: DeviceBuffer
    pinned: PinnedBuffer

    @property
    def name(self) -> str:
        """The engine's name for it."""
        return self.description.name

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of an array of this ``shape``."""
        return math.prod(shape) * self.dtype.itemsize


class Staging:
    """All inputs and outputs of an engine, and the stream on which they are copied and computed."""

    def __init__(
        self,
        calls: SdkCalls,
        cuda: Any,
        resources: contextlib.ExitStack,
        tensors: Iterable[EngineTensor],
        largest: Shapes,
    ) -> None:
        """Allocates on the current device.

        Args:
            calls: of the SDK.
            cuda: as ``engines.cuda.cuda_runtime`` gives it.
            resources: frees everything, newest first.
            tensors: of the engine.
            largest: the largest shape of each.

        Raises:
            DeviceFailed: a call of CUDA failed.
        """
        self._calls, self._cuda, self._resources = calls, cuda, resources
        self.stream = Stream(cuda)
        resources.callback(self.stream.close)
        made = [(tensor.is_input, self._staged(tensor, largest[tensor.description.name])) for tensor in tensors]
        self.inputs = tuple(tensor for is_input, tensor in made if is_input)
        self.outputs = tuple(tensor for is_input, tensor in made if not is_input)

    def _staged(self, tensor: EngineTensor, shape: tuple[int, ...]) -> StagedTensor:
        dtype = np.dtype(tensor.description.dtype)
        size = math.prod(shape) * dtype.itemsize
        device = DeviceBuffer(self._cuda, size)
        self._resources.callback(device.close)
        pinned = PinnedBuffer(self._cuda, size)
        self._resources.callback(pinned.close)
        return StagedTensor(tensor.description, dtype, device, pinned)

    def fill(self, feeds: Mapping[str, NDArray[Any]]) -> Shapes:
        """Writes the inputs into pinned memory; returns their shapes."""
        for tensor in self.inputs:
            tensor.pinned.array(tensor.dtype, feeds[tensor.name].shape)[...] = feeds[tensor.name]
        return {tensor.name: feeds[tensor.name].shape for tensor in self.inputs}

    def bind(self, context: Any) -> None:
        """Lets an ``IExecutionContext`` read and write the memory on the device.

        Raises:
            DeviceFailed: it refused.
        """
        for tensor in (*self.inputs, *self.outputs):
            self._calls.answer(context.set_tensor_address, tensor.name, tensor.device.address)

    def enqueue(self, context: Any, shapes: Shapes, outputs: Shapes) -> None:
        """Enqueues the copies to the device, the engine and the copies back; returns before they are done.

        Args:
            context: bound, with ``shapes`` set.
            shapes: of the inputs, as filled.
            outputs: of the outputs, which follow from them.

        Raises:
            DeviceFailed: a call of CUDA or of the SDK failed; those before it are under way.
        """
        self.copy_inputs(shapes)
        self.compute(context)
        self.copy_outputs(outputs)

    def copy_inputs(self, shapes: Shapes) -> None:
        """Enqueues the copies to the device of inputs of these ``shapes``.

        Raises:
            DeviceFailed: a call of CUDA failed; those before it are under way.
        """
        for tensor in self.inputs:
            self.stream.copy_to_device(tensor.device, tensor.pinned, tensor.size(shapes[tensor.name]))

    def compute(self, context: Any) -> None:
        """Enqueues the engine alone; ``context`` is bound, with the shapes of the inputs set.

        Raises:
            DeviceFailed: the SDK refused.
        """
        self._calls.answer(context.execute_async_v3, self.stream.handle)

    def copy_outputs(self, outputs: Shapes) -> None:
        """Enqueues the copies to the host of ``outputs`` of these shapes.

        Raises:
            DeviceFailed: a call of CUDA failed; those before it are under way.
        """
        for tensor in self.outputs:
            self.stream.copy_to_host(tensor.pinned, tensor.device, tensor.size(outputs[tensor.name]))

    def spoil_outputs(self, outputs: Shapes) -> None:
        """Enqueues the filling of ``outputs`` on the device with NaN; only what is computed afterwards is found there.

        Raises:
            DeviceFailed: a call of CUDA failed; those before it are under way.
        """
        for tensor in self.outputs:
            size = tensor.size(outputs[tensor.name])
            tensor.pinned.array(np.uint8, (size,)).fill(NAN_BYTE)
            self.stream.copy_to_device(tensor.device, tensor.pinned, size)

    def results(self, outputs: Shapes) -> Arrays:
        """Copies of what lies in pinned memory, once the stream has been synchronised."""
        return {tensor.name: tensor.pinned.array(tensor.dtype, outputs[tensor.name]).copy() for tensor in self.outputs}
