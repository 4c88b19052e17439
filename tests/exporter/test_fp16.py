"""The float16 rewrite: its weights, its Casts, the twin that shows rounding and overflow, and what stays in float32."""

from __future__ import annotations

import dataclasses
import itertools
import struct

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from exporter.onnx_graph import Graph
from exporter.precisions import PRECISIONS, fp16
from exporter.precisions.fp16 import FP16, explicit_cast_twin, half_from_float
from exporter.precisions.rescaling import rescaled

CHANNELS, MIDDLE, CLASSES, SIZE = 2, 3, 4, 4


def two_blocks(**weights):
    """Conv, ReLU, Conv with stride 2, ReLU, mean, Gemm on (N, 2, 4, 4), with dyadic weights unless others are given."""
    generator = np.random.default_rng(5)
    usual = {
        "a.weight": generator.integers(-255, 256, (MIDDLE, CHANNELS, 3, 3)) / 256,
        "a.bias": generator.integers(-64, 65, MIDDLE) / 64,
        "b.weight": generator.integers(-2, 3, (MIDDLE, MIDDLE, 3, 3)) / 2,
        "b.bias": generator.integers(-64, 65, MIDDLE) / 64,
        "head.weight": generator.integers(-4, 5, (CLASSES, MIDDLE)) / 4,
        "head.bias": generator.integers(-64, 65, CLASSES) / 64,
    }
    arrays = {name: array.astype(np.float32) for name, array in {**usual, **weights}.items()}
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["input", "a.weight", "a.bias"], ["a/conv"], "a/Conv", strides=[1, 1], **conv),
        helper.make_node("Relu", ["a/conv"], ["a"], "a/Relu"),
        helper.make_node("Conv", ["a", "b.weight", "b.bias"], ["b/conv"], "b/Conv", strides=[2, 2], **conv),
        helper.make_node("Relu", ["b/conv"], ["b"], "b/Relu"),
        helper.make_node("GlobalAveragePool", ["b"], ["head/pooled"], "head/Pool"),
        helper.make_node("Flatten", ["head/pooled"], ["head/features"], "head/Flatten", axis=1),
        helper.make_node("Gemm", ["head/features", "head.weight", "head.bias"], ["output"], "head/Gemm", transB=1),
    ]
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", CHANNELS, SIZE, SIZE])
    scores = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", CLASSES])
    declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "two blocks", [image, *declared], [scores])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return Graph(model, arrays)


def images(count=3):
    """Sixteenths between -4 and 4, exact in float16."""
    generator = np.random.default_rng(7)
    return (generator.integers(-64, 65, (count, CHANNELS, SIZE, SIZE)) / 16).astype(np.float32)


def run(graph, x, level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL):
    """The graph's outputs from ONNX Runtime's CPU provider."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    model = graph.structure.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(["output"], {"input": x, **graph.weights})[0]


def rounded(x):
    """To float16 and back; beyond its range, infinity."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float64)


def by_hand(graph, x, after_each=rounded):
    """The two blocks in float64, with ``after_each`` applied to the input, the weights and every result."""
    w = {name: after_each(array.astype(np.float64)) for name, array in graph.weights.items()}
    x = after_each(x.astype(np.float64))
    for block, stride in (("a", 1), ("b", 2)):
        x = after_each(convolved(x, w[f"{block}.weight"], w[f"{block}.bias"], stride))
        x = after_each(np.maximum(x, 0))
    x = after_each(x.mean(axis=(2, 3)))
    with np.errstate(invalid="ignore"):
        return after_each(x @ w["head.weight"].T + w["head.bias"])


def convolved(x, weight, bias, stride):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    extent = (x.shape[2] - 1) // stride + 1
    result = np.zeros((len(x), len(weight), extent, extent))
    for row in range(extent):
        for column in range(extent):
            window = padded[:, :, row * stride : row * stride + 3, column * stride : column * stride + 3]
            result[:, :, row, column] = np.einsum("nchw,ochw->no", window, weight) + bias
    return result


def operations(graph):
    return [node.op_type for node in graph.structure.graph.node]


