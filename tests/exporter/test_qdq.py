"""The Q/DQ graph computes what its codes compute, holds the codes that it was given, and has each pair in its place."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from exporter.checkpoint import checkpoint_from_path
from exporter.contract import expected_counts
from exporter.errors import VerificationFailed
from exporter.onnx_file import graph_from_file, write_onnx
from exporter.onnx_graph import Graph
from exporter.onnxruntime_cpu import session_from_file, session_from_graph
from exporter.plain import plain_from_repvgg
from exporter.quantization.form import FORMS, PORTABLE, RTX
from exporter.quantization.qdq import graph_from_quantized
from exporter.quantization.quantized import Quantized, QuantizedLayer
from exporter.repvgg import network_from_checkpoint
from exporter.request import Request
from tests.conftest import EXAMPLES
from tests.quantized_networks import (
    NETWORKS,
    SIZE,
    codes_answer,
    exact,
    float_graph,
    half,
    images_of,
    plain_network,
    quantized_graph,
    sqnr_db,
    sqnr_of_images,
)

CHECKPOINT = EXAMPLES / "fashion.pt"
KEPT = ("stage0.0/Conv", "stage2.1/Conv", "head/Gemm")
TYPES = {PORTABLE.name: TensorProto.FLOAT, RTX.name: TensorProto.FLOAT16}
forms = pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])


@pytest.fixture(scope="module")
def made():
    """``made(name, form, kept, size)``: the architecture, its images, the codes and the typed graph; made once."""
    networks, found = {}, {}

    def make(name, form, kept=(), size=None):
        if name not in networks:
            networks[name] = plain_network(name)
        plain = networks[name]
        if (name, form.name, kept, size) not in found:
            images = images_of(plain.architecture)
            quantized = quantized_graph(float_graph(plain, size), images, form, kept)
            found[name, form.name, kept, size] = (
                plain.architecture, images, quantized, graph_from_quantized(quantized),
            )  # fmt: skip
        return found[name, form.name, kept, size]

    return make


def counts(graph):
    return collections.Counter(node.op_type for node in graph.structure.graph.node)


def node_of(graph, name):
    (node,) = (node for node in graph.structure.graph.node if node.name == name)
    return node


def types_of(graph):
    """The element type of every tensor in the graph."""
    inferred = onnx.shape_inference.infer_shapes(graph.structure, strict_mode=True).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}


# --- what it computes


@pytest.mark.parametrize("kept", [(), KEPT], ids=["all", "some kept"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_portable_graph_computes_what_its_codes_compute(name, kept, made):
    """But for float32 in the place of float64.

    Of four images one may be far off: a value that lies between two codes to seven digits becomes either.
    """
    architecture, images, quantized, graph = made(name, PORTABLE, kept)
    truth = codes_answer(quantized, architecture, images)
    assert sqnr_of_images(truth, session_from_graph(graph).run(images))[1] > 120


@pytest.mark.parametrize("kept", [(), KEPT], ids=["all", "some kept"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_half_graph_computes_what_its_codes_compute_rounded_where_onnx_runtime_rounds(name, kept, made):
    """ONNX Runtime's CPU provider rounds to half what codes are made of, and codes of weights times their scale.

    Everything else it computes in float32, and takes out the rounding in between.
    """
    architecture, images, quantized, graph = made(name, RTX, kept)
    truth = codes_answer(quantized, architecture, images, reads=half, weighs=half)
    assert sqnr_of_images(truth, session_from_graph(graph).run(images))[1] > 60


def test_without_that_rounding_the_half_graph_is_farther_from_its_codes(made):
    architecture, images, quantized, graph = made("plain", RTX)
    found = session_from_graph(graph).run(images)
    truths = [codes_answer(quantized, architecture, images, reads, half) for reads in (half, exact)]
    rounded, unrounded = (sqnr_db(truth, found) for truth in truths)
    assert rounded > 100 > unrounded


@forms
def test_the_comparison_sees_one_code_and_one_scale(form, made):
    """The twin of the two above: one step in one code of a weight, and a thousandth of one scale."""
    architecture, images, quantized, graph = made("plain", form)
    reference = session_from_graph(graph).run(images)
    layer = quantized.layers["stage1.1/Conv"]
    weight = layer.weight.copy()
    weight[0, 0, 1, 1] += 1 if weight[0, 0, 1, 1] < 127 else -1
    for changed in (
        dataclasses.replace(layer, weight=weight),
        dataclasses.replace(layer, input_scale=layer.input_scale * 1.001),
    ):
        other = dataclasses.replace(quantized, layers={**quantized.layers, "stage1.1/Conv": changed})
        assert sqnr_db(codes_answer(other, architecture, images, reads=half, weighs=half), reference) < 80


@forms
@pytest.mark.parametrize("name", ["plain", "plus"])
def test_the_file_computes_what_the_graph_computes(name, form, made, tmp_path):
    _, images, _, graph = made(name, form)
    write_onnx(graph, tmp_path / "x.onnx")
    right = session_from_graph(graph).run(images)["output"]
    assert np.array_equal(session_from_graph(graph_from_file(tmp_path / "x.onnx")).run(images)["output"], right)
    as_anybody_runs_it = session_from_file(tmp_path / "x.onnx").run(images)["output"]
    assert sqnr_db({"output": right}, {"output": as_anybody_runs_it}) > 25  # ONNX Runtime's int8 kernels


@forms
def test_a_graph_of_any_size_takes_any_size(form, made):
    architecture, _, quantized, graph = made("se", form)
    images = np.random.default_rng(3).standard_normal((2, 3, 27, 40)).astype(np.float32)
    truth = codes_answer(
        quantized, architecture, images, half if form is RTX else exact, half if form is RTX else exact
    )
    assert sqnr_db(truth, session_from_graph(graph).run(images)) > 50
    fixed = made("se", form, (), SIZE)[3]
    with pytest.raises(VerificationFailed, match="ONNX Runtime refuses"):
        session_from_graph(fixed).run(images)


@forms
def test_a_trained_network_in_int8_computes_what_its_codes_compute(form):
    network = network_from_checkpoint(
        checkpoint_from_path(CHECKPOINT, None), Request(path=CHECKPOINT, out=CHECKPOINT.parent, size=(28, 28))
    )
    with np.load(EXAMPLES / "fashion_calibration.npz") as data:
        images = (data["images"][:32].reshape(-1, 1, 28, 28).astype(np.float32) / 255 - 0.5) / 0.5
    plain = plain_from_repvgg(network.architecture, network.tensors, images[:1])
    graph = float_graph(plain)
    quantized = quantized_graph(graph, images, form)
    found = session_from_graph(graph_from_quantized(quantized)).run(images)
    rounding = half if form is RTX else exact
    assert sqnr_db(codes_answer(quantized, plain.architecture, images, rounding, rounding), found) > 50


# --- what it holds


@forms
@pytest.mark.parametrize("name", NETWORKS)
def test_codes_scales_and_biases_are_those_given_bit_for_bit(name, form, made):
    _, _, quantized, graph = made(name, form)
    for layer_name, layer in quantized.layers.items():
        tensor, weight, bias = node_of(quantized.graph, layer_name).input
        found = {key: graph.weights[f"{key}/{part}"] for key in (tensor, weight) for part in ("scale",)}
        assert graph.weights[weight].dtype == np.int8
        assert np.array_equal(graph.weights[weight], layer.weight)
        assert graph.weights[bias].dtype == form.dtype
        assert np.array_equal(graph.weights[bias].astype(np.float32), layer.bias)
        assert found[tensor].shape == ()
        assert float(found[tensor]) == layer.input_scale
        assert found[weight].shape == ((len(layer.weight),) if form.per_channel else ())
        assert np.array_equal(found[weight], layer.weight_scale)
        assert {array.dtype for array in found.values()} == {form.dtype}
        for key in (tensor, weight):
            zero_point = graph.weights[f"{key}/zero_point"]
            assert zero_point.dtype == np.int8
            assert zero_point.shape == found[key].shape
            assert not zero_point.any()


@forms
def test_what_is_kept_has_the_weights_of_the_float_graph_in_the_forms_type(form, made):
    _, _, quantized, graph = made("plus", form, KEPT)
    assert {*KEPT, "stage1.0/se/expand/Conv"} <= quantized.kept.keys()
    for name in quantized.kept:
        for weight in node_of(quantized.graph, name).input[1:]:
            assert graph.weights[weight].dtype == form.dtype
            assert np.array_equal(graph.weights[weight], quantized.graph.weights[weight].astype(form.dtype))


@forms
def test_the_float_graph_is_left_as_it_was(form):
    plain = plain_network("se")
    graph = float_graph(plain)
    before = graph.structure.SerializeToString(), {name: array.copy() for name, array in graph.weights.items()}
    graph_from_quantized(quantized_graph(graph, images_of(plain.architecture), form))
    assert graph.structure.SerializeToString() == before[0]
    assert {name: array.tobytes() for name, array in graph.weights.items()} == {
        name: array.tobytes() for name, array in before[1].items()
    }


# --- how it is built


@forms
@pytest.mark.parametrize("kept", [(), KEPT], ids=["all", "some kept"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_pair_for_each_input_and_half_a_pair_for_each_weight(name, kept, form, made):
    architecture, _, quantized, graph = made(name, form, kept)
    layers, casts = len(quantized.layers), 0 if form is PORTABLE else 1 + len(architecture.outputs)
    blocks = len(architecture.blocks) + (architecture.classes is not None)
    assert layers == blocks - sum(one in quantized.kept for one in kept)
    expected = collections.Counter(expected_counts(architecture))
    expected.update(QuantizeLinear=layers, DequantizeLinear=2 * layers, Cast=casts)
    assert counts(graph) == +expected


@forms
@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_stand_in_front_of_layers_and_read_what_the_float_graph_reads_there(name, form, made):
    architecture, _, quantized, graph = made(name, form)
    half_names = {"input", *(output.name for output in architecture.outputs)} if form is RTX else set()
    for layer in quantized.layers:
        tensor, weight, bias = node_of(quantized.graph, layer).input
        quantize, dequantize = (node_of(graph, f"{tensor}/{kind}Linear") for kind in ("Quantize", "Dequantize"))
        constant = node_of(graph, f"{weight}/DequantizeLinear")
        assert list(quantize.input) == [
            f"{tensor}/half" if tensor in half_names else tensor, f"{tensor}/scale", f"{tensor}/zero_point",
        ]  # fmt: skip
        assert list(dequantize.input) == [quantize.output[0], f"{tensor}/scale", f"{tensor}/zero_point"]
        assert list(constant.input) == [weight, f"{weight}/scale", f"{weight}/zero_point"]
        assert list(node_of(graph, layer).input) == [dequantize.output[0], constant.output[0], bias]
        axes = [helper.get_attribute_value(one) for one in constant.attribute if one.name == "axis"]
        assert axes == ([0] if form.per_channel else [])


@forms
@pytest.mark.parametrize("name", NETWORKS)
def test_everything_but_codes_and_what_crosses_the_border_has_the_forms_type(name, form, made):
    architecture, _, _, graph = made(name, form)
    border = {"input", *(output.name for output in architecture.outputs)}
    codes = {node.output[0] for node in graph.structure.graph.node if node.op_type == "QuantizeLinear"}
    codes |= {name for name, array in graph.weights.items() if array.dtype == np.int8}
    for tensor, kind in types_of(graph).items():
        wanted = TensorProto.FLOAT if tensor in border else TensorProto.INT8 if tensor in codes else TYPES[form.name]
        assert kind == wanted, tensor
    versions = {entry.domain: entry.version for entry in graph.structure.opset_import}
    assert versions[""] == (19 if form is RTX else 17)


def test_one_pair_serves_all_that_read_a_tensor_with_one_scale_and_another_scale_has_its_own():
    """x is read by three convolutions, two of them with the same scale; no RepVGG has such, but a Quantized may."""
    arrays = {f"{name}.{part}": np.ones(shape, np.float32) for name in "abc" for part, shape in
              (("weight", (2, 2, 1, 1)), ("bias", (2,)))}  # fmt: skip
    nodes = [helper.make_node("Conv", ["x", f"{n}.weight", f"{n}.bias"], [f"{n}/conv"], name=n) for n in "abc"]
    value = helper.make_tensor_value_info
    declared = [value(name, TensorProto.FLOAT, array.shape) for name, array in arrays.items()]
    model = helper.make_model(
        helper.make_graph(
            nodes, "three", [value("x", TensorProto.FLOAT, ["N", 2, 3, 3]), *declared],
            [value(f"{n}/conv", TensorProto.FLOAT, ["N", 2, 3, 3]) for n in "abc"],
        ),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    layers = {
        name: QuantizedLayer(scale, np.ones((2, 2, 1, 1), np.int8), np.ones(2, np.float32), np.zeros(2, np.float32))
        for name, scale in (("a", 0.5), ("b", 0.25), ("c", 0.5))
    }
    graph = graph_from_quantized(Quantized(PORTABLE, Graph(model, arrays), layers, {}))
    assert counts(graph)["QuantizeLinear"] == 2
    a, b, c = (node_of(graph, name).input[0] for name in "abc")
    assert a == c != b
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        graph.structure.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.full((1, 2, 3, 3), 0.3, np.float32)  # 0.5 and 0.25: two channels of one code each
    answers = session.run([f"{n}/conv" for n in "abc"], {"x": x, **graph.weights})
    assert [float(answer[0, 0, 0, 0]) for answer in answers] == [1.0, 0.5, 1.0]


NUMBERS = st.integers(-(2**11) + 1, 2**11 - 1)


@settings(max_examples=50, deadline=None)
@given(
    codes=st.lists(st.integers(-127, 127), min_size=4, max_size=4),
    exponent=st.integers(-10, 4),
    bias=st.lists(NUMBERS, min_size=2, max_size=2),
    pixels=st.lists(st.integers(-300, 300), min_size=2, max_size=2),
    form=st.sampled_from(FORMS),
)
def test_a_layer_of_whole_numbers_is_exact_in_both_forms(codes, exponent, bias, pixels, form):
    """Scales that are powers of two make every step exact: the sum of products of clipped codes, and the bias.

    In half, too: ONNX Runtime does not round what is cast to float32.
    """
    weight, scale = np.array(codes, np.int8).reshape(2, 2, 1, 1), 2.0**exponent
    shape = (2,) if form.per_channel else ()
    layer = QuantizedLayer(1.0, weight, np.full(shape, scale, form.dtype), np.array(bias, np.float32))
    value = helper.make_tensor_value_info
    arrays = {"weight": np.zeros((2, 2, 1, 1), np.float32), "bias": np.zeros(2, np.float32)}
    declared = [value(name, TensorProto.FLOAT, array.shape) for name, array in arrays.items()]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Conv", ["input", "weight", "bias"], ["output"], name="a")],
            "one", [value("input", TensorProto.FLOAT, ["N", 2, 1, 1]), *declared],
            [value("output", TensorProto.FLOAT, ["N", 2, 1, 1])],
        ),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    graph = graph_from_quantized(Quantized(form, Graph(model, arrays), {"a": layer}, {}))
    found = session_from_graph(graph).run(np.array(pixels, np.float32).reshape(1, 2, 1, 1))["output"]
    clipped = np.clip(pixels, -128, 127)
    expected = weight[:, :, 0, 0].astype(np.int64) @ clipped * scale + bias
    assert np.array_equal(found[0, :, 0, 0], expected.astype(np.float32))
