"""One planted fault for each rule of INT8 files: each is named, and the file without it passes."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from exporter.onnx_file import write_onnx
from exporter.onnx_graph import Graph
from exporter.quantization.dialect import dialect_problems
from exporter.quantization.form import FORMS, PORTABLE, RTX
from exporter.quantization.qdq import graph_from_quantized
from exporter.quantized_contract import quantized_contract_problems
from tests.quantized_networks import NETWORKS, float_graph, images_of, plain_network, quantized_graph

BLOCK, OTHER, LEFT = "stage2.1", "stage2.0", "stage3.1"
TENSOR = OTHER  # what BLOCK's Conv reads
KEPT = (f"{LEFT}/Conv",)


@pytest.fixture(scope="module")
def made():
    """``made(name, form)``: the architecture, its codes and the typed graph; made once."""
    found = {}

    def make(name, form):
        if (name, form.name) not in found:
            plain = plain_network(name)
            quantized = quantized_graph(float_graph(plain), images_of(plain.architecture), form, KEPT)
            found[name, form.name] = plain.architecture, quantized, graph_from_quantized(quantized)
        return found[name, form.name]

    return make


def problems(graph, architecture, quantized, path):
    write_onnx(graph, path)
    return quantized_contract_problems(path, architecture, quantized)


class File:
    """A file to be spoilt: its structure and its weights."""

    def __init__(self, graph):
        self.structure, self.weights = copy.deepcopy(graph.structure), dict(graph.weights)

    @property
    def nodes(self):
        return self.structure.graph.node

    def node(self, name):
        (node,) = (node for node in self.nodes if node.name == name)
        return node

    def put(self, name, array):
        """A weight in the place of another, or a new one."""
        self.weights[name] = array
        declared = [value for value in self.structure.graph.input if value.name == name]
        for value in declared:
            self.structure.graph.input.remove(value)
        self.structure.graph.input.append(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        )

    def drop(self, *names):
        for name in names:
            self.weights.pop(name)
            (value,) = (value for value in self.structure.graph.input if value.name == name)
            self.structure.graph.input.remove(value)

    def insert_before(self, reader, *nodes):
        place = [node.name for node in self.nodes].index(reader)
        for offset, node in enumerate(nodes):
            self.nodes.insert(place + offset, node)

    def pair(self, reader, index=0, like=TENSOR):
        """A QuantizeLinear and DequantizeLinear in front of what ``reader`` reads in that place."""
        tensor = self.node(reader).input[index]
        operands = [f"{like}/scale", f"{like}/zero_point"]
        self.insert_before(
            reader,
            helper.make_node("QuantizeLinear", [tensor, *operands], ["more/codes"], name="more/QuantizeLinear"),
            helper.make_node("DequantizeLinear", ["more/codes", *operands], ["more"], name="more/DequantizeLinear"),
        )
        self.node(reader).input[index] = "more"

    def graph(self):
        self.structure.graph.ClearField("value_info")
        return Graph(self.structure, self.weights)


def weight(name, change):
    """The fault in which an array is another."""

    def spoil(file):
        file.put(name, np.asarray(change(file.weights[name])).copy())

    return spoil


def both(*changes):
    def spoil(file):
        for change in changes:
            change(file)

    return spoil


def attribute(node, name, value):
    def spoil(file):
        attributes = file.node(node).attribute
        for one in [one for one in attributes if one.name == name]:
            attributes.remove(one)
        if value is not None:
            attributes.append(helper.make_attribute(name, value))

    return spoil


def reads(node, index, tensor):
    def spoil(file):
        assert file.node(node).input[index] != tensor
        file.node(node).input[index] = tensor

    return spoil


def without_input(node, index):
    def spoil(file):
        inputs = list(file.node(node).input)[:index]
        file.node(node).input[:] = inputs

    return spoil


def bit(array):
    """The last bit of the first number turned."""
    changed = array.copy()
    changed.reshape(-1).view(f"u{array.dtype.itemsize}")[0] ^= 1
    return changed


def more_scales(file):
    """A scale for each channel of an activation."""
    channels = file.weights[f"{BLOCK}.weight"].shape[1]
    for part in ("scale", "zero_point"):
        file.put(f"{TENSOR}/{part}", np.full(channels, file.weights[f"{TENSOR}/{part}"]))
    for kind in ("Quantize", "Dequantize"):
        attribute(f"{TENSOR}/{kind}Linear", "axis", 1)(file)


def scales_along(axis):
    """A weight with a scale for each index of another axis."""

    def spoil(file):
        codes = file.weights[f"{BLOCK}.weight"]
        scale = file.weights[f"{BLOCK}.weight/scale"].reshape(-1)[0]
        file.put(f"{BLOCK}.weight/scale", np.full(codes.shape[axis], scale))
        file.put(f"{BLOCK}.weight/zero_point", np.zeros(codes.shape[axis], np.int8))
        attribute(f"{BLOCK}.weight/DequantizeLinear", "axis", None if axis == 1 else axis)(file)

    return spoil


def quantized_bias(dtype):
    def spoil(file):
        bias, scale = f"{BLOCK}.bias", f"{TENSOR}/scale"
        file.put("bias/codes", np.zeros(file.weights[bias].shape, dtype))
        file.insert_before(
            f"{BLOCK}/Conv",
            helper.make_node("DequantizeLinear", ["bias/codes", scale], ["bias/float"], name="bias/DequantizeLinear"),
        )
        file.node(f"{BLOCK}/Conv").input[2] = "bias/float"

    return spoil


def unsigned(file):
    """uint8 codes of an activation, with the zero point 0, as the compiler takes without a word."""
    file.put(f"{TENSOR}/zero_point", np.array(0, np.uint8))


def unsigned_weight(file):
    codes = f"{BLOCK}.weight"
    file.put(codes, file.weights[codes].view(np.uint8))
    file.put(f"{codes}/zero_point", file.weights[f"{codes}/zero_point"].view(np.uint8))


def a_scale_for_the_way_back(file):
    file.put("other/scale", np.asarray(file.weights[f"{TENSOR}/scale"] * 2))
    file.node(f"{TENSOR}/DequantizeLinear").input[1] = "other/scale"


def in_float(part):
    """A layer whose input or weight stays a float."""

    def spoil(file):
        conv = file.node(f"{BLOCK}/Conv")
        if part == "input":
            conv.input[0] = TENSOR
            removed = {f"{TENSOR}/QuantizeLinear", f"{TENSOR}/DequantizeLinear"}
            unused = [f"{TENSOR}/scale", f"{TENSOR}/zero_point"]
        else:
            conv.input[1] = f"{BLOCK}.weight"
            removed = {f"{BLOCK}.weight/DequantizeLinear"}
            unused = [f"{BLOCK}.weight/scale", f"{BLOCK}.weight/zero_point"]
            scale = file.weights[unused[0]]
            codes = file.weights[f"{BLOCK}.weight"]
            file.put(f"{BLOCK}.weight", codes * scale.reshape(-1, 1, 1, 1).astype(scale.dtype))
        for node in [node for node in file.nodes if node.name in removed]:
            file.nodes.remove(node)
        file.drop(*unused)

    return spoil


def kept_in_int8(file):
    """A layer that was to be kept, in INT8 with the scale of another."""
    file.pair(f"{LEFT}/Conv")


def output_pair(file):
    """Codes of the scores."""
    (last,) = file.structure.graph.output
    maker = next(node for node in file.nodes if last.name in node.output)
    maker.output[0] = "scores"
    file.put("last/scale", np.array(1, np.float32))
    operands = ["last/scale", f"{TENSOR}/zero_point"]
    file.nodes.append(helper.make_node("QuantizeLinear", ["scores", *operands], ["scores/codes"], name="last/Quantize"))
    file.nodes.append(
        helper.make_node("DequantizeLinear", ["scores/codes", *operands], [last.name], name="last/Dequantize")
    )


def codes_as_the_output(file):
    """A feature map that is what its reader's codes stand for."""
    kept = {"stage1": "made", "stage1/half": "made"}
    for node in [node for node in file.nodes if node.name != "stage1/Cast"]:
        node.input[:] = [kept.get(name, name) for name in node.input]
        node.output[:] = [kept.get(name, name) for name in node.output]
    dequantize = file.node("stage1/DequantizeLinear")
    casts = [node for node in file.nodes if node.name == "stage1/Cast"]
    for cast in casts:
        file.nodes.remove(cast)
        cast.input[0] = dequantize.output[0]
        file.nodes.append(cast)
    if not casts:
        dequantize.output[0] = "stage1"
        file.node(f"{OTHER}/Conv").input[0] = "stage1"


