"""Engines on disk: built, read and audited. Imports numpy at most; never torch, never ``exporter``."""

from engines.build import Build, build
from engines.errors import ReportedError

__all__ = ["Build", "ReportedError", "build"]