def types(graph):
    """The element type of every tensor in the graph."""
    inferred = onnx.shape_inference.infer_shapes(graph.structure, strict_mode=True).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}


FLOATS = st.floats(-65504, 65504, width=32)


@settings(max_examples=200, deadline=None)
@given(values=st.lists(FLOATS, min_size=MIDDLE, max_size=MIDDLE))
def test_weights_are_the_ieee_rounding_of_the_float32_ones_bit_for_bit(values):
    """``struct`` rounds a double to the nearest half, ties to even, by its own code."""
    graph = half_from_float(two_blocks(**{"a.bias": np.array(values, np.float32)}), {}).graph
    assert graph.weights["a.bias"].tobytes() == struct.pack(f"<{MIDDLE}e", *np.array(values, np.float32).tolist())


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1 + 2**-11, 0x3C00),  # halfway, to the even one below
        (1 + 3 * 2**-11, 0x3C02),  # halfway, to the even one above
        (1 + 2**-11 + 2**-20, 0x3C01),
        (65504.0, 0x7BFF),
        (2.0**-24, 0x0001),  # the smallest
        (2.0**-25, 0x0000),  # halfway to zero
        (-(2.0**-26), 0x8000),  # the sign stays
        (-0.0, 0x8000),
    ],
)
def test_weights_round_to_even_and_keep_their_sign(value, bits):
    graph = half_from_float(two_blocks(**{"a.bias": np.array([value, 0, 0], np.float32)}), {}).graph
    assert graph.weights["a.bias"].view(np.uint16)[0] == bits


def test_every_weight_is_half_and_the_float32_graph_is_left_alone():
    graph = two_blocks()
    before = {name: array.copy() for name, array in graph.weights.items()}
    structure = graph.structure.SerializeToString()
    rewritten = half_from_float(graph, {})
    assert rewritten.kept == {}
    assert rewritten.graph.weights.keys() == before.keys()
    for name, array in rewritten.graph.weights.items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, before[name].astype(np.float16))
        np.testing.assert_array_equal(graph.weights[name], before[name])
    assert graph.structure.SerializeToString() == structure


def test_casts_stand_at_the_two_ends_alone_where_nothing_is_kept():
    graph = half_from_float(two_blocks(), {}).graph
    assert operations(graph) == ["Cast", *operations(two_blocks()), "Cast"]
    first, last = graph.structure.graph.node[0], graph.structure.graph.node[-1]
    assert list(first.input) == ["input"]
    assert list(last.output) == ["output"]
    inside = {name: kind for name, kind in types(graph).items() if name not in ("input", "output")}
    assert set(inside.values()) == {TensorProto.FLOAT16}
    assert (types(graph)["input"], types(graph)["output"]) == (TensorProto.FLOAT, TensorProto.FLOAT)


def test_nodes_keep_their_names_so_that_the_audit_finds_them():
    names = [node.name for node in two_blocks().structure.graph.node]
    rewritten = [node.name for node in half_from_float(two_blocks(), {}).graph.structure.graph.node]
    assert [name for name in rewritten if not name.endswith("/Cast")] == names
    assert len(set(rewritten)) == len(rewritten)


# --- the twin


def test_the_twin_rounds_after_every_operation_as_float16_does():
    """All sums are exact in float32 (dyadic numbers), so every bit is determined, whatever the order of summation."""
    graph, x = two_blocks(), images()
    twin = run(explicit_cast_twin(half_from_float(graph, {}).graph), x)
    np.testing.assert_array_equal(twin, by_hand(graph, x))
    np.testing.assert_array_equal(run(graph, x), by_hand(graph, x, after_each=lambda value: value))
    assert (twin != run(graph, x)).any()


def test_the_twin_rounds_inputs_and_weights_that_float16_does_not_hold():
    generator = np.random.default_rng(11)
    graph = two_blocks(**{"a.weight": generator.standard_normal((MIDDLE, CHANNELS, 3, 3))})
    x = generator.standard_normal((3, CHANNELS, SIZE, SIZE)).astype(np.float32)
    twin = run(explicit_cast_twin(half_from_float(graph, {}).graph), x)
    np.testing.assert_allclose(twin, by_hand(graph, x), rtol=0, atol=2**-11 * np.abs(twin).max())
    exact = by_hand(graph, x, after_each=lambda value: value)
    assert np.abs(twin - exact).max() > 0


