"""QARepVGG's identity has no tensor: what else says that it is there, and what sees that it is not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from exporter.architecture import Block
from tests.families import Network
from tests.family_exports import GATE, SIZE, assert_answers, difference, export, save_expectation
from tests.family_names import APPLE, FAMILIES, FAST_REID, OFFICIAL, PLUS, QAREPVGG, QAREPVGG_V1, Shape
from tests.family_states import deployed, whole

# The authors' other blocks, for comparisons: none of them has a tensor that says so
BATCH_NORMS_ONLY_IN_FRONT = dataclasses.replace(QAREPVGG, post=None)
BATCH_NORM_ON_THE_IDENTITY = dataclasses.replace(QAREPVGG, post=None, identity="rbr_identity")
BARE_IDENTITY_ONLY = dataclasses.replace(OFFICIAL, identity=None)
BARE_IDENTITY_AND_POST = dataclasses.replace(QAREPVGG_V1, identity=None)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """Images (64, 3, 40, 48), and the path of a file with them."""
    images = torch.randn(64, 3, 40, 48, generator=torch.Generator().manual_seed(3))
    path = tmp_path_factory.mktemp("calibration") / "calib.npz"
    np.savez(path, images=images.numpy())
    return images, path


def witness_line(made):
    (line,) = [line for line in made.outcome.stdout.splitlines() if "witness, batch norms against your images" in line]
    return line


WITNESSED = {
    "QARepVGG": (QAREPVGG, Shape()),
    "QARepVGG V1": (QAREPVGG_V1, Shape()),
    "MobileOne": (APPLE, Shape(depths=(1, 1, 2, 2, 1), convs=2)),
    "RepVGGplus": (PLUS, Shape(se=3)),
    "fast-reid": (FAST_REID, Shape()),
}


@pytest.mark.parametrize("name", WITNESSED)
def test_the_batch_norms_know_the_images_of_the_training(name, calibration, tmp_path):
    """Every one: those of several branches, those behind a sum, those behind SE."""
    family, shape = WITNESSED[name]
    images, path = calibration
    network = Network(family, shape, seen=images)
    line = witness_line(export(tmp_path, whole(network), *SIZE, "--calib", path))
    norms = sum(part.endswith("running_var") for part in network.state)
    assert line.startswith("ok   ")
    assert f"clear: 64 images reproduce the statistics of {norms} batch norms" in line


@pytest.mark.parametrize("name", ["QARepVGG", "MobileOne"])
def test_a_wrong_stride_is_seen_by_the_batch_norms_and_the_right_one_is_named(name, calibration, tmp_path):
    """In QARepVGG it brings an identity with it that belongs nowhere, and no tensor contradicts."""
    family, shape = WITNESSED[name]
    images, path = calibration
    network = Network(family, shape, seen=images)
    made = export(tmp_path, network.state, *SIZE, "--calib", path, "--strides", "2,1,2,2,2")
    assert made.outcome.code == 1
    assert witness_line(made).startswith("FAIL ")
    assert "your images fit --strides 2,2,2,2,2 far better" in made.error


def test_an_identity_that_is_left_out_is_seen_by_the_batch_norms(calibration, tmp_path, monkeypatch):
    images, path = calibration
    network = Network(QAREPVGG, Shape(), seen=images)
    monkeypatch.setattr(Block, "at_stride", lambda block, stride: dataclasses.replace(block, stride=stride))
    made = export(tmp_path, network.state, *SIZE, "--calib", path)
    assert made.outcome.code == 1
    assert "first in stage1.1.post" in witness_line(made)


# Against the user's own outputs


def outputs_file(network, directory):
    images = network.noise()
    return save_expectation(directory, images, network.answer(images))


def test_outputs_of_a_network_without_its_identities_fail(tmp_path):
    network = Network(*FAMILIES["QARepVGG"])
    state = network.state
    network.blocks = [dataclasses.replace(block, skips=False) for block in network.blocks]
    made = export(tmp_path, state, *SIZE, "--expect", outputs_file(network, tmp_path))
    assert made.outcome.code == 1
    assert "FAIL expectation" in made.outcome.stdout


def test_an_identity_where_there_is_none_fails_and_the_right_stride_is_named(tmp_path):
    network = Network(*FAMILIES["QARepVGG"])
    path = outputs_file(network, tmp_path)
    made = export(tmp_path, network.state, *SIZE, "--strides", "2,1,2,2,2", "--expect", path)
    assert made.outcome.code == 1
    assert "your outputs fit --strides 2,2,2,2,2 to" in made.error


@pytest.mark.parametrize(
    ("name", "told"), [("QARepVGG V1", [False, True, False, False, False]), ("QARepVGG", [False] * 5)]
)
def test_only_identities_with_tensors_tell_a_stride(name, told, tmp_path):
    """stage1.0 keeps its channels. Its first version has no batch norm on an identity there, so its stride is 2."""
    made = export(tmp_path, Network(*FAMILIES[name]).state, *SIZE)
    assert made.report["architecture"]["strides_told_by_tensors"] == told


# The authors' other blocks


def test_an_identity_with_a_batch_norm_is_not_counted_twice(tmp_path):
    network = Network(BATCH_NORM_ON_THE_IDENTITY, Shape())
    made = export(tmp_path, network.state, *SIZE)
    assert_answers(made, network, network.state)
    assert "an identity branch, which has no tensors" not in made.outcome.stdout


def test_without_a_batch_norm_behind_the_sum_in_any_block_none_is_computed(tmp_path):
    network = Network(BATCH_NORMS_ONLY_IN_FRONT, Shape())
    assert_answers(export(tmp_path, network.state, *SIZE), network, network.state)


def test_where_no_block_has_an_identity_that_is_said(tmp_path):
    """These have one, under names that do not say so: the answer is another network's, which the user's outputs see."""
    network = Network(BARE_IDENTITY_ONLY, Shape())
    path = outputs_file(network, tmp_path)
    made = export(tmp_path, network.state, *SIZE)
    assert "assumed: no identity branch in any block" in made.outcome.stdout
    images = network.noise()
    assert difference(made.run(images)["output"], network.answer(images)) > 0.1
    assert export(tmp_path, network.state, *SIZE, "--expect", path).outcome.code == 1


def test_batch_norms_everywhere_but_on_the_identity_are_refused_by_name(tmp_path):
    """One behind the sum, none on the identity: the names are those of the first version without its identities."""
    made = export(tmp_path, Network(BARE_IDENTITY_AND_POST, Shape()).state, *SIZE)
    assert (made.outcome.code, made.directory.exists()) == (3, False)
    assert "experimental QARepVGG (V5) weights, which are not exported" in made.error


def test_a_batch_norm_that_is_kept_behind_the_fused_kernel_is_computed(tmp_path):
    """As quantization-aware code leaves it: the branches are fused, the batch norm of their sum is not."""
    network = Network(QAREPVGG, Shape())
    branches = Network(QAREPVGG, Shape())
    branches.family = BATCH_NORMS_ONLY_IN_FRONT
    kept = {name: tensor for name, tensor in network.state.items() if ".bn." in name and "rbr_dense" not in name}
    made = export(tmp_path, {**deployed(branches), **kept}, *SIZE)
    assert difference(made.run(network.noise())["output"], network.answer(network.noise())) < GATE
