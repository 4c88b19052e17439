"""The ONNX files: structure, one file or two, read back, simplified, and the contract's negative twins."""

from __future__ import annotations

import copy
import pathlib

import numpy as np
import onnx
import onnxruntime
import onnxsim
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from exporter.contract import contract_problems, expected_counts, operation_counts
from exporter.errors import InputRejected
from exporter.images import noise_images
from exporter.onnx_file import graph_from_file, write_onnx
from exporter.onnx_graph import (
    Graph,
    onnx_from_plain,
    structure_from_architecture,
    weights_from_plain,
    with_initializers,
)
from exporter.plain import plain_from_repvgg
from tests.inference import network_from_state
from tests.networks import NaiveRepVGG, Shape

SIZE = (20, 24)


def plain_of(shape, seed=0):
    return plain_from_repvgg(*network_from_state(NaiveRepVGG(shape, seed).state_dict()), noise_images(3, SIZE))


@pytest.fixture(scope="module", params=["plain", "grouped", "se"])
def network(request):
    shape = {"plain": Shape(), "grouped": Shape(even_groups=4), "se": Shape(se=True, widths=(16, 32, 32, 48, 64))}
    plain = plain_of(shape[request.param])
    structure = structure_from_architecture(plain.architecture, SIZE)
    return plain, onnx_from_plain(plain, structure, {"precision": "fp32"})


def problems(path, plain):
    return contract_problems(path, plain.architecture, weights_from_plain(plain), half=[], exponents={})


def test_the_body_is_one_conv_and_one_relu_per_block(network, tmp_path):
    plain, graph = network
    write_onnx(graph, tmp_path / "x.onnx")
    model = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(model, full_check=True)
    blocks = len(plain.architecture.blocks)
    se_blocks = sum(block.se_channels is not None for block in plain.architecture.blocks)
    counts = operation_counts(model)
    assert counts["Conv"] == blocks + 2 * se_blocks
    assert counts["Relu"] == blocks + se_blocks
    assert counts["GlobalAveragePool"] == 1 + se_blocks
    assert (counts["Flatten"], counts["Gemm"]) == (1, 1)
    assert counts == expected_counts(plain.architecture)
    assert model.opset_import[0].version >= 17
    assert {entry.key: entry.value for entry in model.metadata_props} == {"precision": "fp32"}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_the_written_bytes_are_protobufs_own(network, tmp_path):
    """What is written by hand parses to exactly the model that protobuf would have serialized."""
    _, graph = network
    write_onnx(graph, tmp_path / "x.onnx")
    assert onnx.load(tmp_path / "x.onnx") == with_initializers(graph)
    assert len((tmp_path / "x.onnx").read_bytes()) == with_initializers(graph).ByteSize()


def test_past_the_limit_the_weights_go_into_a_second_file(network, tmp_path):
    plain, graph = network
    files = write_onnx(graph, tmp_path / "x.onnx", limit=1000)
    assert [path.name for path in files] == ["x.onnx", "x.onnx.data"]
    assert files[0].stat().st_size < 40_000
    loaded = onnx.load(tmp_path / "x.onnx")
    for tensor in loaded.graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), graph.weights[tensor.name])
    x = np.random.default_rng(0).standard_normal((2, 3, *SIZE), dtype=np.float32)
    write_onnx(graph, tmp_path / "one.onnx")
    one, two = (
        onnxruntime.InferenceSession(str(tmp_path / name)).run(None, {"input": x})[0] for name in ("one.onnx", "x.onnx")
    )
    assert np.array_equal(one, two)
    assert problems(tmp_path / "x.onnx", plain) == []


def test_reading_back_gives_the_same_structure_and_bits(network, tmp_path):
    _, graph = network
    write_onnx(graph, tmp_path / "x.onnx")
    again = graph_from_file(tmp_path / "x.onnx")
    assert with_initializers(again) == with_initializers(graph)


def test_onnxsim_finds_nothing_left_to_simplify(network):
    _, graph = network
    model = with_initializers(graph)
    simplified, same = onnxsim.simplify(model)
    assert same
    assert [node.SerializeToString() for node in simplified.graph.node] == [
        node.SerializeToString() for node in model.graph.node
    ]


def test_a_good_file_has_no_problems(network, tmp_path):
    plain, graph = network
    write_onnx(graph, tmp_path / "x.onnx")
    assert problems(tmp_path / "x.onnx", plain) == []


def attribute(node, name):
    return next(attribute for attribute in node.attribute if attribute.name == name)


def swapped_channels(model, weights):
    weights["stage1.0.weight"] = weights["stage1.0.weight"][[1, 0, *range(2, 8)]]


