"""What a run found, as data; its forms are ``report.json``, ``report.md`` and lines for a terminal."""

from __future__ import annotations

from exporter.report.junit import junit_from_error, junit_from_report
from exporter.report.markdown import markdown_from_report
from exporter.report.record import (
    AccuracyRow,
    Check,
    EngineRecord,
    FileRecord,
    Headroom,
    HeadroomRow,
    LayerRow,
    LedgerRow,
    QuantizationRecord,
    QuantizedLayerRow,
    Report,
    plain_json,
)
from exporter.report.text import line_from_headroom, line_from_quantization, lines_from_ledger, rescaled_in_words

__all__ = [
    "AccuracyRow",
    "Check",
    "EngineRecord",
    "FileRecord",
    "Headroom",
    "HeadroomRow",
    "LayerRow",
    "LedgerRow",
    "QuantizationRecord",
    "QuantizedLayerRow",
    "Report",
    "junit_from_error",
    "junit_from_report",
    "line_from_headroom",
    "line_from_quantization",
    "lines_from_ledger",
    "markdown_from_report",
    "plain_json",
    "rescaled_in_words",
]
