"""``python -m engines build ONNX``: a typed ONNX file to an audited engine with its sidecar."""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING

from engines.arguments import batch_from_text, cards_from_text
from engines.build import build
from engines.compiler import HARDWARE_COMPATIBILITY, Options
from engines.errors import VerificationFailed
from engines.interrupts import Uninterrupted
from engines.sizes import sizes_from_text

if TYPE_CHECKING:
    from engines.delivery import Build

NAME = "build"
HELP = "compile a typed ONNX file of the exporter into an engine, audit that, and write its sidecar"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("onnx", type=pathlib.Path, metavar="ONNX", help="a typed graph, such as model.fp16.onnx")
    parser.add_argument("--out", type=pathlib.Path, metavar="ENGINE", help="(default: ONNX with the suffix .engine)")
    parser.add_argument(
        "--batch", default="1:8:32", metavar="MIN:OPT:MAX", help="the engine's batches (default: 1:8:32)"
    )
    parser.add_argument(
        "--size",
        metavar="MIN:OPT:MAX",
        help="its images, each N or HxW, for a graph of free size (default: as exported)",
    )
    parser.add_argument(
        "--sdk", help="tensorrt (needs a GPU) or tensorrt_rtx (default: the first that this machine can use)"
    )
    parser.add_argument("--gpu", metavar="smNN[,smNN]", help="cards to build for (default: the SDK's own choice)")
    parser.add_argument("--workspace", type=int, metavar="MIB", help="the most memory that a kernel may use, in MiB")
    parser.add_argument("--timing-cache", metavar="FILE", help="measurements of kernels to start from, and to add to")
    parser.add_argument(
        "--version-compatible", action="store_true", help="for later TensorRT versions, too; it then holds host code"
    )
    parser.add_argument(
        "--hardware-compatibility", metavar="L", help=f"for other cards, too: {' or '.join(HARDWARE_COMPATIBILITY)}"
    )
    parser.add_argument("--optimization-level", type=int, metavar="N", help="0, the fastest build, to 5")


def run(arguments: argparse.Namespace, interrupts: Uninterrupted) -> int:
    """Builds, and prints how and what.

    Raises:
        VerificationFailed: the engine is not what the graph says; it is kept as ``*.rejected``.
        ReportedError: of the other kinds that ``engines.build`` raises; nothing is left behind.
    """
    from engines.kind import engine_beside  # brings numpy, which --help does without

    source: pathlib.Path = arguments.onnx
    try:
        made = build(
            source,
            arguments.out or engine_beside(source),
            sdk=arguments.sdk,
            gpu=() if arguments.gpu is None else cards_from_text(arguments.gpu),
            batch=batch_from_text(arguments.batch),
            sizes=None if arguments.size is None else sizes_from_text(arguments.size),
            options=_options(arguments),
            interrupts=interrupts,
        )
    except VerificationFailed as failure:
        print(f"FAIL {failure}")
        raise
    for line in lines_from_build(made):
        print(line)
    return 0


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        workspace=arguments.workspace,
        timing_cache=arguments.timing_cache,
        version_compatible=arguments.version_compatible,
        hardware_compatibility=arguments.hardware_compatibility,
        optimization_level=arguments.optimization_level,
    )


def lines_from_build(made: Build) -> list[str]:
    """What there is to say of a finished build, a line each; an engine that was not audited is never called ok."""
    manifest, folder = made.manifest, made.engine.parent
    cards = ", ".join(f"sm{card}" for card in manifest.compute_capabilities) or "the cards that it says itself"
    profile = next(iter(manifest.profile.values()))
    batches = ":".join(str(shape[0]) for shape in profile)
    sizes = ", size " + manifest.assumptions["size"] if len({shape[1:] for shape in profile}) > 1 else ""
    mark = "ok  " if made.audit.audited else "skip"
    lines = [
        f"compiled with {manifest.sdk['name']} {manifest.sdk['version']} for {cards}, batch {batches}{sizes}, "
        f"in {made.seconds:.1f} s",
        *(f"note the compiler says: {' '.join(warning.split())}" for warning in made.warnings),
        f"{mark} {manifest.precision}, engine audit: {made.audit.line}",
        *([f"note {made.prediction}"] if made.prediction is not None else []),
        f"written to {folder}/: {made.engine.name}, {made.sidecar.name}",
    ]
    if not (folder / manifest.golden).is_file():
        lines.append(f"note {manifest.golden} is not in {folder}/: copy it along, verify compares the engine with it")
    return lines
