"""Outputs other than a classifier's: the last feature map of a backbone, and the stages that ``--features`` names."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from tests.families import Network
from tests.family_exports import GATE, SIZE, difference, export, operations_of, save_expectation
from tests.family_names import APPLE, FAMILIES, FAST_REID, OFFICIAL, PLUS, QAREPVGG, Shape
from tests.family_states import deployed, without

STAGES = {"stage1": 1, "stage2": 2, "stage3": 3, "stage4": 4}


@pytest.fixture(scope="module")
def network():
    return Network(OFFICIAL, Shape(even_groups=2, se=3))


@pytest.fixture(scope="module")
def four(network, tmp_path_factory):
    """The outputs of stages 1 to 4, made once."""
    return export(tmp_path_factory.mktemp("four"), network.state, *SIZE, "--features", "1,2,3,4")


def declared(path):
    """The outputs' shapes by name, as the file declares them; dynamic dimensions by their names."""
    return {
        output.name: [dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim]
        for output in onnx.load(path).graph.output
    }


# A file without a classifier


@pytest.mark.parametrize("name", ["official", "timm", "RepVGGplus", "MobileOne", "QARepVGG"])
def test_a_file_without_a_classifier_gives_its_last_feature_map(name, tmp_path):
    network = Network(*FAMILIES[name])
    state = without(network.state, network.family.head)
    made = export(tmp_path, state, *SIZE)
    images = network.noise()
    last = network.stages(images)[-1]
    assert declared(made.path) == {"output": ["N", *last.shape[1:]]}
    assert difference(made.run(images)["output"], last) < GATE
    assert made.operations == operations_of(network, head=False)
    assert "Gemm" not in made.operations
    golden = made.golden
    assert difference(torch.from_numpy(golden["output"]), network.stages(torch.from_numpy(golden["input"]))[-1]) < 1e-11
    assert made.report["architecture"]["classes"] is None


def test_a_backbone_is_told_from_a_classifier_in_words(tmp_path, network):
    made = export(tmp_path, without(network.state, "linear."), *SIZE)
    assert "classes" not in made.outcome.stdout
    assert "no classifier" in made.outcome.stdout.splitlines()[1]
    assert "outputs output (N, 20, 2, 2): the last feature map" in made.outcome.stdout


def test_half_a_classifier_is_no_backbone(tmp_path, network):
    made = export(tmp_path, without(network.state, "linear.weight"), *SIZE)
    assert (made.outcome.code, made.directory.exists()) == (3, False)
    assert "missing: linear.weight" in made.error


@pytest.mark.parametrize("flags", [(), ("--features", "4")])
def test_labels_need_a_classifier(tmp_path, network, flags):
    np.savez(tmp_path / "labels.npz", images=np.zeros((4, 40, 48, 3), np.uint8), labels=np.arange(4))
    made = export(tmp_path, without(network.state, "linear."), *SIZE, "--labels", tmp_path / "labels.npz", *flags)
    assert (made.outcome.code, made.directory.exists()) == (2, False)
    assert made.error.startswith("--labels: ")


# Stages


def test_every_stage_that_is_named_is_an_output(four, network):
    images = network.noise()
    stages = network.stages(images)
    found = four.run(images)
    assert list(found) == list(STAGES)
    for name, stage in STAGES.items():
        assert difference(found[name], stages[stage]) < GATE, name
    assert declared(four.path) == {name: ["N", *stages[stage].shape[1:]] for name, stage in STAGES.items()}
    assert four.operations == operations_of(network, head=False)


def test_the_golden_vectors_hold_each_output_under_its_name(four, network):
    golden = four.golden
    assert set(golden) == {"input", *STAGES}
    stages = network.stages(torch.from_numpy(golden["input"]))
    for name, stage in STAGES.items():
        assert golden[name].dtype == "float64"
        assert difference(torch.from_numpy(golden[name]), stages[stage]) < 1e-11


def test_the_classifier_that_is_not_exported_is_named(four):
    assert "left out: linear.* (2 tensors): behind the features that are exported" in four.outcome.stdout.splitlines()
    assert four.report["checkpoint"]["left_out"] == ["linear.bias", "linear.weight"]


