"""Every family as it is trained: the ONNX file gives what the naive network gives in float64."""

from __future__ import annotations

import pytest
import torch

from tests.families import Network
from tests.family_exports import SIZE, Export, assert_answers, difference, export, operations_of
from tests.family_names import FAMILIES, OFFICIAL
from tests.family_states import deployed, extras, partly_deployed, with_batch_norm, with_counters, with_wrong_fused


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``trained(name)``: the family's network, its state as training saves it, and the export; made once."""
    made: dict[str, tuple[Network, dict[str, torch.Tensor], Export]] = {}

    def get(name):
        if name not in made:
            network = Network(*FAMILIES[name])
            state = with_counters({**network.state, **extras(network)})
            made[name] = network, state, export(tmp_path_factory.mktemp("trained"), state, *SIZE)
        return made[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_network_gives_its_own_answers(trained, name):
    network, state, made = trained(name)
    assert made.outcome.code == 0, made.outcome.stderr
    assert_answers(made, network, state)
    assert made.operations == operations_of(network, head=network.has_head)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_network_is_described(trained, name):
    network, _, made = trained(name)
    checkpoint, architecture = made.report["checkpoint"], made.report["architecture"]
    assert (checkpoint["lineage"], checkpoint["form"]) == (network.family.name, "training")
    assert architecture["groups"] == [block.groups for block in network.blocks]
    assert [channels or 0 for channels in architecture["se_channels"]] == [block.se for block in network.blocks]
    assert tuple(architecture["stage_strides"]) == network.shape.strides
    assert tuple(architecture["widths"]) == network.shape.widths
    assert architecture["in_channels"] == network.shape.in_channels
    assert architecture["classes"] == (network.shape.outputs if network.has_head else None)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_oracle_agrees_with_itself(name):
    """Fusing, the paper's identity, changes no answer; any wrong kernel, epsilon or input would."""
    network = Network(*FAMILIES[name])
    images = network.noise()
    answer = network.answer(images)
    forms = [deployed(network), partly_deployed(network)]
    forms += [with_batch_norm(network)] if network.family is OFFICIAL else []
    assert [difference(network.answer(images, state), answer) < 3e-6 for state in forms] == [True] * len(forms)
    assert torch.equal(network.answer(images, with_wrong_fused(network)), answer)
    assert difference(network.answer(images, eps=1e-3), answer) > 1e-2
    assert 0.1 < answer.std() < 10
    assert [bool(0.05 < stage.std() < 10) for stage in network.stages(images)] == [True] * 5


@pytest.mark.parametrize("name", ["RepVGGplus", "official"])
def test_the_oracle_sees_on_which_side_of_the_relu_se_is(name):
    network = Network(*FAMILIES[name])
    other = not network.family.se_after_relu
    assert difference(network.answer(network.noise(), se_after_relu=other), network.answer(network.noise())) > 1e-2


# What is said


LEFT_OUT = {
    "RepVGGplus": ("stage1_aux.*, stage2_aux.*, stage3_first_aux.*", "an auxiliary classifier of the training"),
    "fast-reid": ("heads.*", "re-identification heads"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_heads_that_are_left_out_are_named(trained, name):
    network, _, made = trained(name)
    names, what = LEFT_OUT[name]
    tensors = with_counters(extras(network))
    assert f"left out: {names} ({len(tensors)} tensors): {what}" in made.outcome.stdout.splitlines()
    assert made.report["checkpoint"]["left_out"] == sorted(tensors)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LEFT_OUT])
def test_nothing_is_said_to_be_left_out_where_nothing_is(trained, name):
    made = trained(name)[2]
    assert "left out" not in made.outcome.stdout
    assert made.report["checkpoint"]["left_out"] == []


def test_the_assumed_last_stride_of_fast_reid_is_said(trained):
    stdout = trained("fast-reid")[2].outcome.stdout
    (line,) = [line for line in stdout.splitlines() if line.startswith("assumed: stage strides")]
    assert "stage strides 2,2,2,2,1" in line
    assert "LAST_STRIDE" in stdout


def test_six_outputs_are_said_to_be_no_rotation_matrix(trained):
    assert "compute_rotation_matrix_from_ortho6d" in trained("6DRepNet")[2].outcome.stdout


def test_an_identity_without_tensors_is_said_to_be_assumed(trained):
    """stage1.0 keeps its channels: only its stride says that it has no identity, and no tensor says its stride."""
    lines = [line for line in trained("QARepVGG")[2].outcome.stdout.splitlines() if line.startswith("assumed")]
    (line,) = [line for line in lines if "identity" in line]
    network = trained("QARepVGG")[0]
    identities = sum(block.has_identity for block in network.blocks)
    assert f"an identity branch, which has no tensors, in {identities} of {len(network.blocks)} blocks" in line


def test_the_same_names_without_the_heads_are_the_same_network(trained, tmp_path):
    network, _, made = trained("RepVGGplus")
    again = export(tmp_path, network.state, *SIZE)
    assert torch.equal(again.run(network.noise())["output"], made.run(network.noise())["output"])
    assert "auxiliary" not in again.outcome.stdout
