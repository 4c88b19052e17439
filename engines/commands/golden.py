"""``python -m engines golden DIR``: writes ``golden.bin`` from ``golden.npz``, for programs without numpy."""

from __future__ import annotations

import argparse
import pathlib

from engines.errors import InputRejected, OutputFailed
from engines.interrupts import Uninterrupted

NAME = "golden"
HELP = "write golden.bin from an export's golden.npz, for repvgg_verify and other programs without numpy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("target", type=pathlib.Path, metavar="DIR", help="an export's directory")


def run(arguments: argparse.Namespace, interrupts: Uninterrupted) -> int:
    """Writes the file whole or not at all, and says what is in it.

    Raises:
        InputRejected: there is no such directory, or its golden vectors cannot be read.
        OutputFailed: the file cannot be written.
    """
    from engines.files import write_whole
    from engines.golden import GOLDEN_NAME
    from engines.golden_file import GOLDEN_FILE_NAME, golden_file_from_vectors

    target: pathlib.Path = arguments.target
    if not target.is_dir():
        raise InputRejected(f"{target}: no such directory; give that of an export")
    golden = golden_file_from_vectors(target / GOLDEN_NAME)
    path, content = target / GOLDEN_FILE_NAME, golden.to_bytes()
    interrupts.too_late()
    try:
        write_whole(path, content)
    except OutputFailed as error:
        raise OutputFailed(str(error).replace("give --out a", "DIR must be a")) from error
    print(f"{path}: {len(golden.images)} images, {', '.join(golden.outputs)}, {len(content)} bytes")
    return 0