def qlinear_conv(file):
    conv = file.node(f"{BLOCK}/Conv")
    tensor, codes = f"{TENSOR}/codes", f"{BLOCK}.weight"
    inputs = [
        tensor, f"{TENSOR}/scale", f"{TENSOR}/zero_point", codes, f"{codes}/scale", f"{codes}/zero_point",
        f"{TENSOR}/scale", f"{TENSOR}/zero_point",
    ]  # fmt: skip
    made = helper.make_node("QLinearConv", inputs, [f"{BLOCK}/sum"], name=f"{BLOCK}/QLinearConv")
    made.attribute.extend(conv.attribute)
    operands = [f"{TENSOR}/scale", f"{TENSOR}/zero_point"]
    back = helper.make_node("DequantizeLinear", [f"{BLOCK}/sum", *operands], [f"{BLOCK}/conv"], name="back")
    file.insert_before(f"{BLOCK}/Conv", made, back)
    file.nodes.remove(conv)


def a_cast_inside(file):
    """A ReLU between Casts, in the other type."""
    relu = file.node(f"{BLOCK}/Relu")
    types = (TensorProto.FLOAT16, TensorProto.FLOAT)
    there, back = types if file.weights[f"{BLOCK}.bias"].dtype == np.float32 else types[::-1]
    source, target = relu.input[0], relu.output[0]
    file.insert_before(f"{BLOCK}/Relu", helper.make_node("Cast", [source], ["there"], name="there/Cast", to=there))
    relu.input[0], relu.output[0] = "there", "here"
    index = [node.name for node in file.nodes].index(relu.name)
    file.nodes.insert(index + 1, helper.make_node("Cast", ["here"], [target], name="back/Cast", to=back))


