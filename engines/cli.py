"""The command line of what runs on a serving machine. A command's own imports wait until it is the one that is run."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from engines.errors import INTERRUPTED_EXIT_CODE, ReportedError, UsageError, first_line
from engines.version import VERSION

COMMANDS = ("verify", "run", "info", "build")
"""Modules of ``engines.commands``, each with NAME, HELP, ``add_arguments`` and ``run``."""

DESCRIPTION = """\
Checks, runs, shows and builds what python -m exporter writes. Needs neither torch nor the exporter.

  python -m engines verify model/                        is it what was exported, and does it compute the network?
  python -m engines run model/model.fp16.engine cat.jpg  what is in this image?
"""

EPILOG = """\
exit codes: 0 done and verified; 1 a check failed; 2 usage; 3 a file cannot be used; 4 a needed SDK or GPU is missing,
or the compiler refused; 5 output could not be written; 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see {self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m engines",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"repvgg-exporter {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name in COMMANDS:
        module = importlib.import_module(f"engines.commands.{name}")
        command = commands.add_parser(module.NAME, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="print the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; every expected error is one line on stderr.

    Without ``argv`` it is the whole process: it then ends at the first SIGINT or SIGTERM, and ignores later ones.
    """
    if argv is None and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show is no reason to fail
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except ReportedError as error:
        return _failed(str(error), error.exit_code, debug=debug)
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED_EXIT_CODE, debug=debug)
    except OSError as error:
        if error.filename is not None:  # a path that cannot even be looked at; writing to a stream names none
            return _failed(f"{error.filename}: {error.strerror}; check its permissions", 3, debug=debug)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is left in its buffer has nowhere to go
        return _failed(f"standard output: cannot be written ({first_line(error)})", 5, debug=debug)
    except MemoryError as error:
        return _failed(f"out of memory ({first_line(error)}); free memory on this machine", 3, debug=debug)


def _interrupt(_number: int, _frame: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _failed(message: str, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    return code
