"""The published networks: their own names at full size in every family's naming, and the published size of each."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from exporter.architecture import with_features
from exporter.errors import ArchitectureRejected, UsageError
from exporter.onnx_graph import INPUT, structure_from_architecture
from exporter.recognition import check_variant
from exporter.variants import VARIANTS, variant_from_name
from exporter.workload import multiply_accumulates
from tests.family_names import APPLE, OFFICIAL, PLUS, QAREPVGG, TIMM, TIMM_MOBILEONE, Shape, batch_norms, kernel_shapes
from tests.inference import network_from_state

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
NAMINGS = {
    "RepVGG": (OFFICIAL, TIMM, QAREPVGG),
    "RepVGGplus": (PLUS,),
    "MobileOne": (APPLE, TIMM_MOBILEONE),
}
SE_RATIOS = {"RepVGG": 16, "RepVGGplus": 4, "MobileOne": 16}
DEPTHS = {"A": (1, 2, 4, 14, 1), "B": (1, 4, 6, 16, 1), "D": (1, 8, 14, 24, 1), "L": (1, 8, 14, 24, 1)}
MOBILEONE_PAIRS = (1, 2, 8, 10, 1)
MOBILEONE_BRANCHES = {"S0": 4}
PUBLISHED = {
    "A0": ((48, 48, 96, 192, 1280), 8.309, 1361),
    "A1": ((64, 64, 128, 256, 1280), 12.790, 2364),
    "A2": ((64, 96, 192, 384, 1408), 25.500, 5117),
    "B0": ((64, 64, 128, 256, 1280), 14.339, 3058),
    "B1": ((64, 128, 256, 512, 2048), 51.829, 11815),
    "B1g2": ((64, 128, 256, 512, 2048), 41.360, 8810),
    "B1g4": ((64, 128, 256, 512, 2048), 36.125, 7307),
    "B2": ((64, 160, 320, 640, 2560), 80.315, 18377),
    "B2g2": ((64, 160, 320, 640, 2560), 63.957, 13680),
    "B2g4": ((64, 160, 320, 640, 2560), 55.778, 11332),
    "B3": ((64, 192, 384, 768, 2560), 110.961, 26209),
    "B3g2": ((64, 192, 384, 768, 2560), 87.405, 19446),
    "B3g4": ((64, 192, 384, 768, 2560), 75.627, 16064),
    "D2se": ((64, 160, 320, 640, 2560), 120.388, 32830),
    "L2pse": ((64, 160, 320, 640, 2560), 127.152, None),
    "S0": ((48, 48, 128, 256, 1024), 2.1, 275),
    "S1": ((64, 96, 192, 512, 1280), 4.8, 825),
    "S2": ((64, 96, 256, 640, 2048), 7.8, 1299),
    "S3": ((64, 128, 320, 768, 2048), 10.1, 1896),
    "S4": ((64, 192, 448, 896, 2048), 14.8, 2978),
}
"""By name: the widths, and after fusion the millions of parameters and of multiply-accumulates at 224 pixels."""
ROUNDING = {"RepVGG": 1e-3, "RepVGGplus": 1e-3, "MobileOne": 1.5e-2}
"""MobileOne's are published with two or three digits."""
EACH = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def shape_of(variant):
    """What the papers say about a variant, without a look at the exporter's own table."""
    widths, _, _ = PUBLISHED[variant.name]
    if variant.family == "MobileOne":
        convs = MOBILEONE_BRANCHES.get(variant.name, 1)
        return Shape(MOBILEONE_PAIRS, widths, outputs=1000, convs=convs, se=int(variant.name == "S4"))
    groups = int(variant.name[3:] or 1) if variant.name[2:].startswith("g") else 1
    return Shape(DEPTHS[variant.name[0]], widths, outputs=1000, even_groups=groups, se=int("se" in variant.name))


