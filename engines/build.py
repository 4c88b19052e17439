"""Typed ONNX in, audited engine with its sidecar out.

checked      names, batch, sizes, precision, options: before anything is begun
compiled     in a fresh process                              ``engines.compilation``
delivered    audited, given a sidecar, put into its place    ``engines.delivery``
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from engines.arguments import check_batch
from engines.compilation import CompilerProcess, Progress
from engines.compiler import Options, Request
from engines.errors import InputRejected, OutputFailed, UsageError
from engines.files import reported_write_errors
from engines.interrupts import Uninterrupted
from engines.manifest import sidecar_path
from engines.sdk import Sdk, check_precision, sdk_for_build
from engines.sizes import Sizes, check_sizes, text_of_size, text_of_sizes

if TYPE_CHECKING:
    from engines.delivery import Build
    from engines.sidecar import Origin

DEFAULT_OPTIONS = Options()
UNINTERRUPTED = Uninterrupted()

UNAVAILABLE = {
    "tensorrt_rtx": {
        "timing_cache": "it has none",
        "version_compatible": "its engines run in the very release that made them",
        "hardware_compatibility": "it takes no level; name the cards with --gpu instead",
    }
}
"""By SDK, the options that it would ignore or fail on, and why."""


def build(
    onnx: str | os.PathLike[str],
    engine: str | os.PathLike[str],
    *,
    sdk: str | None = None,
    gpu: Sequence[int] = (),
    batch: tuple[int, int, int] = (1, 8, 32),
    sizes: Sizes | None = None,
    options: Options = DEFAULT_OPTIONS,
    progress: Progress | None = None,
    interrupts: Uninterrupted = UNINTERRUPTED,
) -> Build:
    """Compiles a typed ONNX file of the exporter into an engine, audits that, and writes its sidecar beside it.

    Args:
        onnx: a graph whose precision stands in its types; see ``exporter.precisions``.
        engine: the file to write; it and ``<engine>.json`` appear whole and together, or not at all.
        sdk: ``"tensorrt"``, ``"tensorrt_rtx"``, or None for the first where it and a GPU are, else the second.
        gpu: compute capabilities to build for, as in ``(86, 89)``; empty for the SDK's default.
        batch: minimum, optimum and maximum batch of the optimization profile.
        sizes: minimum, optimum and maximum (height, width) where the graph leaves them free; None for what it says.
        options: see ``engines.compiler.Options``.
        progress: called as the build goes on.
        interrupts: is told when files are put into their places.

    Raises:
        VerificationFailed: the engine is not what the graph says; it is kept as ``<engine>.rejected``.
        InputRejected, UsageError, SdkMissing, CompilerRefused, OutputFailed: see ``engines.errors``.
    """
    from engines.delivery import delivered  # brings numpy, which ``import engines`` does without
    from engines.onnx_file import onnx_file_from_path
    from engines.sidecar import origin_from_onnx

    source, target = pathlib.Path(onnx), pathlib.Path(engine)
    if not source.is_file():
        raise InputRejected(f"{source}: no such ONNX file; export it first with --onnx")
    check_batch(batch)
    _check_names(source, target, options)
    chosen = sdk_for_build(sdk, gpu)
    check_options(chosen, options)
    graph = onnx_file_from_path(source)
    origin = origin_from_onnx(graph)
    check_precision(chosen, origin.precision, gpu)
    if sizes is not None:
        _check_sizes(source, sizes, origin)
    if target.is_dir():
        raise OutputFailed(f"{target}: cannot be written (it is a directory); name a file with --out")
    with _folder_beside(target) as folder:
        partial = folder / target.name
        request = Request(str(source), str(partial), batch, tuple(gpu), options, sizes or origin.sizes)
        try:
            with CompilerProcess(chosen) as process:
                process.submit(request)
                made = process.result(progress)
        except OutputFailed as error:
            raise OutputFailed(str(error).replace(str(partial), str(target))) from error
        return delivered(made, graph, request, target, interrupts)


def _check_names(source: pathlib.Path, target: pathlib.Path, options: Options) -> None:
    """Raises ``UsageError`` where the engine, its sidecar or the timing cache would take the place of another file."""
    named = {"--out": target, "the sidecar": sidecar_path(target)}
    if options.timing_cache is not None:
        named["--timing-cache"] = pathlib.Path(options.timing_cache)
    taken = {source.resolve(): "the ONNX file"}
    for what, path in named.items():
        other = taken.setdefault(path.resolve(), what)
        if other is not what:
            raise UsageError(f"{path}: {what} would take the place of {other}; give it another name")


def _check_sizes(source: pathlib.Path, sizes: Sizes, origin: Origin) -> None:
    """Raises ``UsageError`` for sizes that the graph does not take, or that leave out the golden vectors' size."""
    check_sizes(sizes)
    least, _, most = sizes
    size = text_of_size(origin.size)
    if origin.sizes is None:
        raise UsageError(
            f"--size: {source} is for images of {size} alone; leave it out, or export with --size MIN:OPT:MAX"
        )
    if not all(low <= extent <= high for low, extent, high in zip(least, origin.size, most, strict=True)):
        raise UsageError(
            f"--size: {text_of_sizes(sizes)} is without {size}, so that no engine could be compared with the golden "
            f"vectors, which have that size; include it, or export again"
        )


def check_options(sdk: Sdk, options: Options) -> None:
    """Raises ``UsageError`` for an option that ``sdk`` would quietly ignore."""
    for name, reason in UNAVAILABLE.get(sdk.module, {}).items():
        if getattr(options, name):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag}: not for {sdk.title}: {reason}; leave it out, or build with --sdk tensorrt")


@contextlib.contextmanager
def _folder_beside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden directory on the same file system, removed at the end."""
    with reported_write_errors(target):
        folder = pathlib.Path(tempfile.mkdtemp(prefix=".build-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
