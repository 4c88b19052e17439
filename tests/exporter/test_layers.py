"""The ledger by layers: a fault planted in one layer of one form of the network is named, with that form."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from exporter import pipeline
from exporter.architecture import with_features
from exporter.errors import VerificationFailed
from exporter.images import noise_images
from exporter.layers import (
    LayerGraph,
    LayerStage,
    farthest_row,
    first_departing,
    layer_stages,
    layers_of_graph,
    layers_of_network,
    names_of,
    rows_from_stages,
)
from exporter.ledger import Stage, whole_stage
from exporter.onnx_graph import Graph, onnx_from_plain, structure_from_architecture
from exporter.plain import plain_from_repvgg
from exporter.precisions import PRECISIONS
from tests.families import Network
from tests.family_names import APPLE, PLUS, QAREPVGG
from tests.family_names import Shape as FamilyShape
from tests.inference import network_from_state
from tests.networks import NaiveRepVGG, Shape, contiguous_float

SIZE = (20, 20)
IMAGE = noise_images(3, SIZE)[:1]
FLOAT32 = 5e-6


@pytest.fixture(scope="module")
def network():
    return network_from_state(contiguous_float(NaiveRepVGG(Shape(se=True, widths=(16, 32, 32, 48, 64))).state_dict()))


@pytest.fixture(scope="module")
def graph(network):
    architecture, tensors = network
    plain = plain_from_repvgg(architecture, tensors, IMAGE)
    return onnx_from_plain(plain, structure_from_architecture(architecture, SIZE), {})


def departing(network, graphs):
    architecture, tensors = network
    after = [LayerGraph(*graph, {}) for graph in graphs]
    stages = layer_stages(architecture, tensors, SIZE, IMAGE, after, FLOAT32)
    reference = layers_of_network(architecture, tensors, torch.from_numpy(IMAGE).double())
    rows = rows_from_stages(reference, stages)
    return rows, first_departing(rows, stages)


def with_weight(graph, name, change):
    weights = {key: array.copy() for key, array in graph.weights.items()}
    weights[name] = change(weights[name])
    return Graph(graph.structure, weights)


def test_every_layer_of_every_form_is_near_the_reference(network, graph):
    architecture, _ = network
    half = PRECISIONS[1]
    typed = half.twin(half.rewrite(graph, {}).graph)
    rows, first = departing(network, [("simplified", graph, FLOAT32), ("fp16", typed, 5e-3)])
    assert first is None
    assert [row.layer for row in rows] == names_of(architecture) == [*(b.name for b in architecture.blocks), "output"]
    for row in rows:
        assert list(row.errors) == ["fused, float64", "fused, float32", "ONNX", "simplified", "fp16"]
        assert row.errors["fused, float64"] < 1e-13
        assert 1e-9 < row.errors["ONNX"] < FLOAT32
        assert 1e-5 < row.errors["fp16"] < 5e-3


# --- families, backbones and feature maps


FAMILIES = {
    "RepVGGplus": (PLUS, FamilyShape(se=3)),
    "QARepVGG": (QAREPVGG, FamilyShape()),
    "MobileOne": (APPLE, FamilyShape(convs=2)),
}


def features_of(network, features):
    """The network up to the last of the stages, and the tensors that it still has."""
    architecture, tensors = network
    cut = with_features(architecture, features)
    blocks = tuple(f"{block.name}." for block in cut.blocks)
    return cut, {name: tensor for name, tensor in tensors.items() if name.startswith(blocks)}


def graph_of(network):
    architecture, tensors = network
    plain = plain_from_repvgg(architecture, tensors, IMAGE)
    return onnx_from_plain(plain, structure_from_architecture(architecture, SIZE), {})


@pytest.mark.parametrize("features", [(), (1, 3)], ids=["classifier", "features"])
@pytest.mark.parametrize(("family", "shape"), FAMILIES.values(), ids=FAMILIES)
def test_every_layer_of_every_family_is_near_the_reference(family, shape, features):
    whole = network_from_state(Network(family, shape).state)
    network = features_of(whole, features) if features else whole
    rows, first = departing(network, [("simplified", graph_of(network), FLOAT32)])
    assert first is None
    named = (
        {"stage1.1": "stage1", "stage3.1": "stage3"}
        if family is not APPLE
        else {"stage1.3": "stage1", "stage3.3": "stage3"}
    )
    blocks = [named.get(block.name, block.name) if features else block.name for block in network[0].blocks]
    assert [row.layer for row in rows] == (blocks if features else [*blocks, "output"])
    assert all(1e-9 < row.errors["ONNX"] < FLOAT32 for row in rows)


def test_a_feature_map_that_departs_is_named_as_the_output_that_it_is(network):
    cut = features_of(network, (1, 2))
    wrong = with_weight(graph_of(cut), "stage2.1.weight", lambda w: w * np.float32(1.01))
    assert departing(cut, [("simplified", wrong, FLOAT32)])[1] == "stage2 in simplified"


FAULTS = {
    "swapped channels": ("stage2.1.weight", lambda w: w[[1, 0, *range(2, len(w))]]),
    "a transposed kernel": ("stage1.1.weight", lambda w: w.transpose(0, 1, 3, 2).copy()),
    "a lost bias": ("stage3.0.bias", np.zeros_like),
    "a NaN": ("stage4.0.weight", lambda w: np.where(np.arange(w.size).reshape(w.shape) == 5, np.nan, w).astype("f4")),
    "the first layer": ("stage0.0.weight", lambda w: w * np.float32(1.001)),
    "the classifier": ("head.weight", lambda w: w[::-1].copy()),
}


@pytest.mark.parametrize(("name", "change"), FAULTS.values(), ids=FAULTS)
def test_the_first_layer_that_departs_is_the_one_with_the_fault(name, change, network, graph):
    _, first = departing(network, [("simplified", with_weight(graph, name, change), FLOAT32)])
    layer = "output" if name.startswith("head") else name.rpartition(".")[0]
    assert first == f"{layer} in simplified"


def test_a_replaced_relu_is_named(network, graph):
    structure = onnx.ModelProto()
    structure.CopyFrom(graph.structure)
    next(node for node in structure.graph.node if node.name == "stage2.0/Relu").op_type = "Sigmoid"
    assert departing(network, [("simplified", Graph(structure, graph.weights), FLOAT32)])[1] == "stage2.0 in simplified"


def test_a_graph_without_the_layers_is_refused(network):
    structure = helper.make_model(
        helper.make_graph(
            [helper.make_node("Relu", ["input"], ["output"])],
            "g",
            [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["N", 3, *SIZE])],
            [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["N", 3, *SIZE])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    with pytest.raises(VerificationFailed, match="ONNX Runtime refuses it"):
        layers_of_graph(Graph(structure, {}), network[0], IMAGE, {})


# --- which image is looked at


REFERENCE = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("error", [1e-3, np.nan, np.inf])
def test_the_image_is_the_one_that_is_farthest_off_in_any_stage(row, error):
    fine = REFERENCE + 1e-8
    wrong = REFERENCE + 1e-8
    wrong[row, 1] += error
    assert farthest_row(REFERENCE, [whole_stage("fine", fine), whole_stage("wrong", wrong)]) == row


def test_rows_in_another_order_are_found_again():
    wrong = REFERENCE[[2, 0, 1]] + 1e-8
    wrong[0, 0] += 1.0
    assert farthest_row(REFERENCE, [Stage("wrong", wrong, ((2,), (0, 1)))]) == 2


def test_the_first_departing_layer_needs_an_error_beyond_the_gate_of_its_own_stage():
    truth = {"a": np.ones(3), "b": np.ones(3)}
    near, far = {"a": np.ones(3), "b": np.full(3, 1.01)}, {"a": np.full(3, 1.001), "b": np.full(3, 1.001)}
    stages = [LayerStage("tight", near, 1e-3), LayerStage("loose", far, 1e-2)]
    assert first_departing(rows_from_stages(truth, stages), stages) == "b in tight"
    stages = [dataclasses.replace(stage, gate=0.1) for stage in stages]
    assert first_departing(rows_from_stages(truth, stages), stages) is None


# --- the command


def test_layers_are_in_the_report_and_none_departs(command, checkpoint, tmp_path):
    done = command(checkpoint, "--size", "20", "--trt", "fp16", "--onnx", "--layers")
    assert (done.code, done.stderr) == (0, "")
    assert "\nlayers: none departs\n" in done.stdout
    report = json.loads((tmp_path / "model" / "report.json").read_text())
    assert report["first_departing_layer"] is None
    assert [row["layer"] for row in report["layers"]][-1] == "output"
    assert list(report["layers"][0]["errors"]) == [
        "fused, float64", "fused, float32", "ONNX", "ONNX simplified, fp32", "fp16, explicit-cast twin",
    ]  # fmt: skip


def test_a_weight_changed_on_its_way_to_the_file_is_named_with_its_layer(command, checkpoint, tmp_path, monkeypatch):
    right = pipeline.write_onnx

    def wrong(graph: Graph, path: pathlib.Path) -> list[pathlib.Path]:
        return right(with_weight(graph, "stage3.0.weight", lambda w: w * np.float32(1.01)), path)

    monkeypatch.setattr(pipeline, "write_onnx", wrong)
    done = command(checkpoint, "--size", "20", "--layers")
    assert done.code == 1
    assert "\nlayers: the first that departs is stage3.0 in ONNX simplified, fp32\n" in done.stdout
    report = json.loads((tmp_path / "model" / "report.json.rejected").read_text())
    assert report["first_departing_layer"] == "stage3.0 in ONNX simplified, fp32"
    row = next(row for row in report["layers"] if row["layer"] == "stage3.0")
    assert row["errors"]["ONNX"] < 1e-6 < 1e-3 < row["errors"]["ONNX simplified, fp32"]
    added = {row["stage"]: row["added"] for row in report["ledger"]}
    assert added["ONNX"] < 1e-5 < added["ONNX simplified, fp32"]


def test_channels_that_half_precision_rescaled_do_not_depart(command, small, saved, tmp_path):
    """Its first block is a million times too loud and the next one makes up for it."""
    state = contiguous_float(small.state_dict())
    for name in state:
        if re.fullmatch(r"stage0\.rbr_\w+\.bn\.(weight|bias)", name):
            state[name] *= 1e6
        if re.fullmatch(r"stage1\.0\.rbr_(dense|1x1)\.conv\.weight", name):
            state[name] *= 1e-6
    done = command(saved(state), "--size", "20", "--trt", "fp16", "--layers")
    assert (done.code, done.stderr) == (0, "")
    assert "8 channels scaled by 2^-" in done.stdout
    report = json.loads((tmp_path / "model" / "report.json").read_text())
    assert [row["layer"] for row in report["layers"] if row["errors"]["fp16, explicit-cast twin"] > 5e-3] == []
    assert "\nlayers: none departs\n" in done.stdout


def test_without_the_flag_there_are_no_layers(command, checkpoint, tmp_path):
    assert "layers" not in command(checkpoint, "--size", "20").stdout
    assert json.loads((tmp_path / "model" / "report.json").read_text())["layers"] == []
