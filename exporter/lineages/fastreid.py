"""The names of RepVGG as fast-reid's backbone (JDAI-CV/fast-reid, ``fastreid/modeling/backbones/repvgg.py``)."""

from __future__ import annotations

from exporter.lineages.lineage import Dropped, Lineage
from exporter.lineages.official import BRANCHES

FASTREID = Lineage(
    name="fast-reid",
    title="fast-reid",
    source="github.com/JDAI-CV/fast-reid, fastreid/modeling/backbones/repvgg.py",
    bn_eps=1e-5,
    stem="backbone.stage0",
    block="backbone.stage{stage}.{index}",
    first_stage=1,
    head=None,
    modules=(
        *BRANCHES,
        ("fused_weight", "fused.weight"),
        ("fused_bias", "fused.bias"),
    ),
    last_stride=1,
    dropped=(
        Dropped("heads.*", "re-identification heads"),
        Dropped("pixel_mean", "the input's mean in 0..255, for --mean"),
        Dropped("pixel_std", "the input's std in 0..255, for --std"),
    ),
    note="fast-reid's LAST_STRIDE is in its config, not in the file: 1 is its default; its mean and std are in 0..255",
)
