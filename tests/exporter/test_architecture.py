"""The network inferred from tensors: every published variant in every naming, ablations, strides, contradictions."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from exporter.architecture import Output, with_features
from exporter.errors import ArchitectureRejected, UsageError
from exporter.lineages import LINEAGES
from exporter.model import outputs_of_network
from exporter.plain import plain_from_repvgg, relative_error
from exporter.recognition import check_variant
from exporter.strides import with_strides
from exporter.variants import VARIANTS, variant_from_name
from tests.families import Network
from tests.family_names import APPLE, PLUS, QAREPVGG
from tests.family_names import Shape as FamilyShape
from tests.inference import answers, network_from_state
from tests.networks import NAMINGS, NaiveRepVGG, Shape, deployed_state, renamed

REPVGG = [variant for variant in VARIANTS if variant.family == "RepVGG"]


def shape_of(variant, divisor=1):
    """The variant's shape, each width divided: small enough to compute, with the same structure."""
    widths = tuple(max(16, width // divisor) for width in variant.widths)
    se = {0.0: False, 1.0: True}[variant.se_part[0]]
    return Shape(depths=variant.depths, widths=widths, even_groups=variant.groups, se=se, classes=10)


@pytest.mark.parametrize("variant", REPVGG, ids=lambda variant: variant.name)
def test_every_published_variant_is_recognised_by_name(variant):
    """At full size, from shapes alone: tensors on the meta device have no values."""
    with torch.device("meta"):
        state = NaiveRepVGG(shape_of(variant)).state_dict()
    for naming in NAMINGS:
        architecture, _ = network_from_state(renamed(state, naming))
        assert architecture.variant == variant.name
        assert architecture.depths == variant.depths
        assert architecture.widths == variant.widths
        assert architecture.stage_strides == (2, 2, 2, 2, 2)


@pytest.mark.parametrize("form", ["training", "deployed"])
@pytest.mark.parametrize("variant", REPVGG, ids=lambda variant: variant.name)
def test_every_published_variant_computes_the_naive_network(variant, form):
    """With a sixteenth of the widths, in all namings, against the oracle in float64."""
    model = NaiveRepVGG(shape_of(variant, divisor=16), seed=5)
    x = torch.randn(2, 3, 19, 19, dtype=torch.float64)
    state = model.state_dict() if form == "training" else deployed_state(model)
    state = {name: tensor.clone() for name, tensor in state.items()}
    answer = model.answer(x)
    architecture, tensors = network_from_state(state)
    for naming in NAMINGS[1:]:
        other, same_tensors = network_from_state(renamed(state, naming))
        assert dataclasses.replace(other, lineage="official") == architecture
        assert tensors.keys() == same_tensors.keys()
        assert all(torch.equal(tensors[name], same_tensors[name]) for name in tensors)
    assert relative_error(answer, answers(architecture, tensors, x)) < (1e-12 if form == "training" else 2e-6)
    plain = plain_from_repvgg(architecture, tensors, x.float().numpy())
    assert relative_error(answer, answers(architecture, tensors, x.float().double())) < 1e-6
    assert relative_error(answer, answers(plain.architecture, plain.tensors, x)) < 2e-6
    assert (
        relative_error(answers(architecture, tensors, x.float().double()), torch.from_numpy(plain.outputs["output"]))
        < 1e-12
    )
    assert max(certificate.error for certificate in plain.certificates) < 1e-12


@pytest.mark.parametrize(
    "changes", [{"identity": False}, {"pointwise": False}, {"identity": False, "pointwise": False}]
)
def test_the_ablations_without_a_branch_are_networks_too(changes):
    model = NaiveRepVGG(Shape(**changes))
    architecture, tensors = network_from_state(model.state_dict())
    x = torch.randn(1, 3, 21, 21, dtype=torch.float64)
    assert relative_error(model.answer(x), answers(architecture, tensors, x)) < 1e-12
    assert all("identity" in block.branches for block in architecture.blocks[2:3]) is changes.get("identity", True)


def test_an_identity_means_stride_one_and_its_absence_at_equal_width_means_two():
    widths = (8, 8, 8, 8, 16)
    architecture, _ = network_from_state(NaiveRepVGG(Shape(widths=widths, strides=(2, 1, 2, 1, 2))).state_dict())
    assert architecture.stage_strides == (2, 1, 2, 1, 2)
    assert architecture.told_strides == (False, True, True, True, False)


def test_without_identities_strides_are_an_assumption_that_can_be_overridden():
    model = NaiveRepVGG(Shape(widths=(8, 8, 8, 8, 8), strides=(1, 2, 1, 2, 2), identity=False))
    assumed, _ = network_from_state(model.state_dict())
    assert assumed.stage_strides == (2, 2, 2, 2, 2)
    assert not any(assumed.told_strides)
    given, tensors = network_from_state(model.state_dict(), strides=(1, 2, 1, 2, 2))
    x = torch.randn(1, 3, 21, 21, dtype=torch.float64)
    assert relative_error(model.answer(x), answers(given, tensors, x)) < 1e-12
    assert relative_error(model.answer(x), answers(assumed, tensors, x)) > 1e-2


def test_one_channel_and_an_epsilon_of_its_own():
    model = NaiveRepVGG(Shape(in_channels=1, eps=1e-3))
    architecture, tensors = network_from_state(model.state_dict(), eps=1e-3)
    x = torch.randn(1, 1, 21, 21, dtype=torch.float64)
    assert relative_error(model.answer(x), answers(architecture, tensors, x)) < 1e-12
    wrong, _ = network_from_state(model.state_dict())
    assert relative_error(model.answer(x), answers(wrong, tensors, x)) > 1e-4


def test_missing_and_unexpected_tensors_are_reported_at_once_in_the_files_own_names():
    state = NaiveRepVGG(Shape()).state_dict()
    del state["stage1.1.rbr_dense.bn.running_var"], state["linear.bias"]
    state["stage9.extra"] = torch.zeros(1)
    message = "missing: linear.bias, stage1.1.rbr_dense.bn.running_var; unexpected: stage9.extra"
    with pytest.raises(ArchitectureRejected, match=re.escape(message)):
        network_from_state(state)


@pytest.mark.parametrize(
    ("dropped", "missing"),
    [
        ("stage1.1.rbr_identity.", "stage1.1.rbr_identity.bias"),
        ("stage2.0.rbr_1x1.", "stage2.0.rbr_1x1.bn.bias"),
        ("stage2.0.", "stage2.0.rbr_dense.bn.bias"),
        ("stage3.", "stage3.0.rbr_dense.bn.bias"),
    ],
)
def test_a_dropped_branch_block_or_stage_is_missing_and_never_an_ablation(dropped, missing):
    state = {name: t for name, t in NaiveRepVGG(Shape()).state_dict().items() if not name.startswith(dropped)}
    with pytest.raises(ArchitectureRejected, match=re.escape(f"missing: {missing}")):
        network_from_state(state)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("stage1.0.rbr_1x1.conv.weight", (8, 4, 1, 1), "expected (8, 8, 1, 1), from stage1.0.rbr_dense.conv.weight"),
        ("stage1.1.rbr_dense.bn.running_mean", (9,), "expected (8,)"),
        ("stage2.0.rbr_dense.conv.weight", (12, 5, 3, 3), "does not fit the 8 channels"),
        ("stage2.1.rbr_dense.conv.weight", (10, 12, 3, 3), "an identity branch needs 12 outputs"),
        ("stage2.0.rbr_dense.conv.weight", (12, 8, 5, 5), "expected (out, in, 3, 3)"),
        ("stage0.rbr_dense.conv.weight", (8, 4, 3, 3), "an image has 1 or 3 channels"),
        ("linear.weight", (7, 15), "expected (classes, 16)"),
        ("linear.bias", (8,), "expected (7,)"),
        ("linear.weight", (), "expected (classes, 16)"),
    ],
)
def test_a_shape_that_contradicts_another_is_named(name, shape, words):
    state = NaiveRepVGG(Shape()).state_dict()
    state[name] = torch.zeros(shape)
    with pytest.raises(ArchitectureRejected, match=re.escape(words)) as caught:
        network_from_state(state)
    assert f"{name} has shape {shape}" in str(caught.value)


