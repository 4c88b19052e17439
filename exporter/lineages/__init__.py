"""The families of checkpoints that are recognised, by tensor names alone. A new one is one file and one line here."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

from torch import Tensor

from exporter.errors import ArchitectureRejected, listed
from exporter.lineages.fastreid import FASTREID
from exporter.lineages.lineage import COUNTER, Lineage
from exporter.lineages.mmpretrain import MMPRETRAIN
from exporter.lineages.mobileone import MOBILEONE
from exporter.lineages.official import OFFICIAL, OFFICIAL_BACKBONE, RENAMED_HEAD
from exporter.lineages.qarepvgg import QAREPVGG
from exporter.lineages.refused import refusal_from_names
from exporter.lineages.repvggplus import REPVGGPLUS
from exporter.lineages.sixdrepnet import SIXDREPNET
from exporter.lineages.timm import TIMM, TIMM_MOBILEONE

__all__ = [
    "LINEAGES",
    "Canonical",
    "Lineage",
    "canonical_from_raw",
    "common_prefix",
    "lineage_from_tensors",
    "without_ignored",
]

LINEAGES: tuple[Lineage, ...] = (
    OFFICIAL,
    REPVGGPLUS,
    QAREPVGG,
    TIMM,
    TIMM_MOBILEONE,
    MOBILEONE,
    MMPRETRAIN,
    OFFICIAL_BACKBONE,
    RENAMED_HEAD,
    FASTREID,
    SIXDREPNET,
)
"""Where the names in a file are those of several, the first whose kernels they fit is taken."""


@dataclasses.dataclass(frozen=True)
class Canonical:
    """``tensors`` by canonical name, without counters; what nothing uses; what a family drops, name by name."""

    tensors: dict[str, Tensor]
    unexpected: tuple[str, ...]
    dropped: dict[str, str]


def without_ignored(tensors: Mapping[str, Tensor], ignore: Sequence[str]) -> dict[str, Tensor]:
    """``tensors`` without those whose names in the file a glob of ``ignore`` hides: they count for nothing."""
    return {name: t for name, t in tensors.items() if not any(fnmatch.fnmatchcase(name, glob) for glob in ignore)}


def common_prefix(names: Sequence[str]) -> str:
    """What every name begins with, such as ``model.``, where no lineage knows any of them with it; else nothing."""
    prefix = ""
    while names and not any(lineage.recognised(names) for lineage in LINEAGES):
        first = {name.partition(".")[0] for name in names}
        if len(first) != 1 or not all("." in name for name in names):
            return ""
        (part,) = first
        prefix += f"{part}."
        names = [name.partition(".")[2] for name in names]
    return prefix


def lineage_from_tensors(tensors: Mapping[str, Tensor], where: str) -> Lineage:
    """The one lineage that explains the most of ``tensors``; see ``Lineage.for_names``.

    Raises:
        ArchitectureRejected: none has blocks among them, or one that is refused has, or two explain each what the
            other does not.
    """
    names = list(tensors)
    if refusal := refusal_from_names(names):
        raise ArchitectureRejected(f"{where}: {refusal.name} weights, which are not exported; {refusal.remedy}")
    found = {lineage: explained for lineage in LINEAGES if (explained := lineage.explained(names))}
    if not found:
        raise ArchitectureRejected(_unknown(names, where))
    most = max(found, key=lambda lineage: len(found[lineage]))
    rivals = [lineage for lineage in found if not found[lineage] <= found[most]]
    if rivals:
        both = ", ".join(f"{lineage.name} ({len(found[lineage])} tensors)" for lineage in (most, *rivals))
        raise ArchitectureRejected(f"{where}: the tensor names fit more than one lineage: {both}; export them apart")
    equal = [lineage for lineage in found if found[lineage] == found[most]]
    return next((lineage for lineage in equal if _kernels_fit(lineage, tensors)), most).for_names(names)


def canonical_from_raw(
    tensors: Mapping[str, Tensor], lineage: Lineage, ignore: Sequence[str] = (), where: str = ""
) -> Canonical:
    """Renames what the lineage knows; names that an ``ignore`` glob hides are left out.

    Raises:
        ArchitectureRejected: two tensors are the same one of the network.
    """
    canonical: dict[str, Tensor] = {}
    raw: dict[str, str] = {}
    unexpected = []
    dropped = {}
    for name, tensor in without_ignored(tensors, ignore).items():
        ours = lineage.canonical(name)
        if ours is None:
            what = lineage.dropped_as(name)
            if what is None:
                unexpected.append(name)
            else:
                dropped[name] = what
            continue
        if ours in raw:
            raise ArchitectureRejected(
                f"{where}: {raw[ours]} and {name} are both {ours} of one network; remove one of them"
            )
        raw[ours] = name
        if not ours.endswith(COUNTER):
            canonical[ours] = tensor
    return Canonical(canonical, tuple(unexpected), dropped)


def _kernels_fit(lineage: Lineage, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the sizes of the fused kernels are the lineage's own."""
    sizes = {
        tuple(tensor.shape[2:])
        for name, tensor in tensors.items()
        if (ours := lineage.canonical(name)) is not None and ours.endswith("fused.weight")
    }
    own = {(size, size) for size in lineage.kernels}
    return sizes <= own and (len(own) == 1 or sizes > {(3, 3)})


def _unknown(names: Sequence[str], where: str) -> str:
    nearest = max(LINEAGES, key=lambda lineage: _likeness(lineage, names))
    known = "; ".join(f"{lineage.name} ({lineage.foreign('stage1.0.dense.weight')})" for lineage in LINEAGES)
    return (
        f"{where}: not a RepVGG that is known: {len(names)} tensors, such as {listed(sorted(names), 3)}; "
        f"nearest lineage: {nearest.name}; known: {known}"
    )


def _likeness(lineage: Lineage, names: Sequence[str]) -> int:
    """How many names share a part (between dots) with the names of this lineage's own modules."""
    parts = {part for theirs, _ in lineage.modules for part in theirs.split(".") if not part.isdigit()} - {"conv", "bn"}
    parts |= {lineage.stem.rpartition(".")[2], (lineage.head or "").partition(".")[0]}
    return sum(bool(parts & set(name.split("."))) for name in names)