def blocks_of(family, variant):
    ratio = SE_RATIOS[variant.family]
    blocks = family.blocks(shape_of(variant))
    return [dataclasses.replace(block, se=block.cout // ratio if block.se else 0) for block in blocks]


def state_of(family, blocks, width, form="training"):
    """A state dict of the right shapes and no values at all."""
    shapes = {f"{family.head}.weight": (1000, width), f"{family.head}.bias": (1000,)}
    for block in blocks:
        own = dict(kernel_shapes(family, block))
        if form == "deployed":
            kernel = next(iter(own.values()))
            own = {
                f"{block.prefix}.{name}": shape for name, shape in zip(family.fused, (kernel, kernel[:1]), strict=True)
            }
        else:
            norms = batch_norms(family, block)
            own |= {f"{name}.{part}": (block.cout,) for name in norms for part in BATCH_NORM}
        if block.se:
            down, up = (f"{block.prefix}.{name}" for name in family.se)
            own |= {f"{down}.weight": (block.se, block.cout, 1, 1), f"{down}.bias": (block.se,)}
            own |= {f"{up}.weight": (block.cout, block.se, 1, 1), f"{up}.bias": (block.cout,)}
        shapes |= own
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def architecture_of(variant, family=None, form="training", change=lambda block: block):
    family = family or NAMINGS[variant.family][0]
    blocks = [change(block) for block in blocks_of(family, variant)]
    return network_from_state(state_of(family, blocks, PUBLISHED[variant.name][0][-1], form))[0]


def test_every_variant_is_in_the_tests_own_table():
    assert [variant.name for variant in VARIANTS] == list(PUBLISHED)


@pytest.mark.parametrize("form", ["training", "deployed"])
@EACH
def test_every_published_network_is_recognised_by_name_in_every_naming(variant, form):
    for family in NAMINGS[variant.family]:
        if family is QAREPVGG and "se" in variant.name:
            continue
        architecture = architecture_of(variant, family, form)
        named = "RepVGG" if (form, family) == ("deployed", QAREPVGG) else variant.family
        assert (architecture.variant, architecture.widths) == (variant.name, PUBLISHED[variant.name][0])
        assert architecture.family in (named, "QARepVGG")
        assert architecture.form == form
        check_variant(architecture, variant, "x.pt")


@EACH
def test_parameters_and_work_after_fusion_are_the_published_ones(variant):
    _, millions, work = PUBLISHED[variant.name]
    architecture = architecture_of(variant)
    declared = structure_from_architecture(architecture, (224, 224)).graph.input
    shapes = [[dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in declared if v.name != INPUT]
    assert sum(map(math.prod, shapes)) / 1e6 == pytest.approx(millions, rel=ROUNDING[variant.family])
    if work is not None:
        found = multiply_accumulates(architecture, (224, 224)) / 1e6
        assert found == pytest.approx(work, rel=ROUNDING[variant.family])


@EACH
def test_no_published_network_has_the_size_of_another(variant):
    """What the test above would miss if its tolerance were too wide."""
    of_family = [name for name, other in zip(PUBLISHED, VARIANTS, strict=True) if other.family == variant.family]
    for other in of_family:
        if other != variant.name:
            assert PUBLISHED[other][1] != pytest.approx(PUBLISHED[variant.name][1], rel=ROUNDING[variant.family])


# --- what is nearly a published network


def wider(block):
    """The last block twice as wide."""
    return block if block.stage != 4 else dataclasses.replace(block, cout=2 * block.cout)


NEARLY = {
    "B1 with the groups of B1g2": ("B1", lambda b: b if b.prefix != "stage1.1" else dataclasses.replace(b, groups=2)),
    "D2se with SE of a quarter": ("D2se", lambda block: dataclasses.replace(block, se=block.cout // 4)),
    "D2se without SE": ("D2se", lambda block: dataclasses.replace(block, se=0)),
    "L2pse with SE of a sixteenth": ("L2pse", lambda block: dataclasses.replace(block, se=block.cout // 16)),
    "S4 without SE": ("S4", lambda block: dataclasses.replace(block, se=0)),
    "S4 with SE in the last stage only": (
        "S4",
        lambda block: dataclasses.replace(block, se=block.se if block.stage == 4 else 0),
    ),
}


@pytest.mark.parametrize(("name", "change"), NEARLY.values(), ids=NEARLY)
def test_a_network_that_differs_in_groups_or_se_has_no_name(name, change):
    variant = variant_from_name(name)
    assert architecture_of(variant).variant == name
    architecture = architecture_of(variant, change=change)
    assert architecture.variant is None
    with pytest.raises(ArchitectureRejected, match=f"not {variant.title} .* but no published variant"):
        check_variant(architecture, variant, "x.pt")


def test_mobileone_is_not_its_neighbour():
    architecture = architecture_of(variant_from_name("S1"))
    with pytest.raises(ArchitectureRejected, match=r"not MobileOne-S0 .* but MobileOne-S1 "):
        check_variant(architecture, variant_from_name("mobileone_s0"), "x.pt")


def test_features_of_a_published_network_keep_its_name():
    """As "RepVGG-A0" in the report; its classifier is not exported."""
    architecture = with_features(architecture_of(variant_from_name("A0")), (1, 3))
    assert (architecture.variant, architecture.classes) == ("A0", None)
    assert [output.channels for output in architecture.outputs] == [48, 192]


# --- names


SPELLINGS = {
    "MobileOne-S0": "S0",
    "mobileone_s4": "S4",
    "s2": "S2",
    "RepVGGplus-L2pse": "L2pse",
    "repvggplus_l2pse": "L2pse",
    "L2PSE": "L2pse",
    "QARepVGG-A0": "A0",
    "repvgg_d2se": "D2se",
}


@pytest.mark.parametrize(("spelling", "name"), SPELLINGS.items(), ids=SPELLINGS)
def test_the_usual_spellings(spelling, name):
    assert variant_from_name(spelling).name == name


@pytest.mark.parametrize("spelling", ["S5", "mobileone", "RepVGG", "", "plus-L2pse"])
def test_what_is_no_variant_is_told_all_there_are(spelling):
    with pytest.raises(UsageError, match=r"did you mean .*\? Known: A0, .*, L2pse, S0, S1, S2, S3, S4$"):
        variant_from_name(spelling)
