"""Several outputs of one network as one row of numbers for each image, so that one comparison judges them all.

    row i   [y_1[i] / s_1, y_2[i] / s_2, ...]     each flattened, s_k = max|r_k| over the reference's own outputs

The relative error of such rows is the largest that any output has in its own scale, however different the scales are. A
single output is only flattened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.parity import Gate


@dataclasses.dataclass(frozen=True)
class Layout:
    """The outputs' ``names`` in order, and their ``scales``.

    ``ranked`` says whether a row is one of scores, whose largest has a meaning; in feature maps it has none.
    """

    names: tuple[str, ...]
    scales: tuple[float, ...]
    ranked: bool

    def joined(self, outputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Outputs (n, ...) each, by name, as one array (n, values) of their common dtype.

        Raises:
            ValueError: an output is missing, has no rows, or they differ in their number of rows.
        """
        missing = [name for name in self.names if name not in outputs]
        if missing:
            raise ValueError(f"no output {', '.join(missing)}")
        without = [name for name in self.names if outputs[name].ndim < 2]
        if without:
            raise ValueError(f"{', '.join(without)} has no row for each image")
        rows = {len(outputs[name]) for name in self.names}
        if len(rows) != 1:
            raise ValueError(f"outputs of {', '.join(map(str, sorted(rows)))} rows")
        flat = [outputs[name].reshape(len(outputs[name]), -1) for name in self.names]
        if len(flat) == 1:
            return flat[0]
        return np.concatenate(
            [part / part.dtype.type(scale) for part, scale in zip(flat, self.scales, strict=True)], axis=1
        )

    def gate(self, gate: Gate) -> Gate:
        """``gate`` for these outputs: without top-1 where a row is not one of scores."""
        return gate if self.ranked else dataclasses.replace(gate, top1=False)


def layout_from_outputs(reference: Mapping[str, NDArray[Any]]) -> Layout:
    """The layout that the reference's outputs (n, ...) give, in their order."""
    names = tuple(reference)
    single = len(names) == 1
    scales = tuple(1.0 if single else _scale(reference[name]) for name in names)
    return Layout(names, scales, ranked=single and reference[names[0]].ndim == 2)


def _scale(output: NDArray[Any]) -> float:
    """The largest absolute value, or what float32 can still divide by; 1 for an output of zeros."""
    largest = float(np.abs(output).max(initial=0.0))
    return max(largest, float(np.finfo(np.float32).smallest_normal)) if largest else 1.0
