"""What a file has to compute and to move for an image, and the bound that follows on a card (``engines.roofline``)."""

from __future__ import annotations

import dataclasses
import pathlib

from engines.errors import InputRejected, UsageError, printable
from engines.roofline import Bound, PeakUnknown, Work, bound_of, bytes_per_image, operations_per_image, works_of_file
from engines.roofline.cards import Card
from engines.sizes import Size


@dataclasses.dataclass(frozen=True)
class Workload:
    """The kernels of a file; none where ``problem`` says why they are not known."""

    works: tuple[Work, ...]
    problem: str | None = None

    @property
    def operations_per_image(self) -> int | None:
        """Two for each multiply-accumulate."""
        return None if self.problem is not None else operations_per_image(self.works)

    def bytes_per_image(self, batch: int) -> float | None:
        """Activations, and an image's share of the weights."""
        return None if self.problem is not None else bytes_per_image(self.works, batch)

    def bound(self, card: Card, batch: int) -> Bound | None:
        """The least time for a batch on the card; None where it has no peak for a dtype, or nothing is known."""
        if self.problem is not None:
            return None
        try:
            return bound_of(self.works, card, batch)
        except PeakUnknown:
            return None


def workload_of(path: pathlib.Path, size: Size | None) -> Workload:
    """Reads it off the graph; what cannot be counted is no reason not to measure."""
    try:
        return Workload(works_of_file(path, size))
    except (InputRejected, UsageError) as error:
        return Workload((), printable(str(error).removeprefix(f"{path}: ")))  # names in a graph are of any characters
