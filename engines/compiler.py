"""The process that compiles one engine and ends: ``python -m engines.compiler``, spoken to by ``engines.compilation``.

One engine per process, because a failed build leaves the compiler in a state in which the next INT8 build silently
comes out in float32. The SDK is a parameter: ``tensorrt`` and ``tensorrt_rtx`` have the same interface, and the network
is strongly typed, so that precision comes from the graph alone and there is nothing here that chooses it.

It is told the SDK's name as an argument and imports it at once, reads one JSON request from standard input, and answers
with one JSON object a line: ``progress`` (phase, done, steps), ``log`` (severity, text), then ``done`` or ``failed``.
When its standard input closes it stops: the process that asked is gone.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from engines.errors import OutputFailed, UsageError
from engines.files import write_whole
from engines.sizes import Sizes

HARDWARE_COMPATIBILITY = ("ampere_plus", "same_compute_capability")
"""The names of trt.HardwareCompatibilityLevel, in small letters; each is one that an engine can be asked for."""

OPTIMIZATION_LEVELS = range(6)
LARGEST_WORKSPACE = 1 << 20

Emit = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to compile, beyond what the graph says; None, like False, leaves a choice to the SDK.

    ``workspace`` is the most memory that a kernel may use while it runs, in MiB. ``timing_cache`` is a file that is
    read if it is there, and written back. ``hardware_compatibility`` is a name of HARDWARE_COMPATIBILITY.
    ``optimization_level`` is one of OPTIMIZATION_LEVELS, from the fastest build to the fastest engine.
    """

    workspace: int | None = None
    timing_cache: str | None = None
    version_compatible: bool = False
    hardware_compatibility: str | None = None
    optimization_level: int | None = None

    def __post_init__(self) -> None:
        """Raises ``UsageError`` for what no SDK could take."""
        if self.workspace is not None and not 1 <= self.workspace <= LARGEST_WORKSPACE:
            raise UsageError(f"--workspace: {self.workspace} MiB is outside 1 to {LARGEST_WORKSPACE}")
        if self.hardware_compatibility not in (None, *HARDWARE_COMPATIBILITY):
            offered = ", ".join(HARDWARE_COMPATIBILITY)
            raise UsageError(f"--hardware-compatibility {self.hardware_compatibility}: unknown; choose from {offered}")
        if self.optimization_level not in (None, *OPTIMIZATION_LEVELS):
            raise UsageError(
                f"--optimization-level: {self.optimization_level} is outside 0 to {OPTIMIZATION_LEVELS[-1]}"
            )
        if self.timing_cache is not None and pathlib.Path(self.timing_cache).is_dir():
            raise UsageError(f"--timing-cache {self.timing_cache}: a directory; name a file")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile. ``batch`` is (minimum, optimum, maximum); ``cards`` as in (86, 89), empty for the default.

    ``sizes`` are those of the images where the graph leaves height and width free, and None where it fixes them.
    """

    onnx: str
    engine: str
    batch: tuple[int, int, int]
    cards: tuple[int, ...]
    options: Options = Options()
    sizes: Sizes | None = None

    @classmethod
    def from_json(cls, line: str) -> Request:
        """The inverse of ``json.dumps(dataclasses.asdict(request))``."""
        fields = json.loads(line)
        return cls(
            fields["onnx"],
            fields["engine"],
            tuple(fields["batch"]),
            tuple(fields["cards"]),
            Options(**fields["options"]),
            _sizes(fields["sizes"]),
        )


def _sizes(value: list[list[int]] | None) -> Sizes | None:
    if value is None:
        return None
    least, best, most = ((height, width) for height, width in value)
    return least, best, most


class Refusal(Exception):
    """The compiler said no; the text is its own."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The serialized engine, a buffer, and the timing cache to write back, empty where none was asked for."""

    engine: Any
    timing_cache: bytes


