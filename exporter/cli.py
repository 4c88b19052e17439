"""The command line: arguments in, lines and an exit code out. Imports nothing heavy, so that --help is immediate."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from engines.arguments import integers_from_text
from engines.console import Parser, exit_code_of
from engines.interrupts import Interrupts
from exporter.errors import (
    OutputFailed,
    ReportedError,
    UsageError,
    VerificationFailed,
)
from exporter.request import (
    EFFORTS,
    PRECISION_NAMES,
    WEIGHTS,
    Request,
    batch_from_text,
    cards_from_text,
    features_from_text,
    floats_from_text,
    sizes_from_text,
    strides_from_text,
)
from exporter.version import VERSION

if TYPE_CHECKING:
    from engines.compilation import Progress
    from exporter.report import Report

DESCRIPTION = """\
Exports a trained RepVGG to ONNX and TensorRT, and proves that what was written computes the same network.

  python -m exporter model.pt                        model/model.onnx, checked
  python -m exporter model.pt --onnx --trt fp16      and an FP16 engine, built without a GPU where need be
  python -m exporter model.pt --trt int8 --calib images/   INT8, calibrated on your images
"""

MEMORY_HINT = "choose a smaller --size"
EPILOG = """\
exit codes: 0 done and verified; 1 a check failed (files kept as *.rejected); 2 usage; 3 the checkpoint or data cannot
be used; 4 a needed SDK or GPU is missing, or the compiler refused; 5 output could not be written; 130 interrupted
"""


def _parser() -> Parser:
    parser = Parser(
        prog="python -m exporter",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=pathlib.Path, help="weights of torch.save (.pt, .pth, .bin) or .safetensors")
    parser.add_argument("--version", action="version", version=f"repvgg-exporter {VERSION}")

    made = parser.add_argument_group("what to make")
    made.add_argument("--onnx", action="store_true", help="write <stem>.onnx (the default where --trt is not given)")
    precisions = ", ".join(PRECISION_NAMES)
    made.add_argument("--trt", action="append", metavar="P[,P]", help=f"write an engine per precision, of {precisions}")
    made.add_argument("--out", type=pathlib.Path, help="directory to write (default: ./<checkpoint stem>)")
    made.add_argument(
        "--size",
        default="224",
        metavar="N|HxW|MIN:OPT:MAX",
        help="image size in pixels (default: 224); three sizes make height and width dynamic",
    )
    made.add_argument(
        "--features",
        metavar="S[,S]",
        help="export the feature maps of these stages, as in 1,2,3,4, not the classifier",
    )
    made.add_argument("--batch", default="1:8:32", metavar="MIN:OPT:MAX", help="an engine's batches (default: 1:8:32)")
    made.add_argument(
        "--sdk", help="tensorrt (needs a GPU) or tensorrt_rtx (default: the first that this machine can use)"
    )
    made.add_argument("--gpu", metavar="smNN[,smNN]", help="cards to build for (default: the SDK's own choice)")

    add_assumptions(parser)

    int8 = parser.add_argument_group("INT8, which needs --calib")
    int8.add_argument(
        "--int8-effort",
        default="default",
        metavar="|".join(EFFORTS),
        help="high rounds weights by what they do to the results (GPTQ), and takes longer",
    )
    int8.add_argument("--int8-report", action="store_true", help="say what each layer in INT8 costs")
    int8.add_argument(
        "--int8-budget",
        metavar="DB",
        help="the SQNR to reach over all of --calib, with as few layers out of INT8 as it takes",
    )

    proof = parser.add_argument_group("what to prove it on")
    proof.add_argument(
        "--calib",
        type=pathlib.Path,
        metavar="FOLDER|NPZ",
        help="real images: INT8 is calibrated on all of them, outputs are compared on the first, not on noise",
    )
    proof.add_argument(
        "--labels",
        type=pathlib.Path,
        metavar="FOLDER|NPZ",
        help="images and labels: top-1 of every precision; of a folder, each class is one in it",
    )
    proof.add_argument("--max-drop", metavar="POINTS", help="with --labels: the most top-1 that a precision may lose")
    proof.add_argument(
        "--expect", type=pathlib.Path, metavar="NPZ", help="input and output of your own model: must be reproduced"
    )
    proof.add_argument("--ignore-witness", action="store_true", help="let images pass that the batch norms do not know")
    proof.add_argument("--layers", action="store_true", help="compare layer by layer, and name the first that departs")
    proof.add_argument(
        "--require", action="append", default=[], metavar="trt", help="trt: fail where no GPU can run the engines"
    )

    said = add_output(parser)
    said.add_argument("--junit", type=pathlib.Path, metavar="FILE", help="write the checks as JUnit XML, for CI")
    return parser


def add_assumptions(parser: argparse.ArgumentParser) -> None:
    """The flags that say what no tensor does."""
    told = parser.add_argument_group("what the tensors cannot tell")
    told.add_argument(
        "--weights",
        metavar="|".join(WEIGHTS),
        help="of two sets in a file: the averaged ones (default) or the raw",
    )
    told.add_argument("--strides", metavar="S,S,S,S,S", help="stride of the first block of stage0 to stage4")
    told.add_argument("--eps", metavar="E", help="epsilon of the batch norms (default: that of the lineage's code)")
    told.add_argument(
        "--mean", metavar="M[,M,M]", help="normalisation in units of 0..1 (default: ImageNet's; 0.5 for one channel)"
    )
    told.add_argument("--std", metavar="S[,S,S]", help="as --mean")
    told.add_argument(
        "--resize", metavar="N", help="scale the shorter side of images in a folder to N before --size is cut out"
    )
    told.add_argument(
        "--arch", metavar="NAME", help="a published network that it must be, as in A0, D2se, MobileOne-S0"
    )
    told.add_argument("--ignore-keys", action="append", default=[], metavar="GLOB", help="tensors that may go unused")


def assumptions_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of a ``Request`` that ``add_assumptions`` is about."""
    return {
        "weights": arguments.weights,
        "strides": None if arguments.strides is None else strides_from_text(arguments.strides),
        "eps": _optional_number("--eps", arguments.eps, "1e-5"),
        "arch": arguments.arch,
        "mean": None if arguments.mean is None else floats_from_text("--mean", arguments.mean),
        "std": None if arguments.std is None else floats_from_text("--std", arguments.std),
        "resize": None if arguments.resize is None else _whole_number("--resize", arguments.resize),
        "ignore_keys": tuple(arguments.ignore_keys),
    }


