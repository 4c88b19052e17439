"""The names of OpenMMLab's classifiers (open-mmlab/mmpretrain and mmcls, ``models/backbones/repvgg.py``)."""

from __future__ import annotations

from exporter.lineages.lineage import Lineage

MMPRETRAIN = Lineage(
    name="mmpretrain",
    title="mmpretrain, mmcls",
    source="github.com/open-mmlab/mmpretrain, mmpretrain/models/backbones/repvgg.py",
    bn_eps=1e-5,
    stem="backbone.stem",
    block="backbone.stage_{stage}.{index}",
    first_stage=1,
    head="head.fc",
    modules=(
        ("branch_3x3.conv", "dense"),
        ("branch_3x3.norm", "dense.bn"),
        ("branch_1x1.conv", "pointwise"),
        ("branch_1x1.norm", "pointwise.bn"),
        ("branch_norm", "identity.bn"),
        ("branch_reparam", "fused"),
        ("se_layer.conv1.conv", "se.reduce"),
        ("se_layer.conv2.conv", "se.expand"),
    ),
)
