"""How many times as fast as the first file, where that may be said.

A speed-up compares rows of the same batch and way, slice by slice in the rounds that both were measured in. There is
none where either file computed something else than its network, or nothing says whether it did, or the interval as it
is printed holds 1: then the two are not known to differ by as much as a digit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from engines.bench.record import FileRow, Row
from engines.bench.statistics import speed_up
from engines.bench.text import speed_up_text

DIGITS = 2
"""Behind the point, of a speed-up as it is printed."""


def with_speed_ups(rows: Sequence[Row], files: Sequence[FileRow]) -> list[Row]:
    """The rows with their speed-ups against the first file, or the reason why there is none."""
    passed = {file.file: file.parity.passed for file in files}
    first = files[0].file
    references = {(row.batch, row.way): row for row in rows if row.file == first}
    return [
        row if row.file == first else _with_speed_up(row, references.get((row.batch, row.way)), first, passed)
        for row in rows
    ]


def _with_speed_up(row: Row, reference: Row | None, first: str, passed: Mapping[str, bool | None]) -> Row:
    def without(reason: str) -> Row:
        return dataclasses.replace(row, no_speedup=reason)

    if reference is None:
        return without(f"{first} was not measured this way")
    for name in (row.file, first):
        if passed[name] is not True:
            return without(f"{name}: {'parity was not checked' if passed[name] is None else 'parity failed'}")
    found = speed_up(row.measurement.counted, reference.measurement.counted)
    if round(found.low, DIGITS) <= 1 <= round(found.high, DIGITS):
        return without(f"{speed_up_text(found)} cannot be told from 1")
    return dataclasses.replace(row, speedup=found, against=first)
