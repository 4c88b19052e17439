"""What must not pass in silence: tensors that are lost, families that are mixed."""

from __future__ import annotations

import re

import pytest
import torch

from tests.families import Network
from tests.family_exports import SIZE, export
from tests.family_names import FAMILIES
from tests.family_states import auxiliary_heads, whole, without

LOST = {
    "official: a 1x1 kernel": ("official", ["stage2.1.rbr_1x1.conv.weight"]),
    "official: a 1x1 branch": ("official", ["stage2.1.rbr_1x1."]),
    "official: an identity": ("official", ["stage3.1.rbr_identity"]),
    "official: a whole block's SE": ("official", ["stage2.1.se."]),
    "official: the stem's SE": ("official", ["stage0.se."]),
    "official: half of an SE": ("official", ["stage2.0.se.up"]),
    "official: one bias of an SE": ("official", ["stage2.0.se.down.bias"]),
    "official: the classifier's bias": ("official", ["linear.bias"]),
    "RepVGGplus: a block's SE": ("RepVGGplus", ["stage3_second.blocks.1.post_se."]),
    "RepVGGplus: half of an SE": ("RepVGGplus", ["stage4.blocks.0.post_se.down"]),
    "RepVGGplus: a block in the middle": ("RepVGGplus", ["stage3_second.blocks.0."]),
    "RepVGGplus: a 3x3 branch": ("RepVGGplus", ["stage2.blocks.1.rbr_dense."]),
    "QARepVGG: a batch norm of the sum": ("QARepVGG", ["stage2.1.bn."]),
    "QARepVGG: a mean of the sum's batch norm": ("QARepVGG", ["stage2.1.bn.running_mean"]),
    "QARepVGG: a 1x1 branch": ("QARepVGG", ["stage1.1.rbr_1x1."]),
    "QARepVGG: a variance": ("QARepVGG", ["stage1.1.rbr_dense.bn.running_var"]),
    "QARepVGG V1: a batch norm of the sum": ("QARepVGG V1", ["stage2.1.bn."]),
    "QARepVGG V1: an identity": ("QARepVGG V1", ["stage2.1.rbr_identity"]),
    "timm: half of an SE": ("timm", ["stages.2.1.attn.fc2"]),
    "timm MobileOne: the last branch of one block": ("timm MobileOne", ["stages.1.1.conv_kxk.3."]),
    "timm MobileOne: a branch in the middle": ("timm MobileOne", ["stages.1.1.conv_kxk.1."]),
    "timm MobileOne: a scale branch": ("timm MobileOne", ["stages.1.2.conv_scale."]),
    "timm MobileOne: half of an SE": ("timm MobileOne", ["stages.3.0.attn.fc1"]),
    "timm MobileOne: an identity": ("timm MobileOne", ["stages.1.2.identity"]),
    "MobileOne: the second branch of one block": ("MobileOne", ["stage2.1.rbr_conv.1."]),
    "MobileOne: the first branch of one block": ("MobileOne", ["stage2.1.rbr_conv.0."]),
    "MobileOne: a scale branch": ("MobileOne", ["stage2.2.rbr_scale."]),
    "MobileOne: an identity": ("MobileOne", ["stage2.2.rbr_skip"]),
    "MobileOne: the last block's SE": ("MobileOne", ["stage4.1.se."]),
    "MobileOne: half of an SE": ("MobileOne", ["stage4.0.se.expand"]),
    "mmpretrain: an identity": ("mmpretrain", ["backbone.stage_2.1.branch_norm"]),
    "fast-reid: a 1x1 branch": ("fast-reid", ["backbone.stage2.0.rbr_1x1"]),
    "6DRepNet: a bias of a batch norm": ("6DRepNet", ["layer2.0.rbr_dense.bn.bias"]),
}


@pytest.mark.parametrize(("name", "parts"), LOST.values(), ids=LOST)
def test_lost_tensors_are_an_error_that_names_them(name, parts, tmp_path):
    network = Network(*FAMILIES[name])
    made = export(tmp_path, without(network.state, *parts), *SIZE)
    assert made.outcome.code == 3, made.outcome.stdout
    assert "missing: " in made.error
    assert parts[0] in made.error.partition("missing: ")[2]
    assert not made.directory.exists()


def test_an_auxiliary_head_that_is_there_in_part_is_dropped_and_named(tmp_path):
    network = Network(*FAMILIES["RepVGGplus"])
    heads = without(auxiliary_heads(network), "stage1_aux.3.", "stage2_aux.0.bn")
    made = export(tmp_path, {**network.state, **heads}, *SIZE)
    assert made.outcome.code == 0, made.outcome.stderr
    names = "stage1_aux.*, stage2_aux.*, stage3_first_aux.*"
    assert f"left out: {names} ({len(heads)} tensors): an auxiliary classifier" in made.outcome.stdout
    assert set(made.report["checkpoint"]["left_out"]) == set(heads)


# Families that are mixed


def mixed(first, second):
    """Blocks of both: stages 0 to 2 of one, the others of the other."""
    one, other = Network(*FAMILIES[first]), Network(*FAMILIES[second])
    early = ("heads.", *(block.prefix + "." for block in one.blocks if block.stage < 3))
    late = tuple(block.prefix + "." for block in other.blocks if block.stage >= 3)
    state = {name: tensor for name, tensor in whole(one).items() if name.startswith(early)}
    return state | {name: tensor for name, tensor in whole(other).items() if name.startswith(late)}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("official", "timm"),
        ("official", "MobileOne"),
        ("timm", "timm MobileOne"),
        ("fast-reid", "mmpretrain"),
        ("MobileOne", "timm MobileOne"),
        ("6DRepNet", "official"),
    ],
)
def test_two_families_in_one_file_are_both_named(first, second, tmp_path):
    made = export(tmp_path, mixed(first, second), *SIZE)
    assert made.outcome.code == 3
    families = [FAMILIES[name][0].name for name in (first, second)]
    assert "fit more than one lineage" in made.error
    assert all(re.search(rf"\b{re.escape(name)} \(\d+ tensors\)", made.error) for name in families), made.error
    assert not made.directory.exists()


def test_one_block_of_another_version_is_not_taken_for_the_first(tmp_path):
    """A block of RepVGG among those of QARepVGG: it lacks the batch norm of the sum, and its 1x1 branch has one."""
    one, other = Network(*FAMILIES["QARepVGG"]), Network(*FAMILIES["official"])
    state = without(one.state, "stage2.1.")
    state |= {name: tensor for name, tensor in other.state.items() if name.startswith("stage2.1.rbr")}
    made = export(tmp_path, state, *SIZE)
    assert (made.outcome.code, made.directory.exists()) == (3, False)
    assert "not a whole QARepVGG checkpoint; missing: " in made.error


def test_a_kernel_of_another_size_is_refused_by_name(tmp_path):
    network = Network(*FAMILIES["official"])
    state = dict(network.state)
    state["stage2.1.rbr_dense.conv.weight"] = torch.zeros(12, 12, 5, 5)
    made = export(tmp_path, state, *SIZE)
    assert made.outcome.code == 3
    assert "stage2.1.rbr_dense.conv.weight has shape (12, 12, 5, 5)" in made.error
