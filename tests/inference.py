"""The way from a state dict to answers, as the tests of single modules go it, without a command line or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from exporter.architecture import Architecture
from exporter.lineages import canonical_from_raw, lineage_from_tensors
from exporter.model import outputs_of_network
from exporter.recognition import architecture_from_tensors


def network_from_state(
    state: Mapping[str, Tensor], strides: Sequence[int] | None = None, eps: float | None = None, where: str = "x.pt"
) -> tuple[Architecture, dict[str, Tensor]]:
    """The network that a state dict in any lineage's names holds, and its tensors under canonical names."""
    lineage = lineage_from_tensors(state, where)
    canonical = canonical_from_raw(state, lineage, where=where)
    architecture = architecture_from_tensors(
        canonical.tensors, lineage, unexpected=canonical.unexpected, where=where, strides=strides, eps=eps
    )
    return architecture, canonical.tensors


def answers(architecture: Architecture, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The single output, (N, classes) or (N, C, h, w), in the dtype of ``images`` (N, C, H, W)."""
    (output,) = outputs_of_network(architecture, tensors, images).values()
    return output