def transposed_kernel(model, weights):
    weights["stage1.0.weight"] = np.ascontiguousarray(weights["stage1.0.weight"].transpose(0, 1, 3, 2))


def one_flipped_bit(model, weights):
    bits = weights["stage2.1.bias"].copy()
    bits.view("u4")[3] ^= 1
    weights["stage2.1.bias"] = bits


def not_a_number(model, weights):
    weights["stage0.0.weight"] = weights["stage0.0.weight"].copy()
    weights["stage0.0.weight"].flat[0] = np.nan


def negative_zero(model, weights):
    bias = weights["head.bias"].copy()
    bias[0] = 0.0
    weights["head.bias"] = bias


def another_stride(model, weights):
    attribute(model.graph.node[2], "strides").ints[:] = [1, 1]


def no_padding(model, weights):
    attribute(model.graph.node[0], "pads").ints[:] = [0, 0, 0, 0]


def a_relu_replaced(model, weights):
    model.graph.node[1].op_type = "Sigmoid"


def a_relu_that_reads_another_conv(model, weights):
    model.graph.node[3].input[0] = model.graph.node[1].output[0]


def a_block_left_out(model, weights):
    model.graph.node[4].input[0] = model.graph.node[1].output[0]


def two_blocks_with_each_others_weights(model, weights):
    first, second = model.graph.node[4], model.graph.node[6]
    first.input[1], second.input[1] = second.input[1], first.input[1]


def scaled_classifier(model, weights):
    gemm = model.graph.node[-1]
    gemm.attribute.append(onnx.helper.make_attribute("alpha", 2.0))


def a_pool_of_another_tensor(model, weights):
    pool = next(node for node in model.graph.node if node.name == "head/Pool")
    pool.input[0] = "stage3.0"


def a_fixed_batch(model, weights):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def an_extra_operation(model, weights):
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Identity", ["before"], ["output"]))


FAULTS = {
    swapped_channels: "weight stage1.0.weight differs",
    transposed_kernel: "weight stage1.0.weight differs",
    one_flipped_bit: "weight stage2.1.bias differs",
    not_a_number: "weight stage0.0.weight differs",
    negative_zero: "weight head.bias differs",
    another_stride: "stage1.0/Conv has (strides, pads, group, dilations) ([1, 1]",
    no_padding: "stage0.0/Conv has (strides, pads, group, dilations) ([2, 2], [0, 0, 0, 0]",
    a_relu_replaced: "4 Relu where",
    a_relu_that_reads_another_conv: "stage1.0/Relu does not read its own Conv",
    a_block_left_out: "stage1.1/Conv does not read stage1.0",
    two_blocks_with_each_others_weights: "does not read its own weight and bias",
    scaled_classifier: "head/Gemm is not x W^T + b",
    a_pool_of_another_tensor: "the head does not pool stage4.0",
    a_fixed_batch: "its batch is not dynamic",
    an_extra_operation: "1 Identity where 0 belong",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_contract_names_a_planted_fault(fault, tmp_path):
    plain = plain_of(Shape())
    graph = onnx_from_plain(plain, structure_from_architecture(plain.architecture, SIZE), {})
    plain_copy = copy.deepcopy(plain)
    if fault is negative_zero:
        plain_copy.tensors["head.bias"][0] = -0.0
    model, weights = copy.deepcopy(graph.structure), dict(graph.weights)
    fault(model, weights)
    if fault is a_relu_replaced:
        assert operation_counts(model)["Relu"] == len(plain.architecture.blocks) - 1
    write_onnx(Graph(model, weights), tmp_path / "x.onnx")
    found = problems(tmp_path / "x.onnx", plain_copy)
    expected = FAULTS[fault].replace("4 Relu", f"{len(plain.architecture.blocks) - 1} Relu")
    assert any(expected in problem for problem in found), found


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    plain = plain_of(Shape(widths=(4, 4, 4, 4, 4), depths=(1, 1, 1, 1, 1)))
    path = tmp_path_factory.mktemp("onnx") / "x.onnx"
    write_onnx(onnx_from_plain(plain, structure_from_architecture(plain.architecture, (8, 8)), {}), path)
    return path


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_file_is_refused_or_read_and_nothing_else(written, data):
    content = bytearray(written.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    mutated = written.with_name("mutated.onnx")
    mutated.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        found = graph_from_file(mutated)
    except InputRejected as error:
        found = str(error)
    assert isinstance(found, Graph) or ("mutated.onnx: not a whole ONNX file" in found and "\n" not in found)


def test_external_weights_are_read_from_the_models_own_directory_only(tmp_path):
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    (tmp_path / "x.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(InputRejected, match="outside the model's own directory"):
        graph_from_file(tmp_path / "x.onnx")
