"""The command line of what runs on a serving machine. A command's own imports wait until it is the one that is run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from engines.console import Parser, exit_code_of
from engines.interrupts import Interrupts
from engines.version import VERSION

COMMANDS = ("verify", "run", "bench", "roofline", "info", "build", "golden", "receipt", "replay")
"""Modules of ``engines.commands``, each with NAME, HELP, ``add_arguments`` and ``run``."""

DESCRIPTION = """\
Checks, runs, shows and builds what python -m exporter writes. Needs neither torch nor the exporter.

  python -m engines verify model/                        is it what was exported, and does it compute the network?
  python -m engines run model/model.fp16.engine cat.jpg  what is in this image?
  python -m engines bench model/*.engine                 how fast, and how near to what the card could do?
"""

EPILOG = """\
exit codes: 0 done and verified; 1 a check failed; 2 usage; 3 a file cannot be used; 4 a needed SDK or GPU is missing,
or the compiler refused; 5 output could not be written; 130 interrupted
"""


def _parser() -> Parser:
    parser = Parser(
        prog="python -m engines",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"repvgg-exporter {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name in COMMANDS:
        module = importlib.import_module(f"engines.commands.{name}")
        command = commands.add_parser(module.NAME, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="print the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; every expected error is one line on stderr."""
    return exit_code_of(_parser, _run, argv, memory_hint="free memory on this machine")


def _run(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    code: int = arguments.run(arguments, interrupts)
    return code