@pytest.mark.parametrize(("step", "left_out"), [("a", {7, 8}), ("b", {9, 10}), ("head/pooled", {11}), ("output", {12})])
def test_rounding_left_out_at_any_one_step_would_be_seen(step, left_out):
    """The numbers above are sensitive: ``by_hand`` without that one step's rounding gives another answer."""
    graph, x, calls = two_blocks(), images(50), itertools.count()
    without = by_hand(graph, x, after_each=lambda value: value if next(calls) in left_out else rounded(value))
    assert (without != by_hand(graph, x)).any(), step


def huge():
    """A graph whose first block reaches 180,000 and whose second brings it down again; all weights fit float16."""
    first = np.zeros((MIDDLE, CHANNELS, 3, 3))
    first[:, :, 1, 1] = 45_000.0
    return two_blocks(
        **{"a.weight": first, "a.bias": np.zeros(MIDDLE), "b.weight": np.full((MIDDLE, MIDDLE, 3, 3), 2**-12)}
    )


def ones(value=2.0):
    return np.full((1, CHANNELS, SIZE, SIZE), value, np.float32)


def test_the_twin_turns_an_activation_of_180_000_into_infinity():
    typed = half_from_float(huge(), {}).graph
    assert not np.isfinite(by_hand(huge(), ones())).any()
    assert not np.isfinite(run(explicit_cast_twin(typed), ones())).any()
    assert np.isfinite(run(explicit_cast_twin(typed), ones(0.5))).all()  # 45,000 still fits


@pytest.mark.parametrize(
    "level",
    [onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL],
    ids=["optimizations off", "on"],
)
def test_onnx_runtime_does_not_notice_the_overflow_in_the_typed_graph_itself_which_is_why_there_is_a_twin(level):
    assert np.isfinite(run(half_from_float(huge(), {}).graph, ones(), level)).all()


def test_the_twin_takes_and_gives_what_the_typed_graph_does():
    typed = half_from_float(two_blocks(), {}).graph
    twin = explicit_cast_twin(typed)
    onnx.checker.check_model(twin.structure, full_check=True)
    assert twin.weights is typed.weights
    for name in ("input", "output"):
        assert types(twin)[name] == TensorProto.FLOAT
    assert operations(twin).count("Conv") == 2


# --- what stays in float32


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("a.weight", 65505.0, True),
        ("a.weight", -65505.0, True),
        ("b.weight", 1e9, True),
        ("b.bias", -70000.0, True),
        ("head.weight", 70000.0, True),
        ("a.weight", 65504.0, False),
        ("a.weight", -65504.0, False),
    ],
)
def test_a_node_whose_weight_is_beyond_half_is_named_and_kept(name, value, kept):
    weight = two_blocks().weights[name].copy()
    weight.reshape(-1)[1] = value
    rewritten = half_from_float(two_blocks(**{name: weight}), {})
    owner = {"a": "a/Conv", "b": "b/Conv", "head": "head/Gemm"}[name.partition(".")[0]]
    assert rewritten.kept.get(owner) == (f"weight {name} reaches {abs(value):.4g}" if kept else None)
    dtypes = {other: array.dtype for other, array in rewritten.graph.weights.items()}
    in_float32 = {other for other, dtype in dtypes.items() if dtype == np.float32}
    assert in_float32 == ({f"{owner.partition('/')[0]}.{kind}" for kind in ("weight", "bias")} if kept else set())
    onnx.checker.check_model(rewritten.graph.structure, full_check=True)


PEAK = np.full(MIDDLE, 180_000.0)


@pytest.fixture
def unscaled(monkeypatch):
    """Nothing is rescaled, so that everything beyond half must be kept."""
    monkeypatch.setattr(
        fp16, "rescaled", lambda graph, peaks: dataclasses.replace(rescaled(graph, {}), peaks=dict(peaks))
    )


