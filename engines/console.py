"""What every command line here has in common: arguments in, an exit code out, and one line for what went wrong."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from engines.errors import INTERRUPTED_EXIT_CODE, ReportedError, UsageError, first_line
from engines.interrupts import Interrupts

INTERRUPTED = ("interrupted; nothing was written", INTERRUPTED_EXIT_CODE)


class Parser(argparse.ArgumentParser):
    """Whose errors are raised, as every other error is."""

    def error(self, message: str) -> Any:
        """Raises ``UsageError``."""
        raise UsageError(f"{message}; see {self.prog} --help")


def exit_code_of(
    parser: Callable[[], Parser],
    run: Callable[[argparse.Namespace, Interrupts], int],
    argv: Sequence[str] | None,
    *,
    memory_hint: str,
) -> int:
    """Parses ``argv``, calls ``run``, and turns what it raises into one line on stderr and an exit code.

    Args:
        parser: makes the parser.
        run: the command; gives its exit code.
        argv: the arguments; None for those of the process, whose signals are then taken over for good.
        memory_hint: what to do where memory does not suffice.
    """
    interrupts = Interrupts()
    sys.stdout = sys.stdout or _nowhere()  # closed by whoever started this
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show is no reason to fail
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        code = run(parser().parse_args(argv), interrupts)
        sys.stdout.flush()
        return code
    except ReportedError as error:
        # An import that is interrupted says that something is not installed.
        failure = INTERRUPTED if interrupts.received else (str(error), error.exit_code)
        return _failed(*failure, debug=debug)
    except KeyboardInterrupt:
        return _failed(*INTERRUPTED, debug=debug)
    except OSError as error:
        if error.filename is not None:  # a path that cannot even be looked at; writing to a stream names none
            return _failed(f"{error.filename}: {error.strerror}; check its permissions", 3, debug=debug)
        sys.stdout = _nowhere()  # for what is left in its buffer
        return _failed(f"standard output: cannot be written ({first_line(error)})", 5, debug=debug)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return _failed(f"out of memory ({first_line(error)}); {memory_hint}", 3, debug=debug)
    finally:
        if argv is not None:
            interrupts.give_back()


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _failed(message: str, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())
    sys.stderr.write(f"error: {line}\n")
    return code
