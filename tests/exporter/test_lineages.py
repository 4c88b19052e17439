"""Names: each lineage against the tests' own tables, and what is said when none or several fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.errors import ArchitectureRejected
from exporter.lineages import LINEAGES, Canonical, canonical_from_raw, common_prefix, lineage_from_tensors
from exporter.lineages.lineage import BATCH_NORM, FUSED_TENSORS
from tests.networks import NAMINGS, NaiveRepVGG, Shape, deployed_state, named, renamed

BY_NAME = {lineage.name: lineage for lineage in LINEAGES}
ALIASES = {"rbr_reparam.conv": "rbr_dense.conv", "rbr_reparam.bn": "rbr_dense.bn"}
"""Official modules that are another form's names of the same tensors."""


def states(naming, form, **changes):
    model = NaiveRepVGG(Shape(**changes))
    return renamed(model.state_dict() if form == "training" else deployed_state(model), naming)


def of_no_values(names):
    return dict.fromkeys(names, torch.zeros(1))


@pytest.mark.parametrize("form", ["training", "deployed"])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("se", [False, True])
def test_exactly_one_lineage_matches_and_every_name_is_used(naming, form, se):
    state = states(naming, form, se=se)
    assert lineage_from_tensors(state, "x").name == naming
    canonical = canonical_from_raw(state, BY_NAME[naming])
    assert (canonical.unexpected, canonical.dropped) == ((), {})
    assert len(canonical.tensors) == sum(not name.endswith("num_batches_tracked") for name in state)


@pytest.mark.parametrize("naming", NAMINGS)
def test_canonical_names_are_the_same_for_every_lineage_and_lead_back(naming):
    official = states("official", "training", se=True)
    lineage = BY_NAME[naming]
    for name in official:
        if not name.endswith("num_batches_tracked"):
            canonical = BY_NAME["official"].canonical(name)
            assert lineage.canonical(named(name, naming)) == canonical
            assert lineage.foreign(canonical) == named(name, naming)


def test_the_tables_cover_all_lineages():
    """The plain ones here; the others in tests/families.py."""
    assert [lineage.name for lineage in LINEAGES] == [
        "official", "RepVGGplus", "QARepVGG", "timm", "timm MobileOne", "MobileOne", "mmpretrain",
        "official backbone", "RepVGG-PyTorch", "fast-reid", "6DRepNet",
    ]  # fmt: skip
    assert set(NAMINGS) < BY_NAME.keys()
    assert all(lineage.bn_eps == 1e-5 for lineage in LINEAGES)


def test_two_lineages_in_one_file_are_both_named():
    state = {**states("official", "training"), **states("timm", "training")}
    with pytest.raises(
        ArchitectureRejected, match=r"more than one lineage: official \(\d+ tensors\), timm \(\d+ tensors\)"
    ):
        lineage_from_tensors(state, "x.pt")


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_foreign_network_is_told_the_nearest_lineage(naming):
    names = [name.replace(".0.", ".block0.") for name in states(naming, "training")]
    names = [name for name in names if BY_NAME[naming].canonical(name) is None]
    with pytest.raises(ArchitectureRejected, match=f"nearest lineage: {naming};"):
        lineage_from_tensors(of_no_values(names), "x.pt")


def test_a_foreign_network_is_shown_with_what_is_known():
    with pytest.raises(ArchitectureRejected, match=r"2 tensors, such as fc\.bias, layer1\.0\.conv1\.weight"):
        lineage_from_tensors(of_no_values(["layer1.0.conv1.weight", "fc.bias"]), "resnet.pt")


@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "features.3.weight", "0.weight"])
def test_a_number_makes_no_lineage_the_nearest(name):
    with pytest.raises(ArchitectureRejected, match="not a RepVGG that is known") as caught:
        lineage_from_tensors(of_no_values([name, "fc.bias"]), "resnet.pt")
    assert "nearest lineage: timm MobileOne" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="stage0123456789._rbdenwighcovlistm-", max_size=60))
def test_any_name_is_either_foreign_or_leads_back_to_itself(name):
    for lineage in LINEAGES:
        canonical = lineage.canonical(name)
        assert canonical is None or lineage.foreign(canonical) == name


@st.composite
def spelled_names(draw):
    """A lineage, and a name put together from its templates and modules, or from those of another."""
    lineage, other = draw(st.sampled_from(LINEAGES)), draw(st.sampled_from(LINEAGES))
    templates = [lineage.stem, lineage.block, *(template for _, template in lineage.split_stages)]
    number = st.sampled_from(["0", "1", "2", "3", "4", "12", "007", "-1", "\u0663", "99999", ""])
    prefix = draw(st.sampled_from(templates)).format(stage=draw(number), index=draw(number))
    module = draw(st.sampled_from([theirs for theirs, _ in (*lineage.modules, *other.modules)]))
    part = draw(st.sampled_from(["weight", "bias", *BATCH_NORM, "num_batches_tracked", *FUSED_TENSORS, "", "extra"]))
    return lineage, f"{prefix}.{module}.{part}" if part else f"{prefix}.{module}"


