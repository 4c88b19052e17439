"""The contract on the graphs of every family: each whole file passes, and each planted fault is named."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import onnx
import pytest
from onnx import helper

from exporter.architecture import with_features
from exporter.contract import contract_problems, expected_counts, operation_counts
from exporter.images import noise_images
from exporter.onnx_file import write_onnx
from exporter.onnx_graph import Graph, onnx_from_plain, structure_from_architecture, weights_from_plain
from exporter.plain import plain_from_repvgg
from exporter.precisions import PRECISIONS
from exporter.reference import reference_from_repvgg
from tests.families import Network
from tests.family_names import APPLE, FAMILIES, OFFICIAL, PLUS, Shape
from tests.family_states import without
from tests.inference import network_from_state

SIZE = (20, 24)
SE = Shape(se=3)
EQUAL = Shape(widths=(8, 8, 8, 16, 20), strides=(2, 2, 1, 2, 2))
"""Stages 1 and 2 give feature maps of the same shape."""
CASES = {
    **{name: (family, shape, (), True) for name, (family, shape) in FAMILIES.items()},
    "se": (OFFICIAL, SE, (), True),
    "plus": (PLUS, SE, (), True),
    "mobile": (APPLE, Shape(convs=2, se=3), (), True),
    "features": (OFFICIAL, EQUAL, (1, 2), True),
    "features with SE": (PLUS, SE, (0, 2, 4), True),
    "backbone": (OFFICIAL, Shape(), (), False),
}
HALF = next(precision for precision in PRECISIONS if precision.name == "fp16")


def network_of(name):
    """Architecture and tensors; with features, without what lies behind them."""
    family, shape, features, head = CASES[name]
    state = Network(family, shape).state
    architecture, tensors = network_from_state(state if head else without(state, f"{family.head}."))
    if features:
        architecture = with_features(architecture, features)
        blocks = tuple(f"{block.name}." for block in architecture.blocks)
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(blocks)}
    return architecture, tensors


@pytest.fixture(scope="module")
def made():
    """``made(name)``: the plain network and its graph for any size; made once."""
    found = {}

    def make(name):
        if name not in found:
            architecture, tensors = network_of(name)
            plain = plain_from_repvgg(architecture, tensors, noise_images(architecture.in_channels, SIZE)[:1])
            found[name] = plain, onnx_from_plain(plain, structure_from_architecture(plain.architecture, None), {})
        return found[name]

    return make


def problems(graph, plain, tmp_path, half=(), exponents=None):
    write_onnx(graph, tmp_path / "x.onnx")
    weights = weights_from_plain(plain)
    return contract_problems(tmp_path / "x.onnx", plain.architecture, weights, half, exponents or {})


# --- whole files


@pytest.mark.parametrize("size", [None, SIZE], ids=["any size", "one size"])
@pytest.mark.parametrize("name", CASES)
def test_a_whole_file_has_no_problems(name, size, made, tmp_path):
    plain, _ = made(name)
    graph = onnx_from_plain(plain, structure_from_architecture(plain.architecture, size), {})
    assert problems(graph, plain, tmp_path) == []
    assert operation_counts(graph.structure) == expected_counts(plain.architecture)


@pytest.mark.parametrize("name", CASES)
def test_a_half_file_has_no_problems(name, made, tmp_path):
    """Where casts stand between the nodes."""
    plain, graph = made(name)
    architecture, tensors = network_of(name)
    peaks = reference_from_repvgg(architecture, tensors, noise_images(architecture.in_channels, SIZE)).peaks
    rewritten = HALF.rewrite(graph, peaks)
    half = [key for key, array in rewritten.graph.weights.items() if array.dtype == np.float16]
    assert "Cast" in operation_counts(rewritten.graph.structure)
    assert problems(rewritten.graph, plain, tmp_path, half, rewritten.exponents) == []
    assert problems(rewritten.graph, plain, tmp_path, half[1:], rewritten.exponents) != []


@pytest.mark.parametrize(
    ("name", "other"), [("backbone", "features"), ("features", "se"), ("se", "plus"), ("plus", "se")]
)
def test_the_graph_of_one_network_is_not_that_of_another(name, other, made, tmp_path):
    assert problems(made(other)[1], made(name)[0], tmp_path) != []


# --- planted faults


def node_of(model, name):
    return next(node for node in model.graph.node if node.name == name)


def reads(node, place, tensor):
    """The fault in which ``node`` reads ``tensor`` in that place."""

    def change(model):
        assert node_of(model, node).input[place] != tensor
        node_of(model, node).input[place] = tensor

    return change


def with_attribute(node, name, value):
    def change(model):
        attributes = node_of(model, node).attribute
        for attribute in [attribute for attribute in attributes if attribute.name == name]:
            attributes.remove(attribute)
        attributes.append(helper.make_attribute(name, value))

    return change


def renamed(**names):
    """Tensors under other names, everywhere but in the declared outputs; ``__`` stands for a slash."""
    table = {old.replace("__", "/"): new.replace("__", "/") for old, new in names.items()}

    def change(model):
        for node in model.graph.node:
            for values in (node.input, node.output):
                values[:] = [table.get(value, value) for value in values]

    return change


def before_the_relu(model):
    """``stage2`` is what its last ReLU is given."""
    conv, relu = node_of(model, "stage2.1/Conv"), node_of(model, "stage2.1/Relu")
    conv.output[0], relu.input[0], relu.output[0] = "stage2", "stage2", "unused"


def a_head_behind(model):
    last = model.graph.output[-1].name
    model.graph.node.append(helper.make_node("GlobalAveragePool", [last], ["pooled"], name="head/Pool"))


def an_output_lost(model):
    del model.graph.output[0]


def outputs_turned_round(model):
    outputs = list(model.graph.output)[::-1]
    del model.graph.output[:]
    model.graph.output.extend(outputs)


def an_output_more(model):
    model.graph.output.append(helper.make_tensor_value_info("stage2.0", onnx.TensorProto.FLOAT, ["N", 8, "h", "w"]))


def an_output_of_unknown_channels(model):
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "channels"


BLOCK, OTHER = "stage2.1", "stage2.0"
POOL, REDUCE, ACTIVE, EXPAND, SIGMOID, MUL = (
    f"{BLOCK}/se/{part}" for part in ("Pool", "reduce/Conv", "Relu", "expand/Conv", "Sigmoid", "Mul")
)
REDUCE_READS = f"{REDUCE} does not read {POOL}, {BLOCK}.se.reduce.weight, {BLOCK}.se.reduce.bias"
EXPAND_READS = f"{EXPAND} does not read {ACTIVE}, {BLOCK}.se.expand.weight, {BLOCK}.se.expand.bias"
FAULTS = {
    "SE pools another block's convolution": (
        "se", reads(POOL, 0, f"{OTHER}/conv"), f"{POOL} does not read {BLOCK}/Conv",
    ),
    "SE pools what goes into its block": ("se", reads(POOL, 0, OTHER), f"{POOL} does not read {BLOCK}/Conv"),
    "SE pools before the ReLU and not behind it": (
        "plus", reads(POOL, 0, f"{BLOCK}/conv"), f"{POOL} does not read {BLOCK}/Relu",
    ),
    "SE squeezes with another block's weights": ("se", reads(REDUCE, 1, f"{OTHER}.se.reduce.weight"), REDUCE_READS),
    "SE squeezes with another block's bias": ("plus", reads(REDUCE, 2, f"{OTHER}.se.reduce.bias"), REDUCE_READS),
    "SE squeezes what another block pooled": ("se", reads(REDUCE, 0, f"{OTHER}/se/pooled"), REDUCE_READS),
    "SE's ReLU reads another block": (
        "plus", reads(ACTIVE, 0, f"{OTHER}/se/reduced"), f"{ACTIVE} does not read {REDUCE}",
    ),
    "SE without its ReLU": ("se", reads(EXPAND, 0, f"{BLOCK}/se/reduced"), EXPAND_READS),
    "SE expands with another block's weights": ("se", reads(EXPAND, 1, f"{OTHER}.se.expand.weight"), EXPAND_READS),
    "SE expands with another block's bias": ("plus", reads(EXPAND, 2, f"{OTHER}.se.expand.bias"), EXPAND_READS),
    "SE of a pointwise block pools what the depthwise block gives": (
        "mobile", reads("stage3.3/se/Pool", 0, "stage3.2"), "stage3.3/se/Pool does not read stage3.3/Conv",
    ),
    "SE's Sigmoid reads another block": (
        "se", reads(SIGMOID, 0, f"{OTHER}/se/expanded"), f"{SIGMOID} does not read {EXPAND}",
    ),
    "the factor of another block": ("se", reads(MUL, 1, f"{OTHER}/se/factor"), f"{MUL} does not read its SE's Sigmoid"),
    "the factor of another block, behind the ReLU": (
        "plus", reads(MUL, 1, f"{OTHER}/se/factor"), f"{MUL} does not read its SE's Sigmoid",
    ),
    "the product of another tensor": ("se", reads(MUL, 0, OTHER), f"{MUL} does not read {BLOCK}/Conv"),
    "the product of what comes before the ReLU": (
        "plus", reads(MUL, 0, f"{BLOCK}/conv"), f"{MUL} does not read {BLOCK}/Relu",
    ),
    "a ReLU past its SE": (
        "se", reads(f"{BLOCK}/Relu", 0, f"{BLOCK}/conv"), f"{BLOCK}/Relu does not read its SE's product",
    ),
    "a block past the SE before it": (
        "plus", reads(f"{BLOCK}/Conv", 0, f"{OTHER}/relu"), f"{BLOCK}/Conv does not read {OTHER}",
    ),
    "a head past the last SE": ("plus", reads("head/Pool", 0, "stage4.0/relu"), "the head does not pool stage4.0"),
    "padding of a 1x1 kernel": (
        "mobile", with_attribute("stage4.1/Conv", "pads", [1] * 4), "stage4.1/Conv has (strides, pads, group, dil",
    ),
    "no padding of a depthwise kernel": (
        "mobile", with_attribute("stage3.2/Conv", "pads", [0] * 4), "stage3.2/Conv has (strides, pads, group, dil",
    ),
    "a dilation": (
        "mobile", with_attribute("stage3.2/Conv", "dilations", [2] * 2), "stage3.2/Conv has (strides, pads, group, dil",
    ),
    "two outputs in each other's place": (
        "features", renamed(stage1="stage2", stage2="stage1"), "stage1 is not the result of stage1.1",
    ),
    "an output before its ReLU": ("features", before_the_relu, "stage2 is not the result of stage2.1"),
    "outputs in another order": ("features", outputs_turned_round, "its outputs are not stage1, float32 (N, 8, H, W)"),
    "an output that is lost": ("features", an_output_lost, "its outputs are not stage1, float32 (N, 8, H, W) and"),
    "an output too many": ("features", an_output_more, "its outputs are not stage1, float32 (N, 8, H, W) and"),
    "a pool behind a backbone": ("backbone", a_head_behind, "1 GlobalAveragePool where 0 belong"),
    "channels that are not told": (
        "backbone", an_output_of_unknown_channels, "its outputs are not output, float32 (N, 20, H, W)",
    ),
    "an output that is a convolution": (
        "backbone", renamed(output="x", **{"stage4.0__conv": "output"}), "output is not the result of stage4.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "expected"), FAULTS.values(), ids=FAULTS)
def test_the_contract_names_a_planted_fault(name, change, expected, made, tmp_path):
    plain, graph = made(name)
    model = copy.deepcopy(graph.structure)
    change(model)
    found = problems(Graph(model, graph.weights), plain, tmp_path)
    assert any(expected in problem for problem in found), found


def on_the_other_side(block):
    return dataclasses.replace(block, se_after_activation=not block.se_after_activation)


@pytest.mark.parametrize("which", ["all", "stage2.1"])
@pytest.mark.parametrize(
    ("name", "words"), [("se", "/Relu does not read its SE's product"), ("plus", "/Relu does not read its own Conv")]
)
def test_se_on_the_wrong_side_of_the_relu_is_named(name, words, which, made, tmp_path):
    """The counts are the same on both sides."""
    plain, _ = made(name)
    blocks = tuple(on_the_other_side(b) if which in ("all", b.name) else b for b in plain.architecture.blocks)
    turned = dataclasses.replace(plain.architecture, blocks=blocks)
    graph = onnx_from_plain(plain, structure_from_architecture(turned, None), {})
    assert operation_counts(graph.structure) == expected_counts(plain.architecture)
    found = problems(graph, plain, tmp_path)
    for block in plain.architecture.blocks:
        assert (f"{block.name}{words}" in found) is (which in ("all", block.name))
