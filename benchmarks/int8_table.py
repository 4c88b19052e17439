"""The rows of ``benchmarks/int8.py`` as tables and as JSON: every line of ours stands against the other side's best."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.int8_figures import Figures
from benchmarks.int8_worker import Cost

THEIRS, OURS = "onnxruntime", "exporter"
PACKAGES = ("torch", "onnx", "onnxruntime", "numpy")
HEADINGS = (
    "network", "form", "bits", "side", "what", "SQNR dB", "gain", "float32", "top-1", "drop", "+-", "agree",
    "s", "ratio", "peak MB", "ratio",
)  # fmt: skip
TIMING_HEADINGS = ("images", "side", "what", "median s", "min-max s", "ratio", "cpu s", "ratio", "peak MB", "above MB")
TEXT_COLUMNS = ("network", "form", "bits", "side", "what")


@dataclasses.dataclass(frozen=True)
class Row:
    """One INT8 file. ``what`` is a calibration of ONNX Runtime or an effort of the exporter."""

    network: str
    form: str
    bits: int
    side: str
    what: str
    figures: Figures
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Gain:
    """Ours against the other side's best: dB more, and seconds and peak memory divided by its own."""

    best: str
    sqnr_db: float
    seconds: float
    peak: float


@dataclasses.dataclass(frozen=True)
class TimingRow:
    """Every measured run of one side with so many images."""

    images: int
    side: str
    what: str
    runs: tuple[Cost, ...]

    def median(self, field: str) -> float:
        """The median over the runs of one of ``Cost``'s numbers."""
        return statistics.median(float(getattr(run, field)) for run in self.runs)


def best_of(rows: Sequence[Row]) -> Row:
    """The one with the highest SQNR; a network that answers NaN is none's best."""
    return max(rows, key=lambda row: -math.inf if math.isnan(row.figures.sqnr_db) else row.figures.sqnr_db)


def gain_of(row: Row, rows: Sequence[Row]) -> Gain | None:
    """Of one of the exporter's rows, where the other side made the same."""
    kind = (row.network, row.form, row.bits)
    theirs = [other for other in rows if other.side == THEIRS and (other.network, other.form, other.bits) == kind]
    if row.side != OURS or not theirs:
        return None
    best = best_of(theirs)
    return Gain(
        best.what,
        row.figures.sqnr_db - best.figures.sqnr_db,
        row.cost.seconds / best.cost.seconds,
        row.cost.peak_mb / best.cost.peak_mb,
    )


def figures_table(rows: Sequence[Row]) -> str:
    """One line a row below the headings."""
    return _table(HEADINGS, [_cells(row, gain_of(row, rows)) for row in rows])


def _cells(row: Row, gain: Gain | None) -> tuple[str, ...]:
    figures, cost = row.figures, row.cost
    gained = ("-", "-", "-") if gain is None else (f"{gain.sqnr_db:+.1f}", f"{gain.seconds:.2f}", f"{gain.peak:.2f}")
    accuracy = (figures.float32_top1, figures.top1, figures.drop, figures.standard_error, figures.agreement)
    return (
        *(row.network, row.form, f"W{row.bits}A8", row.side, row.what),
        *(f"{figures.sqnr_db:.1f}", gained[0], *(f"{value:.2f}" for value in accuracy)),
        *(f"{cost.seconds:.1f}", gained[1], f"{cost.peak_mb:.0f}", gained[2]),
    )


def timing_ratios(row: TimingRow, rows: Sequence[TimingRow]) -> dict[str, Any] | None:
    """Wall and processor time of ours divided by the other side's with the same images, and round by round."""
    theirs = [other for other in rows if other.side == THEIRS and other.images == row.images]
    if row.side != OURS or not theirs:
        return None
    (other,) = theirs
    pairs = zip(row.runs, other.runs, strict=True)
    return {
        "seconds": row.median("seconds") / other.median("seconds"),
        "cpu_seconds": row.median("cpu_seconds") / other.median("cpu_seconds"),
        "each_round": [ours.seconds / their.seconds for ours, their in pairs],
    }


def timing_table(rows: Sequence[TimingRow]) -> str:
    """One line a row below the headings."""
    return _table(TIMING_HEADINGS, [_timing_cells(row, timing_ratios(row, rows)) for row in rows])


def _timing_cells(row: TimingRow, ratios: dict[str, Any] | None) -> tuple[str, ...]:
    seconds = [run.seconds for run in row.runs]
    wall, processor = ("-", "-") if ratios is None else (f"{ratios['seconds']:.2f}", f"{ratios['cpu_seconds']:.2f}")
    return (
        *(str(row.images), row.side, row.what),
        *(f"{row.median('seconds'):.1f}", f"{min(seconds):.1f}-{max(seconds):.1f}", wall),
        *(f"{row.median('cpu_seconds'):.1f}", processor),
        *(f"{row.median('peak_mb'):.0f}", f"{row.median('above_mb'):.0f}"),
    )


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in (headings, *rows)) for column in range(len(headings))]
    left = [heading in TEXT_COLUMNS for heading in headings]
    lines = (
        (cell.ljust(width) if text else cell.rjust(width) for cell, width, text in zip(line, widths, left, strict=True))
        for line in (headings, *rows)
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def json_of_results(machine: str, figures: Sequence[Row], timing: Sequence[TimingRow]) -> str:
    """Every number, for other tools. An SQNR that is not finite becomes null."""
    rows = [{**dataclasses.asdict(row), "gain": _as_dict(gain_of(row, figures))} for row in figures]
    runs = [{**dataclasses.asdict(row), "ratios": timing_ratios(row, timing)} for row in timing]
    return json.dumps(_finite({"machine": machine, "figures": rows, "timing": runs}), indent=2, allow_nan=False) + "\n"


def _as_dict(gain: Gain | None) -> dict[str, Any] | None:
    return None if gain is None else dataclasses.asdict(gain)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine_line() -> str:
    """Cores, load before the start, and the versions of what does the work."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    python = platform.python_version()
    return f"{cores} cores ({platform.machine()}), load {load:.1f} at the start; Python {python}, {versions}"
