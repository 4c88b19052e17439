"""INT8 engines of the real compiler against their graphs: what is there is proven, and each planted fault is named."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.audit import Audit, audit_of_file, audit_of_plan
from engines.errors import InputRejected, UsageError
from engines.expected import expected_from_nodes, expected_from_onnx
from engines.onnx_file import Node, onnx_file_from_path
from engines.plan import PlanRejected, plan_from_bytes
from engines.sdk import SDKS, check_precision
from tests.conftest import ROOT
from tests.engines.quantized_graphs import EVERYTHING, PORTABLE, RTX, Block, QuantizedGraph, engine_from_model

FORMS = [RTX, PORTABLE]
QUANTIZED = [block.name for block in EVERYTHING if not block.kept]
WEIGHTS, BIAS, SCALES, INPUT = (
    f"its {what} not stand in the engine bit for bit"
    for what in ("weights do", "bias does", "scales do", "input's scale does")
)
FIRST_WEIGHT, TAG_OF_SIZE = 218, 112


@pytest.fixture(params=FORMS, ids=lambda form: form.name)
def network(request, compiled_int8):
    return compiled_int8(request.param, *EVERYTHING)


def audited(engine, plan=None, **changes):
    """The audit of a plan, or of one that was changed, against expectations that may be changed, too."""
    expected = {"convolutions": engine.convolutions, "matrices": engine.matrices, **changes}
    return audit_of_plan(plan or engine.plan, expected["convolutions"], expected["matrices"])


def changed(engine, node, **fields):
    """The expected convolutions with other fields of one node; ``scales`` as a function of those it has."""
    convolutions = list(engine.convolutions)
    index = next(i for i, convolution in enumerate(convolutions) if convolution.node == f"{node}/Conv")
    if callable(fields.get("scales")):
        fields["scales"] = fields["scales"](convolutions[index].scales)
    convolutions[index] = dataclasses.replace(convolutions[index], **fields)
    return convolutions


def convolution_of(engine, node):
    return next(convolution for convolution in engine.convolutions if convolution.node == f"{node}/Conv")


def kernel_of(plan, node):
    return next(kernel for kernel in plan.convolutions if f"{node}/Conv" in kernel.onnx_nodes)


def with_kernel(plan, node, **fields):
    kernels = [
        dataclasses.replace(kernel, **fields) if f"{node}/Conv" in kernel.onnx_nodes else kernel
        for kernel in plan.convolutions
    ]
    return dataclasses.replace(plan, convolutions=tuple(kernels))


def next_half(value):
    return np.nextafter(value, value.dtype.type(np.inf))


def test_every_kind_of_layer_is_int8_and_holds_its_very_numbers(compiled_int8):
    """Three convolutions are kept: one block and SE's two. The seven others, the head and six kernels are INT8's."""
    audit = audited(compiled_int8(RTX, *EVERYTHING))
    assert audit.problems == audit.unproven == ()
    assert (audit.by_dtype, audit.int8_outputs) == ({"float16": 3, "int8": 7}, {"float16": 7})
    assert audit.line == (
        "7 of 10 convs in INT8 (half out), 3 of 10 convs in FP16, Conv+ReLU in one kernel for 7 of 8, "
        "6 requantize kernels beside them, all 11 weights bit-equal"
    )


def test_per_channel_scales_give_float_results_and_no_fusion_and_that_is_said(compiled_int8):
    audit = audited(compiled_int8(PORTABLE, *EVERYTHING))
    assert audit.problems == audit.unproven == ()
    assert (audit.by_dtype, audit.int8_outputs) == ({"float32": 3, "int8": 7}, {"float32": 7})
    assert audit.line == (
        "7 of 10 convs in INT8 (float out), 3 of 10 convs in FP32, Conv+ReLU in one kernel for 2 of 8, "
        f"{audit.requantize_kernels} requantize kernels beside them, all 11 weights bit-equal"
    )
    assert audit.requantize_kernels == 8


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_odd_widths_depthwise_grey_and_a_kept_head_are_proven_too(compiled_int8, form):
    blocks = (Block("stage0.0", 17), Block("stage1.0", 17, groups=0, stride=2), Block("stage2.0", 5))
    audit = audited(compiled_int8(form, *blocks, kept_head=True, classes=7, channels=1))
    assert audit.problems == audit.unproven == ()
    assert audit.line.endswith("all 4 weights bit-equal")
    assert audit.by_dtype == {"int8": 3}


def test_mixed_results_are_counted_by_type(network):
    plan = with_kernel(network.plan, "stage3.0", output_dtype="int8")
    audit = audited(network, plan)
    (other,) = {"float16", "float32"}.intersection(audit.int8_outputs)
    assert audit.int8_outputs == {other: 6, "int8": 1}
    assert f"in INT8 (6 {'half' if other == 'float16' else 'float'}, 1 int8 out), " in audit.line


def test_a_kernel_with_another_pixel_count_or_a_second_input_is_no_requantize_kernel(network):
    kernel = next(kernel for kernel in network.plan.functions if kernel.rescales and len(kernel.reads[0].dims) == 4)
    (read,) = kernel.reads
    pooled = dataclasses.replace(read, dims=(*read.dims[:2], 1, 1))
    for fields in ({"writes": (pooled,)}, {"behind_weighted": False}, {"onnx_nodes": ()}, {"writes": (read, read)}):
        assert not dataclasses.replace(kernel, **fields).rescales


def test_an_fp16_engine_has_no_requantize_kernels(compiled):
    network = compiled()
    audit = audit_of_file(network.engine, network.convolutions, network.matrices)
    assert (audit.int8_outputs, audit.requantize_kernels) == ({}, 0)
    assert "requantize" not in audit.line


def test_any_changed_byte_of_codes_scales_or_bias_is_named_after_its_node(network):
    places = []
    for block in QUANTIZED:
        kernel, expected = kernel_of(network.plan, block), convolution_of(network, block)
        places.append((block, WEIGHTS, kernel.weight, expected.weight.shape))
        if kernel.factor == 1 and kernel.factors.size > 4:
            places.append((block, SCALES, kernel.factors, kernel.factors.dims))
        if kernel.bias is not None:
            places.append((block, BIAS, kernel.bias, kernel.bias.dims))
        for function in network.plan.functions:
            for constant in function.constants:
                value = network.plan.array(constant).reshape(-1)
                if value.size > 1 and expected.node in function.behind:
                    problem = BIAS if np.array_equal(value, expected.bias) else SCALES
                    places.append((block, problem, constant, constant.dims))
                if value.size == 1 and expected.scales.quantizer in function.onnx_nodes:
                    places.append((block, INPUT, constant, constant.dims))
    found = {(block, problem) for block, problem, *_ in places}
    single = {("stage1.1", SCALES)} if network.plan.convolutions[0].relu else set()  # a factor of one number
    assert found == {(block, problem) for block in QUANTIZED for problem in (WEIGHTS, BIAS, SCALES, INPUT)} - single

    @settings(max_examples=60, deadline=None)
    @given(place=st.sampled_from(places), flip=st.integers(1, 255), choice=st.data())
    def change(place, flip, choice):
        block, problem, constant, shape = place
        index = [choice.draw(st.integers(0, extent - 1)) for extent in shape]
        width = np.dtype(constant.dtype).itemsize
        position = (
            constant.position + width * int(np.dot(index, constant.strides)) + choice.draw(st.integers(0, width - 1))
        )
        data = bytearray(network.bytes)
        data[position] ^= flip
        found = audited(network, plan_from_bytes(bytes(data), "engine")).problems
        sharing = [
            other for other, what, stored, _ in places if (what, stored.position) == (problem, constant.position)
        ]
        assert found == tuple(f"{other}/Conv: {problem}" for other in sharing)  # factors of 1 are stored once
        assert block in sharing

    change()


def test_codes_of_two_convolutions_swapped_in_the_file_are_named(network):
    first, second = (kernel_of(network.plan, block).weight for block in ("stage3.0", "stage3.1"))
    data = bytearray(network.bytes)
    one, other = (bytes(data[weight.position : weight.position + weight.size]) for weight in (first, second))
    assert len(one) == len(other) == 32 * 32 * 9
    data[first.position : first.position + first.size] = other
    data[second.position : second.position + second.size] = one
    problems = audited(network, plan_from_bytes(bytes(data), "engine")).problems
    assert problems == (f"stage3.0/Conv: {WEIGHTS}", f"stage3.1/Conv: {WEIGHTS}")


@pytest.mark.parametrize("block", QUANTIZED)
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (lambda c: {"weight": c.weight[[1, 0, *range(2, len(c.weight))]]}, WEIGHTS),
        (lambda c: {"weight": c.weight[:, :, ::-1, ::-1] if c.weight.shape[-1] > 1 else -c.weight}, WEIGHTS),
        (lambda c: {"bias": c.bias[[1, 0, *range(2, len(c.bias))]]}, BIAS),
        (lambda c: {"bias": next_half(c.bias)}, BIAS),
        (lambda c: {"scales": dataclasses.replace(c.scales, of_weight=next_half(c.scales.of_weight))}, SCALES),
    ],
    ids=["channels swapped", "window turned", "biases swapped", "bias off by one bit", "scale off by one bit"],
)
def test_numbers_of_the_graph_that_the_engine_has_not_are_named(network, block, fields, problem):
    convolutions = changed(network, block, **fields(convolution_of(network, block)))
    assert audited(network, convolutions=convolutions).problems == (f"{block}/Conv: {problem}",)


@pytest.mark.parametrize("block", QUANTIZED)
def test_another_scale_of_an_input_is_wrong_in_the_quantizer_and_in_the_product(network, block):
    def doubled(scales):
        return dataclasses.replace(scales, of_input=scales.of_input * scales.of_input.dtype.type(2))

    problems = audited(network, convolutions=changed(network, block, scales=doubled)).problems
    assert problems == (f"{block}/Conv: {SCALES}", f"{block}/Conv: {INPUT}")


def test_two_convolutions_whose_quantizers_are_exchanged_are_named(network):
    """Each scale is there, and neither is where it belongs."""
    names = [convolution_of(network, block).scales.quantizer for block in ("stage3.0", "stage3.1")]
    convolutions = changed(network, "stage3.0", scales=lambda scales: dataclasses.replace(scales, quantizer=names[1]))
    assert audited(network, convolutions=convolutions).problems == (f"stage3.0/Conv: {INPUT}",)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (lambda m: {"weight": m.weight[[1, 0, *range(2, 10)]]}, WEIGHTS),
        (lambda m: {"bias": m.bias[::-1]}, BIAS),
        (lambda m: {"scales": dataclasses.replace(m.scales, of_weight=next_half(m.scales.of_weight))}, SCALES),
    ],
    ids=["classes swapped", "biases turned", "scale"],
)
def test_the_heads_matrix_is_held_to_the_same(network, fields, problem):
    (matrix,) = network.matrices
    matrices = [dataclasses.replace(matrix, **fields(matrix))]
    assert audited(network, matrices=matrices).problems == (f"head/Gemm: {problem}",)


def test_a_head_compiled_in_another_type_is_named(network):
    kernels = [dataclasses.replace(kernel, input_dtype="float16") for kernel in network.plan.matrices]
    problems = audited(network, dataclasses.replace(network.plan, matrices=tuple(kernels))).problems
    assert problems == ("head/Gemm: asked for int8, compiled with float16 x int8",)
    problems = audited(network, dataclasses.replace(network.plan, matrices=())).problems
    assert problems == ("head/Gemm: 0 kernels of the engine compute it, not one",)


def test_a_factor_beside_its_operand_that_says_something_else_is_named(compiled_int8):
    network = compiled_int8(RTX, *EVERYTHING)
    for block in ("stage1.0", "stage1.1"):  # a factor for each channel, and one number
        factor = kernel_of(network.plan, block).factor
        plan = with_kernel(network.plan, block, factor=factor * 2)
        assert audited(network, plan).problems == (f"{block}/Conv: {SCALES}",)


def test_a_factor_of_a_convolution_of_floats_is_named(network, compiled):
    plan = with_kernel(network.plan, "stage2.0", factor=0.5)
    said = "its result is multiplied by something else than 1"
    assert audited(network, plan).problems == (f"stage2.0/Conv: {said}",)
    half = compiled()
    plan = with_kernel(plan_from_bytes(half.bytes, "engine"), "stage1.0", factor=0.5)
    assert audit_of_plan(plan, half.convolutions, half.matrices).problems == (f"stage1.0/Conv: {said}",)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_relu_that_the_engine_has_not_is_named(compiled_int8, form):
    blocks = (Block("stage0.0", 16), Block("stage1.0", 16), Block("stage2.0", 16))
    asked = compiled_int8(form, *blocks)
    without = compiled_int8(form, blocks[0], dataclasses.replace(blocks[1], relu=False), blocks[2])
    assert audited(without).problems == ()
    problems = audited(without, convolutions=asked.convolutions).problems
    assert problems == ("stage1.0/Conv: no kernel of the engine computes the ReLU behind it",)


def test_a_convolution_that_was_compiled_in_half_is_named(compiled_int8):
    blocks = (Block("stage0.0", 16), Block("stage1.0", 16), Block("stage2.0", 16))
    asked = compiled_int8(RTX, *blocks)
    kept = compiled_int8(RTX, blocks[0], dataclasses.replace(blocks[1], kept=True), blocks[2])
    audit = audited(kept, convolutions=changed(kept, "stage1.0", **_fields(asked, "stage1.0")))
    assert audit.problems == ("stage1.0/Conv: asked for int8, compiled with float16 x float16",)
    assert audit.line.startswith("2 of 3 convs in INT8 (half out), 1 of 3 convs in FP16, ")
    audit = audited(asked, convolutions=changed(asked, "stage1.0", **_fields(kept, "stage1.0")))
    assert audit.problems[0] == "stage1.0/Conv: asked for float16, compiled with int8 x int8"


def _fields(engine, block):
    convolution = convolution_of(engine, block)
    return {"weight": convolution.weight, "bias": convolution.bias, "scales": convolution.scales}


def test_an_engine_shared_with_turing_has_no_int8_convolution_left_and_is_named(compiled_int8):
    network = compiled_int8(RTX, *EVERYTHING, cards=(75, 86))
    audit = audited(network)
    said = "asked for int8, compiled with float16 x float16"
    assert audit.problems == tuple(f"{block}/Conv: {said}" for block in QUANTIZED)
    assert (audit.int8_outputs, audit.weights_bit_equal) == ({}, 4)  # the head's product of codes is there


def test_turing_is_refused_before_anything_is_compiled(engines_command, compiled_int8):
    rtx = SDKS[1]
    with pytest.raises(UsageError, match="has no INT8 convolutions for Turing"):
        check_precision(rtx, "int8", (75,))
    check_precision(rtx, "fp16", (75,))
    check_precision(rtx, "int8", (86, 89))
    check_precision(SDKS[0], "int8", (75,))
    network = compiled_int8(RTX, *EVERYTHING)
    outcome = engines_command("build", network.onnx, "--gpu", "sm75", "--out", "x.engine", "--sdk", "tensorrt_rtx")
    assert outcome.code == 2
    assert outcome.error.startswith("--gpu sm75: TensorRT for RTX has no INT8 convolutions for Turing, ")


LEAK = """
import pathlib, sys
import tensorrt_rtx
from engines.compiler import Refusal, Request, engine_from_onnx

