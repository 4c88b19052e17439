"""Which tensors a checkpoint must have: each rule by a loss that it names, and by what it rightly does not ask for."""

from __future__ import annotations

import pytest
import torch

from exporter.errors import ArchitectureRejected
from exporter.lineages.lineage import (
    BATCH_NORM,
    BRANCH_TENSORS,
    DENSE_BRANCHES,
    FUSED_TENSORS,
    HEAD_TENSORS,
    POST_TENSORS,
    SE_TENSORS,
)
from exporter.lineages.mobileone import MOBILEONE
from exporter.lineages.official import OFFICIAL
from exporter.required import required_names
from tests import family_names
from tests.families import Network
from tests.family_names import APPLE, PLUS, QAREPVGG, QAREPVGG_V1, TIMM_MOBILEONE, Shape
from tests.family_states import deployed, without
from tests.inference import network_from_state

SE = Shape(se=3)
BRANCHES_OF_S0 = Shape(depths=(1, 1, 2, 2, 1), convs=3)
SE_IN_PART = Shape(depths=(1, 1, 1, 4, 2), se=3)


def missing_from(state):
    """The names that the error lists as missing, in the file's own spelling; none where the network is whole."""
    try:
        network_from_state(state)
    except ArchitectureRejected as error:
        line = str(error)
        assert "not a whole" in line, line
        assert "unexpected" not in line, line
        return sorted(line.partition("missing: ")[2].split(", "))
    return []


def lost(family, shape, *parts):
    """What is said to be missing from a network of ``family`` that has lost all tensors with one of ``parts``."""
    state = Network(family, shape).state
    assert missing_from(state) == []
    return missing_from(without(state, *parts))


def batch_norm(name):
    return sorted(f"{name}.{part}" for part in BATCH_NORM)


# --- each kind of branch


def test_every_tensor_of_a_small_network_is_missed_when_it_alone_is_lost():
    for family, shape in ((family_names.OFFICIAL, SE), (QAREPVGG, Shape()), (PLUS, SE)):
        state = Network(family, shape).state
        for name in state:
            assert missing_from({key: tensor for key, tensor in state.items() if key != name}) == [name]


def test_every_tensor_of_a_mobileone_is_missed_when_it_alone_is_lost():
    """A block that has lost its kernel might be of either size, so that more may be asked for than it had."""
    state = Network(APPLE, Shape(depths=(1, 1, 1, 2, 1), convs=2, se=3)).state
    for name in state:
        missing = missing_from({key: tensor for key, tensor in state.items() if key != name})
        assert name in missing
        assert missing == [name] or name.endswith("rbr_conv.0.conv.weight")


LOST_BRANCHES = {
    "an identity": (family_names.OFFICIAL, Shape(), ["stage2.1.rbr_identity."], batch_norm("stage2.1.rbr_identity")),
    "a 1x1 branch": (
        family_names.OFFICIAL,
        Shape(),
        ["stage2.0.rbr_1x1."],
        sorted([*batch_norm("stage2.0.rbr_1x1.bn"), "stage2.0.rbr_1x1.conv.weight"]),
    ),
    "the 3x3 branch": (
        family_names.OFFICIAL,
        Shape(),
        ["stage2.0.rbr_dense."],
        sorted([*batch_norm("stage2.0.rbr_dense.bn"), "stage2.0.rbr_dense.conv.weight"]),
    ),
    "a 1x1 branch without a batch norm": (QAREPVGG, Shape(), ["stage2.1.rbr_1x1."], ["stage2.1.rbr_1x1.weight"]),
    "the last dense branch of one MobileOne block": (
        APPLE,
        BRANCHES_OF_S0,
        ["stage2.1.rbr_conv.2."],
        sorted([*batch_norm("stage2.1.rbr_conv.2.bn"), "stage2.1.rbr_conv.2.conv.weight"]),
    ),
    "a dense branch in the middle": (
        TIMM_MOBILEONE,
        BRANCHES_OF_S0,
        ["stages.2.3.conv_kxk.1."],
        sorted([*batch_norm("stages.2.3.conv_kxk.1.bn"), "stages.2.3.conv_kxk.1.conv.weight"]),
    ),
    "the scale branch of a depthwise block": (
        APPLE,
        BRANCHES_OF_S0,
        ["stage3.2.rbr_scale."],
        sorted([*batch_norm("stage3.2.rbr_scale.bn"), "stage3.2.rbr_scale.conv.weight"]),
    ),
    "the identity of a pointwise block": (
        APPLE,
        BRANCHES_OF_S0,
        ["stage3.3.rbr_skip."],
        batch_norm("stage3.3.rbr_skip"),
    ),
}


