"""``report.md``: the report for a person, and for a CI job's summary.

Names and messages come from files and from other software, so everything that is not markup of this module is escaped:
what Markdown, HTML or a table would read as its own shows as itself. A job's summary takes 1 MiB and shows nothing of a
longer one, so the text is cut at LARGEST_SIZE; what matters most stands first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from engines.markdown_text import Markup, code, escaped, table
from exporter.errors import listed
from exporter.report.record import (
    AccuracyRow,
    Check,
    HeadroomRow,
    LayerRow,
    LedgerRow,
    QuantizationRecord,
    QuantizedLayerRow,
    Report,
)
from exporter.report.text import equalization_in_words, made_in_words, rescaled_in_words

LARGEST_SIZE = 900 * 1024
"""Of the whole text, in bytes of UTF-8."""
HEADROOM_ROWS = 5
QUANTIZED_ROWS = 5
LEDGER_COLUMNS = (
    "stage", "max abs", "mean abs", "relative", "SQNR dB", "cosine", "top-1", "flips", "non-finite", "added", "batches",
)  # fmt: skip
QUANTIZATION_COLUMNS = (
    "file", "made with", "SQNR dB", "images", "same top-1", "budget dB", "equalization", "fitted on",
    "ONNX Runtime to simulation dB", "with INT8 kernels dB", "seconds",
)  # fmt: skip


def markdown_from_report(report: Report) -> str:
    """The whole report as Markdown with tables."""
    checkpoint, architecture = report.checkpoint, report.architecture
    return document(
        f"{escaped(checkpoint['name'])}: {report.verdict}",
        [
            f"{escaped(architecture['title'])}, {checkpoint['lineage']} naming, {checkpoint['form']} form. "
            f"SHA-256 of the checkpoint: {code(checkpoint['sha256'])}. Compared on {escaped(report.inputs)}.",
            section("Checks", ("stage", "result", "found"), map(_check, report.checks)),
            section("Ledger", LEDGER_COLUMNS, map(ledger_cells, report.ledger)),
            _layers(report.layers, report.first_departing_layer),
            _headroom(report),
            _quantization(report.quantization),
            section("Accuracy", ("precision", "images", "top-1", "drop", "agreement"), map(_accuracy, report.accuracy)),
            _witness(report.witness),
            section("Assumptions", ("what", "value"), report.assumptions.items()),
            section("Engines", ("file", "made by", "cards", "audit"), _engines(report)),
            section(
                "Fusion, block by block", ("block", "branches", "error", "as written in float32"), _certificates(report)
            ),
            section(
                "Files",
                ("file", "bytes", "SHA-256"),
                ((file.name, file.bytes, code(file.sha256) if file.sha256 else "none") for file in report.files),
            ),
            section("Versions", ("package", "version"), report.versions.items()),
        ],
    )


def document(title: str, parts: Iterable[str]) -> str:
    """A heading of Markdown and the ``parts`` that are not empty, cut where a job's summary would not take more."""
    text = "\n\n".join(part for part in (f"# {title}", *parts) if part) + "\n"
    encoded = text.encode()
    if len(encoded) <= LARGEST_SIZE:
        return text
    kept = encoded[:LARGEST_SIZE].decode(errors="ignore").rpartition("\n")[0]
    return f"{kept}\n\nThe rest is left out: it is more than a job's summary takes.\n"


