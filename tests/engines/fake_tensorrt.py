"""TensorRT without a GPU: the names and signatures of real bindings, ONNX Runtime for the arithmetic.

``FakeTensorRT`` stands in for the module of one SDK. It has the names that the real bindings of that version have
(``tests.engines.sdk_bindings``) and no others, and takes as many arguments as their docstrings say. An engine is a
file that this module writes: a header as the real one's, the profile, and the ONNX file that ``execute_async_v3``
computes, on the memory at the addresses that were set, when the stream of ``tests.engines.fake_cuda`` gets to it. The
file also says how long that takes in pretended time, for a batch and for each of its images.
"""

from __future__ import annotations

import ctypes
import functools
import json
import struct
import weakref
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import tensorrt_rtx as real

from tests.engines.fake_cuda import FakeCuda, Journal, Work
from tests.engines.sdk_bindings import Bindings, argument_counts

HEADER = 64
ACTIVATIONS = 4096
TAGS = {"tensorrt": b"ftrt", "tensorrt_rtx": b"vtrt"}
CACHE_TAG = b"kernels:"


Shapes = list[tuple[int, ...]]


def engine_bytes(
    onnx: bytes,
    sdk: str,
    version: str,
    profile: Shapes,
    mask: int = 0x7E,
    seconds: tuple[float, float] = (0.0, 0.0),
) -> bytes:
    """An engine file whose header a reader of real ones takes.

    ``profile`` has three shapes of its input; ``seconds`` is what a batch takes, and each of its images.
    """
    payload = json.dumps({"profile": profile, "onnx": len(onnx), "seconds": seconds}).encode() + b"\n" + onnx
    numbers = [int(part) for part in version.split(".")]
    tag = TAGS[sdk]
    header = struct.pack(
        "<4s4xQQ4B4sI", tag, 2, HEADER + len(payload), *(number % 256 for number in numbers), tag, mask
    )
    return header.ljust(HEADER, b"\0") + payload


@functools.cache
def session_of(onnx: bytes) -> onnxruntime.InferenceSession:
    """ONNX Runtime's, once for each file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


class FakeTensorRT:
    """The module ``tensorrt`` or ``tensorrt_rtx``."""

    def __init__(self, bindings: Bindings, journal: Journal, cuda: FakeCuda) -> None:
        self._bindings, self._journal, self._cuda = bindings, journal, cuda
        self._raises = False
        self._compiled: list[tuple[Any, ...]] = []
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self._destroyed: list[str] = []
        self.__version__ = bindings.version

    def __getattr__(self, name: str) -> Any:
        if name not in self._bindings.members:
            raise AttributeError(f"module {self._bindings.version} has no attribute {name}")
        if name == "Runtime":
            return self._factory
        return getattr(real, name)

    @property
    def _factory(self) -> Any:
        def create(logger: Any) -> Any:
            assert isinstance(logger, real.ILogger)
            self._logger = logger
            return self._made("Runtime", RuntimeState(self))

        return self._callable("Runtime.__init__", create, "Runtime")

    def _made(self, kind: str, state: Any) -> Any:
        self._alive.add(state)
        weakref.finalize(state, self._destroyed.append, kind)
        return Faked(self, kind, state)

    def _callable(self, path: str, function: Any, name: str) -> Any:
        document = self._bindings.members[path]
        counts = argument_counts(document, path.rpartition(".")[2])
        returns_nothing = "-> None" in document and name != "Runtime"

        def call(*arguments: Any) -> Any:
            assert any(len(arguments) in count for count in counts), f"{path}: {len(arguments)} arguments"
            self._cuda.spend(name)
            if self._journal.enter(name, arguments):
                logger = arguments[0] if name == "Runtime" else self._logger
                logger.log(real.ILogger.Severity.ERROR, f"IFake::{name}: planted")
                if self._raises or returns_nothing:
                    raise RuntimeError("planted exception\nwith a second line")
                return False if "-> bool" in document else None
            return function(*arguments)

        call.__name__ = name
        return call


class Faked:
    """An object of a class of the SDK: its names and its signatures."""

    def __init__(self, module: FakeTensorRT, kind: str, state: Any) -> None:
        self.__dict__.update(_module=module, _kind=kind, _state=state)

    def __getattr__(self, name: str) -> Any:
        path = f"{self._kind}.{name}"
        if path not in self._module._bindings.members:
            raise AttributeError(f"{path} is not in {self._module._bindings.version}")
        value = getattr(self._state, name)
        return self._module._callable(path, value, name) if callable(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if f"{self._kind}.{name}" not in self._module._bindings.members:
            raise AttributeError(f"{self._kind}.{name} is not in {self._module._bindings.version}")
        setattr(self._state, name, value)


class RuntimeState:
    def __init__(self, module: FakeTensorRT) -> None:
        self.module = module

    def deserialize_cuda_engine(self, engine: bytes) -> Any:
        payload = bytes(engine)[HEADER:]
        description, _, onnx = payload.partition(b"\n")
        described = json.loads(description)
        return self.module._made("ICudaEngine", EngineState(self, described["profile"], onnx, described["seconds"]))


class EngineState:
    """An engine; ``overrides`` replaces what it says of a tensor."""

    overrides: ClassVar[dict[str, Any]] = {}

    def __init__(self, runtime: RuntimeState, profile: Shapes, onnx: bytes, seconds: list[float]) -> None:
        self.runtime, self.module, self.profile, self.seconds = runtime, runtime.module, profile, seconds
        self.session = session_of(onnx)
        self.known: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)
        self.device_memory_size_v2 = ACTIVATIONS
        self.last: tuple[Any, list[np.ndarray]] | None = None

    def value(self, name: str) -> Any:
        return (self.inputs | self.outputs)[name]

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return real.TensorIOMode.INPUT if name in self.inputs else real.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.overrides.get("location", real.TensorLocation.DEVICE)

    def get_tensor_format(self, name: str) -> Any:
        return self.overrides.get("format", real.TensorFormat.LINEAR)

    def get_tensor_dtype(self, name: str) -> Any:
        return self.overrides.get("dtype", {"tensor(float)": real.DataType.FLOAT}[self.value(name).type])

    def get_tensor_shape(self, name: str) -> Any:
        return real.Dims([extent if isinstance(extent, int) else -1 for extent in self.value(name).shape])

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        assert name in self.inputs, "the real one has profiles of inputs alone"
        assert index == 0
        return [real.Dims(shape) for shape in self.profile]

    def output_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Those of the outputs, by name, for an input of ``shape``."""
        if shape not in self.known:
            (image,) = self.inputs
            arrays = self.session.run(list(self.outputs), {image: np.zeros(shape, np.float32)})
            self.known[shape] = {name: array.shape for name, array in zip(self.outputs, arrays, strict=True)}
        return self.known[shape]

    def computed(self, image: bytes, shape: tuple[int, ...]) -> list[np.ndarray]:
        """The outputs; the same image again takes no time."""
        if self.last is None or self.last[0] != (image, shape):
            feeds = {name: np.frombuffer(image, np.float32).reshape(shape) for name in self.inputs}
            self.last = ((image, shape), self.session.run(list(self.outputs), feeds))
        return self.last[1]

    def create_runtime_config(self) -> Any:
        return self.module._made("IRuntimeConfig", ConfigState(self))

    def create_execution_context(self, config: Any) -> Any:
        return self.module._made("IExecutionContext", ContextState(self, config._state))