@settings(max_examples=1000, deadline=None)
@given(spelled_names())
def test_a_name_that_is_nearly_right_is_either_foreign_or_leads_back_to_itself(spelled):
    lineage, name = spelled
    lineage = lineage.for_names([name])
    canonical = lineage.canonical(name)
    if canonical is None:
        return
    assert lineage.foreign(canonical) == name
    assert lineage.canonical(lineage.foreign(canonical)) == canonical


@pytest.mark.parametrize("name", ["stage3.blocks.0.rbr_dense.conv.weight", "stage3.blocks.5.post_se.up.bias"])
def test_a_split_stage_has_no_other_name(name):
    plus = BY_NAME["RepVGGplus"]
    assert plus.canonical(name) is None
    assert plus.canonical(name.replace("stage3", "stage4")) is not None
    assert plus.canonical(name.replace("stage3", "stage3_first")) is not None


def test_ignored_names_are_neither_used_nor_unexpected():
    state = {"aux.weight": torch.zeros(1), "aux.bias": torch.zeros(1), "other": torch.zeros(1)}
    assert canonical_from_raw(state, LINEAGES[0], ["aux.*"]) == Canonical({}, ("other",), {})


def test_what_a_family_drops_is_named_with_what_it_is_unless_it_is_ignored():
    state = of_no_values(["stage1_aux.0.bn.weight", "stage2_aux.3.weight", "stage4_aux.3.weight"])
    auxiliary = "an auxiliary classifier of the training"
    assert canonical_from_raw(state, BY_NAME["RepVGGplus"], ["stage2*"]) == Canonical(
        {}, ("stage4_aux.3.weight",), {"stage1_aux.0.bn.weight": auxiliary}
    )
    assert canonical_from_raw(state, BY_NAME["official"]) == Canonical({}, tuple(state), {})


def test_two_names_of_one_tensor_are_both_named():
    state = of_no_values(["stage1.0.rbr_dense.conv.weight", "stage1.0.rbr_reparam.conv.weight"])
    with pytest.raises(ArchitectureRejected) as caught:
        canonical_from_raw(state, BY_NAME["official"], where="x.pt")
    assert str(caught.value) == (
        "x.pt: stage1.0.rbr_dense.conv.weight and stage1.0.rbr_reparam.conv.weight are both stage1.0.dense.weight of "
        "one network; remove one of them"
    )


def under_backbone(*more):
    names = [f"backbone.{name}" for name in states("official", "training") if not name.startswith("linear.")]
    return of_no_values([*names, *more])


@pytest.mark.parametrize(
    ("tensors", "lineage", "last_stride"),
    [
        (under_backbone(), "official backbone", 2),
        (under_backbone("backbone.stage2.0.rbr_reparam.weight"), "official backbone", 2),
        (under_backbone("heads.weight"), "fast-reid", 1),
        (under_backbone("pixel_mean"), "fast-reid", 1),
        (under_backbone("backbone.stage2.0.fused_weight"), "fast-reid", 1),
        (under_backbone("decode_head.conv.weight"), "official backbone", 2),
    ],
    ids=["nothing else", "deployed", "heads", "pixel_mean", "fused_weight", "another head"],
)
def test_what_stands_beside_a_backbone_tells_fast_reid_whose_last_stride_is_another(tensors, lineage, last_stride):
    found = lineage_from_tensors(tensors, "x.pt")
    assert (found.name, found.last_stride) == (lineage, last_stride)


def test_a_backbone_of_both_kinds_is_not_chosen_for_anybody():
    both = under_backbone("backbone.stage2.0.rbr_reparam.weight", "backbone.stage2.1.fused_weight")
    with pytest.raises(ArchitectureRejected, match="more than one lineage: "):
        lineage_from_tensors(both, "x.pt")


@pytest.mark.parametrize("prefix", ["model.", "net.encoder."])
@pytest.mark.parametrize("naming", NAMINGS)
def test_what_stands_before_every_name_is_taken_off(naming, prefix):
    names = [*states(naming, "training")]
    assert common_prefix([prefix + name for name in names]) == prefix
    assert common_prefix(names) == ""


def test_a_prefix_of_only_some_names_or_of_a_foreign_network_stays():
    names = [f"model.{name}" for name in states("official", "training")]
    assert common_prefix([*names, "loss.weight"]) == ""
    assert common_prefix(["model.conv1.weight", "model.fc.bias"]) == ""
    assert common_prefix([]) == ""


@pytest.mark.parametrize(("head", "lineage"), [("linear", "official"), ("classifier", "RepVGG-PyTorch")])
def test_the_name_of_the_classifier_tells_whose_official_names_these_are(head, lineage):
    names = [name.replace("linear.", f"{head}.") for name in states("official", "training")]
    assert lineage_from_tensors(of_no_values(names), "x.pt").name == lineage
