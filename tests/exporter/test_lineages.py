"""Names: each lineage against the tests' own tables, and what is said when none or several fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.errors import ArchitectureRejected
from exporter.lineages import LINEAGES, canonical_from_raw, lineage_from_names
from tests.networks import NAMINGS, NaiveRepVGG, Shape, deployed_state, named, renamed

BY_NAME = {lineage.name: lineage for lineage in LINEAGES}


def states(naming, form, **changes):
    model = NaiveRepVGG(Shape(**changes))
    return renamed(model.state_dict() if form == "training" else deployed_state(model), naming)


@pytest.mark.parametrize("form", ["training", "deployed"])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("se", [False, True])
def test_exactly_one_lineage_matches_and_every_name_is_used(naming, form, se):
    state = states(naming, form, se=se)
    assert lineage_from_names(list(state), "x").name == naming
    canonical, unexpected = canonical_from_raw(state, BY_NAME[naming])
    assert unexpected == []
    assert len(canonical) == sum(not name.endswith("num_batches_tracked") for name in state)


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
    assert [lineage.name for lineage in LINEAGES] == list(NAMINGS)
    assert all(lineage.bn_eps == 1e-5 for lineage in LINEAGES)


def test_two_lineages_in_one_file_are_both_named():
    names = [*states("official", "training"), *states("timm", "training")]
    with pytest.raises(
        ArchitectureRejected, match=r"more than one lineage: official \(\d+ tensors\), timm \(\d+ tensors\)"
    ):
        lineage_from_names(names, "x.pt")


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_foreign_network_is_told_the_nearest_lineage(naming):
    names = [name.replace(".0.", ".block0.") for name in states(naming, "training")]
    names = [name for name in names if BY_NAME[naming].canonical(name) is None]
    with pytest.raises(ArchitectureRejected, match=f"nearest lineage: {naming}"):
        lineage_from_names(names, "x.pt")


def test_a_foreign_network_is_shown_with_what_is_known():
    with pytest.raises(ArchitectureRejected, match=r"2 tensors, such as fc\.bias, layer1\.0\.conv1\.weight"):
        lineage_from_names(["layer1.0.conv1.weight", "fc.bias"], "resnet.pt")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="stage0123456789._rbdenwighcovlistm-", max_size=60))
def test_any_name_is_either_foreign_or_leads_back_to_itself(name):
    for lineage in LINEAGES:
        canonical = lineage.canonical(name)
        assert canonical is None or lineage.foreign(canonical) == name


def test_ignored_names_are_neither_used_nor_unexpected():
    state = {"aux.weight": torch.zeros(1), "aux.bias": torch.zeros(1), "other": torch.zeros(1)}
    assert canonical_from_raw(state, LINEAGES[0], ["aux.*"]) == ({}, ["other"])
