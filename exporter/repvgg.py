"""A checkpoint's tensors and what a request says about them, to a network with every assumption made."""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.architecture import Architecture, architecture_from_tensors, check_variant
from exporter.checkpoint import Checkpoint, checkpoint_from_path
from exporter.lineages import canonical_from_raw, lineage_from_names
from exporter.model import logits
from exporter.plain import relative_error
from exporter.reference import Reference
from exporter.request import Request
from exporter.variants import variant_from_name


def repvgg_from_checkpoint(checkpoint: Checkpoint, request: Request) -> tuple[Architecture, dict[str, Tensor]]:
    """The network and its tensors under canonical names, after every check that needs no arithmetic.

    Raises:
        ArchitectureRejected: not a RepVGG that is known, not a whole one, or not the ``--arch`` that was named.
    """
    where = request.path.name
    lineage = lineage_from_names(list(checkpoint.tensors), where)
    tensors, unexpected = canonical_from_raw(checkpoint.tensors, lineage, request.ignore_keys)
    architecture = architecture_from_tensors(
        tensors, lineage, unexpected=unexpected, where=where, strides=request.strides, eps=request.eps
    )
    if request.arch is not None:
        check_variant(architecture, variant_from_name(request.arch), where)
    return architecture, tensors


def training_time_loss(request: Request, architecture: Architecture, reference: Reference) -> float:
    """What the training-time network itself loses in float32; reads the checkpoint again, since few runs need it."""
    tensors = repvgg_from_checkpoint(checkpoint_from_path(request.path), request)[1]
    outputs = logits(architecture, tensors, torch.from_numpy(reference.images))
    return relative_error(torch.from_numpy(reference.outputs), outputs.double())