def section(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A heading with a table; empty without rows. Cells that are not ``Markup`` are escaped."""
    lines = table(columns, rows)
    return f"## {title}\n\n{lines}" if lines else ""


def ledger_cells(row: LedgerRow) -> tuple[object, ...]:
    """One row of the ledger, for LEDGER_COLUMNS."""
    found = row.comparison
    return (
        row.stage,
        f"{found.max_abs_error:.1e}",
        f"{found.mean_abs_error:.1e}",
        f"{found.relative_error:.1e}",
        f"{found.sqnr_db:.1f}",
        f"{found.cosine:.9f}",
        f"{found.rows - len(found.flips)} of {found.rows}" if row.ranked else "-",
        flips_in_words(row) if row.ranked else "-",
        found.non_finite,
        f"{row.added:.1e}",
        ", ".join(map(str, row.batches)),
    )


def flips_in_words(row: LedgerRow) -> str:
    """How many rows name another class, with the reference's margins in them, and how many no error explains."""
    found = row.comparison
    if not found.flips:
        return "0"
    margins = listed([f"{flip.margin:.1e}" for flip in found.flips])
    decided = f", {found.decided_flips} beyond the error's reach" if found.decided_flips else ""
    return f"{len(found.flips)} (margins {margins}){decided}"


def result_in_words(check: Check) -> str:
    """``pass``, ``FAIL`` or ``not run``."""
    return "not run" if check.passed is None else "pass" if check.passed else "FAIL"


def _check(check: Check) -> tuple[str, str, str]:
    result = result_in_words(check)
    return check.stage, Markup(f"**{result}**") if check.passed is False else result, check.detail


def _layers(layers: Sequence[LayerRow], first_departing: str | None) -> str:
    stages = list(dict.fromkeys(itertools.chain.from_iterable(row.errors for row in layers)))
    shown = section(
        "Layers",
        ("layer", *stages),
        ((row.layer, *(f"{row.errors[s]:.1e}" if s in row.errors else "" for s in stages)) for row in layers),
    )
    if not shown:
        return ""
    departs = f"The first that departs is **{escaped(first_departing)}**." if first_departing else "None departs."
    return f"{shown}\n\nRelative errors of each layer's output. {departs}"


def _headroom(report: Report) -> str:
    """The convolutions with the least headroom; all of them stand in the JSON."""
    rows = sorted(report.headroom, key=lambda row: row.before.factor)[:HEADROOM_ROWS]
    shown = section(
        "Headroom in half",
        ("convolution", "peak", "channel", "headroom", "bits", "rescaled", "headroom after", "bits after"),
        map(_headroom_cells, rows),
    )
    if not shown:
        return ""
    peaks = f"Peaks on {escaped(report.inputs)}"
    return f"{shown}\n\n{peaks}; the least of {len(report.headroom)} convolutions, all of which are in report.json."


def _headroom_cells(row: HeadroomRow) -> tuple[object, ...]:
    rescaled = rescaled_in_words(row).partition(": ")[2] if row.exponents else row.fixed or "not needed"
    before, after = row.before, row.after
    figures = (f"{before.peak:.4g}", before.channel, f"{before.factor:.3g}", f"{before.bits:.1f}")
    return row.convolution, *figures, rescaled, f"{after.factor:.3g}", f"{after.bits:.1f}"


def _quantization(records: Sequence[QuantizationRecord]) -> str:
    """One line of figures for each INT8 file, then its worst layers, those that are not in INT8, and its traffic."""
    figures = section("INT8", QUANTIZATION_COLUMNS, map(_quantization_cells, records))
    if not figures:
        return ""
    explained = "SQNR and top-1 are of the network's output over all images, against float32."
    return "\n\n".join([figures, explained, *itertools.chain.from_iterable(map(_quantized_parts, records))])


def _quantization_cells(record: QuantizationRecord) -> tuple[object, ...]:
    return (
        record.file,
        made_in_words(record),
        f"{record.sqnr_db:.1f}",
        record.images,
        "-" if record.agreement is None else f"{record.agreement:.2%}",
        _decibels(record.budget_db),
        equalization_in_words(record),
        record.fitted_images,
        f"{record.simulation_db:.1f}",
        _decibels(record.kernels_db),
        f"{record.seconds:.1f}",
    )


def _quantized_parts(record: QuantizationRecord) -> Iterator[str]:
    name = escaped(record.file)
    worst = sorted(record.layers, key=lambda row: -math.inf if math.isnan(row.sqnr_db) else row.sqnr_db)
    columns = ("layer", "range of its input", "chosen by", "beyond it", "SQNR dB", "alone dB", "all but it dB")
    shown = section(f"INT8, layers of {name}", columns, map(_quantized_cells, worst[:QUANTIZED_ROWS]))
    if shown:
        yield shown
        yield f"The worst of {len(worst)} layers, all of which are in report.json."
    kept = section(f"Not in INT8 in {name}", ("layer", "reason"), record.kept.items())
    if kept:
        yield kept
    if record.traffic:
        yield f"Traffic of {name}: {escaped(record.traffic)}"


def _quantized_cells(row: QuantizedLayerRow) -> tuple[object, ...]:
    figures = (f"{row.input_range:.4g}", row.method, f"{100 * row.clipped:.3g}%", f"{row.sqnr_db:.1f}")
    return row.layer, *figures, _decibels(row.alone_db), _decibels(row.without_db)


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _accuracy(row: AccuracyRow) -> tuple[object, ...]:
    drop = f"{100 * row.drop:+.2f} points (standard error {100 * row.standard_error:.2f})"
    return row.precision, row.images, f"{row.top1:.2%}", drop, f"{row.agreement:.2%}"


def _witness(witness: dict[str, Any] | None) -> str:
    if witness is None:
        return ""
    figures = ("drift", "spread", "excess_drift", "excess_spread")
    layers = section(
        "Batch norms",
        ("layer", *(figure.replace("_", " ") for figure in figures)),
        ((row["layer"], *(_figure(row[figure]) for figure in figures)) for row in witness["layers"]),
    )
    agreements = section(
        "Branches of a block against each other",
        ("block", "disagreement"),
        ((row["block"], _figure(row["disagreement"])) for row in witness["agreements"]),
    )
    proposal = escaped(witness["proposal"]["line"]) if witness["proposal"] else ""
    parts = ("## Witness", escaped(witness["line"]), proposal, layers, agreements)
    return "\n\n".join(part for part in parts if part)


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _engines(report: Report) -> Iterable[tuple[str, str, str, str]]:
    for engine in report.engines:
        cards = ", ".join(f"sm{card}" for card in engine.compute_capabilities)
        yield engine.name, f"{engine.sdk} {engine.sdk_version}", cards, str(engine.audit["line"])


def _certificates(report: Report) -> Iterable[tuple[str, str, str, str]]:
    for row in report.certificates:
        yield row["block"], " + ".join(row["branches"]), f"{row['error']:.1e}", f"{row['rounding_error']:.1e}"