class ConfigState:
    def __init__(self, engine: EngineState) -> None:
        self.engine, self.cache = engine, None
        self.strategy = real.ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = real.DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = real.ExecutionContextAllocationStrategy(strategy)

    def create_runtime_cache(self) -> Any:
        return self.engine.module._made("IRuntimeCache", CacheState())

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache._state
        return True


class CacheState:
    """Kernels by input shape."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(CACHE_TAG):
            return False
        self.kernels = set(json.loads(blob[len(CACHE_TAG) :]))
        return True

    def serialize(self) -> Any:
        return CACHE_TAG + json.dumps(sorted(self.kernels)).encode()


class ContextState:
    def __init__(self, engine: EngineState, config: ConfigState) -> None:
        self.engine, self.config = engine, config
        self.cuda, self.journal = engine.module._cuda, engine.module._journal
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = None
        self.settled: dict[str, tuple[int, ...]] | None = None
        self.recorded = False

    def _change(self, what: str) -> None:
        if self.recorded:
            self.journal.violated(f"{what} on a context whose graph may still be launched")

    def set_device_memory(self, address: int, size: int) -> None:
        self._change("set_device_memory")
        assert self.config.strategy == real.ExecutionContextAllocationStrategy.USER_MANAGED
        if size < ACTIVATIONS or address % 16 or self.cuda.block_of(address, size) is None:
            self.journal.violated(f"activations: {size} bytes at {address:#x}")
        self.memory = (address, ACTIVATIONS)

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self._change("set_input_shape")
        least, _, most = self.engine.profile
        shape = tuple(shape)
        if name not in self.engine.inputs or len(shape) != len(least):
            return False
        if not all(low <= extent <= high for low, extent, high in zip(least, shape, most, strict=True)):
            return False
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> Any:
        if name in self.shapes:
            return real.Dims(self.shapes[name])
        (shape,) = self.shapes.values()
        extents = self.engine.output_shapes(shape)[name]
        return real.Dims([self.engine.overrides.get("output batch", extents[0]), *extents[1:]])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._change("set_tensor_address")
        assert isinstance(address, int)
        self.addresses[name] = address
        return name in self.engine.names

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.overrides.get("capturable", True)

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        shapes |= {name: tuple(self.get_tensor_shape(name)) for name in self.engine.outputs}
        if set(addresses) != set(self.engine.names) or not set(self.engine.inputs) <= set(shapes):
            self.journal.violated("execute_async_v3 before every address and shape was set")
            return False
        capture = self.cuda.streams[stream].capture
        if capture is not None:
            if self.settled != self.shapes:  # a new shape makes a real context do what cannot be recorded
                self.cuda.streams[stream].broken = True
                return False
            self.recorded = True
        self.settled = dict(self.shapes)
        if self.config.cache is not None:
            kernel = str(sorted(self.shapes.items()))
            if kernel not in self.config.cache.kernels:
                self.engine.module._compiled.append(kernel)
            self.config.cache.kernels.add(kernel)
        (image,), outputs = self.engine.inputs, list(self.engine.outputs)
        sizes = {name: int(np.prod(shape)) * 4 for name, shape in shapes.items()}
        memory = self.memory

        def compute() -> None:
            ctypes.memset(memory[0], 0, memory[1])
            answers = self.engine.computed(ctypes.string_at(addresses[image], sizes[image]), shapes[image])
            for name, array in zip(outputs, answers, strict=True):
                assert array.nbytes == sizes[name]
                ctypes.memmove(addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)

        touches = (*((addresses[name], sizes[name]) for name in self.engine.names), memory)
        whole, each = self.engine.seconds
        seconds = whole + each * shapes[image][0] + (self.cuda.costs.launches if capture is None else 0.0)
        work = Work("execute_async_v3", compute, touches, alone=memory[0], seconds=seconds)
        status = self.cuda.enqueue(stream, work)
        return int(status) == 0
