"""Typed ONNX in, engine out, each engine compiled in a fresh process (``engines.compiler`` says why)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from engines.compiler import Request
from engines.errors import CompilerRefused, InputRejected, OutputFailed, ReportedError, SdkMissing, first_line
from engines.files import reported_write_errors
from engines.process import Process
from engines.sdk import Sdk, sdk_for_build

Progress = Callable[[str, int, int], None]
"""Called with the phase's name, the steps done and the steps there are."""

HINTS = (
    ("MIN<=OPT<=MAX", "give --batch as MIN:OPT:MAX in this order"),
    ("FP32 GEMM is not supported", "Turing (sm75) takes fp16 only: use --trt fp16, or leave sm75 out of --gpu"),
    ("workspace", "the compiler found no kernel within its memory limit: free memory, or export a smaller --batch"),
    ("cudaError 35", "the compiler asked for a GPU driver and found none: build for named cards with --gpu"),
    ("insufficient driver", "the GPU driver is older than this SDK: update the driver"),
    ("SM89", "this precision needs an sm89 card or newer: leave older cards out of --gpu"),
    ("out of memory", "free memory on this machine, or export a smaller --size or --batch"),
)


@dataclasses.dataclass(frozen=True)
class Build:
    """A finished engine: where it is, which SDK of which version made it, and how long that took."""

    engine: pathlib.Path
    sdk: str
    sdk_version: str
    seconds: float
    warnings: tuple[str, ...]


class CompilerProcess(Process):
    """A fresh process that compiles one engine; started early, it imports the SDK meanwhile."""

    def __init__(self, sdk: Sdk) -> None:
        super().__init__("engines.compiler", sdk.module)
        self.sdk = sdk
        self._started = time.monotonic()
        self._engine = pathlib.Path()

    def __enter__(self) -> CompilerProcess:
        return self

    def submit(self, request: Request) -> None:
        """Hands over the request and returns at once; ``result`` waits."""
        self._started = time.monotonic()
        self._engine = pathlib.Path(request.engine)
        self.send(json.dumps(dataclasses.asdict(request)).encode() + b"\n")

    def result(self, progress: Progress | None = None) -> Build:
        """Waits for the engine.

        Raises:
            SdkMissing: the SDK is installed but cannot be imported.
            CompilerRefused: parser or builder failed; the message is the compiler's own, with a hint if one is known.
            OutputFailed: the engine could not be written.
        """
        warnings: list[str] = []
        for line in self.answers:
            message: dict[str, Any] = json.loads(line)
            if message["kind"] == "progress" and progress is not None:
                progress(message["phase"], message["done"], message["steps"])
            elif message["kind"] == "log":
                warnings.append(message["text"])
            elif message["kind"] == "failed":
                raise self._failure(message)
            elif message["kind"] == "done":
                seconds = time.monotonic() - self._started
                return Build(self._engine, self.sdk.module, message["version"], seconds, tuple(warnings))
        raise CompilerRefused(f"{self.sdk.title} ended without an answer ({self.last_words()})")

    def _failure(self, message: dict[str, Any]) -> ReportedError:
        text = first_line(message["text"], limit=400)
        if message["reason"] == "import":
            return SdkMissing(f"{self.sdk.title} is installed but does not start ({text}); {self.sdk.install}")
        if message["reason"] == "write":
            return OutputFailed(
                f"{self._engine}: cannot be written ({text}); give --out a writable directory with space left"
            )
        hint = next((hint for pattern, hint in HINTS if pattern in message["text"]), None)
        return CompilerRefused(f"{self.sdk.title} refused the graph: {text}" + (f" [{hint}]" if hint else ""))


def build(
    onnx: str | os.PathLike[str],
    engine: str | os.PathLike[str],
    *,
    sdk: str | None = None,
    gpu: Sequence[int] = (),
    batch: tuple[int, int, int] = (1, 8, 32),
    progress: Progress | None = None,
) -> Build:
    """Compiles a typed ONNX file into an engine file.

    Args:
        onnx: a graph whose precision stands in its types; see ``exporter.precisions``.
        engine: the file to write; it appears whole or not at all.
        sdk: ``"tensorrt"``, ``"tensorrt_rtx"``, or None for the first where it and a GPU are, else the second.
        gpu: compute capabilities to build for, as in ``(86, 89)``; empty for the SDK's default.
        batch: minimum, optimum and maximum batch of the optimization profile.
        progress: called as the build goes on.

    Raises:
        InputRejected, UsageError, SdkMissing, CompilerRefused, OutputFailed: see ``engines.errors``.
    """
    source, target = pathlib.Path(onnx), pathlib.Path(engine)
    if not source.is_file():
        raise InputRejected(f"{source}: no such ONNX file; export it first with --onnx")
    chosen = sdk_for_build(sdk, gpu)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with CompilerProcess(chosen) as process:
            process.submit(Request(str(source), str(partial), batch, tuple(gpu)))
            made = process.result(progress)
        with reported_write_errors(target):
            partial.replace(target)
    except OutputFailed as error:
        raise OutputFailed(str(error).replace(str(partial), str(target))) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return dataclasses.replace(made, engine=target)