def an_opset_without_float16_scales(file):
    file.structure.opset_import[0].version = 17


def the_input_without_its_cast(file):
    """From opset 23 on, a scale may have another type than what it scales."""
    file.structure.opset_import[0].version = 23
    file.node("input/QuantizeLinear").input[0] = "input"
    file.nodes.remove(file.node("input/Cast"))


def one_more_reader(file):
    """What SE pools are the dequantized values of the block before."""
    file.node(f"{BLOCK}/se/Pool").input[0] = f"{TENSOR}/dequantized"


def renamed_bias(file):
    file.put("other.bias", file.weights[f"{BLOCK}.bias"])
    file.drop(f"{BLOCK}.bias")
    file.node(f"{BLOCK}/Conv").input[2] = "other.bias"


def computed(index):
    """A scale or zero point that is the result of a node."""

    def spoil(file):
        name = file.node(Q).input[index]
        file.insert_before(Q, helper.make_node("Identity", [name], ["same"], name="same/Identity"))
        file.node(Q).input[index] = "same"

    return spoil


def a_relu_of_codes(file):
    """Between Conv and ReLU there is a QuantizeLinear, and the DequantizeLinear comes behind."""
    file.pair(f"{BLOCK}/Relu")
    quantize, dequantize, relu = (
        file.node(name) for name in ("more/QuantizeLinear", "more/DequantizeLinear", f"{BLOCK}/Relu")
    )
    file.nodes.remove(dequantize)
    back = helper.make_node("DequantizeLinear", ["active", *dequantize.input[1:]], [relu.output[0]], name="back")
    relu.input[0], relu.output[0] = quantize.output[0], "active"
    file.nodes.insert([node.name for node in file.nodes].index(relu.name) + 1, back)


