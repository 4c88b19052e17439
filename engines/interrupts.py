"""SIGINT and SIGTERM as exactly one KeyboardInterrupt, at a moment that can bear it.

A second signal must not break the clearing up after the first, and an exception in the middle of the start-up of a
native library can take the whole process down; so every later signal is ignored, and one that comes in a held section
waits for its end. Once files are moved into place it is too late to say that nothing was written.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Uninterrupted:
    """For callers that leave signals alone, such as a program that calls ``exporter.export``."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A section in which an interruption waits; raises ``KeyboardInterrupt`` at its end if one came."""
        yield

    def too_late(self) -> None:
        """Says that the run can no longer be interrupted."""


class Interrupts(Uninterrupted):
    """Takes the two signals over, until ``give_back``."""

    def __init__(self) -> None:
        self.received = False
        """Whether a signal came."""
        self._held = False
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def give_back(self) -> None:
        """Restores the handlers that were there before."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See ``Uninterrupted``."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.received:
            raise KeyboardInterrupt

    def too_late(self) -> None:
        """See ``Uninterrupted``."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _receive(self, _number: int, _frame: object) -> None:
        self.too_late()
        self.received = True
        if not self._held:
            raise KeyboardInterrupt
