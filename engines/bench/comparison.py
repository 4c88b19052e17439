"""Files against each other: opened, measured batch by batch, judged, and put into a record.

    for each batch   every way of every file is made ready and computes once (its first inference, timed apart)
                     all of them are measured in rounds                       ``engines.bench.rounds``
                     what the timed queries computed is held to the golden vectors
    at the end       every golden image is computed once more and judged
                     speed-ups are told of files that passed                  ``engines.bench.speed_ups``

Speed is never told without the answers: a file that computes something else is not a faster one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence

from engines.bench.cautions import warnings_of_files, warnings_of_left_out, warnings_of_row, warnings_of_sizes
from engines.bench.contenders import Contender, Way, opened_contenders
from engines.bench.device import Device, device_of
from engines.bench.machine import load_average, machine, versions
from engines.bench.options import DEFAULT_BATCHES, Options, check_options, settings_of
from engines.bench.record import FileRow, Parity, Record, Row
from engines.bench.rounds import measured
from engines.bench.rows import row_from_measurement
from engines.bench.speed_ups import with_speed_ups
from engines.bench.workload import Workload, workload_of
from engines.errors import UsageError, printable
from engines.kind import ONNX
from engines.timing import Clock, Queries


@dataclasses.dataclass(frozen=True)
class _Lane:
    """One row in the making."""

    contender: Contender
    way: Way
    queries: Queries
    golden_rows: list[int] | None
    first_seconds: float


def bench(
    paths: Sequence[pathlib.Path],
    options: Options = Options(),  # noqa: B008 - it is frozen
    *,
    clock: Clock = time.perf_counter,
    told: Callable[[str], None] = lambda line: None,
) -> Record:
    """Measures the files side by side.

    Args:
        paths: ONNX files and engines; speed-ups are against the first.
        options: how.
        clock: of the host, in seconds.
        told: is given a line when a batch was measured.

    Raises:
        UsageError: options that contradict each other, or that a file cannot satisfy.
        InputRejected: a file cannot be run.
        SdkMissing: what it runs on is not here.
        DeviceFailed: a call to the GPU failed.
    """
    check_options(options)
    names, load = names_of(paths), load_average()
    with opened_contenders(list(paths), options, clock) as contenders, contextlib.ExitStack() as resources:
        batches = batches_of(contenders, options)
        device = device_of(contenders, options, resources)
        sizes = [contender.size(options.size) for contender in contenders]
        workloads = [workload_of(contender.path, size) for contender, size in zip(contenders, sizes, strict=True)]
        parities: list[list[Parity]] = [[] for _ in contenders]
        rows: list[Row] = []
        for batch in batches:
            found, judged = _rows_of_batch(contenders, names, batch, options, clock, device, workloads)
            for place, parity in judged:
                parities[place].append(parity)
            rows += found
            told(f"measured batch {batch}: {len(found)} rows, {sum(row.queries for row in found)} queries that count")
        files = [
            _file_row(contender, name, _together([contender.parity_of_all(), *said]), workload)
            for contender, name, said, workload in zip(contenders, names, parities, workloads, strict=True)
        ]
        return Record(
            machine=machine(device, load),
            versions=versions(),
            settings=settings_of(
                options,
                batches,
                sizes,
                with_onnx=any(contender.kind == ONNX for contender in contenders),
                with_gpu=device is not None,
            ),
            files=tuple(files),
            rows=tuple(with_speed_ups(rows, files)),
            warnings=(
                *warnings_of_files(contenders, names, options, workloads),
                *warnings_of_sizes(names, sizes),
                *([device.problem] if device is not None and device.problem is not None else []),
                *warnings_of_left_out(contenders, names, rows),
                *(warning for row in rows for warning in warnings_of_row(row)),
            ),
        )


def names_of(paths: Sequence[pathlib.Path]) -> list[str]:
    """The files' names, with as many of their directories as it takes to tell them apart, and no more.

    Raises:
        UsageError: there is no file, or one is given twice.
    """
    if not paths:
        raise UsageError("give at least one file")
    twice = [path for index, path in enumerate(paths) if path in paths[:index]]
    if twice:
        raise UsageError(f"{twice[0]} is given twice")
    tails = ([_printable(path.parts[-length:]) for path in paths] for length in itertools.count(1))
    return next(names for names in tails if len(set(names)) == len(names))


def _printable(parts: Sequence[str]) -> str:
    """A path of these parts as one line; an escape for what cannot be seen, or for an escape's own mark."""
    return printable(pathlib.Path(*parts).as_posix().replace("\\", "\\\\"))


