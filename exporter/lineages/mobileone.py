"""The names of MobileOne's authors (apple/ml-mobileone, ``mobileone.py``; Vasu et al., CVPR 2023).

Depthwise 3x3 and pointwise 1x1 blocks take turns; each is a sum of several convolutions of its kernel's size, in a 3x3
block one of size 1, and the identity, every one with a batch norm.
"""

from __future__ import annotations

from exporter.lineages.lineage import Lineage, several_branches

MOBILEONE = Lineage(
    name="MobileOne",
    title="official MobileOne",
    source="github.com/apple/ml-mobileone, mobileone.py",
    bn_eps=1e-5,
    stem="stage0",
    block="stage{stage}.{index}",
    first_stage=1,
    head="linear",
    modules=(
        *several_branches("rbr_conv.{branch}.conv", "{branch}"),
        *several_branches("rbr_conv.{branch}.bn", "{branch}.bn"),
        ("rbr_scale.conv", "pointwise"),
        ("rbr_scale.bn", "pointwise.bn"),
        ("rbr_skip", "identity.bn"),
        ("reparam_conv", "fused"),
        ("se.reduce", "se.reduce"),
        ("se.expand", "se.expand"),
    ),
    family="MobileOne",
    kernels=(3, 1),
    se_in_part=True,
)
