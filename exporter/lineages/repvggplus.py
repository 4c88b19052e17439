"""The names of RepVGGplus (DingXiaoH/RepVGG, ``repvggplus.py``).

Its third stage is two modules, its squeeze-and-excitation comes behind the ReLU, and its training has auxiliary
classifiers that nothing else needs.
"""

from __future__ import annotations

from exporter.lineages.lineage import Dropped, Lineage
from exporter.lineages.official import BRANCHES

AUXILIARY = "an auxiliary classifier of the training"

REPVGGPLUS = Lineage(
    name="RepVGGplus",
    title="official RepVGGplus",
    source="github.com/DingXiaoH/RepVGG, repvggplus.py",
    bn_eps=1e-5,
    stem="stage0",
    block="stage{stage}.blocks.{index}",
    first_stage=1,
    head="linear",
    modules=(
        *BRANCHES,
        ("rbr_reparam", "fused"),
        ("post_se.down", "se.reduce"),
        ("post_se.up", "se.expand"),
    ),
    family="RepVGGplus",
    split_stages=((3, "stage3_first.blocks.{index}"), (3, "stage3_second.blocks.{index}")),
    se_after_activation=True,
    dropped=tuple(Dropped(f"{stage}_aux.*", AUXILIARY) for stage in ("stage1", "stage2", "stage3_first")),
)
