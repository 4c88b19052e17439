"""``python -m engines replay receipt.json``: does every figure follow from its raw data? Needs no GPU."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engines.errors import VerificationFailed, listed
from engines.interrupts import Uninterrupted

if TYPE_CHECKING:
    from engines.receipts.replay import Check

NAME = "replay"
HELP = "make every figure of a receipt again from its raw data, without a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("receipt", type=pathlib.Path, metavar="FILE", help="what python -m engines receipt wrote")
    parser.add_argument(
        "--against",
        type=pathlib.Path,
        metavar="DIR",
        help="an export that is here, whose files and golden vectors it must be of",
    )


def run(arguments: argparse.Namespace, _interrupts: Uninterrupted) -> int:
    """Prints a line per check and what the receipt's own verdict was.

    Raises:
        VerificationFailed: a figure does not follow from the raw data, or the receipt is of something else.
        InputRejected: the receipt cannot be read.
    """
    from engines.json_value import Malformed
    from engines.receipts.received import damaged, receipt_from_file
    from engines.receipts.replay import HONESTY, checks_against, checks_of_receipt

    path: pathlib.Path = arguments.receipt
    receipt = receipt_from_file(path)
    try:
        checks = list(checks_of_receipt(receipt))
    except Malformed as error:
        raise damaged(path, error) from error
    held = [] if arguments.against is None else list(checks_against(receipt, arguments.against))
    for check in (*checks, *held):
        print(
            f"FAIL {check.place}: {'; '.join(check.problems)}"
            if check.problems
            else f"ok   {check.place}: {check.detail}"
        )
    print(f"note {HONESTY}")
    _fail_for(checks, f"{path}: does not follow from its own raw data")
    _fail_for(held, f"{path}: is of something else than {arguments.against}")
    print(f"the receipt is consistent; it says: {receipt.verdict}")
    return 0


def _fail_for(checks: Sequence[Check], said: str) -> None:
    problems = [f"{check.place}: {problem}" for check in checks for problem in check.problems]
    if problems:
        raise VerificationFailed(f"{said}: {listed(problems, 3)}")
