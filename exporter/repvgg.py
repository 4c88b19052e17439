"""A checkpoint's tensors and what a request says about them, to a network with every assumption made."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from exporter.architecture import Architecture, with_features
from exporter.checkpoint import Checkpoint, checkpoint_from_path
from exporter.lineages import Lineage, canonical_from_raw, common_prefix, lineage_from_tensors, without_ignored
from exporter.model import outputs_of_network
from exporter.plain import relative_error
from exporter.recognition import architecture_from_tensors, check_variant
from exporter.reference import Reference
from exporter.request import Request
from exporter.variants import variant_from_name


@dataclasses.dataclass(frozen=True)
class Network:
    """``tensors`` by canonical name, of exactly the blocks and head that ``architecture`` has.

    ``dropped`` maps the names of tensors that are left out to what they are; ``prefix`` stood before every name.
    """

    architecture: Architecture
    tensors: dict[str, Tensor]
    lineage: Lineage
    dropped: dict[str, str]
    prefix: str


def network_from_checkpoint(checkpoint: Checkpoint, request: Request) -> Network:
    """The network and its tensors under canonical names, after every check that needs no arithmetic.

    Raises:
        ArchitectureRejected: not a RepVGG that is known, not a whole one, or not the ``--arch`` that was named.
        UsageError: ``--features`` names a stage that the network does not have.
    """
    where = request.path.name
    wanted = without_ignored(checkpoint.tensors, request.ignore_keys)
    prefix = common_prefix(list(wanted))
    named = {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}
    lineage = lineage_from_tensors(named, where)
    canonical = canonical_from_raw(named, lineage, request.ignore_keys, where)
    tensors, dropped = canonical.tensors, canonical.dropped
    architecture = architecture_from_tensors(
        tensors, lineage, unexpected=canonical.unexpected, where=where, strides=request.strides, eps=request.eps
    )
    if request.arch is not None:
        check_variant(architecture, variant_from_name(request.arch), where)
    if request.features:
        architecture = with_features(architecture, request.features)
        parts = {block.name for block in architecture.blocks}
        left = {name for name in tensors if not _is_of(name, parts)}
        dropped = dropped | {lineage.foreign(name): "behind the features that are exported" for name in left}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in left}
    return Network(architecture, tensors, lineage, dropped, prefix)


def training_time_loss(request: Request, architecture: Architecture, reference: Reference) -> float:
    """What the training-time network itself loses in float32; reads the checkpoint again, since few runs need it."""
    tensors = network_from_checkpoint(checkpoint_from_path(request.path, request.weights), request).tensors
    outputs = outputs_of_network(architecture, tensors, torch.from_numpy(reference.images))
    joined = reference.layout.joined({name: value.numpy() for name, value in outputs.items()})
    return relative_error(torch.from_numpy(reference.outputs), torch.from_numpy(joined).double())


def _is_of(name: str, blocks: set[str]) -> bool:
    stage, index, *_ = name.split(".")
    return f"{stage}.{index}" in blocks