def blocks(file):
    """Two scales for each output channel."""
    file.structure.opset_import[0].version = 21
    codes = file.weights[W]
    scale = np.full((len(codes), codes.shape[1] // 6, 3, 3), file.weights[f"{W}/scale"].reshape(-1)[0])
    file.put(f"{W}/scale", scale)
    file.put(f"{W}/zero_point", np.zeros(scale.shape, np.int8))
    attribute(WDQ, "axis", 1)(file)
    attribute(WDQ, "block_size", 6)(file)


def left_over(file):
    file.put("more.weight", np.zeros(3, np.float32))


def a_bias_beyond_half(file):
    file.put(f"{BLOCK}.bias", np.full_like(file.weights[f"{BLOCK}.bias"], np.inf))


def swapped_channels(array):
    return array[[1, 0, *range(2, len(array))]]


def swapped(a, b):
    """Two arrays in each other's place."""

    def spoil(file):
        first, second = file.weights[a], file.weights[b]
        file.put(a, second)
        file.put(b, first)

    return spoil


W, S, Z = f"{BLOCK}.weight", f"{TENSOR}/scale", f"{TENSOR}/zero_point"
Q, DQ, WDQ = f"{TENSOR}/QuantizeLinear", f"{TENSOR}/DequantizeLinear", f"{W}/DequantizeLinear"
NOT_NORMAL = "which is not positive, finite and normal"

IN_BOTH_FORMS = {
    "uint8 codes of an activation": (unsigned, f"{Q} has a uint8 zero point"),
    "uint8 codes of a weight": (unsigned_weight, f"{WDQ} has uint8 codes"),
    "no zero point": (without_input(Q, 2), f"{Q} has no zero point, which is uint8 to ONNX"),
    "no zero point on the way back": (without_input(DQ, 2), f"{DQ} has no scale and zero point of its own"),
    "no zero point of a weight": (without_input(WDQ, 2), f"{WDQ} has no scale and zero point of its own"),
    "a zero point that is not 0": (weight(Z, lambda z: z + np.int8(1)), f"{Q} has a zero point that is not 0"),
    "a zero point of a weight that is not 0": (
        weight(f"{W}/zero_point", lambda z: np.asarray(z + np.int8(3))), f"{WDQ} has a zero point that is not 0",
    ),
    "a scale for each channel of an activation": (more_scales, f"{Q} has 12 scales for an activation"),
    "a weight's scales along axis 1": (scales_along(1), f"{WDQ} has a scale for each index of axis 1 of a weight"),
    "a weight's scales along axis 2": (scales_along(2), f"{WDQ} has a scale for each index of axis 2 of a weight"),
    "an int32 bias": (quantized_bias(np.int32), f"{BLOCK}/Conv has a quantized bias"),
    "int32 codes": (quantized_bias(np.int32), "bias/DequantizeLinear has int32 codes"),
    "an int8 bias": (quantized_bias(np.int8), f"{BLOCK}/Conv has a quantized bias"),
    "Q/DQ between Conv and ReLU": (
        lambda file: file.pair(f"{BLOCK}/Relu"),
        f"more/QuantizeLinear stands between {BLOCK}/Conv and {BLOCK}/Relu, where none belongs", "plain",
    ),
    "Q/DQ in front of SE's product": (
        lambda file: file.pair(f"{BLOCK}/se/Mul"), f"{BLOCK}/se/Mul reads more, which is for INT8 layers alone",
    ),
    "a second pair behind the first": (
        lambda file: file.pair(f"{BLOCK}/Conv"),
        f"{Q} stands between {OTHER}/Relu and {BLOCK}/Conv, where none belongs",
    ),
    "codes of the output": (output_pair, "last/Dequantize stands on the output output, where none belongs"),
    "a scale of 0": (weight(S, lambda s: s * 0), f"{Q} has a scale of 0, {NOT_NORMAL}"),
    "a negative scale": (weight(S, lambda s: -s), NOT_NORMAL),
    "an infinite scale": (weight(S, lambda s: s * np.inf), f"{Q} has a scale of inf, {NOT_NORMAL}"),
    "a scale that is no number": (weight(S, lambda s: s * np.nan), f"{Q} has a scale of nan, {NOT_NORMAL}"),
    "a whole number as a scale": (weight(S, lambda s: np.array(1, np.int8)), f"{Q} has a scale of int8: write a float"),
    "no scale": (without_input(Q, 1), f"{Q} has no scale"),
    "a subnormal scale": (
        weight(f"{W}/scale", lambda s: np.full_like(s, np.finfo(s.dtype).smallest_subnormal * 3)), NOT_NORMAL,
    ),
    "another scale on the way back": (a_scale_for_the_way_back, f"{DQ} has another scale than {Q}"),
    "a layer whose input is a float": (in_float("input"), f"{BLOCK}/Conv is not in INT8: its input is no codes"),
    "a layer whose weight is a float": (in_float("weight"), f"{BLOCK}/Conv is not in INT8: its weight is no codes"),
    "a kept layer in INT8": (kept_in_int8, f"{LEFT}/Conv is in INT8, but was to be kept: asked for"),
    "SE's convolution in INT8": (
        lambda file: file.pair(f"{BLOCK}/se/expand/Conv"), f"{BLOCK}/se/expand/Conv is in INT8, but was to be kept: SE",
    ),
    "a bit of a weight's scale": (weight(f"{W}/scale", bit), f"weight {W}/scale differs from the scale that {BLOCK}"),
    "a bit of an input's scale": (weight(S, bit), f"weight {S} differs from the scale that {BLOCK}/Conv was given"),
    "one code": (weight(W, bit), f"weight {W} differs from the codes that it is made of"),
    "codes of another order": (weight(W, swapped_channels), f"weight {W} differs from the codes that it is made of"),
    "a bit of a bias": (weight(f"{BLOCK}.bias", bit), f"weight {BLOCK}.bias differs from the network's"),
    "an infinite bias": (a_bias_beyond_half, f"weight {BLOCK}.bias differs from the network's"),
    "a bit of a kept weight": (weight(f"{LEFT}.weight", bit), f"weight {LEFT}.weight differs from the network's"),
    "a bit of SE's weight": (
        weight(f"{BLOCK}.se.reduce.weight", bit), f"weight {BLOCK}.se.reduce.weight differs from the network's",
    ),
    "a kept weight in another type": (
        weight(f"{LEFT}.weight", lambda w: w.astype(np.float64)), f"node name: {LEFT}/Conv): W has inconsistent type",
    ),
    "codes of another layer": (
        swapped("stage1.0.weight", "stage1.1.weight"), "weight stage1.0.weight differs from the codes that it is made",
    ),
    "a bias under another name": (renamed_bias, f"weight {BLOCK}.bias is missing"),
    "a scale that is computed": (computed(1), f"{Q} computes its scale"),
    "a zero point that is computed": (computed(2), f"{Q} computes its zero point"),
    "a weight that nothing reads": (left_over, "weight more.weight belongs to nothing"),
    "a QLinearConv": (qlinear_conv, f"{BLOCK}/QLinearConv is QLinearConv, which the compiler refuses"),
    "the input of another block": (
        reads("stage1.1/Conv", 0, "stage0.0/dequantized"), "stage1.1/Conv does not read stage1.0",
    ),
    "the weight of another block": (
        reads(f"{BLOCK}/Conv", 1, f"{OTHER}.weight/dequantized"), f"{BLOCK}/Conv does not read its own weight and bias",
    ),
    "the bias of another block": (
        reads(f"{BLOCK}/Conv", 2, f"{OTHER}.bias"), f"{BLOCK}/Conv does not read its own weight and bias",
    ),
    "another stride": (
        attribute(f"{BLOCK}/Conv", "strides", [2, 2]), f"{BLOCK}/Conv has (strides, pads, group, dilations)",
    ),
    "a reader of dequantized values that is no layer": (
        one_more_reader, f"{BLOCK}/se/Pool reads {TENSOR}/dequantized, which is for INT8 layers alone",
    ),
    "a ReLU of the codes themselves": (
        a_relu_of_codes, f"{BLOCK}/Relu reads the codes more/codes themselves", "plain",
    ),
    "a scale for each block of a weight": (blocks, f"{WDQ} has a scale for each block of numbers"),
    "a ReLU in another type": (a_cast_inside, "there/Cast is a Cast where none belongs"),
}  # fmt: skip
IN_FLOAT = {
    "an operation in the place of a Conv": (qlinear_conv, "23 Conv where 24 belong"),
    "an output that is what codes stand for": (
        codes_as_the_output, "stage1/DequantizeLinear stands on the output stage1, where none belongs", "features",
    ),
    "a float16 scale": (weight(S, np.float16), f"{Q} has a float16 scale, for which opset 17 is too old"),
}  # fmt: skip
IN_HALF = {
    "an output that is what codes stand for": (
        codes_as_the_output, "stage1/Cast reads stage1/dequantized, which is for INT8 layers alone", "features",
    ),
    "a float32 scale": (weight(S, np.float32), f"node name: {Q}): y_scale has inconsistent type"),
    "an opset without float16 scales": (
        an_opset_without_float16_scales, "has a float16 scale, for which opset 17 is too old",
    ),
    "codes of the float32 input": (the_input_without_its_cast, "input/QuantizeLinear stands where a Cast belongs"),
}  # fmt: skip
FAULTS = [
    pytest.param(form, change, expected, *(network or ["se"]), id=f"{name}, {form.name}")
    for form, own in ((PORTABLE, IN_FLOAT), (RTX, IN_HALF))
    for name, (change, expected, *network) in {**IN_BOTH_FORMS, **own}.items()
]


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_clean_file_passes(name, form, made, tmp_path):
    architecture, quantized, graph = made(name, form)
    assert problems(graph, architecture, quantized, tmp_path / "x.onnx") == []
    assert dialect_problems(graph) == []
    assert problems(File(graph).graph(), architecture, quantized, tmp_path / "x.onnx") == []


@pytest.mark.parametrize(("form", "change", "expected", "name"), FAULTS)
def test_a_planted_fault_is_named(form, change, expected, name, made, tmp_path):
    architecture, quantized, graph = made(name, form)
    file = File(graph)
    change(file)
    found = problems(file.graph(), architecture, quantized, tmp_path / "x.onnx")
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
def test_no_bit_of_any_array_may_change(form, made, tmp_path):
    architecture, quantized, graph = made("plus", form)
    for name in graph.weights:
        file = File(graph)
        weight(name, bit)(file)
        found = problems(file.graph(), architecture, quantized, tmp_path / "x.onnx")
        assert any(name in problem or "zero point" in problem or "scale" in problem for problem in found), name


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), form=st.sampled_from(FORMS), name=st.sampled_from(["plus", "features", "mobile"]))
def test_no_node_may_read_anything_else(data, form, name, made, tmp_path):
    architecture, quantized, graph = made(name, form)
    file = File(graph)
    node = data.draw(st.sampled_from(list(file.nodes)), "node")
    index = data.draw(st.integers(0, len(node.input) - 1), "place")
    tensors = [value for one in file.nodes for value in (*one.input, *one.output)]
    other = data.draw(st.sampled_from(sorted(set(tensors))), "tensor")
    before = node.input[index]
    equal = [file.weights[one].tobytes() for one in (before, other) if one in file.weights]
    assume(before != other and (len(equal) < 2 or equal[0] != equal[1]))  # zero points are alike
    node.input[index] = other
    assert problems(file.graph(), architecture, quantized, tmp_path / "x.onnx") != []