def test_strides_that_contradict_an_identity_are_refused():
    with pytest.raises(ArchitectureRejected, match=r"stage1\.0 stride 2, but its identity branch allows only 1"):
        network_from_state(NaiveRepVGG(Shape(strides=(2, 1, 2, 2, 2))).state_dict(), strides=(2, 2, 2, 2, 2))
    with pytest.raises(UsageError, match="3 numbers for 5 stages"):
        network_from_state(NaiveRepVGG(Shape()).state_dict(), strides=(2, 2, 2))


def test_another_variant_than_the_one_named_is_refused():
    with torch.device("meta"):
        architecture, _ = network_from_state(NaiveRepVGG(shape_of(variant_from_name("A1"))).state_dict())
    check_variant(architecture, variant_from_name("repvgg_a1"), "x.pt")
    with pytest.raises(ArchitectureRejected, match=r"not RepVGG-A0 .* but RepVGG-A1"):
        check_variant(architecture, variant_from_name("A0"), "x.pt")


def test_a_variant_with_another_number_of_groups_is_not_that_variant():
    variant = variant_from_name("B1g4")
    with torch.device("meta"):
        architecture, _ = network_from_state(NaiveRepVGG(shape_of(variant)).state_dict())
    assert architecture.variant == "B1g4"
    with pytest.raises(ArchitectureRejected, match="not RepVGG-B1 "):
        check_variant(architecture, variant_from_name("B1"), "x.pt")