@pytest.mark.parametrize(("family", "shape", "parts", "missing"), LOST_BRANCHES.values(), ids=LOST_BRANCHES)
def test_a_branch_that_one_block_has_lost_is_missing_whole(family, shape, parts, missing):
    assert lost(family, shape, *parts) == missing


def test_a_block_that_is_lost_whole_is_missing_with_every_branch_that_it_can_have():
    deep = Shape(depths=(1, 2, 3, 2, 1), se=3)
    architecture, tensors = network_from_state(Network(family_names.OFFICIAL, deep).state)
    branches = {tuple(map(int, b.name.removeprefix("stage").split("."))): b.branches for b in architecture.blocks}
    for block in ("stage2.0", "stage2.1"):
        left = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{block}.")}
        of_block = {position: here for position, here in branches.items() if position != (2, int(block[-1]))}
        own = ["dense", "pointwise", *(["identity"] if block == "stage2.1" else [])]
        needed = {f"{block}.{name}" for branch in own for name in BRANCH_TENSORS[branch]}
        needed |= {f"{block}.{name}" for name in SE_TENSORS}
        assert required_names(left, of_block, OFFICIAL) - left.keys() == needed
        assert required_names(tensors, branches, OFFICIAL) == tensors.keys()


@pytest.mark.parametrize(
    ("family", "shape", "block", "branch"),
    [
        (family_names.OFFICIAL, Shape(), "stage1.0", "identity"),  # keeps the width; its stride may be 2
        (family_names.OFFICIAL, Shape(), "stage2.0", "identity"),  # changes the width
        (APPLE, BRANCHES_OF_S0, "stage2.1", "identity"),  # changes the width within the stage
        (APPLE, BRANCHES_OF_S0, "stage2.1", "pointwise"),  # a 1x1 branch beside a 1x1 kernel
        (TIMM_MOBILEONE, Shape(depths=(1, 1, 1, 1, 1)), "stage2.0", "dense1"),  # no block has it
    ],
)
def test_a_branch_that_the_block_cannot_have_is_not_asked_for(family, shape, block, branch):
    architecture, _ = network_from_state(Network(family, shape).state)
    assert branch not in next(one.branches for one in architecture.blocks if one.name == block)
    assert branch == "dense1" or any(branch in one.branches for one in architecture.blocks)


def test_a_stem_may_have_one_dense_branch_where_the_others_have_more():
    """As timm's MobileOne has."""
    state = Network(TIMM_MOBILEONE, BRANCHES_OF_S0).state
    assert not any(name.startswith("stem.conv_kxk.1.") for name in state)
    assert missing_from(state) == []
    assert missing_from(without(state, "stages.0.0.conv_kxk.1.", "stages.0.0.conv_kxk.2.")) != []
    second = {name.replace(".0.", ".1.", 1): state[name] for name in state if name.startswith("stem.conv_kxk.0.")}
    assert missing_from({**state, **second}) == sorted(name.replace("conv_kxk.1", "conv_kxk.2") for name in second)
    assert len(second) == 5


def test_a_kind_of_branch_that_no_block_has_is_an_ablation():
    state = Network(family_names.OFFICIAL, Shape()).state
    for parts in (["rbr_1x1."], ["rbr_identity."], ["rbr_1x1.", "rbr_identity."]):
        assert missing_from(without(state, *parts)) == []


# --- deployed blocks


@pytest.mark.parametrize("name", ["stage2.1.rbr_reparam.bias", "stage2.1.rbr_reparam.weight"])
def test_a_deployed_block_needs_kernel_and_bias(name):
    state = deployed(Network(family_names.OFFICIAL, Shape()))
    assert missing_from(state) == []
    assert missing_from({key: tensor for key, tensor in state.items() if key != name}) == [name]


def test_a_deployed_block_beside_trained_ones_needs_no_branch_and_they_need_no_kernel():
    network = Network(QAREPVGG, Shape())
    state = deployed(network, lambda block: block.prefix == "stage2.1")
    assert missing_from(state) == []
    assert missing_from(without(state, "stage3.1.rbr_1x1.")) == ["stage3.1.rbr_1x1.weight"]


# --- the batch norm behind the sum


