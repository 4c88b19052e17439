"""A Python process that does one thing and ends: a crash of native code in it is a message, not the end of the run."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import IO

from engines.errors import first_line

PACKAGES = pathlib.Path(__file__).resolve().parent.parent


class Process:
    """``python -m MODULE ARGUMENTS`` with pipes; a context manager that leaves no process behind."""

    def __init__(self, module: str, *arguments: str) -> None:
        paths = [str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C reaches the caller alone, which then ends this process
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        self._process.wait()
        self._stderr.close()

    def send(self, content: bytes) -> None:
        """Writes to its standard input; a process that has died already says why in ``last_words``."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.write(content)
                self._process.stdin.flush()

    def close_input(self) -> None:
        """Ends its standard input."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    @property
    def answers(self) -> IO[bytes]:
        """Its standard output."""
        if self._process.stdout is None:
            raise ValueError("the process was started without an output pipe")
        return self._process.stdout

    def last_words(self) -> str:
        """How it ended: its exit status and the last line on its standard error."""
        status = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"status {status}" + (f": {first_line(lines[-1])}" if lines else "")