@pytest.mark.usefixtures("unscaled")
@pytest.mark.parametrize(
    ("peaks", "kept"),
    [
        ({"a/conv": PEAK}, {"a/Conv", "a/Relu"}),
        ({"a/conv": PEAK, "a": PEAK}, {"a/Conv", "a/Relu", "b/Conv"}),
        ({"b": PEAK}, {"b/Relu", "head/Pool"}),
        ({"input": PEAK}, {"a/Conv"}),
        ({"head/features": PEAK}, {"head/Flatten", "head/Gemm"}),
        ({"output": PEAK}, {"head/Gemm"}),
        ({"a": PEAK * 0 + 65504.0}, set()),
    ],
)
def test_every_node_that_touches_a_tensor_beyond_half_is_kept(peaks, kept):
    rewritten = half_from_float(two_blocks(), peaks)
    assert {node for node, reason in rewritten.kept.items() if "reaches 1.8e+05" in reason} == kept
    typed, x = types(rewritten.graph), images()
    for node in rewritten.graph.structure.graph.node:
        if node.op_type != "Cast":
            wanted = TensorProto.FLOAT if node.name in rewritten.kept else TensorProto.FLOAT16
            assert {typed[name] for name in (*node.input, *node.output)} == {wanted}, node.name
    assert bool(kept) == bool(rewritten.kept)
    exact = run(two_blocks(), x)
    assert np.abs(run(explicit_cast_twin(rewritten.graph), x) - exact).max() < 5e-3 * np.abs(exact).max()


@pytest.mark.usefixtures("unscaled")
@pytest.mark.parametrize(
    ("weights", "peaks"),
    [({"a.weight": 7e4}, {}), ({"b.weight": 7e4}, {}), ({"b.bias": 7e4}, {}), ({}, {"input": PEAK}), ({}, {"a": PEAK})],
)
def test_no_kept_convolution_stands_alone_between_two_casts(weights, peaks):
    """TensorRT for RTX 1.7.1 compiles Cast, float32 Conv, Cast as one half convolution, and so undoes the keeping."""
    planted = {name: two_blocks().weights[name] + np.float32(value) for name, value in weights.items()}
    rewritten = half_from_float(two_blocks(**planted), peaks)
    nodes = rewritten.graph.structure.graph.node
    maker = {name: node.op_type for node in nodes for name in node.output}
    convolutions = [node for node in nodes if node.op_type == "Conv" and node.name in rewritten.kept]
    assert convolutions
    for conv in convolutions:
        readers = {node.op_type for node in nodes if conv.output[0] in node.input}
        assert not (maker.get(conv.input[0]) == "Cast" and readers == {"Cast"}), conv.name


def test_a_kept_tensor_of_180_000_stays_finite_in_the_twin(unscaled):
    peaks = {"a/conv": PEAK, "a": PEAK}
    rewritten = half_from_float(huge(), peaks)
    assert rewritten.kept
    assert rewritten.exponents == {}
    np.testing.assert_allclose(run(explicit_cast_twin(rewritten.graph), ones()), run(huge(), ones()), rtol=2e-3)


def test_a_rescaled_tensor_of_180_000_stays_finite_in_the_twin_and_nothing_is_kept():
    rewritten = half_from_float(huge(), {"a/conv": PEAK, "a": PEAK})
    assert rewritten.kept == {}
    assert {name: values.tolist() for name, values in rewritten.exponents.items()} == {"a/Conv": [-9, -9, -9]}
    assert {array.dtype for array in rewritten.graph.weights.values()} == {np.dtype(np.float16)}
    np.testing.assert_allclose(run(explicit_cast_twin(rewritten.graph), ones()), run(huge(), ones()), rtol=2e-3)


def with_outputs(graph, *names):
    """The graph with more outputs, of float32 feature maps."""
    structure = onnx.ModelProto()
    structure.CopyFrom(graph.structure)
    for name, extent in names:
        structure.graph.output.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", MIDDLE, extent, extent])
        )
    return dataclasses.replace(graph, structure=structure)