def add_output(parser: argparse.ArgumentParser) -> Any:
    """The flags about what is printed; returns their group."""
    said = parser.add_argument_group("what to print")
    said.add_argument("--quiet", action="store_true", help="print nothing but errors")
    said.add_argument("--json", action="store_true", help="print the report as JSON, and nothing else, on stdout")
    said.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return said


def _request(arguments: argparse.Namespace) -> Request:
    checkpoint: pathlib.Path = arguments.checkpoint
    trt = [name.strip() for names in arguments.trt or [] for name in names.split(",")]
    size, size_range = sizes_from_text(arguments.size)
    return Request(
        path=checkpoint,
        out=arguments.out or pathlib.Path(checkpoint.stem or "exported"),
        onnx=arguments.onnx or not trt,
        features=() if arguments.features is None else features_from_text(arguments.features),
        trt=tuple(trt),
        size=size,
        size_range=size_range,
        batch=batch_from_text(arguments.batch),
        calibration=arguments.calib,
        int8_effort=arguments.int8_effort,
        int8_report=arguments.int8_report,
        int8_budget=_optional_number("--int8-budget", arguments.int8_budget, "35"),
        labels=arguments.labels,
        max_drop=_optional_number("--max-drop", arguments.max_drop, "0.5"),
        expect=arguments.expect,
        ignore_witness=arguments.ignore_witness,
        layers=arguments.layers,
        require=tuple(arguments.require),
        sdk=arguments.sdk,
        gpu=() if arguments.gpu is None else cards_from_text(arguments.gpu),
        **assumptions_from(arguments),
    )


def _optional_number(flag: str, text: str | None, example: str) -> float | None:
    if text is None:
        return None
    numbers = floats_from_text(flag, text)
    if len(numbers) != 1:
        raise UsageError(f"{flag}: {text!r} is not one number, as in {example}")
    return numbers[0]


def _whole_number(flag: str, text: str) -> int:
    numbers = integers_from_text(flag, text, ",")
    if len(numbers) != 1:
        raise UsageError(f"{flag}: {text!r} is not one whole number")
    return numbers[0]


@contextlib.contextmanager
def _progress(*, shown: bool) -> Iterator[Progress]:
    """A bar on stderr for what takes long, where someone is watching."""
    if not (shown and sys.stderr.isatty()):
        yield lambda phase, done, steps: None
        return
    from tqdm import tqdm

    with tqdm(desc="export", unit="step", leave=False) as bar:

        def update(phase: str, done: int, steps: int) -> None:
            bar.set_description(phase, refresh=False)
            bar.total, bar.n = steps, done
            bar.refresh()

        yield update


def _run(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    from exporter.run import report_from_request

    if arguments.junit is not None:
        _prepare_junit(arguments.junit)
    request = _request(arguments)
    talkative = not (arguments.quiet or arguments.json)
    with _progress(shown=talkative) as progress:
        try:
            report = report_from_request(request, print if talkative else _silent, progress, interrupts)
        except ReportedError as error:
            if arguments.junit is not None:
                _write_junit_of_error(arguments.junit, error, request)
            raise
    if arguments.junit is not None:
        with contextlib.nullcontext() if report.passed else contextlib.suppress(OutputFailed):
            _write_junit(arguments.junit, report)
    if arguments.json:
        sys.stdout.write(report.to_json())
    if not report.passed:
        raise VerificationFailed(f"{report.failure_line} (kept in {request.out} as *.rejected)")
    if talkative:
        print(report.verdict)
        print(
            f"written to {request.out}{os.sep}: {', '.join(file.name for file in report.files)}, report.json, report.md"
        )
    return 0


def _silent(line: str) -> None:
    pass


def _prepare_junit(path: pathlib.Path) -> None:
    """Sees that the file can be written, and that none of an earlier run is taken for this one's."""
    from engines.files import reported_write_errors

    if path.suffix != ".xml":
        raise UsageError(f"--junit {path}: name a file that ends in .xml, which nothing else here does")
    with reported_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)


def _write_junit(path: pathlib.Path, report: Report) -> None:
    from engines.files import write_whole
    from exporter.report import junit_from_report

    write_whole(path, junit_from_report(report).encode())


def _write_junit_of_error(path: pathlib.Path, error: ReportedError, request: Request) -> None:
    from engines.files import write_whole
    from exporter.report import junit_from_error

    write_whole(path, junit_from_error(error, request.path.name).encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Exports, and returns the exit code; every expected error is one line on stderr.

    Without ``argv`` it is the whole process, and takes its signals over for good.
    """
    return exit_code_of(_parser, _run, argv, memory_hint=MEMORY_HINT)
