"""The ledger as lines for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

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
    same = comparison.rows - len(comparison.flips)
    bad = f" ({comparison.non_finite} NaN or infinite)" if comparison.non_finite else ""
    return (
        row.stage,
        f"{comparison.max_abs_error:.1e}{bad}",
        f"{comparison.relative_error:.1e}",
        f"{row.added:.1e}",
        f"{comparison.sqnr_db:.1f}",
        f"{same} of {comparison.rows}",
        ", ".join(_repeated(row.batches)),
    )


def _repeated(batches: Sequence[int]) -> Iterator[str]:
    """As in "1", "7 x 32", "31"."""
    for batch, group in itertools.groupby(batches):
        times = len(list(group))
        yield str(batch) if times == 1 else f"{times} x {batch}"