def all_outputs(graph, x):
    session = onnxruntime.InferenceSession(
        graph.structure.SerializeToString(), quiet(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {"input": x, **graph.weights}), strict=True))


def quiet():
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def test_feature_maps_are_float32_outputs_under_their_names_and_the_next_block_reads_them_in_half():
    graph, x = with_outputs(two_blocks(), ("a", SIZE), ("b", SIZE // 2)), images()
    rewritten = half_from_float(graph, {})
    typed, nodes = types(rewritten.graph), rewritten.graph.structure.graph.node
    assert [value.name for value in rewritten.graph.structure.graph.output] == ["output", "a", "b"]
    for name in ("a", "b", "output"):
        (maker,) = (node for node in nodes if name in node.output)
        assert (typed[name], maker.op_type, list(maker.input)) == (TensorProto.FLOAT, "Cast", [f"{name}/half"])
        assert not any(name in node.input for node in nodes)
    assert [node.name for node in nodes if "a/half" in node.input] == ["a/Cast", "b/Conv"]
    assert operations(rewritten.graph).count("Cast") == 4
    assert len({node.name for node in nodes}) == len(nodes)
    found, truth = all_outputs(explicit_cast_twin(rewritten.graph), x), all_outputs(graph, x)
    np.testing.assert_array_equal(found["output"], by_hand(two_blocks(), x))
    for name in ("a", "b"):
        np.testing.assert_array_equal(found[name], rounded(found[name]))
        np.testing.assert_allclose(found[name], truth[name], rtol=0, atol=5e-3 * np.abs(truth[name]).max())


def test_a_feature_map_beyond_half_is_kept_whole_and_only_its_neighbours():
    graph = with_outputs(huge(), ("a", SIZE))
    rewritten = half_from_float(graph, {"a/conv": PEAK, "a": PEAK})
    assert rewritten.exponents == {}
    assert rewritten.kept == {
        "a/Conv": "activation a/conv reaches 1.8e+05",
        "a/Relu": "activation a/conv reaches 1.8e+05",
        "b/Conv": "activation a reaches 1.8e+05",
        "b/Relu": "it reads b/Conv",
    }
    found = all_outputs(explicit_cast_twin(rewritten.graph), ones())
    truth = all_outputs(graph, ones())
    np.testing.assert_array_equal(found["a"], truth["a"])
    np.testing.assert_allclose(found["output"], truth["output"], rtol=2e-3)
    assert found["a"].max() == 180_000.0


def test_a_feature_map_in_float32_that_a_half_block_reads_is_cast_once():
    graph = with_outputs(two_blocks(**{"a.weight": np.full((MIDDLE, CHANNELS, 3, 3), 7e4)}), ("a", SIZE))
    rewritten = half_from_float(graph, {})
    assert set(rewritten.kept) == {"a/Conv", "a/Relu"}
    (relu,) = (node for node in rewritten.graph.structure.graph.node if node.name == "a/Relu")
    assert list(relu.output) == ["a"]
    assert [node.name for node in rewritten.graph.structure.graph.node if "a" in node.input] == ["a/Cast"]
    onnx.checker.check_model(rewritten.graph.structure, full_check=True)


@pytest.mark.usefixtures("unscaled")
def test_kept_nodes_are_not_rounded_by_the_twin():
    """With everything kept the twin is the float32 graph, to the last bit."""
    everything = {name: PEAK for node in two_blocks().structure.graph.node for name in (*node.input, *node.output)}
    rewritten = half_from_float(two_blocks(), everything)
    assert len(rewritten.kept) == 7
    assert "Cast" not in operations(rewritten.graph)
    np.testing.assert_array_equal(run(explicit_cast_twin(rewritten.graph), images()), run(two_blocks(), images()))


def test_the_precision_and_its_gate_are_what_the_design_says():
    assert FP16 in PRECISIONS
    assert (FP16.name, FP16.dtype, FP16.gate.max_relative_error, FP16.gate.top1) == ("fp16", "float16", 5e-3, True)
    assert (FP16.rewrite, FP16.twin) == (half_from_float, explicit_cast_twin)
