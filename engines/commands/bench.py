"""``python -m engines bench FILE...``: how fast, side by side, and is it still the network?"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from engines.arguments import integers_from_text
from engines.errors import InputRejected, OutputFailed, UsageError, VerificationFailed
from engines.interrupts import Uninterrupted

if TYPE_CHECKING:
    from engines.bench import Options, Record

NAME = "bench"
REPORT_TEXT_NAME = "report.md"
HELP = "measure files side by side: throughput, latencies, speed-ups, and how near they come to the card's bound"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "files", type=pathlib.Path, nargs="+", metavar="FILE", help="engines and ONNX files; the first is compared with"
    )
    parser.add_argument("--batch", metavar="N[,N]", help="images at once (default: those of 1,8,32 that fit)")
    parser.add_argument("--provider", help="ONNX Runtime's, for ONNX files: cpu (the default), cuda, tensorrt")
    parser.add_argument("--threads", type=int, metavar="N", help="of ONNX Runtime on the CPU (default: its own choice)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="the GPU to run on (default: 0)")
    parser.add_argument("--size", metavar="N|HxW", help="of the images, for files that take any")
    parser.add_argument(
        "--duration", type=float, metavar="S", help="seconds that each row is measured for, at least (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="print the record as JSON, and nothing else, on stdout")
    parser.add_argument(
        "--report",
        type=pathlib.Path,
        metavar="DIR",
        help="write bench.json and bench.svg there, and a section into its report.md",
    )


def run(arguments: argparse.Namespace, interrupts: Uninterrupted) -> int:
    """Measures and prints.

    Raises:
        VerificationFailed: a file computes something else than its network.
        ReportedError: nothing could be measured, or written.
    """
    from engines.bench import bench, lines_from_record

    report: pathlib.Path | None = arguments.report
    if report is not None:
        check_report(report)
    told = (lambda line: None) if arguments.json else (lambda line: print(line, flush=True))
    record = bench(arguments.files, options_from_arguments(arguments), told=told)
    if arguments.json:
        sys.stdout.write(record.to_json())
    else:
        print("\n".join(lines_from_record(record)))
    if report is not None:
        interrupts.too_late()
        for path in written_report(record, report):
            if not arguments.json:
                print(f"written to {path}")
    if record.failures:
        raise VerificationFailed("; ".join(record.failures))
    return 0


def options_from_arguments(arguments: argparse.Namespace) -> Options:
    """The options of the command line."""
    from engines.bench.options import DURATION, Options
    from engines.sizes import size_from_text

    return Options(
        batches=None if arguments.batch is None else integers_from_text("--batch", arguments.batch, ","),
        provider=arguments.provider,
        threads=arguments.threads,
        device=arguments.device,
        size=None if arguments.size is None else size_from_text(arguments.size),
        duration=DURATION if arguments.duration is None else arguments.duration,
    )


def check_report(folder: pathlib.Path) -> None:
    """Looks, before minutes are spent on measuring, whether a report can be written into ``folder``.

    Raises:
        UsageError: it is no directory.
        InputRejected: its report takes no section.
        SdkMissing: there is nothing to draw with.
        OutputFailed: nothing can be written into it, or a directory has the name of a file of the report.
    """
    from engines.bench.markdown import report_with_section
    from engines.bench.plot import drawing
    from engines.bench.record import BENCH_NAME, PLOT_NAME

    if not folder.is_dir():
        raise UsageError(f"--report {folder}: is no directory; give that of an export, or make it")
    for name in (BENCH_NAME, PLOT_NAME, REPORT_TEXT_NAME):
        if (folder / name).is_dir():
            raise OutputFailed(f"{folder / name}: is a directory in the place of a file; give --report another one")
    report_with_section(report_text(folder), "")
    write_report(folder, {})
    with drawing():
        pass


def report_text(folder: pathlib.Path) -> str:
    """What ``report.md`` says, with the ends of its lines as they are; nothing where there is none.

    Raises:
        InputRejected: it is no text.
    """
    report = folder / REPORT_TEXT_NAME
    try:
        return report.read_bytes().decode() if report.is_file() else ""
    except UnicodeDecodeError:
        raise InputRejected(f"{report}: is no text in UTF-8; move it away, or export again") from None


def written_report(record: Record, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes ``bench.json`` with every latency, ``bench.svg``, and the section in ``report.md``.

    Raises:
        SdkMissing: there is nothing to draw with.
        OutputFailed: something cannot be written.
    """
    from engines.bench.markdown import markdown_from_record, report_with_section
    from engines.bench.plot import svg_from_record
    from engines.bench.record import BENCH_NAME, PLOT_NAME

    report = report_with_section(report_text(folder), markdown_from_record(record))
    contents = {
        BENCH_NAME: record.to_json(raw=True).encode(),
        PLOT_NAME: svg_from_record(record),
        REPORT_TEXT_NAME: report.encode(),
    }
    write_report(folder, contents)
    return [folder / name for name in contents]


def write_report(folder: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    """Writes files into the directory of ``--report``, by name; of none, it tells whether any could be written.

    Raises:
        OutputFailed: one of them cannot be written; then none is.
    """
    from engines.replacement import write_together

    try:
        write_together(folder, contents)
    except OutputFailed as error:
        raise OutputFailed(str(error).replace("--out", "--report")) from error
