"""Every error that is meant for a person, with the exit code that a command gives for it.

    ReportedError                 one line: what, where, what to do
     |- VerificationFailed   1    a check did not pass
     |- UsageError           2    the call itself is wrong
     |- InputRejected        3    a checkpoint, graph, plan or data file cannot be used
     |- SdkMissing           4    a needed SDK or GPU is not here
     |- CompilerRefused      4    the compiler is here and said no
     |- DeviceFailed         4    a GPU is here, and a call to it or its runtime failed
     |- OutputFailed         5    a result could not be written

Anything else that is raised is a defect of this software, never of the user's file.
"""

from __future__ import annotations

INTERRUPTED_EXIT_CODE = 130


class ReportedError(Exception):
    """An error whose message is one complete line for the user, whatever was put into it."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class VerificationFailed(ReportedError):
    """A check did not pass: the result must not be used."""

    exit_code = 1


class UsageError(ReportedError):
    """Arguments that contradict each other or that nothing could satisfy."""

    exit_code = 2


class InputRejected(ReportedError):
    """A file that was read cannot be used."""

    exit_code = 3


class SdkMissing(ReportedError):
    """A compiler, runtime or GPU that the request needs is not on this machine."""

    exit_code = 4


class CompilerRefused(ReportedError):
    """The engine compiler failed; the message carries its own words."""

    exit_code = 4


class DeviceFailed(ReportedError):
    """A CUDA or TensorRT runtime call failed; the message names the call."""

    exit_code = 4


class OutputFailed(ReportedError):
    """A file could not be written."""

    exit_code = 5


def printable(text: str) -> str:
    """One line, with an escape for every character that cannot be seen, or that a terminal would act on."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def first_line(error: BaseException | str, limit: int = 240) -> str:
    """The first non-empty line of a message, cut to ``limit`` characters, for use inside a one-line error."""
    text = str(error).strip()
    line = next((part.strip() for part in text.splitlines() if part.strip()), type(error).__name__)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def listed(names: list[str], shown: int = 6) -> str:
    """Names joined for one line: the first few, then how many more there are."""
    head = ", ".join(names[:shown])
    return head if len(names) <= shown else f"{head} and {len(names) - shown} more"
