"""An engine computing one batch again and again, timed by the GPU's own clock.

A query is the copies to the device, the engine and the copies back, on one stream, with an event at every joint:

    event | to the device | event | engine | event | to the host | event

Its latency is the time from its first event to its last. Two queries are enqueued at a time: the device finds the next
one waiting, so that what the host takes to launch it counts only where the device is faster than the host, and in a
run's first query. Nothing overlaps, so the time of many queries is the sum of their latencies and of such gaps.

Without transfers the inputs are copied once, before, and a query is the engine alone. With a graph the engine, and no
copy, is launched as a CUDA graph. The stream, the memory and the context are the queries' own; the activations' memory
is the engine's, which is why they take turns with everything else that runs the engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.backend import Arrays
from engines.backends.loaded_engine import LoadedEngine
from engines.backends.recordings import attempted, recorded_graph
from engines.backends.staging import Staging
from engines.cuda import Stream, TimingEvent
from engines.errors import DeviceFailed, UsageError
from engines.timing import COMPUTE, D2H, H2D, Clock, Timing

IN_FLIGHT = 2
"""Queries that are enqueued and not waited for."""


@dataclasses.dataclass(frozen=True)
class Turns:
    """How queries take turns with whatever else uses their engine.

    ``entered`` lets one thread in, on the engine's device, and ends all work on the stream if the block fails;
    ``settled`` lets a stream wait for what others do with the activations' memory; ``freed`` closes resources.
    """

    entered: Callable[[int], contextlib.AbstractContextManager[None]]
    settled: Callable[[Stream], None]
    freed: Callable[[contextlib.ExitStack], None]


class DeviceQueries:
    """See ``engines.timing.Queries``. ``graphed`` says whether the engine is launched as a CUDA graph.

    ``first_seconds`` is what the first run took on the host's clock, with the making of its context, in which an SDK
    may compile kernels, and of its memory. An engine's later queries of the same shape find the kernels made.
    """

    def __init__(
        self,
        turns: Turns,
        loaded: LoadedEngine,
        cuda: Any,
        resources: contextlib.ExitStack,
        feeds: Mapping[str, NDArray[Any]],
        *,
        graph: bool,
        transfers: bool,
        clock: Clock,
    ) -> None:
        """Takes all memory and computes the batch, in this thread's turn.

        Args:
            turns: how to get the next one.
            loaded: the engine.
            cuda: as ``engines.cuda.cuda_runtime`` gives it.
            resources: frees everything, newest first; it is empty.
            feeds: a contiguous array per input, of a batch that the engine takes.
            graph: whether to launch the engine as a CUDA graph; where it cannot be recorded, it goes without.
            transfers: whether the copies belong to a query.
            clock: the host's, in seconds.

        Raises:
            DeviceFailed: a call of CUDA or of the SDK failed; everything is freed.
        """
        self._turns, self._loaded, self._cuda, self._resources = turns, loaded, cuda, resources
        self._clock = clock
        self._context: Any = None
        self._closed = False
        resources.callback(self._forget)
        try:
            started = clock()
            self._take(feeds)
            self.first_seconds = clock() - started
            self._steps = self._prepared(graph=graph, transfers=transfers)
            self._names = (H2D, COMPUTE, D2H) if transfers else (COMPUTE,)
            self._marks = tuple(self._events(len(self._steps) + 1) for _ in range(IN_FLIGHT + 1))
        except BaseException:
            with contextlib.suppress(DeviceFailed):
                resources.close()
            raise

    def run(self, count: int) -> Timing:
        """Computes the batch ``count`` times and times each by events, and all of them by the host's clock.

        Raises:
            DeviceFailed: a call of CUDA or of the SDK failed.
            UsageError: the queries or the engine were closed.
        """
        stream = self._staging.stream
        seconds = np.empty((len(self._names) + 1, count))
        with self._turns.entered(stream.handle):
            self._check_open()
            self._turns.settled(stream)
            start = self._clock()
            for index in range(count):
                ended = index - IN_FLIGHT
                if ended >= 0:
                    self._marks_of(ended)[-1].synchronize()
                self._enqueue(self._marks_of(index))
                if ended >= 0:  # after the launch, so that the device does not wait for it
                    seconds[:, ended] = _seconds(self._marks_of(ended))
            stream.synchronize()
            wall = self._clock() - start
            for index in range(max(count - IN_FLIGHT, 0), count):
                seconds[:, index] = _seconds(self._marks_of(index))
        return Timing(seconds[0], wall, dict(zip(self._names, seconds[1:], strict=True)))

    def results(self) -> Arrays:
        """What the last query computed, NaN before the first; the arrays are the caller's.

        Raises:
            DeviceFailed: a call of CUDA failed.
            UsageError: the queries or the engine were closed.
        """
        staging = self._staging
        with self._turns.entered(staging.stream.handle):
            self._check_open()
            staging.copy_outputs(self._output_shapes)
            staging.stream.synchronize()
            return staging.results(self._output_shapes)

    def close(self) -> None:
        """Frees everything; whatever fails, the rest is freed too. The second time it does nothing.

        Raises:
            DeviceFailed: freeing failed, and nothing before it had.
        """
        if not self._closed:
            self._turns.freed(self._resources)

    def _forget(self) -> None:
        """The SDK frees the context when nothing refers to it."""
        self._context = None
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("these queries were closed; ask the engine for new ones")

    def _take(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """A context and memory for this batch, the images in their pinned place, and the first run."""
        loaded, resources = self._loaded, self._resources
        self._context = loaded.new_context()
        shapes: dict[str, tuple[int, ...]] = {name: array.shape for name, array in feeds.items()}
        self._output_shapes = loaded.set_shapes(self._context, shapes)
        self._staging = Staging(loaded.calls, self._cuda, resources, loaded.tensors, shapes | self._output_shapes)
        self._recorded = resources.enter_context(contextlib.ExitStack())
        resources.callback(self._staging.stream.synchronize)  # nothing that is enqueued needs what is freed next
        self._shapes = self._staging.fill(feeds)
        self._staging.bind(self._context)
        self._staging.enqueue(self._context, self._shapes, self._output_shapes)
        self._staging.stream.synchronize()

    def _prepared(self, *, graph: bool, transfers: bool) -> tuple[Callable[[], None], ...]:
        """The steps of a query; the engine was launched once in the way it will be, and nothing of that is left."""
        staging = self._staging
        launch = self._launch_of_graph() if graph else None
        self.graphed = launch is not None
        compute = launch or self._compute
        compute()
        staging.spoil_outputs(self._output_shapes)
        staging.stream.synchronize()
        if not transfers:
            return (compute,)
        return (
            lambda: staging.copy_inputs(self._shapes),
            compute,
            lambda: staging.copy_outputs(self._output_shapes),
        )

    def _compute(self) -> None:
        self._staging.compute(self._context)

    def _launch_of_graph(self) -> Callable[[], None] | None:
        stream, context = self._staging.stream, self._context
        made = attempted(
            self._cuda, stream, lambda: recorded_graph(self._loaded.calls, self._cuda, context, stream, self._compute)
        )
        if made is None:
            return None
        self._recorded.callback(made.close)
        return made.launch

    def _events(self, count: int) -> tuple[TimingEvent, ...]:
        events = []
        for _ in range(count):
            event = TimingEvent(self._cuda)
            self._resources.callback(event.close)
            events.append(event)
        return tuple(events)

    def _marks_of(self, index: int) -> tuple[TimingEvent, ...]:
        """The events of a query; they serve again once it was waited for and read."""
        return self._marks[index % len(self._marks)]

    def _enqueue(self, marks: tuple[TimingEvent, ...]) -> None:
        stream = self._staging.stream.handle
        marks[0].record(stream)
        for step, mark in zip(self._steps, marks[1:], strict=True):
            step()
            mark.record(stream)


def _seconds(marks: tuple[TimingEvent, ...]) -> list[float]:
    """From the first to the last, then from each to the next."""
    parts = [later.elapsed_seconds(since=earlier) for earlier, later in itertools.pairwise(marks)]
    return [marks[-1].elapsed_seconds(since=marks[0]), *parts]
