"""The names of timm's ``RepVggBlock`` and ``MobileOneBlock`` (huggingface/pytorch-image-models, ``models/byobnet.py``).

A deployed MobileOne has the very names of a deployed RepVGG; its 1x1 kernels tell it.
"""

from __future__ import annotations

from exporter.lineages.lineage import Lineage, several_branches

SOURCE = "github.com/huggingface/pytorch-image-models, timm/models/byobnet.py"
SHARED = (
    ("identity", "identity.bn"),
    ("reparam_conv", "fused"),
    ("attn.fc1", "se.reduce"),
    ("attn.fc2", "se.expand"),
)

TIMM = Lineage(
    name="timm",
    title="timm",
    source=SOURCE,
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
        *SHARED,
    ),
)

TIMM_MOBILEONE = Lineage(
    name="timm MobileOne",
    title="timm MobileOne",
    source=SOURCE,
    bn_eps=1e-5,
    stem="stem",
    block="stages.{stage}.{index}",
    first_stage=0,
    head="head.fc",
    modules=(
        *several_branches("conv_kxk.{branch}.conv", "{branch}"),
        *several_branches("conv_kxk.{branch}.bn", "{branch}.bn"),
        ("conv_scale.conv", "pointwise"),
        ("conv_scale.bn", "pointwise.bn"),
        *SHARED,
    ),
    family="MobileOne",
    kernels=(3, 1),
    se_in_part=True,
)
