"""The names of the RepVGG authors' own code (DingXiaoH/RepVGG, ``repvgg.py``), also used by many forks.

Its quantization-aware training keeps a batch norm behind the fused convolution (``rbr_reparam.conv``,
``rbr_reparam.bn``): here that is a block whose only branch is the dense one.
"""

from __future__ import annotations

import dataclasses

from exporter.lineages.lineage import Lineage

BRANCHES = (
    ("rbr_dense.conv", "dense"),
    ("rbr_dense.bn", "dense.bn"),
    ("rbr_1x1.conv", "pointwise"),
    ("rbr_1x1.bn", "pointwise.bn"),
    ("rbr_identity", "identity.bn"),
)
FUSED = (
    ("rbr_reparam.conv", "dense"),
    ("rbr_reparam.bn", "dense.bn"),
    ("rbr_reparam", "fused"),
)

OFFICIAL = Lineage(
    name="official",
    title="official RepVGG",
    source="github.com/DingXiaoH/RepVGG, repvgg.py",
    bn_eps=1e-5,
    stem="stage0",
    block="stage{stage}.{index}",
    first_stage=1,
    head="linear",
    modules=(
        *BRANCHES,
        *FUSED,
        ("se.down", "se.reduce"),
        ("se.up", "se.expand"),
    ),
)

RENAMED_HEAD = dataclasses.replace(
    OFFICIAL,
    name="RepVGG-PyTorch",
    title="RepVGG-PyTorch of Lornatang",
    source="github.com/Lornatang/RepVGG-PyTorch",
    head="classifier",
)
OFFICIAL_BACKBONE = dataclasses.replace(
    OFFICIAL,
    name="official backbone",
    title="official backbone",
    stem="backbone.stage0",
    block="backbone.stage{stage}.{index}",
    head=None,
)