@pytest.mark.parametrize("spelling", ["A0", "a0", "RepVGG-A0", "repvgg_a0", "RepVGGA0"])
def test_the_usual_spellings_of_a_variant(spelling):
    assert variant_from_name(spelling).name == "A0"


def test_an_unknown_variant_is_told_the_nearest():
    with pytest.raises(UsageError, match="did you mean B1g4"):
        variant_from_name("B1g5")


# Outputs


def test_a_file_without_a_classifier_is_a_backbone_and_half_a_classifier_is_not_whole():
    state = NaiveRepVGG(Shape()).state_dict()
    whole, _ = network_from_state(state)
    assert (whole.classes, whole.outputs) == (7, (Output("output", None, 7),))
    for lost in ("linear.weight", "linear.bias"):
        with pytest.raises(ArchitectureRejected, match=f"missing: {lost}$"):
            network_from_state({name: tensor for name, tensor in state.items() if name != lost})
    backbone, tensors = network_from_state({k: v for k, v in state.items() if not k.startswith("linear.")})
    assert (backbone.classes, backbone.outputs) == (None, (Output("output", "stage4.0", 16),))
    assert dataclasses.replace(backbone, classes=7) == whole
    assert backbone.tensor_names == {**{b.name: b.name for b in backbone.blocks}, "stage4.0": "output"}
    assert whole.tensor_names == {block.name: block.name for block in whole.blocks}
    assert answers(backbone, tensors, torch.randn(1, 3, 40, 48).double()).shape == (1, 16, 2, 2)


def test_features_are_the_network_up_to_the_last_of_them():
    whole, _ = network_from_state(NaiveRepVGG(Shape(strides=(2, 1, 2, 2, 1))).state_dict())
    cut = with_features(whole, (1, 3))
    assert cut.outputs == (Output("stage1", "stage1.1", 8), Output("stage3", "stage3.0", 16))
    assert cut.blocks == whole.blocks[: 1 + 2 + 2 + 1]
    assert (cut.classes, cut.depths, cut.widths) == (None, (1, 2, 2, 1), (8, 8, 12, 16))
    assert (cut.stage_strides, cut.cut_strides) == (whole.stage_strides[:4], whole.stage_strides[4:])
    assert cut.told_strides == whole.told_strides[:4]
    assert {old: new for old, new in cut.tensor_names.items() if old != new} == {
        "stage1.1": "stage1", "stage3.0": "stage3",
    }  # fmt: skip


@pytest.mark.parametrize("features", [(5,), (1, 9), (0, 1, 2, 3, 4, 5)])
def test_a_stage_that_does_not_exist_is_a_usage_error(features):
    whole, _ = network_from_state(NaiveRepVGG(Shape()).state_dict())
    with pytest.raises(UsageError, match=f"--features {features[-1]}: the network has stages 0 to 4"):
        with_features(whole, features)


