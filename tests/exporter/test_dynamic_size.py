"""Dynamic height and width: one file gives the naive answer at every size between the two that were named."""

from __future__ import annotations

import onnx
import pytest
import torch

from tests.families import Network
from tests.family_exports import GATE, difference, export
from tests.family_names import FAMILIES
from tests.family_states import whole, without

RANGE = "20:28x36:44x52"
SIZES = ((20, 20), (28, 36), (44, 52), (20, 52), (44, 20), (21, 33), (29, 23), (43, 51))
"""The three that are named, the corners that are not, and odd ones in between."""
NAMES = ("official", "MobileOne", "fast-reid", "RepVGGplus")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``exported(name, *flags)``: the family's network and its export with dynamic sizes; made once."""
    made = {}

    def get(name, *flags):
        if (name, flags) not in made:
            network = Network(*FAMILIES[name])
            directory = tmp_path_factory.mktemp("dynamic")
            made[name, flags] = network, export(directory, whole(network), "--size", RANGE, *flags)
        return made[name, flags]

    return get


def frames(values):
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", NAMES)
def test_the_file_gives_the_naive_answer_at_every_size(exported, name, size):
    network, made = exported(name)
    images = network.noise(size)
    gate = max(GATE, 4 * network.loss_of_float32(images))
    assert gate < 1e-4
    assert difference(made.run(images)["output"], network.answer(images)) < gate


def test_answers_at_two_sizes_are_not_the_same(exported):
    """What the test above would miss if the oracle looked at one size only."""
    network, _ = exported("official")
    images = network.noise((44, 52))
    assert difference(network.answer(images[:, :, :20, :20]), network.answer(images)) > 1e-2


def test_height_and_width_are_named_in_the_file(exported):
    network, made = exported("official")
    graph = onnx.load(made.path).graph
    assert frames(graph.input) == {"input": ["N", network.shape.in_channels, "height", "width"]}
    assert frames(graph.output) == {"output": ["N", network.shape.outputs]}


def test_feature_maps_have_heights_and_widths_of_their_own(exported):
    network, made = exported("official", "--features", "1,3")
    names = {"stage1": 1, "stage3": 3}
    widths = network.shape.widths
    assert frames(onnx.load(made.path).graph.output) == {
        name: ["N", widths[stage], f"{name}_height", f"{name}_width"] for name, stage in names.items()
    }
    for size in SIZES:
        images = network.noise(size)
        stages = network.stages(images)
        found = made.run(images)
        assert all(difference(found[name], stages[stage]) < GATE for name, stage in names.items()), size


def test_the_last_feature_map_of_a_backbone_has_them_too(tmp_path):
    network = Network(*FAMILIES["official"])
    made = export(tmp_path, without(network.state, "linear."), "--size", RANGE)
    assert frames(onnx.load(made.path).graph.output) == {"output": ["N", 20, "output_height", "output_width"]}
    for size in SIZES:
        images = network.noise(size)
        assert difference(made.run(images)["output"], network.stages(images)[-1]) < GATE, size


def test_golden_vectors_are_of_the_usual_size(exported):
    network, made = exported("official")
    golden = made.golden
    assert golden["input"].shape[1:] == (3, 28, 36)
    expected = network.answer(torch.from_numpy(golden["input"]))
    assert difference(torch.from_numpy(golden["output"]), expected) < 1e-11


def test_all_three_sizes_are_checked_and_told(exported):
    _, made = exported("official")
    assert made.report["passed"] is True
    stdout = made.outcome.stdout
    assert "20x20:28x36:44x52" in stdout
    assert all(
        any(size in line for line in stdout.splitlines() if line.startswith("ok ")) for size in ("20x20", "44x52")
    )
    assert '"size": "20x20:28x36:44x52"' in made.metadata["assumptions"]


def test_a_single_size_stays_fixed(tmp_path):
    network = Network(*FAMILIES["fast-reid"])
    made = export(tmp_path, whole(network), "--size", "28x36")
    graph = onnx.load(made.path).graph
    assert frames(graph.input) == {"input": ["N", 3, 28, 36]}
    assert frames(graph.output) == {"output": ["N", 20, 2, 3]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("28:20:36", "not in the order MIN:OPT:MAX"),
        ("20x30:28x28:36x36", "not in the order MIN:OPT:MAX"),
        ("20:28", "has 2 sizes"),
        ("20:28:36:40", "has 4 sizes"),
        ("20::36", "is not a number, HxW or MIN:OPT:MAX"),
        ("a:b:c", "is not a number, HxW or MIN:OPT:MAX"),
        ("0:28:36", "outside 1 to 4096"),
        ("20:28:5000", "outside 1 to 4096"),
    ],
)
def test_sizes_that_make_no_range_are_a_mistake_of_usage(text, words, tmp_path):
    made = export(tmp_path, {}, "--size", text)
    assert made.outcome.code == 2
    assert made.error.startswith("--size: ")
    assert words in made.error
