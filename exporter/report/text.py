"""The ledger and the headroom in half as lines for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from exporter.report.record import HeadroomRow, LedgerRow

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
        f"{same} of {comparison.rows}" if row.ranked else "-",
        ", ".join(_repeated(row.batches)),
    )


def _repeated(batches: Sequence[int]) -> Iterator[str]:
    """As in "1", "7 x 32", "31"."""
    for batch, group in itertools.groupby(batches):
        times = len(list(group))
        yield str(batch) if times == 1 else f"{times} x {batch}"


def line_from_headroom(rows: Sequence[HeadroomRow], inputs: str) -> str:
    """The least headroom of all convolutions, before and after, and where it was seen.

    Args:
        rows: at least one.
        inputs: where the images come from, as the report says it.
    """
    before = min(rows, key=lambda row: row.before.factor)
    after = min(rows, key=lambda row: row.after.factor)
    line = f"{before.before.factor:.3g} ({before.before.bits:.1f} bits) in {before.convolution}"
    if any(row.exponents for row in rows):
        line += f"; rescaled, {after.after.factor:.3g} ({after.after.bits:.1f} bits) in {after.convolution}"
    return f"{line}, on {inputs}"


def rescaled_in_words(row: HeadroomRow) -> str:
    """As in "stage2.1: 3 channels scaled by 2^-5..2^-2", of a convolution that was rescaled."""
    powers = [exponent for exponent in row.exponents if exponent]
    least, most = min(powers), max(powers)
    by = f"2^{least}" if least == most else f"2^{least}..2^{most}"
    count = f"{len(powers)} channel{'s' if len(powers) > 1 else ''}"
    return f"{row.convolution.removesuffix('/Conv')}: {count} scaled by {by}"
