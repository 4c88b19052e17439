"""The figures of a row, from what was measured of it; a receipt's are made again by the same function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engines.bench.record import Bound, Row
from engines.bench.rounds import Measurement
from engines.bench.statistics import Estimate, latency_percentiles, queries_per_second, variation
from engines.bench.workload import Workload
from engines.roofline.cards import Card
from engines.timing import COMPUTE, D2H, H2D

MILLISECONDS = 1e3


def row_from_measurement(
    measurement: Measurement,
    *,
    file: str,
    batch: int,
    way: str,
    first_seconds: float,
    workload: Workload,
    card: Card | None,
    telemetry: dict[str, Any] | None,
) -> Row:
    """Everything that is told of a row but its speed-up, which needs the others.

    Args:
        measurement: of the row.
        file: its name.
        batch: images of a query.
        way: how it was computed.
        first_seconds: of the first inference.
        workload: what the file computes and moves.
        card: that it ran on; None where there is none, or its peaks are not known.
        telemetry: what the card told of itself.
    """
    counted = measurement.counted
    rate = queries_per_second(counted)
    medians = {part: float(np.median(measurement.counted_part(part))) for part in measurement.parts}
    steady = measurement.counted_part(COMPUTE) if COMPUTE in measurement.parts else counted.latencies
    return Row(
        file=file,
        batch=batch,
        way=way,
        first_seconds=first_seconds,
        queries=counted.queries,
        images_per_second=_times(rate, batch),
        queries_per_second=rate,
        latency_ms={percent: _in_ms(found) for percent, found in latency_percentiles(counted).items()},
        parts_ms={part: median * MILLISECONDS for part, median in medians.items()},
        variation=variation(steady),
        windows=tuple(batch * rate for rate in measurement.windows),
        settled=measurement.settled,
        speedup=None,
        against=None,
        no_speedup=None,
        bytes_per_image=workload.bytes_per_image(batch),
        bound=None if card is None else _bound(card, workload, batch, rate.value, medians),
        telemetry=telemetry,
        measurement=measurement,
    )


def _bound(card: Card, workload: Workload, batch: int, rate: float, medians: Mapping[str, float]) -> Bound | None:
    """The least time for a query on the card, and how near the row comes to it."""
    least = workload.bound(card, batch)
    if least is None:
        return None
    copying = medians.get(H2D, 0.0) + medians.get(D2H, 0.0)
    binds = "transfers" if copying > medians.get(COMPUTE, np.inf) else least.binds
    return Bound(card.title, least.seconds * MILLISECONDS, binds, 100 * least.seconds * rate)


def _times(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(estimate.value * factor, estimate.low * factor, estimate.high * factor)


def _in_ms(estimate: Estimate | None) -> Estimate | None:
    return None if estimate is None else _times(estimate, MILLISECONDS)