@pytest.mark.parametrize("family", [QAREPVGG, QAREPVGG_V1], ids=["V2", "V1"])
def test_a_batch_norm_behind_the_sum_that_one_block_has_lost_is_missing(family):
    assert lost(family, Shape(), "stage3.1.bn.") == batch_norm("stage3.1.bn")


def test_no_batch_norm_behind_the_sum_is_asked_for_where_no_block_has_one():
    architecture, _ = network_from_state(Network(family_names.OFFICIAL, Shape()).state)
    assert not any(block.post_batch_norm for block in architecture.blocks)


def test_a_deployed_block_that_kept_its_batch_norm_needs_all_of_it():
    state = deployed(Network(QAREPVGG, Shape()))
    norm = {f"stage2.0.bn.{part}": torch.ones(12) for part in BATCH_NORM}
    assert missing_from({**state, **norm}) == []
    for name in norm:
        assert missing_from({**state, **without(norm, name)}) == [name]


# --- squeeze-and-excitation


@pytest.mark.parametrize("family", [family_names.OFFICIAL, PLUS], ids=["before", "after"])
def test_se_that_one_block_has_lost_is_missing_whole(family):
    block = "stage2.blocks.1" if family is PLUS else "stage2.1"
    down, up = (f"{block}.{name}" for name in family.se)
    names = sorted(f"{part}.{kind}" for part in (down, up) for kind in ("weight", "bias"))
    assert lost(family, SE, f"{block}.{family.se[0].split('.')[0]}.") == names


def test_se_in_part_is_needed_in_all_blocks_of_a_stage_from_its_first_on():
    state = Network(APPLE, SE_IN_PART).state
    first, *others = sorted({name.split(".se.")[0] for name in state if name.startswith("stage3.") and ".se." in name})
    assert (first, others) == ("stage3.4", ["stage3.5", "stage3.6", "stage3.7"])
    for block in others:
        assert len(missing_from(without(state, f"{block}.se."))) == 4
    assert missing_from(without(state, "stage4.3.se.")) != []


def test_se_in_part_is_not_asked_for_in_earlier_blocks_nor_in_other_stages():
    architecture, _ = network_from_state(Network(APPLE, SE_IN_PART).state)
    squeezed = [block.name for block in architecture.blocks if block.se_channels is not None]
    assert squeezed == [*(f"stage3.{index}" for index in range(4, 8)), *(f"stage4.{index}" for index in range(4))]


# --- the classifier


def test_a_classifier_is_there_with_both_tensors_or_not_at_all():
    state = Network(family_names.OFFICIAL, Shape()).state
    assert missing_from(without(state, "linear.bias")) == ["linear.bias"]
    assert missing_from(without(state, "linear.weight")) == ["linear.weight"]
    assert missing_from(without(state, "linear.")) == []
    assert network_from_state(without(state, "linear."))[0].classes is None


# --- the function itself


def test_the_names_are_worked_out_by_hand():
    tensors = {f"stage0.0.{name}": torch.zeros(4) for name in BRANCH_TENSORS["dense"]}
    tensors |= {"stage0.0.se.reduce.bias": torch.zeros(1), "head.bias": torch.zeros(7)}
    expected = {f"stage0.0.{name}" for name in (*BRANCH_TENSORS["dense"], *SE_TENSORS)} | set(HEAD_TENSORS)
    assert required_names(tensors, {(0, 0): ("dense",)}, OFFICIAL) == expected
    assert required_names({}, {(0, 0): ("fused",)}, OFFICIAL) == {f"stage0.0.{name}" for name in FUSED_TENSORS}
    trained = {f"stage0.0.{POST_TENSORS[0]}": torch.zeros(4)}
    assert required_names(trained, {(0, 0): ("dense",)}, OFFICIAL) == {
        f"stage0.0.{name}" for name in (*BRANCH_TENSORS["dense"], *POST_TENSORS)
    }


def test_gaps_between_stages_and_blocks_are_filled():
    names = required_names({}, {(0, 0): ("dense",), (2, 1): ("dense", "pointwise")}, MOBILEONE)
    blocks = {name.rsplit(".dense.weight")[0] for name in names if name.endswith(".dense.weight")}
    assert blocks == {"stage0.0", "stage1.0", "stage2.0", "stage2.1"}
    assert "stage1.0.pointwise.weight" in names
    assert not any(f".{branch}." in name for name in names for branch in DENSE_BRANCHES[1:])