def batches_of(contenders: Sequence[Contender], options: Options) -> tuple[int, ...]:
    """The batches that every file takes; all that were asked for, or those of the default that fit.

    Raises:
        UsageError: a file does not take a batch that was asked for, or none of the default.
    """
    if options.batches is None:
        fitting = tuple(batch for batch in DEFAULT_BATCHES if all(contender.takes(batch) for contender in contenders))
        if fitting:
            return fitting
        ranges = "; ".join(f"{contender.path.name} {_range(contender)}" for contender in contenders)
        raise UsageError(f"no usual batch fits all files ({ranges}); give --batch")
    for batch in options.batches:
        for contender in contenders:
            if not contender.takes(batch):
                raise UsageError(f"--batch {batch}: {contender.path} takes batches of {_range(contender)}")
    return options.batches


def _range(contender: Contender) -> str:
    least, most = contender.backend.batch
    return f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"


def _rows_of_batch(
    contenders: Sequence[Contender],
    names: Sequence[str],
    batch: int,
    options: Options,
    clock: Clock,
    device: Device | None,
    workloads: Sequence[Workload],
) -> tuple[list[Row], list[tuple[int, Parity]]]:
    """All rows of one batch, and of each what it computed, by the file's place."""
    with contextlib.ExitStack() as resources:
        lanes = [
            lane
            for contender in contenders
            for way in contender.ways
            if (lane := _lane(contender, way, batch, options, clock, resources)) is not None
        ]
        measurements = measured([lane.queries for lane in lanes], options.duration, clock)
        rows, judged = [], []
        for lane, measurement in zip(lanes, measurements, strict=True):
            place = contenders.index(lane.contender)
            judged.append((place, lane.contender.parity(lane.queries.results(), lane.golden_rows)))
            telemetry = None
            if device is not None:
                telemetry = device.telemetry(lane.queries, batch, options.duration, clock)
            rows.append(
                row_from_measurement(
                    measurement,
                    file=names[place],
                    batch=batch,
                    way=lane.way.title,
                    first_seconds=lane.first_seconds,
                    workload=workloads[place],
                    card=None if device is None else device.card,
                    telemetry=telemetry,
                )
            )
        return rows, judged


def _lane(
    contender: Contender, way: Way, batch: int, options: Options, clock: Clock, resources: contextlib.ExitStack
) -> _Lane | None:
    """The row, made ready; None where the GPU records no graph of it."""
    images, golden_rows = contender.images(batch, options.size)
    started = clock()
    queries = contender.queries(way, images, clock)
    resources.callback(queries.close)
    if way.graph and not queries.graphed:
        return None
    queries.run(1)
    passed = clock() - started
    first_seconds = passed if queries.first_seconds is None else queries.first_seconds
    return _Lane(contender, way, queries, golden_rows, first_seconds)


def _together(parities: Sequence[Parity]) -> Parity:
    """The first failure, else the first that could not be checked, else what the run of all golden images says."""
    worst = (parity for passed in (False, None) for parity in parities if parity.passed is passed)
    return next(worst, parities[0])


def _file_row(contender: Contender, name: str, parity: Parity, workload: Workload) -> FileRow:
    return FileRow(
        file=name,
        sha256=contender.sha256,
        bytes=contender.bytes,
        precision=contender.precision,
        kind=contender.kind,
        load_seconds=contender.load_seconds,
        parity=parity,
        operations_per_image=workload.operations_per_image,
    )
