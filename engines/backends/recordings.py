"""CUDA graphs of an engine's runs: copies and kernels of one input shape, launched with one call.

A graph is bound to the state that its execution context was in, so each has a context of its own that nothing touches
afterwards. Before it is recorded that context runs once, since a new shape makes it do what cannot be recorded. Where
recording fails, the shape goes on without a graph, and it is not tried again: a graph saves time and changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from engines.backends.loaded_engine import LoadedEngine, Shapes
from engines.backends.sdk_calls import SdkCalls
from engines.backends.staging import Staging
from engines.cuda import Graph, Stream
from engines.errors import DeviceFailed

_Recorded = TypeVar("_Recorded")

MOST_GRAPHS = 16
"""Shapes that are recorded; those that come later go on without."""


@dataclasses.dataclass(frozen=True)
class _Recording:
    """A graph, the context that it is bound to, and the shapes of the outputs."""

    graph: Graph
    context: Any
    outputs: Shapes


class Recordings:
    """The graphs of one engine, by the shapes of its inputs."""

    def __init__(self, cuda: Any, resources: contextlib.ExitStack, loaded: LoadedEngine, staging: Staging) -> None:
        """Records nothing yet; ``resources`` frees what will be recorded."""
        self._cuda, self._resources, self._loaded, self._staging = cuda, resources, loaded, staging
        self._made: dict[tuple[tuple[int, ...], ...], _Recording | None] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(recording is not None for recording in self._made.values())

    def launch(self, shapes: Shapes) -> Shapes | None:
        """Enqueues what was recorded for ``shapes``; returns the outputs' shapes, or None if there is no graph.

        Raises:
            DeviceFailed: a call of CUDA failed.
        """
        recording = self._made.get(tuple(shapes.values()))
        if recording is None:
            return None
        recording.graph.launch()
        return recording.outputs

    def record(self, shapes: Shapes) -> None:
        """Records a graph for ``shapes`` unless that was done or tried before. The staged inputs are computed again."""
        key = tuple(shapes.values())
        if key in self._made:
            return
        full = self.count >= MOST_GRAPHS
        self._made[key] = None
        if full:
            return
        recording = attempted(self._cuda, self._staging.stream, lambda: self._recorded(shapes))
        if recording is None:
            return
        self._made[key] = recording
        self._resources.callback(self._made.pop, key)
        self._resources.callback(recording.graph.close)

    def _recorded(self, shapes: Shapes) -> _Recording:
        staging = self._staging
        context = self._loaded.new_context()
        staging.bind(context)
        outputs = self._loaded.set_shapes(context, shapes)
        staging.enqueue(context, shapes, outputs)
        staging.stream.synchronize()
        work = functools.partial(staging.enqueue, context, shapes, outputs)
        graph = recorded_graph(self._loaded.calls, self._cuda, context, staging.stream, work)
        return _Recording(graph, context, outputs)


def recorded_graph(calls: SdkCalls, cuda: Any, context: Any, stream: Stream, work: Callable[[], None]) -> Graph:
    """Records what ``work`` enqueues on ``stream``, the engine in ``context`` among it, which has run before.

    Raises:
        DeviceFailed: it cannot be recorded.
    """
    if hasattr(context, "is_stream_capturable"):
        calls.answer(context.is_stream_capturable, stream.handle)
    return Graph(cuda, stream, work)


def attempted(cuda: Any, stream: Stream, recording: Callable[[], _Recorded]) -> _Recorded | None:
    """What ``recording`` gives; None if it failed, and then ``stream`` is done with whatever it was given."""
    try:
        return recording()
    except DeviceFailed:
        cuda.cudaStreamSynchronize(stream.handle)  # nothing half-done goes on
        cuda.cudaGetLastError()  # else the next library to ask takes it for its own
        return None
