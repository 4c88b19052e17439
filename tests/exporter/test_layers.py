"""The ledger by layers: a fault planted in one layer of one form of the network is named, with that form."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from exporter import pipeline
from exporter.architecture import architecture_from_tensors
from exporter.errors import VerificationFailed
from exporter.images import noise_images
from exporter.layers import (
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
from exporter.lineages import canonical_from_raw, lineage_from_names
from exporter.onnx_graph import Graph, onnx_from_plain, structure_from_architecture
from exporter.plain import plain_from_repvgg
from exporter.precisions import PRECISIONS
from tests.networks import NaiveRepVGG, Shape, contiguous_float

SIZE = (20, 20)
IMAGE = noise_images(3, SIZE)[:1]
FLOAT32 = 5e-6


@pytest.fixture(scope="module")
def network():
    tensors = contiguous_float(NaiveRepVGG(Shape(se=True, widths=(16, 32, 32, 48, 64))).state_dict())
    lineage = lineage_from_names(list(tensors), "model.pt")
    canonical, _ = canonical_from_raw(tensors, lineage)
    architecture = architecture_from_tensors(
        canonical, lineage, unexpected=[], where="model.pt", strides=None, eps=None
    )
    return architecture, canonical


@pytest.fixture(scope="module")
def graph(network):
    architecture, tensors = network
    plain = plain_from_repvgg(architecture, tensors, IMAGE)
    return onnx_from_plain(plain, structure_from_architecture(architecture, SIZE), {})


def departing(network, graphs):
    architecture, tensors = network
    stages = layer_stages(architecture, tensors, SIZE, IMAGE, graphs, FLOAT32)
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
        layers_of_graph(Graph(structure, {}), network[0], IMAGE)


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


def test_without_the_flag_there_are_no_layers(command, checkpoint, tmp_path):
    assert "layers" not in command(checkpoint, "--size", "20").stdout
    assert json.loads((tmp_path / "model" / "report.json").read_text())["layers"] == []
