"""Dtypes and extents of tensors, against onnx's own inference; operands that do not fit are refused by name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from engines.errors import InputRejected
from engines.onnx_file import onnx_file_from_path
from engines.roofline.shape_rules import RULES, TensorType
from engines.roofline.tensor_types import constants_of_graph, types_of_graph

KINDS = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def integers(*numbers):
    return np.array(numbers, np.int64)


def model_of(operation, shape, operands=(), *, dtype=np.float32, opset=18, **attributes):
    """One node ``node`` that reads ``x`` of ``shape`` and stored ``operands``; None among them is an absent one."""
    names = [f"w{index}" if operand is not None else "" for index, operand in enumerate(operands)]
    node = helper.make_node(operation, ["x", *names], ["y"], name="node", **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", KINDS[np.dtype(dtype)], list(shape))],
        [onnx.ValueInfoProto(name="y", type=helper.make_tensor_type_proto(TensorProto.FLOAT, ["?"]))],
        [numpy_helper.from_array(operand, name) for operand, name in zip(operands, names, strict=True) if name],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def ours(model, folder):
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    file = onnx_file_from_path(path)
    return types_of_graph(file, constants_of_graph(file))["y"]


def theirs(model):
    """What onnx infers of ``y``; None where it refuses."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.output[:]
    bare.graph.output.add(name="y")
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return None
    tensor = inferred.graph.output[0].type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorType(dtype, tuple(dim.dim_value for dim in tensor.shape.dim))


def agree(model, folder):
    """Ours is onnx's, or neither of them has any."""
    expected = theirs(model)
    if expected is None or min(expected.shape, default=1) < 1:
        with pytest.raises(InputRejected, match=r"net\.onnx: \w+ node: .*; its work cannot be counted"):
            ours(model, folder)
    else:
        assert ours(model, folder) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


SIDE = st.integers(1, 9)
PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


def fits(extents, kernel, window):
    """Whether a window is no larger than the padded image; onnx's inference takes others, too."""
    pads, dilations = window.get("pads", (0,) * 4), window.get("dilations", (1, 1))
    return all(
        dilations[axis] * (kernel[axis] - 1) < extent + pads[axis] + pads[axis + 2]
        for axis, extent in enumerate(extents)
    )


@st.composite
def windows(draw):
    """How a window is moved."""
    window = {"strides": draw(PAIR)}
    if draw(st.booleans()):
        window["dilations"] = draw(PAIR)
    how = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if how != "NOTSET":
        return {"strides": window["strides"], "auto_pad": how}
    return window | {"pads": draw(st.tuples(*[st.integers(0, 2)] * 4))}