def compile(onnx, engine, card):
    request = Request(onnx, engine, (1, 8, 32), (card,))
    pathlib.Path(engine).write_bytes(engine_from_onnx(tensorrt_rtx, request, lambda message: None).engine)

try:
    compile(sys.argv[1], sys.argv[3], 75)
except Refusal:
    compile(sys.argv[2], sys.argv[3], 86)
"""


def test_an_engine_built_after_a_failed_build_of_the_same_process_is_found_out(compiled_int8, tmp_path):
    """The compiler keeps something of the failure, and makes floats of the next INT8 graph without a word."""
    refused, network = compiled_int8(PORTABLE, *EVERYTHING), compiled_int8(RTX, *EVERYTHING)
    path = tmp_path / "after.engine"
    subprocess.run(
        [sys.executable, "-c", LEAK, str(refused.onnx), str(network.onnx), str(path)],
        check=True, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    audit = audit_of_file(path, network.convolutions, network.matrices)
    said = "asked for int8, compiled with float16 x float16"
    assert audit.problems == tuple(f"{block}/Conv: {said}" for block in QUANTIZED)


def test_scales_along_another_axis_are_compiled_to_floats_and_named(tmp_path):
    """As many output channels as input channels: nothing but the axis is wrong."""
    model = QuantizedGraph(PORTABLE).blocks(Block("stage0.0", 16), Block("stage1.0", 16)).head(10).model()
    (node,) = (node for node in model.graph.node if node.name == "stage1.0.weight/DequantizeLinear")
    node.attribute[0].i = 1
    network = engine_from_model(model, tmp_path)
    problems = audited(network).problems
    assert problems == ("stage1.0/Conv: asked for int8, compiled with float32 x float32",)


def test_a_scale_whose_reciprocal_half_cannot_hold_is_named(tmp_path):
    """1 / 1e-5 is beyond 65504, and the quantizer multiplies by it; as a product with another scale it is sound."""
    blocks = (Block("stage0.0", 16), Block("stage1.0", 16, scale=1e-5))
    network = engine_from_model(QuantizedGraph(RTX).blocks(*blocks).head(10).model(), tmp_path)
    assert audited(network).problems == (f"stage1.0/Conv: {INPUT}",)


def test_scales_of_one_leave_nothing_to_multiply_by(tmp_path):
    blocks = (Block("stage0.0", 16, scale=1.0), Block("stage1.0", 16, scale=0.5))
    network = engine_from_model(QuantizedGraph(RTX).blocks(*blocks).head(10).model(), tmp_path)
    audit = audited(network)
    assert (audit.problems, audit.unproven) == ((), ("stage0.0/Conv: its input's scale of one number",))


@pytest.mark.parametrize(("offset", "value"), [(0, 0xFF), (4, 0xFF), (4 + 5, 0xFF)], ids=["tag", "near", "far"])
def test_weights_that_begin_elsewhere_than_the_engine_says_are_no_engine(network, offset, value):
    data = bytearray(network.bytes)
    data[TAG_OF_SIZE + FIRST_WEIGHT + offset] = value
    with pytest.raises(PlanRejected, match="contradicts itself"):
        plan_from_bytes(bytes(data), "engine")


def rewired(form, change):
    """Nodes and weights of a small network after ``change(nodes by name, weights)``."""
    graph = QuantizedGraph(form).blocks(Block("stage0.0", 16), Block("stage1.0", 16)).head(10)
    change({node.name: node for node in graph.nodes}, graph.weights)
    return [node for node in graph.nodes if node.op_type], graph.weights


def set_weight(name, value):
    return lambda nodes, weights: weights.update({name: value})


def drop_zero_point(name):
    return lambda nodes, weights: nodes[name].input.pop()


def read_plain(name):
    return lambda nodes, weights: nodes[name].input.__setitem__(0, "stage0.0")


NO_ZERO = "has no int8 zero point of 0, and compilers silently take it for one"
CODES = "Conv stage1.0/Conv has no stored int8 codes of one scale, or one per channel"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_weight("stage1.0/input/zero_point", np.array(0, np.uint8)), f"stage1.0/QuantizeLinear {NO_ZERO}"),
        (set_weight("stage1.0/input/zero_point", np.array(3, np.int8)), f"stage1.0/QuantizeLinear {NO_ZERO}"),
        (set_weight("stage1.0.weight/zero_point", np.zeros((), np.uint8)), f"1.0.weight/DequantizeLinear {NO_ZERO}"),
        (drop_zero_point("stage1.0/QuantizeLinear"), f"stage1.0/QuantizeLinear {NO_ZERO}"),
        (drop_zero_point("stage1.0.weight/DequantizeLinear"), f"stage1.0.weight/DequantizeLinear {NO_ZERO}"),
        (set_weight("stage1.0.weight", np.zeros((16, 16, 3, 3), np.uint8)), CODES),
        (set_weight("stage1.0.weight/scale", np.ones(7, np.float16)), CODES),
        (set_weight("stage1.0.weight/scale", np.array(-1, np.float16)), "has no stored scale above 0"),
        (set_weight("stage1.0.weight/scale", np.array(np.nan, np.float16)), "has no stored scale above 0"),
        (set_weight("stage1.0/input/scale", np.ones(16, np.float16)), "is not quantized and restored by one scale"),
        (set_weight("stage1.0/input/scale", np.array(1, np.float32)), "has scales and a bias of different types"),
        (set_weight("stage1.0.bias", np.zeros(16, np.int32)), "has scales and a bias of different types"),
        (read_plain("stage1.0/Conv"), "has codes for a weight, and an input that is not quantized"),
    ],
    ids=[
        "uint8", "not zero", "uint8 weight", "absent", "absent of weight", "uint8 codes", "seven scales", "negative",
        "nan", "per-channel input", "two types", "int32 bias", "float input",
    ],
)  # fmt: skip
def test_a_graph_that_means_something_else_to_a_compiler_is_refused(change, problem):
    nodes, weights = rewired(RTX, change)
    with pytest.raises(InputRejected) as raised:
        expected_from_nodes(nodes_of(nodes), weights, "net.onnx")
    assert problem in str(raised.value)
    assert str(raised.value).startswith("net.onnx: ")
    assert "\n" not in str(raised.value)


def nodes_of(nodes):
    return [Node(node.name, node.op_type, node.domain, tuple(node.input), tuple(node.output)) for node in nodes]


def test_an_input_restored_by_another_scale_is_refused():
    def change(nodes, weights):
        weights["other"] = np.array(0.5, np.float16)
        nodes["stage1.0/input/DequantizeLinear"].input[1] = "other"

    nodes, weights = rewired(RTX, change)
    with pytest.raises(InputRejected, match="is not quantized and restored by one scale"):
        expected_from_nodes(nodes_of(nodes), weights, "net.onnx")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_codes_scales_and_biases_of_a_file_are_read_as_they_stand(tmp_path, form):
    graph = QuantizedGraph(form).blocks(*EVERYTHING).head(10)
    onnx.save(graph.model(), tmp_path / "net.onnx")
    file = onnx_file_from_path(tmp_path / "net.onnx")
    assert file.opsets[""] == form.opset
    convolutions, (matrix,) = expected_from_onnx(file)
    for convolution in [*convolutions, matrix]:
        name = convolution.node.rpartition("/")[0]
        if convolution.scales is None:
            assert convolution.weight.dtype == form.dtype
            continue
        assert convolution.weight.dtype == np.int8
        assert convolution.scales.quantizer == f"{name}/QuantizeLinear"
        for found, stored in [
            (convolution.weight, f"{name}.weight"),
            (convolution.bias, f"{name}.bias"),
            (convolution.scales.of_weight, f"{name}.weight/scale"),
            (convolution.scales.of_input, f"{name}/input/scale"),
        ]:
            assert found.dtype == graph.weights[stored].dtype
            np.testing.assert_array_equal(found, graph.weights[stored])
    assert sum(convolution.scales is not None for convolution in convolutions) == len(QUANTIZED)


def test_the_record_has_the_fields_of_the_audit_and_the_line(network):
    audit = audited(network)
    assert set(audit.record) == {field.name for field in dataclasses.fields(Audit)} | {"line"}
    assert (audit.record["int8_outputs"], audit.record["requantize_kernels"]) == (
        audit.int8_outputs, audit.requantize_kernels,
    )  # fmt: skip
