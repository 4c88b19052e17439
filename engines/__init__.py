"""Engines on disk: built, read, audited, verified and run. Imports numpy at most; never torch, never ``exporter``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from engines.build import build  # here and now: the module of that name would take the function's place later
from engines.errors import ReportedError
from engines.version import VERSION

if TYPE_CHECKING:
    from engines.delivery import Build
    from engines.runner import Runner, load

__all__ = ["Build", "ReportedError", "Runner", "__version__", "build", "load"]

__version__ = VERSION

_WITH_NUMPY = {"Build": "engines.delivery", "Runner": "engines.runner", "load": "engines.runner"}


def __getattr__(name: str) -> Any:
    """What brings numpy is imported when it is first asked for."""
    if name not in _WITH_NUMPY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WITH_NUMPY[name]), name)
