"""The names of timm's ``RepVggBlock`` (huggingface/pytorch-image-models, ``timm/models/byobnet.py``)."""

from __future__ import annotations

from exporter.lineages.lineage import Lineage

TIMM = Lineage(
    name="timm",
    title="timm",
    source="github.com/huggingface/pytorch-image-models, timm/models/byobnet.py",
    bn_eps=1e-5,
    stem="stem",
    block="stages.{stage}.{index}",
    first_stage=0,
    head="head.fc",
    modules=(
        ("conv_kxk.conv", "dense"),
        ("conv_kxk.bn", "dense.bn"),
        ("conv_1x1.conv", "pointwise"),
        ("conv_1x1.bn", "pointwise.bn"),
        ("identity", "identity.bn"),
        ("reparam_conv", "fused"),
        ("attn.fc1", "se.reduce"),
        ("attn.fc2", "se.expand"),
    ),
)
