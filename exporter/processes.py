"""The processes that help one run, started before torch is imported so that everybody's imports overlap."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping

from engines.compilation import CompilerProcess
from engines.process import Process
from engines.sdk import check_precision, gpu_compute_capability, sdk_for_build
from exporter.errors import SdkMissing, VerificationFailed
from exporter.request import Request

PACKAGES = ("torch", "onnx", "onnxsim", "onnxruntime", "safetensors")


class SimplifierProcess(Process):
    """onnxsim, for one model; see ``exporter.simplifier``."""

    def __init__(self) -> None:
        super().__init__("exporter.simplifier")

    def __enter__(self) -> SimplifierProcess:
        return self

    def submit(self, model: bytes) -> None:
        """Hands over a serialized model and returns at once; ``result`` waits."""
        self.send(model)
        self.close_input()

    def result(self) -> bytes:
        """The simplified model, serialized.

        Raises:
            VerificationFailed: onnxsim failed, or says that its result differs from what it was given.
        """
        model = self.answers.read()
        if not model:
            raise VerificationFailed(f"onnxsim: it gave no answer ({self.last_words()})")
        return model


@dataclasses.dataclass(frozen=True)
class Processes:
    """``compilers`` has one for each precision that an engine is wanted in. A context manager that ends them all."""

    simplifier: SimplifierProcess
    compilers: Mapping[str, CompilerProcess]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in (self.simplifier, *self.compilers.values()):
            process.__exit__()


def require_packages() -> None:
    """Raises ``SdkMissing`` unless every package that exporting needs is installed; none is imported."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise SdkMissing(f"{', '.join(missing)}: not installed; pip install 'repvgg-exporter[export,ort]'")


@contextlib.contextmanager
def started(request: Request) -> Iterator[Processes]:
    """Starts what ``request`` needs, and ends it all at the end, however that comes.

    Raises:
        SdkMissing: a package is not installed, no compiler here can do what is asked, or a GPU is required and absent.
        UsageError: the cards asked for must not share an engine.
    """
    require_packages()
    if "trt" in request.require and gpu_compute_capability() is None:
        raise SdkMissing(
            "--require trt: no GPU answers here, so no engine could be run; run this where one is, or leave it out"
        )
    with contextlib.ExitStack() as stack:
        compilers = {}
        if request.trt:
            sdk = sdk_for_build(request.sdk, request.gpu)
            for precision in request.trt:
                check_precision(sdk, precision, request.gpu)
            compilers = {precision: stack.enter_context(CompilerProcess(sdk)) for precision in request.trt}
        yield Processes(stack.enter_context(SimplifierProcess()), compilers)
