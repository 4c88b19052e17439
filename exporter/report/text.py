"""The ledger, the headroom in half and what INT8 costs, as lines for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from exporter.errors import listed
from exporter.quantization.form import FORMS
from exporter.report.record import HeadroomRow, LedgerRow, QuantizationRecord

_FORMS = {form.name: form for form in FORMS}
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


def line_from_quantization(record: QuantizationRecord) -> str:
    """How near an INT8 file comes to float32, and what was done for it."""
    agreement = "" if record.agreement is None else f", top-1 agrees on {record.agreement:.2%}"
    found = f"{record.sqnr_db:.1f} dB{_budget_in_words(record)} over {record.images} images{agreement}"
    parts = [
        f"{record.form} ({made_in_words(record)}): {found}",
        equalization_in_words(record),
        *([kept_in_words(record)] if record.kept else []),
        *([record.traffic] if record.traffic else []),
    ]
    return "; ".join(parts)


def _budget_in_words(record: QuantizationRecord) -> str:
    if record.budget_db is None:
        return ""
    return f" ({'meets' if record.sqnr_db >= record.budget_db else 'misses'} the budget of {record.budget_db:g} dB)"


def made_in_words(record: QuantizationRecord) -> str:
    """As in "a weight scale for each channel, effort high, 4-bit weights"."""
    parts = [
        _FORMS[record.form].title.partition(",")[0],
        *([f"effort {record.effort}"] if record.effort != "default" else []),
        *([f"{record.weight_bits}-bit weights"] if record.weight_bits != 8 else []),
        *([f"{record.activation_bits}-bit activations"] if record.activation_bits != 8 else []),
    ]
    return ", ".join(parts)


def equalization_in_words(record: QuantizationRecord) -> str:
    """As in "equalized (33.6 dB against 31.9 dB without)"."""
    done = "equalized" if record.equalized else "not equalized"
    if record.equalized_db is None or record.plain_db is None:
        return done
    if record.equalized:
        return f"{done} ({record.equalized_db:.1f} dB against {record.plain_db:.1f} dB without)"
    return f"{done} ({record.plain_db:.1f} dB against {record.equalized_db:.1f} dB with it)"


def kept_in_words(record: QuantizationRecord) -> str:
    """As in "2 layers kept in float32: stage0.0/Conv (the budget), ..."; there is at least one."""
    count = f"{len(record.kept)} layer{'s' if len(record.kept) > 1 else ''}"
    named = listed([f"{layer} ({reason})" for layer, reason in record.kept.items()], 3)
    return f"{count} kept in {_FORMS[record.form].dtype.name}: {named}"