def test_what_was_asked_for_stands_in_the_files_metadata(four):
    assert '"features": "1,2,3,4"' in four.metadata["assumptions"]


@pytest.mark.parametrize(
    ("family", "shape", "stage"),
    [
        (OFFICIAL, Shape(), 2),
        (PLUS, Shape(depths=(1, 2, 2, 3, 1), se=3), 3),
        (APPLE, Shape(convs=2, se=3), 3),
        (QAREPVGG, Shape(), 1),
    ],
    ids=["official", "RepVGGplus", "MobileOne", "QARepVGG"],
)
def test_nothing_behind_the_last_stage_is_computed(family, shape, stage, tmp_path):
    network = Network(family, shape)
    made = export(tmp_path, network.state, *SIZE, "--features", stage)
    images = network.noise()
    found = made.run(images)
    assert list(found) == [f"stage{stage}"]
    assert difference(found[f"stage{stage}"], network.stages(images)[stage]) < GATE
    network.blocks = [block for block in network.blocks if block.stage <= stage]
    assert made.operations == operations_of(network, head=False)


def test_stages_of_a_deployed_backbone(tmp_path):
    network = Network(FAST_REID, Shape())
    state = deployed(network)
    made = export(tmp_path, state, *SIZE, "--features", "2,4")
    images = network.noise()
    found, stages = made.run(images), network.stages(images, state)
    assert list(found) == ["stage2", "stage4"]
    assert difference(found["stage2"], stages[2]) < GATE
    assert difference(found["stage4"], stages[4]) < GATE


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("5", 2, "stages 0 to 4"),
        ("1,9", 2, "stages 0 to 4"),
        ("1,1", 2, "each stage once"),
        ("2,1", 2, "in their order"),
        ("a", 2, "--features"),
        ("", 2, "--features"),
        ("1.5", 2, "--features"),
        ("-1", 2, "--features"),
        ("1,", 2, "--features"),
    ],
)
def test_stages_that_do_not_exist_are_a_mistake_of_usage(text, code, words, tmp_path, network):
    made = export(tmp_path, network.state, *SIZE, f"--features={text}")
    assert made.outcome.code == code
    assert words in made.error
    assert not made.directory.exists()


def test_the_stem_is_a_stage_too(tmp_path, network):
    made = export(tmp_path, network.state, *SIZE, "--features", "0,1")
    images = network.noise()
    found, stages = made.run(images), network.stages(images)
    assert list(found) == ["stage0", "stage1"]
    assert all(difference(found[f"stage{stage}"], stages[stage]) < GATE for stage in (0, 1))


# The user's own outputs


def test_the_users_own_feature_maps_are_reproduced(tmp_path, network):
    images = network.noise()
    stages = network.stages(images)
    path = save_expectation(tmp_path, images, {"stage2": stages[2], "stage4": stages[4]})
    made = export(tmp_path, network.state, *SIZE, "--features", "2,4", "--expect", path)
    assert made.outcome.code == 0, made.outcome.stdout + made.outcome.stderr
    assert "ok   expectation" in made.outcome.stdout


@pytest.mark.parametrize("wrong", ["stage2", "stage4"])
def test_one_feature_map_that_is_another_fails(wrong, tmp_path, network):
    """A thousandth of its own scale in a single value, however large the other outputs are."""
    images = network.noise()
    stages = {f"stage{stage}": network.stages(images)[stage] for stage in (2, 4)}
    stages[wrong].view(-1)[7] += 1e-3 * stages[wrong].abs().max()
    path = save_expectation(tmp_path, images, stages)
    made = export(tmp_path, network.state, *SIZE, "--features", "2,4", "--expect", path)
    assert made.outcome.code == 1
    assert "FAIL expectation" in made.outcome.stdout


def test_two_feature_maps_in_one_anothers_place_are_refused(tmp_path, network):
    images = network.noise()
    stages = network.stages(images)
    path = save_expectation(tmp_path, images, {"stage2": stages[4], "stage4": stages[2]})
    made = export(tmp_path, network.state, *SIZE, "--features", "2,4", "--expect", path)
    assert (made.outcome.code, made.directory.exists()) == (3, False)
    assert "stage2 is " in made.error
