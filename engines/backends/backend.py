"""What a backend is: something that computes one file, for batches of a range."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.errors import UsageError

Arrays = dict[str, NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class TensorDescription:
    """An input or output: ``shape`` has None for the batch and for every other size that is not fixed."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""The smallest and the largest shape of inputs, by name."""


def check_extents(name: str, shape: tuple[int, ...], profile: Profile) -> None:
    """Raises ``UsageError`` where an extent behind the batch is outside of the ``profile`` of the input ``name``."""
    if name not in profile:
        return
    least, most = (extents[1:] for extents in profile[name])
    if not all(low <= extent <= high for low, extent, high in zip(least, shape[1:], most, strict=True)):
        given, low, high = ("x".join(map(str, extents)) for extents in (shape[1:], least, most))
        raise UsageError(f"{name}: {given} is outside of the engine's profile, {low} to {high}")


class Backend(Protocol):
    """A loaded file. Its first dimension is the batch; ``batch`` is the smallest and the largest that it takes.

    ``run`` is given contiguous arrays of the right names, dtypes and shapes, with a batch in that range, which the
    runner sees to. ``close`` frees everything and may be called twice. A backend may have ``profile``, the smallest and
    the largest shape of each input by its name, where free extents have bounds; ``enqueue``, where it takes arrays on a
    GPU; and ``queries``, where it can time the parts of a computation (``engines.timing.Queries``).
    """

    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]
    batch: tuple[int, int | None]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Computes one batch; the arrays returned are the caller's."""

    def close(self) -> None:
        """Frees what the backend holds."""
