"""What a run found, as data; its forms are ``report.json``, ``report.md`` and lines for a terminal."""

from __future__ import annotations

from exporter.report.markdown import markdown_from_report
from exporter.report.record import AccuracyRow, Check, EngineRecord, FileRecord, LayerRow, LedgerRow, Report

__all__ = [
    "AccuracyRow",
    "Check",
    "EngineRecord",
    "FileRecord",
    "LayerRow",
    "LedgerRow",
    "Report",
    "markdown_from_report",
]
