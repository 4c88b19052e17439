"""Calls of TensorRT's Python interface, of either SDK: what it refuses becomes one line with its own words.

Its methods refuse by returning None or False, or by raising; the reason goes to a logger. The SDK keeps the first
logger that a process gives it and ignores all later ones, so there is one for each SDK, as long as the process lives.
"""

from __future__ import annotations

import collections
import functools
import importlib
from collections.abc import Callable
from typing import Any

from engines.errors import DeviceFailed, SdkMissing, first_line
from engines.sdk import Sdk

KEPT_MESSAGES = 4


def imported_sdk(sdk: Sdk) -> Any:
    """The SDK's module.

    Raises:
        SdkMissing: it cannot be imported, such as without its libraries.
    """
    try:
        return importlib.import_module(sdk.module)
    except Exception as error:  # a broken installation raises whatever it pleases
        raise SdkMissing(
            f"{sdk.title} is installed here and cannot be imported ({first_line(error)}); {sdk.install}"
        ) from error


@functools.cache
def logger_of(trt: Any) -> Any:
    """The one logger of an SDK in this process; its ``errors`` are the last few messages of that severity."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: collections.deque[str] = collections.deque(maxlen=KEPT_MESSAGES)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


class SdkCalls:
    """Calls methods of the SDK ``trt`` for the engine that ``where`` names in errors."""

    def __init__(self, trt: Any, where: str) -> None:
        self.trt = trt
        self.logger = logger_of(trt)
        self.where = where

    def answer(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns.

        Raises:
            DeviceFailed: it returned None or False, or raised.
        """
        result = self.command(function, *arguments)
        if result is None or result is False:
            raise self._failure(function)
        return result

    def command(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns, which may be nothing.

        Raises:
            DeviceFailed: it raised.
        """
        self.logger.errors.clear()
        try:
            return function(*arguments)
        except Exception as error:  # the SDK raises what its binding makes of C++ exceptions
            raise self._failure(function, error) from error

    def _failure(self, function: Callable[..., Any], error: Exception | None = None) -> DeviceFailed:
        words = [*self.logger.errors, *([first_line(error)] if error is not None else [])]
        said = "; ".join(words) or "it gave no reason"
        return DeviceFailed(f"{self.where}: {function.__name__} failed: {said}")
