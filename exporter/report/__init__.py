"""What a run found, as data; its forms are ``report.json``, ``report.md`` and lines for a terminal."""

from __future__ import annotations

from exporter.report.markdown import markdown_from_report
from exporter.report.record import AccuracyRow, Check, EngineRecord, FileRecord, LayerRow, LedgerRow, Report
from exporter.report.text import lines_from_ledger

__all__ = [
    "AccuracyRow",
    "Check",
    "EngineRecord",
    "FileRecord",
    "LayerRow",
    "LedgerRow",
    "Report",
    "lines_from_ledger",
    "markdown_from_report",
]
