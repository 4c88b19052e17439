"""The names of 6DRepNet (thohemp/6DRepNet, ``sixdrepnet/model.py``), which estimates a head's pose with a RepVGG."""

from __future__ import annotations

from exporter.lineages.lineage import Lineage
from exporter.lineages.official import BRANCHES

SIXDREPNET = Lineage(
    name="6DRepNet",
    title="6DRepNet",
    source="github.com/thohemp/6DRepNet, sixdrepnet/model.py",
    bn_eps=1e-5,
    stem="layer0",
    block="layer{stage}.{index}",
    first_stage=1,
    head="linear_reg",
    modules=(
        *BRANCHES,
        ("rbr_reparam", "fused"),
    ),
    note="the output is six numbers; 6DRepNet's compute_rotation_matrix_from_ortho6d makes the rotation of them",
)