def engine_from_onnx(trt: Any, request: Request, emit: Emit) -> Compiled:
    """Compiles a typed ONNX file with the SDK module ``trt``.

    Raises:
        Refusal: the parser or the builder failed, the timing cache is not of this machine, or ``sizes`` are given for
            a graph of a fixed size, or none for one of a free size.
    """
    errors: list[str] = []
    logger = _logger(trt, emit, errors)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.onnx):
        raise Refusal("; ".join(str(parser.get_error(index)) for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, emit)
    _set_profile(builder, network, config, request)
    if request.cards and hasattr(trt, "ComputeCapability"):  # full TensorRT builds for the card it runs on
        config.num_compute_capabilities = len(request.cards)
        for index, card in enumerate(request.cards):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{card}"), index)
    _set_options(trt, config, request.options)
    cache = _timing_cache(config, request.options.timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refusal("; ".join(errors) or "the builder returned nothing and gave no reason")
    return Compiled(engine, b"" if cache is None else bytes(cache.serialize()))


def _set_options(trt: Any, config: Any, options: Options) -> None:
    # On unless cleared, and then a float32 convolution is computed with 10 bits of mantissa: not what the graph says.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility is not None:
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper())
        config.hardware_compatibility_level = level
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level


def _timing_cache(config: Any, path: str | None) -> Any | None:
    """The cache that ``config`` now uses: the file's, or an empty one."""
    if path is None:
        return None
    file = pathlib.Path(path)
    cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise Refusal(f"the timing cache {path} is damaged, or of another version or GPU; remove it")
    return cache


def _set_profile(builder: Any, network: Any, config: Any, request: Request) -> None:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(None if extent < 0 else extent for extent in tuple(tensor.shape))
        try:
            shapes = profile_shapes(tensor.name, shape, request.batch, request.sizes)
        except ValueError as error:
            raise Refusal(str(error)) from error
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)


def profile_shapes(
    name: str, shape: tuple[int | None, ...], batch: tuple[int, int, int], sizes: Sizes | None
) -> list[tuple[int, ...]]:
    """Minimum, optimum and maximum shape of the input ``name``, in whose ``shape`` None stands for a free extent.

    Raises:
        ValueError: ``sizes`` are missing for free extents behind the batch, or given where there are none.
    """
    fixed = tuple(extent for extent in shape[1:] if extent is not None)
    if len(fixed) == len(shape) - 1:
        if sizes is not None:
            raise ValueError(f"the size of input {name} is fixed in the graph, and sizes were given; leave out --size")
        return [(rows, *fixed) for rows in batch]
    if len(shape) != 4 or len(fixed) != 1 or shape[1] is None:
        raise ValueError(f"input {name} has free extents other than batch, height and width: {shape}; export it again")
    if sizes is None:
        raise ValueError(f"input {name} is of any height and width; give the engine's sizes as --size MIN:OPT:MAX")
    return [(rows, *fixed, *size) for rows, size in zip(batch, sizes, strict=True)]


def _logger(trt: Any, emit: Emit, errors: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                errors.append(message)
            if severity not in (trt.ILogger.Severity.VERBOSE, trt.ILogger.Severity.INFO):
                emit({"kind": "log", "severity": severity.name, "text": message})

    return Logger()


def _monitor(trt: Any, emit: Emit) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            emit({"kind": "progress", "phase": phase_name, "done": 0, "steps": num_steps})

        def step_complete(self, phase_name: str, step: int) -> bool:
            emit({"kind": "progress", "phase": phase_name, "done": step + 1, "steps": self.steps.get(phase_name, 0)})
            return True

        def phase_finish(self, phase_name: str) -> None:
            steps = self.steps.pop(phase_name, 0)
            emit({"kind": "progress", "phase": phase_name, "done": steps, "steps": steps})

    return Monitor()


def _write(path: pathlib.Path, engine: Any) -> None:
    with open(path, "wb") as file:
        file.write(engine)
        file.flush()
        os.fsync(file.fileno())


def _answer(trt: Any, request: Request, emit: Emit) -> dict[str, Any]:
    """Compiles and writes; the last thing that is said."""
    try:
        compiled = engine_from_onnx(trt, request, emit)
    except Refusal as error:
        return {"kind": "failed", "reason": "compiler", "text": str(error)}
    except Exception as error:
        return {"kind": "failed", "reason": "compiler", "text": f"{type(error).__name__}: {error}"}
    try:
        _write(pathlib.Path(request.engine), compiled.engine)
    except OSError as error:
        return {"kind": "failed", "reason": "write", "text": error.strerror or str(error)}
    if request.options.timing_cache is not None:
        try:
            write_whole(pathlib.Path(request.options.timing_cache), compiled.timing_cache)
        except OutputFailed as error:
            return {"kind": "failed", "reason": "timing cache", "text": str(error)}
    return {"kind": "done", "version": trt.__version__}


def _stop_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def main(arguments: Sequence[str]) -> int:
    """Serves one request; the answers go to what was standard output, which stray prints cannot reach."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def emit(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        trt = importlib.import_module(arguments[0])
    except Exception as error:
        emit({"kind": "failed", "reason": "import", "text": f"{type(error).__name__}: {error}"})
        return 1
    line = sys.stdin.readline()
    if not line:
        return 1
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    answer = _answer(trt, Request.from_json(line), emit)
    emit(answer)
    return 0 if answer["kind"] == "done" else 1


if __name__ == "__main__":
    # The engine is on the disk and the answers are line-buffered; tearing the SDK down would only take time.
    os._exit(main(sys.argv[1:]))
