"""The process that compiles one engine and ends: ``python -m engines.compiler``, spoken to by ``engines.build``.

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

Emit = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile. ``batch`` is (minimum, optimum, maximum); ``cards`` as in (86, 89), empty for the default."""

    onnx: str
    engine: str
    batch: tuple[int, int, int]
    cards: tuple[int, ...]

    @classmethod
    def from_json(cls, line: str) -> Request:
        """The inverse of ``json.dumps(dataclasses.asdict(request))``."""
        fields = json.loads(line)
        return cls(fields["onnx"], fields["engine"], tuple(fields["batch"]), tuple(fields["cards"]))


class Refusal(Exception):
    """The compiler said no; the text is its own."""


def engine_from_onnx(trt: Any, request: Request, emit: Emit) -> Any:
    """Compiles a typed ONNX file with the SDK module ``trt``; returns the serialized engine as a buffer.

    Raises:
        Refusal: the parser or the builder failed.
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
    _set_profile(builder, network, config, request.batch)
    if request.cards and hasattr(trt, "ComputeCapability"):  # full TensorRT builds for the card it runs on
        config.num_compute_capabilities = len(request.cards)
        for index, card in enumerate(request.cards):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{card}"), index)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refusal("; ".join(errors) or "the builder returned nothing and gave no reason")
    return engine


def _set_profile(builder: Any, network: Any, config: Any, batch: Sequence[int]) -> None:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = [(size, *tuple(tensor.shape)[1:]) for size in batch]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)


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
    request = Request.from_json(line)
    try:
        engine = engine_from_onnx(trt, request, emit)
    except Refusal as error:
        emit({"kind": "failed", "reason": "compiler", "text": str(error)})
        return 1
    except Exception as error:
        emit({"kind": "failed", "reason": "compiler", "text": f"{type(error).__name__}: {error}"})
        return 1
    try:
        _write(pathlib.Path(request.engine), engine)
    except OSError as error:
        emit({"kind": "failed", "reason": "write", "text": error.strerror or str(error)})
        return 1
    emit({"kind": "done", "version": trt.__version__})
    return 0


if __name__ == "__main__":
    # The engine is on the disk and the answers are line-buffered; tearing the SDK down would only take time.
    os._exit(main(sys.argv[1:]))
