"""The families of checkpoints that are recognised, by tensor names alone. A new one is one file and one line here."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import Tensor

from exporter.errors import ArchitectureRejected, listed
from exporter.lineages.lineage import COUNTER, Lineage
from exporter.lineages.mmpretrain import MMPRETRAIN
from exporter.lineages.official import OFFICIAL
from exporter.lineages.timm import TIMM

__all__ = ["LINEAGES", "Lineage", "canonical_from_raw", "lineage_from_names"]

LINEAGES: tuple[Lineage, ...] = (OFFICIAL, TIMM, MMPRETRAIN)


def lineage_from_names(names: Sequence[str], where: str) -> Lineage:
    """The one lineage that has blocks among ``names``.

    Raises:
        ArchitectureRejected: none has, or more than one; the message lists the candidates.
    """
    counts = {lineage: lineage.recognised(names) for lineage in LINEAGES}
    found = [lineage for lineage, count in counts.items() if count]
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{lineage.name} ({_sample(lineage)})" for lineage in LINEAGES)
    if found:
        both = ", ".join(f"{lineage.name} ({counts[lineage]} tensors)" for lineage in found)
        raise ArchitectureRejected(f"{where}: the tensor names fit more than one lineage: {both}; export them apart")
    nearest = max(LINEAGES, key=lambda lineage: _likeness(lineage, names))
    raise ArchitectureRejected(
        f"{where}: not a RepVGG that is known: {len(names)} tensors, such as {listed(sorted(names), 3)}; "
        f"nearest lineage: {nearest.name}; known: {known}"
    )


def canonical_from_raw(
    tensors: Mapping[str, Tensor], lineage: Lineage, ignore: Sequence[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under canonical names, without counters, and the names that nothing uses and no ``ignore`` glob hides."""
    canonical: dict[str, Tensor] = {}
    unexpected = []
    for name, tensor in tensors.items():
        ours = lineage.canonical(name)
        if any(fnmatch.fnmatchcase(name, glob) for glob in ignore):
            continue
        if ours is None:
            unexpected.append(name)
        elif not ours.endswith(COUNTER):
            canonical[ours] = tensor
    return canonical, unexpected


def _sample(lineage: Lineage) -> str:
    return lineage.foreign("stage1.0.dense.weight")


def _likeness(lineage: Lineage, names: Sequence[str]) -> int:
    """How many names share a part (between dots) with the names of this lineage's own modules."""
    parts = {part for theirs, _ in lineage.modules for part in theirs.split(".")} - {"conv", "bn"}
    parts |= {lineage.stem.rpartition(".")[2], lineage.head.partition(".")[0]}
    return sum(bool(parts & set(name.split("."))) for name in names)