def test_a_number_that_the_form_does_not_hold_is_named(made, tmp_path):
    """Numbers that were to be written, and are rounded or infinite in half."""
    architecture, quantized, _ = made("se", RTX)
    layer = quantized.layers[f"{BLOCK}/Conv"]
    between = dataclasses.replace(layer, input_scale=layer.input_scale * (1 + 2**-14))
    weight = f"{LEFT}.weight"
    large = {**quantized.graph.weights, weight: quantized.graph.weights[weight] * np.float32(1e7)}
    changed = dataclasses.replace(
        quantized,
        layers={**quantized.layers, f"{BLOCK}/Conv": between},
        graph=Graph(quantized.graph.structure, large),
    )
    found = problems(graph_from_quantized(changed), architecture, changed, tmp_path / "x.onnx")
    assert len(found) == 2
    assert f"{BLOCK}/Conv's input scale {between.input_scale!r} is no number of float16" in found
    assert any(problem.startswith(f"weight {weight} reaches") and "beyond float16" in problem for problem in found)


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x08\x08"])
def test_what_is_no_onnx_file_is_one_problem(content, made, tmp_path):
    architecture, quantized, _ = made("se", PORTABLE)
    (tmp_path / "x.onnx").write_bytes(content)
    (problem,) = quantized_contract_problems(tmp_path / "x.onnx", architecture, quantized)
    assert "not a whole ONNX file" in problem


