"""One compilation as its caller sees it: a fresh process is asked for an engine, and answers (``engines.compiler``).

with CompilerProcess(sdk) as process:      starts it; it imports the SDK meanwhile
    process.submit(request)                returns at once
    made = process.result(progress)        waits
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from engines.compiler import Request
from engines.errors import CompilerRefused, OutputFailed, ReportedError, SdkMissing, first_line
from engines.process import Process
from engines.sdk import Sdk

Progress = Callable[[str, int, int], None]
"""Called with the phase's name, the steps done and the steps there are."""

HINTS = (
    ("MIN<=OPT<=MAX", "give --batch as MIN:OPT:MAX in this order"),
    ("FP32 GEMM is not supported", "Turing (sm75) takes fp16 only: use --trt fp16, or leave sm75 out of --gpu"),
    ("workspace", "the compiler found no kernel within its memory limit: free memory, or give a larger --workspace"),
    ("cudaError 35", "the compiler asked for a GPU driver and found none: build for named cards with --gpu"),
    ("insufficient driver", "the GPU driver is older than this SDK: update the driver"),
    ("SM89", "this precision needs an sm89 card or newer: leave older cards out of --gpu"),
    ("out of memory", "free memory on this machine, or export a smaller --size or --batch"),
)


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A compiled engine: where it is, which SDK of which version made it, and how long that took."""

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

    def result(self, progress: Progress | None = None) -> Compilation:
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
                return Compilation(self._engine, self.sdk.module, message["version"], seconds, tuple(warnings))
        raise CompilerRefused(f"{self.sdk.title} ended without an answer ({self.last_words()})")

    def _failure(self, message: dict[str, Any]) -> ReportedError:
        text = first_line(message["text"], limit=400)
        if message["reason"] == "import":
            return SdkMissing(f"{self.sdk.title} is installed but does not start ({text}); {self.sdk.install}")
        if message["reason"] == "write":
            return OutputFailed(
                f"{self._engine}: cannot be written ({text}); give --out a writable directory with space left"
            )
        if message["reason"] == "timing cache":
            problem = message["text"].rpartition(";")[0]
            return OutputFailed(f"{problem}; give --timing-cache a file that can be written, or leave it out")
        hint = next((hint for pattern, hint in HINTS if pattern in message["text"]), None)
        return CompilerRefused(f"{self.sdk.title} refused the graph: {text}" + (f" [{hint}]" if hint else ""))
