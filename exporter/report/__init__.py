"""What a run found, as data; its forms are ``report.json``, ``report.md`` and lines for a terminal."""

from __future__ import annotations

from exporter.report.markdown import markdown_from_report
from exporter.report.record import Check, EngineRecord, FileRecord, Report

__all__ = ["Check", "EngineRecord", "FileRecord", "Report", "markdown_from_report"]
