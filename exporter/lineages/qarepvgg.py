"""The names of QARepVGG (cxxgtxy/QARepVGG, ``repvgg.py``; Chu et al., "Make RepVGG Greater Again", AAAI 2024).

    y = ReLU(BN(BN3(K3 x) + K1 x + x))

The 1x1 branch and the identity have no batch norm of their own, so the identity has no tensor: it is there where a
block keeps its channels and has stride 1, which its position decides. Blocks of the authors' first version, with a
batch norm in every branch and one behind the sum, have the same names and are told by them.
"""

from __future__ import annotations

from exporter.lineages.lineage import Lineage
from exporter.lineages.official import BRANCHES

QAREPVGG = Lineage(
    name="QARepVGG",
    title="QARepVGG",
    source="github.com/cxxgtxy/QARepVGG, repvgg.py",
    bn_eps=1e-5,
    stem="stage0",
    block="stage{stage}.{index}",
    first_stage=1,
    head="linear",
    modules=(
        *BRANCHES,
        ("rbr_1x1", "bare_pointwise"),
        ("bn", "post.bn"),
        ("rbr_reparam", "fused"),
    ),
    family="QARepVGG",
)
