"""What can compute a file, by the file's kind; a new backend is one entry in BACKENDS."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

from engines.backends.backend import Backend
from engines.manifest import Manifest
from engines.plan import Header


@dataclasses.dataclass(frozen=True)
class Source:
    """A file to open, what is known of it, and how: ``header`` and ``manifest`` are an engine's, checked.

    ``graph`` asks for CUDA graphs. ``provider``, ``threads`` and ``spinning`` are ONNX Runtime's; see ``OnnxRuntime``.
    """

    path: pathlib.Path
    header: Header | None
    manifest: Manifest | None
    device: int
    graph: bool
    provider: str | None
    threads: int | None = None
    spinning: bool = True


@dataclasses.dataclass(frozen=True)
class BackendEntry:
    """A backend: the kind of file it is for (``engines.kind``), its title, what it takes in words, how it is opened."""

    kind: str
    title: str
    takes: str
    open: Callable[[Source], Backend]


def _open_onnx_runtime(source: Source) -> Backend:
    from engines.backends.onnx_runtime import OnnxRuntime

    return OnnxRuntime(
        source.path,
        provider=source.provider,
        device=source.device,
        threads=source.threads,
        spinning=source.spinning,
    )


def _open_tensorrt(source: Source) -> Backend:
    from engines.backends.tensorrt import TensorRT

    if source.header is None:
        raise ValueError("an engine is opened with its header")
    return TensorRT.open(
        source.path,
        source.header,
        source.manifest,
        sdk_module_name=source.header.sdk,
        device=source.device,
        graph=source.graph,
    )


BACKENDS = (
    BackendEntry("onnx", "ONNX Runtime", "ONNX files", _open_onnx_runtime),
    BackendEntry("tensorrt", "TensorRT", "engines of full TensorRT", _open_tensorrt),
    BackendEntry("tensorrt_rtx", "TensorRT for RTX", "engines of TensorRT for RTX", _open_tensorrt),
)


def backend_for(kind: str) -> BackendEntry:
    """The entry of BACKENDS for a kind of file."""
    return next(entry for entry in BACKENDS if entry.kind == kind)