@pytest.mark.parametrize(("ours", "theirs"), [(PORTABLE, RTX), (RTX, PORTABLE)], ids=["rtx", "portable"])
def test_the_file_of_one_form_is_not_that_of_the_other(ours, theirs, made, tmp_path):
    architecture, quantized, _ = made("plus", ours)
    assert problems(made("plus", theirs)[2], architecture, quantized, tmp_path / "x.onnx") != []


@pytest.mark.parametrize("name", ["plain", "grouped"])
def test_the_file_of_one_network_is_not_that_of_another(name, made, tmp_path):
    architecture, quantized, _ = made("plus", PORTABLE)
    assert problems(made(name, PORTABLE)[2], architecture, quantized, tmp_path / "x.onnx") != []


# --- the dialect alone


def test_a_float_weight_behind_a_pair_is_in_the_dialect(made):
    """As other tools write it: the compiler makes the codes."""
    _, quantized, graph = made("plain", PORTABLE)
    file = File(graph)
    operands = [f"{W}/scale", f"{W}/zero_point"]
    file.put(W, quantized.graph.weights[W])
    file.insert_before(
        WDQ, helper.make_node("QuantizeLinear", [W, *operands], ["weight/codes"], name="weight/Quantize", axis=0)
    )
    file.node(WDQ).input[0] = "weight/codes"
    assert dialect_problems(file.graph()) == []
    attribute("weight/Quantize", "axis", 1)(file)
    (problem,) = dialect_problems(file.graph())
    assert problem == "weight/Quantize has a scale for each index of axis 1 of a weight: scale axis 0"


