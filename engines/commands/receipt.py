"""``python -m engines receipt DIR...``: what the owner of a GPU runs and sends back."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from collections.abc import Sequence

from engines.arguments import integers_from_text
from engines.errors import OutputFailed, UsageError, VerificationFailed
from engines.interrupts import Uninterrupted

NAME = "receipt"
HELP = "check, run and measure exports on this machine's GPU, and write all of it into one file to send back"
RECEIPT_NAME = "receipt.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("folders", type=pathlib.Path, nargs="+", metavar="DIR", help="directories of exports")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(RECEIPT_NAME),
        metavar="FILE",
        help=f"the file to write (default: {RECEIPT_NAME})",
    )
    parser.add_argument("--batch", metavar="N[,N]", help="images at once (default: those of 1,8,32 that fit)")
    parser.add_argument("--duration", type=float, metavar="S", help="seconds for each row (default, and most: 3)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="the GPU to run on (default: 0)")
    parser.add_argument(
        "--allow-no-gpu", action="store_true", help="without a GPU, write a receipt that says that none ran anything"
    )


def run(arguments: argparse.Namespace, interrupts: Uninterrupted) -> int:
    """Writes the receipt, whatever it says, and prints its verdict.

    Raises:
        VerificationFailed: something failed; the receipt is written.
        ReportedError: there is nothing to run, or nothing to run it on, or the receipt cannot be written; then it is
            not.
    """
    from engines.bench.options import DURATION, Options, check_options
    from engines.files import write_whole
    from engines.receipts.receipt import Request, receipt_from_folders

    out: pathlib.Path = arguments.out
    check_out(out, arguments.folders)
    if len({folder.resolve() for folder in arguments.folders}) < len(arguments.folders):
        raise UsageError("a directory is given twice")
    options = Options(
        batches=None if arguments.batch is None else integers_from_text("--batch", arguments.batch, ","),
        device=arguments.device,
        duration=DURATION if arguments.duration is None else arguments.duration,
    )
    check_options(options)
    if options.duration > DURATION:
        raise UsageError(
            f"--duration {options.duration:g}: a receipt has every latency, so give up to {DURATION:g}; python -m "
            f"engines bench measures longer"
        )
    request = Request(
        tuple(arguments.folders), options, arguments.allow_no_gpu, told=lambda line: print(line, flush=True)
    )
    receipt = receipt_from_folders(request)
    content = (json.dumps(receipt, indent=1, allow_nan=False) + "\n").encode()
    interrupts.too_late()
    write_whole(out, content)
    print(receipt["verdict"])
    print(f"written to {out}, {len(content) / 1e6:.3g} MB; python -m engines replay {out} checks it on any machine")
    if not receipt["passed"]:
        raise VerificationFailed(f"{receipt['verdict']}; {out} says what, send it all the same")
    return 0


def check_out(out: pathlib.Path, folders: Sequence[pathlib.Path] = ()) -> None:
    """Looks, before minutes are spent on measuring, whether ``out`` can become the receipt of exports in ``folders``.

    Raises:
        OutputFailed: its directory is not there or takes no file, or something else stands in its place, as a device
            or a file of an export does.
    """
    from engines.receipts.receipt import file_names

    if not out.parent.is_dir():
        raise OutputFailed(f"{out}: cannot be written, {out.parent} is no directory; give --out in one that is there")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OutputFailed(f"{out}: cannot be written, {out.parent} is read-only; give --out in another directory")
    if out.exists() and not out.is_file():
        raise OutputFailed(f"{out}: cannot be written, it is no plain file; give --out another name")
    for folder in folders:
        if folder.resolve() == out.parent.resolve() and out.name in file_names(folder):
            raise OutputFailed(f"{out}: cannot be written, it is a file of the export; give --out another name")