@given(SIDE, SIDE, PAIR, st.sampled_from([1, 2, 4]), windows())
@settings(max_examples=150, deadline=None)
def test_convolutions(folder, height, width, kernel, group, window):
    weight, bias = zeros(8, 4 // group, *kernel), zeros(8)
    model = model_of("Conv", (2, 4, height, width), [weight, bias], group=group, **window)
    if "SAME" in window.get("auto_pad", "") or fits((height, width), kernel, window):
        agree(model, folder)
    else:
        with pytest.raises(InputRejected, match="Conv node: a window of "):
            ours(model, folder)


@given(SIDE, SIDE, PAIR, windows(), st.sampled_from(["MaxPool", "AveragePool"]))
@settings(max_examples=100, deadline=None)
def test_pools(folder, height, width, kernel, window, operation):
    if operation == "AveragePool":
        window.pop("dilations", None)  # which opset 18 does not have
    if "SAME" in window.get("auto_pad", "") or fits((height, width), kernel, window):
        agree(model_of(operation, (1, 3, height, width), kernel_shape=kernel, **window), folder)


@given(SIDE, SIDE, PAIR, PAIR, st.booleans())
@settings(max_examples=100, deadline=None)
def test_pools_that_round_up_leave_out_windows_that_begin_behind_the_image(
    folder, height, width, kernel, strides, padded
):
    """As the standard says since opset 22, and PyTorch does; onnx's inference does not."""
    pads = [extent // 2 if padded else 0 for extent in kernel]
    if not fits((height, width), kernel, {"pads": pads * 2}):
        return
    model = model_of("MaxPool", (1, 3, height, width), kernel_shape=kernel, strides=strides, pads=pads * 2, ceil_mode=1)
    pooled = functional.max_pool2d(torch.zeros(1, 3, height, width), kernel, strides, pads, ceil_mode=True)
    assert ours(model, folder).shape == tuple(pooled.shape)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.lists(st.integers(1, 4), min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_operands_of_different_shapes(folder, left, right):
    agree(model_of("Add", left, [zeros(*right)]), folder)
    if len(left) >= 2 and len(right) >= 2:
        agree(model_of("MatMul", left, [zeros(*right)]), folder)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_gemms(folder, rows, inner, other, columns, turned, also_turned):
    left, right = (inner, rows) if turned else (rows, inner), (columns, other) if also_turned else (other, columns)
    transposed = {"transA": int(turned), "transB": int(also_turned)}
    agree(model_of("Gemm", left, [zeros(*right), zeros(columns)], **transposed), folder)


@given(
    st.lists(st.sampled_from([1, 1, 2, 3]), min_size=2, max_size=4),
    st.lists(st.integers(-5, 4), min_size=1, max_size=3, unique=True),
    st.integers(0, 1),
    st.sampled_from(["Squeeze", "Unsqueeze", "ReduceMean", "Flatten"]),
)
@settings(max_examples=150, deadline=None)
def test_axes(folder, shape, axes, kept, operation):
    rank = len(shape) + (len(axes) if operation == "Unsqueeze" else 0)
    fitting = len({axis % rank for axis in axes}) == len(axes) and all(-rank <= axis < rank for axis in axes)
    if operation == "Flatten":
        agree(model_of("Flatten", shape, axis=axes[0]), folder)
    elif fitting:
        attributes = {"keepdims": kept} if operation == "ReduceMean" else {}
        agree(model_of(operation, shape, [integers(*axes)], **attributes), folder)


@given(
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4),
    st.lists(st.sampled_from([-1, 0, 1, 2, 3, 6]), min_size=1, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_reshapes(folder, shape, wanted):
    model = model_of("Reshape", shape, [integers(*wanted)])
    expected = theirs(model)
    if expected is None or np.prod(expected.shape) != np.prod(shape) or wanted.count(-1) > 1:
        with pytest.raises(InputRejected, match="Reshape node: "):
            ours(model, folder)
    else:
        assert ours(model, folder) == expected


OTHERS = {
    "BatchNormalization": ([zeros(4)] * 4, {}),
    "Cast": ([], {"to": TensorProto.FLOAT16}),
    "Clip": ([zeros(), None], {}),
    "Div": ([zeros(4, 1, 1)], {}),
    "GlobalAveragePool": ([], {}),
    "Identity": ([], {}),
    "Max": ([zeros(1)], {}),
    "Mul": ([zeros(1, 4, 1, 1)], {}),
    "QuantizeLinear": ([zeros(), zeros(dtype=np.int8)], {}),
    "Relu": ([], {}),
    "Sigmoid": ([], {}),
    "Sub": ([zeros(6, 1)], {}),
}


@pytest.mark.parametrize("operation", OTHERS)
def test_what_keeps_or_pools_its_operand(folder, operation):
    operands, attributes = OTHERS[operation]
    agree(model_of(operation, (2, 4, 6, 5), operands, **attributes), folder)


def test_codes_are_uint8_where_no_zero_point_is_given_and_turn_back_to_the_scales_dtype(folder):
    assert ours(model_of("QuantizeLinear", (2, 3), [zeros()]), folder) == TensorType("uint8", (2, 3))
    model = model_of("DequantizeLinear", (2, 3), [zeros(dtype=np.float16)], opset=19)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    assert ours(model, folder) == theirs(model) == TensorType("float16", (2, 3))


def test_every_rule_is_held_against_onnx_here():
    tried = {"Conv", "MaxPool", "AveragePool", "Add", "MatMul", "Gemm", "Squeeze", "Unsqueeze", "ReduceMean", "Flatten"}
    assert tried | {"Reshape", "DequantizeLinear"} | set(OTHERS) == set(RULES)


IMAGE = (1, 4, 6, 6)
WRONG = {
    "channels": (model_of("Conv", IMAGE, [zeros(8, 3, 3, 3)]), "in 1 groups on 4 channels"),
    "groups": (model_of("Conv", IMAGE, [zeros(8, 2, 3, 3)], group=3), "in 3 groups on 4 channels"),
    "a group of 0": (model_of("Conv", IMAGE, [zeros(8, 4, 3, 3)], group=0), "in 0 groups"),
    "outputs in groups": (model_of("Conv", IMAGE, [zeros(7, 2, 3, 3)], group=2), r"\[7, 2, 3, 3\] in 2 groups"),
    "dtypes": (model_of("Conv", IMAGE, [zeros(8, 4, 3, 3, dtype=np.float16)]), "a weight of float16"),
    "a bias": (model_of("Conv", IMAGE, [zeros(8, 4, 3, 3), zeros(7)]), r"a bias of float32 \[7\] for 8 channels"),
    "rank": (model_of("Conv", IMAGE, [zeros(8, 4, 3)]), r"a weight of float32 \[8, 4, 3\]"),
    "no weight": (model_of("Conv", IMAGE), "it has no input 1"),
    "too large a window": (model_of("Conv", IMAGE, [zeros(8, 4, 7, 7)]), r"a window of \[7, 7\] on \[6, 6\]"),
    "a stride of 0": (model_of("Conv", IMAGE, [zeros(8, 4, 1, 1)], strides=[0, 1]), r"strides \[0, 1\]"),
    "a stride too few": (model_of("Conv", IMAGE, [zeros(8, 4, 1, 1)], strides=[1]), r"its strides is \[1\], not 2"),
    "text for numbers": (model_of("Conv", IMAGE, [zeros(8, 4, 1, 1)], strides="2"), "its strides is '2'"),
    "floats for numbers": (model_of("Conv", IMAGE, [zeros(8, 4, 1, 1)], strides=[1.0, 1.0]), "its strides is"),
    "a foreign padding": (model_of("Conv", IMAGE, [zeros(8, 4, 1, 1)], auto_pad="MORE"), "auto_pad MORE"),
    "no kernel": (model_of("MaxPool", IMAGE), r"a window of \[0, 0\]"),
    "mixed dtypes": (model_of("Add", IMAGE, [zeros(1, dtype=np.float16)]), "operands of float32, float16"),
    "a norm of others": (model_of("BatchNormalization", IMAGE, [zeros(3)] * 4), "not of 4 channels"),
    "a matrix of three axes": (model_of("Gemm", (2, 3, 4), [zeros(4, 2)]), r"matrices of \[2, 3, 4\]"),
    "an addend of others": (model_of("Gemm", (2, 3), [zeros(3, 4), zeros(5)]), "do not fit"),
    "an addend of more": (model_of("Gemm", (1, 3), [zeros(3, 4), zeros(2, 4)]), r"\[2, 4\] added to \[1, 4\]"),
    "an absent operand": (model_of("Add", IMAGE, [None, zeros(1)]), "it has no input 1"),
    "no axes": (model_of("ReduceMean", IMAGE), "it says no axes"),
    "squeezing all": (model_of("Squeeze", IMAGE), "axes"),
    "no shape": (model_of("Reshape", IMAGE), "it says no shape"),
    "a dtype that numpy lacks": (model_of("Cast", IMAGE, to=TensorProto.BFLOAT16), "to type 16, which numpy lacks"),
    "no dtype": (model_of("Cast", IMAGE), "to type 0"),
    "codes of floats": (model_of("QuantizeLinear", IMAGE, [zeros(), zeros()]), "codes of float32"),
    "more numbers than there are": (
        model_of("Unsqueeze", IMAGE, [integers(*range(17))]), "its axes is not stored"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_operands_that_do_not_fit_are_refused_with_the_node(tmp_path, kind):
    model, said = WRONG[kind]
    with pytest.raises(InputRejected, match=rf"net\.onnx: \w+ node: .*{said}.*; its work cannot be counted"):
        ours(model, tmp_path)


@pytest.mark.parametrize(("change", "said"), [
    (lambda node: node.input.__setitem__(0, "z"), "nothing before it makes z"),
    (lambda node: node.input.append("z"), "nothing before it makes z"),
    (lambda node: node.output.pop(), "its result has no name of its own"),
    (lambda node: node.output.__setitem__(0, "x"), "its result has no name of its own"),
    (lambda node: setattr(node, "op_type", "Einsum"), "an operation that is not counted here"),
    (lambda node: setattr(node, "domain", "com.example"), "an operation that is not counted here"),
])  # fmt: skip
def test_a_node_that_cannot_stand_where_it_is_is_refused(tmp_path, change, said):
    model = model_of("Relu", IMAGE)
    assert ours(model, tmp_path) == TensorType("float32", IMAGE)
    change(model.graph.node[0])
    with pytest.raises(InputRejected, match=f"node: {said}"):
        ours(model, tmp_path)


def test_an_axis_list_that_is_computed_is_refused(tmp_path):
    model = model_of("ReduceMean", IMAGE)
    model.graph.node[0].input.append("x")
    with pytest.raises(InputRejected, match="ReduceMean node: its axes is not stored"):
        ours(model, tmp_path)


CONSTANTS = {
    "value_int": (7, np.int64, ()),
    "value_ints": ([7, 8], np.int64, (2,)),
    "value_float": (0.5, np.float32, ()),
    "value_floats": ([0.5], np.float32, (1,)),
    "value": (numpy_helper.from_array(zeros(2, 3, dtype=np.float16)), np.float16, (2, 3)),
}


@pytest.mark.parametrize("form", CONSTANTS)
def test_a_constant_in_every_form(tmp_path, form):
    value, dtype, shape = CONSTANTS[form]
    model = model_of("Relu", IMAGE)
    model.graph.node.add().CopyFrom(helper.make_node("Constant", [], ["c"], name="odd", **{form: value}))
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    constant = constants_of_graph(onnx_file_from_path(path))["c"]
    assert (constant.dtype, constant.shape) == (dtype, shape)
    model.graph.node[-1].attribute[0].name = "other"
    model.graph.node[-1].attribute[0].type = onnx.AttributeProto.GRAPH
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputRejected, match="Constant odd: neither numbers nor a tensor"):
        constants_of_graph(onnx_file_from_path(path))
