"""The ledger as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.report.record import LedgerRow

_HEADINGS = ("ledger", "max error", "relative", "added", "SQNR dB", "top-1", "batches")


def lines_from_ledger(ledger: Sequence[LedgerRow]) -> list[str]:
    """A heading and a line for each stage, in columns."""
    table = [_HEADINGS, *(cells_of(row) for row in ledger)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(_HEADINGS))]
    lines = []
    for first, *others in table:
        figures = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *figures]))
    return lines


def cells_of(row: LedgerRow) -> tuple[str, ...]:
    """The figures of one stage, rounded for people."""
    comparison = row.comparison
    agreement = f"{comparison.top1_agreement:.0%}" + (f" ({len(comparison.flips)} flips)" if comparison.flips else "")
    bad = f" ({comparison.non_finite} NaN or infinite)" if comparison.non_finite else ""
    return (
        row.stage,
        f"{comparison.max_abs_error:.1e}{bad}",
        f"{comparison.relative_error:.1e}",
        f"{row.added:.1e}",
        f"{comparison.sqnr_db:.1f}",
        agreement,
        ", ".join(str(batch) for batch in row.batches),
    )
