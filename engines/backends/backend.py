"""What a backend is: something that computes one file, for batches of a range."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class TensorDescription:
    """An input or output: ``shape`` has None for the batch and for every other size that is not fixed."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Backend(Protocol):
    """A loaded file. Its first dimension is the batch; ``batch`` is the smallest and the largest that it takes.

    ``run`` is given contiguous arrays of the right names, dtypes and shapes, with a batch in that range, which the
    runner sees to. ``close`` frees everything and may be called twice.
    """

    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]
    batch: tuple[int, int | None]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Computes one batch; the arrays returned are the caller's."""

    def close(self) -> None:
        """Frees what the backend holds."""
