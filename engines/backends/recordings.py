"""CUDA graphs of an engine's runs: copies and kernels of one input shape, launched with one call.

A graph is bound to the state that its execution context was in, so each has a context of its own that nothing touches
afterwards. Before it is recorded that context runs once, since a new shape makes it do what cannot be recorded. Where
recording fails, the shape goes on without a graph, and it is not tried again: a graph saves time and changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from engines.backends.loaded_engine import LoadedEngine, Shapes
from engines.backends.staging import Staging
from engines.cuda import Graph
from engines.errors import DeviceFailed

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
        try:
            recording = self._recorded(shapes)
        except DeviceFailed:
            self._cuda.cudaStreamSynchronize(self._staging.stream.handle)  # nothing half-done goes on
            self._cuda.cudaGetLastError()  # else the next library to ask takes it for its own
            return
        self._made[key] = recording
        self._resources.callback(self._made.pop, key)
        self._resources.callback(recording.graph.close)

    def _recorded(self, shapes: Shapes) -> _Recording:
        staging, calls = self._staging, self._loaded.calls
        context = self._loaded.new_context()
        staging.bind(context)
        outputs = self._loaded.set_shapes(context, shapes)
        staging.enqueue(context, shapes, outputs)
        staging.stream.synchronize()
        if hasattr(context, "is_stream_capturable"):
            calls.answer(context.is_stream_capturable, staging.stream.handle)
        graph = Graph(self._cuda, staging.stream, lambda: staging.enqueue(context, shapes, outputs))
        return _Recording(graph, context, outputs)