@pytest.mark.parametrize("size", [(20, 24), (21, 33), (1, 1), (64, 2)])
def test_the_size_behind_each_block_is_that_of_what_leaves_it(size):
    architecture, tensors = network_from_state(NaiveRepVGG(Shape(strides=(2, 1, 2, 2, 1))).state_dict())
    images, seen = torch.randn(1, 3, *size, dtype=torch.float64), {}
    outputs_of_network(architecture, tensors, images, lambda name, value: seen.update({name: value.shape[2:]}))
    for block in architecture.blocks:
        assert architecture.size_behind(block.name, size) == tuple(seen[block.name])


# Families


def test_blocks_of_a_split_stage_are_counted_on():
    naive = Network(PLUS, FamilyShape(depths=(1, 2, 2, 5, 1), se=3))
    architecture, tensors = network_from_state(naive.state)
    assert (architecture.depths, architecture.family) == ((1, 2, 2, 5, 1), "RepVGGplus")
    weights = [naive.state[f"{block.prefix}.rbr_dense.conv.weight"] for block in naive.blocks]
    for block, weight in zip(architecture.blocks, weights, strict=True):
        assert torch.equal(tensors[f"{block.name}.dense.weight"], weight)
        assert block.se_after_activation
        assert block.se_channels == 3


def test_what_no_tensor_of_a_mobileone_says_is_in_its_blocks():
    architecture, _ = network_from_state(Network(APPLE, FamilyShape(depths=(1, 1, 2, 1, 1), convs=3)).state)
    assert [block.kernel for block in architecture.blocks] == [3, *[3, 1] * 5]
    assert [block.padding for block in architecture.blocks] == [1, *[1, 0] * 5]
    assert [block.groups for block in architecture.blocks] == [1, 8, 1, 8, 1, 12, 1, 12, 1, 16, 1]
    assert [block.stride for block in architecture.blocks] == [2, 2, 1, 2, 1, 1, 1, 2, 1, 2, 1]
    stem, depthwise, pointwise, *_ = (block.branches for block in architecture.blocks)
    assert stem == ("dense", "pointwise")
    assert depthwise == ("dense", "dense1", "dense2", "pointwise")
    assert pointwise == ("dense", "dense1", "dense2", "identity")


@pytest.mark.parametrize("strides", [(2, 2, 2, 2, 2), (1, 1, 2, 1, 1), (2, 1, 1, 2, 1)])
def test_an_identity_without_tensors_is_where_channels_stay_and_the_stride_is_one(strides):
    naive = Network(QAREPVGG, FamilyShape(strides=strides))
    architecture, tensors = network_from_state(naive.state, strides=naive.shape.strides)
    assert architecture.stage_strides == naive.shape.strides
    assert ["bare_identity" in block.branches for block in architecture.blocks] == [
        b.has_identity for b in naive.blocks
    ]
    assert all(block.post_batch_norm for block in architecture.blocks)
    assert architecture.told_strides == (False,) * 5
    x = naive.noise((21, 21)).double()
    assert relative_error(naive.answer(x), answers(architecture, tensors, x)) < 1e-11
    moved = with_strides(architecture, (2, 2, 2, 2, 2))
    assert moved.blocks == network_from_state(naive.state, strides=(2, 2, 2, 2, 2))[0].blocks
    assert with_strides(moved, naive.shape.strides) == architecture


def test_branches_win_over_a_fused_kernel_beside_them():
    model = NaiveRepVGG(Shape())
    state = model.state_dict()
    for name, tensor in deployed_state(model).items():
        if "rbr_reparam" in name:
            state[name] = torch.randn_like(tensor)
    architecture, tensors = network_from_state(state)
    assert architecture.form == "training"
    x = torch.randn(1, 3, 21, 21, dtype=torch.float64)
    assert relative_error(model.answer(x), answers(architecture, tensors, x)) < 1e-12


def test_every_lineage_is_in_the_tuple_once():
    assert len({lineage.name for lineage in LINEAGES}) == len(LINEAGES)