def test_where_pairs_stand_is_no_matter_of_the_dialect(made):
    file = File(made("plain", PORTABLE)[2])
    file.pair(f"{BLOCK}/Relu")
    assert dialect_problems(file.graph()) == []


OPERATIONS = st.sampled_from(["QuantizeLinear", "DequantizeLinear", "Conv", "Relu", "QLinearConv", ""])
TENSORS = st.sampled_from(["x", "y", "codes", "scale", "scales", "zero_point", "unsigned", "nowhere", ""])
ARRAYS = {
    "codes": np.ones((2, 2, 1, 1), np.int8),
    "scale": np.array(0.5, np.float32),
    "scales": np.array([0.5, np.nan], np.float16),
    "zero_point": np.array(0, np.int8),
    "unsigned": np.array(7, np.uint8),
}


@settings(max_examples=300, deadline=None)
@given(
    nodes=st.lists(
        st.tuples(OPERATIONS, st.lists(TENSORS, max_size=4), st.lists(TENSORS, max_size=2), st.integers(-3, 3)),
        max_size=5,
    )
)
def test_whatever_stands_in_a_foreign_graph_is_one_line_each(nodes):
    """Also circles, nodes without inputs or outputs, and operands of any type."""
    made = [helper.make_node(kind, inputs, outputs, axis=axis) for kind, inputs, outputs, axis in nodes]
    model = helper.make_model(helper.make_graph(made, "foreign", [], []), opset_imports=[helper.make_opsetid("", 17)])
    found = dialect_problems(Graph(model, ARRAYS))
    assert all(problem and "\n" not in problem for problem in found)
    wrong = {"unsigned", "scales", ""}
    for kind, inputs, *_ in nodes:
        if kind == "QuantizeLinear" and (len(inputs) < 3 or wrong & set(inputs[1:3])):
            assert found
