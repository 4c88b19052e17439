"""What timing a file's queries gives, on whichever clock: a query is one batch, computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.backends.backend import Arrays

Clock = Callable[[], float]
"""Gives seconds."""

H2D, COMPUTE, D2H = "h2d", "compute", "d2h"
"""Parts of a query on a GPU: the copy to it, the engine, the copy back."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Queries one after the other, in seconds.

    ``latencies`` has one number a query, ``wall`` is from the start of the first to the end of the last. ``parts`` has
    the latencies' parts by name, one number a query each; it is empty where only the whole was timed.
    """

    latencies: NDArray[np.float64]
    wall: float
    parts: Mapping[str, NDArray[np.float64]] = dataclasses.field(default_factory=dict)


class Queries(Protocol):
    """One way of computing one batch of one file, again and again."""

    @property
    def graphed(self) -> bool:
        """Whether a CUDA graph is launched."""

    @property
    def first_seconds(self) -> float | None:
        """What the very first inference took, where these queries made it themselves."""

    def run(self, count: int) -> Timing:
        """Computes the batch ``count`` times and times each."""

    def results(self) -> Arrays:
        """What a query of these computes, by the outputs' names."""

    def close(self) -> None:
        """Frees what the queries hold; may be called twice."""
