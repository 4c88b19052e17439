"""The audit of an engine against its typed graph: what a true engine gets said of it, and every fault it must name."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exporter
from engines.audit import ExpectedConvolution, audit_of_file, audit_of_plan
from engines.compilation import CompilerProcess
from engines.errors import VerificationFailed
from engines.plan import PlanRejected, plan_from_bytes, plan_from_file
from tests.networks import NaiveRepVGG, Shape, contiguous_float

PLAIN = Shape(classes=8)
GROUPED = Shape(classes=8, even_groups=4, depths=(1, 2, 2, 2, 1), widths=(8, 8, 16, 16, 16))
SE = Shape(classes=8, se=True, depths=(1, 1, 1, 1, 1), widths=(128,) * 5)
GREY = Shape(classes=8, in_channels=1)
ELEVEN = Shape(classes=8, depths=(1, 2, 3, 4, 1))

WEIGHTS = "its weights do not stand in the engine bit for bit"
BIAS = "its bias does not stand in the engine bit for bit"


@pytest.fixture
def network(compiled):
    return compiled(PLAIN)


@pytest.fixture
def audited(tmp_path):
    """Audits an engine's bytes, read back from a file, against a network's typed graph."""

    def audit(data, network):
        path = tmp_path / "planted.engine"
        path.write_bytes(data)
        return audit_of_file(path, network.convolutions, network.matrices)

    return audit


def with_bytes(data, position, content):
    return data[:position] + content + data[position + len(content) :]


def flipped(data, position, bit=0):
    return with_bytes(data, position, bytes([data[position] ^ 1 << bit]))


def constant_of(data, name):
    """The plan's constant for "stage1.0.weight", "stage1.0.bias", "head.weight" or "head.bias"."""
    plan = plan_from_bytes(data, "engine")
    owner, _, kind = name.rpartition(".")
    if owner == "head":
        return next(c for c in plan.constants if c.dims == ((16, 8) if kind == "weight" else (1, 8)))
    kernel = next(kernel for kernel in plan.convolutions if f"{owner}/Conv" in kernel.onnx_nodes)
    return kernel.weight if kind == "weight" else bias_of(kernel)


def bias_of(kernel):
    return next(c for c in kernel.constants if c is not kernel.weight and c.dims == (1, kernel.weight.dims[0], 1, 1))


def changed(network, index, **fields):
    """The network's expected convolutions with one of them changed."""
    convolutions = list(network.convolutions)
    convolutions[index] = dataclasses.replace(convolutions[index], **fields)
    return convolutions


@pytest.mark.parametrize(
    ("shape", "precision", "line"),
    [
        (PLAIN, "fp16", "7 of 7 convs in FP16, Conv+ReLU in one kernel each, all 8 weights bit-equal"),
        (PLAIN, "fp32", "7 of 7 convs in FP32, Conv+ReLU in one kernel each, all 8 weights bit-equal"),
        (ELEVEN, "fp16", "11 of 11 convs in FP16, Conv+ReLU in one kernel each, all 12 weights bit-equal"),
        (GROUPED, "fp16", "8 of 8 convs in FP16, Conv+ReLU in one kernel each, all 9 weights bit-equal"),
        (SE, "fp16", "15 of 15 convs in FP16, Conv+ReLU in one kernel each, all 16 weights bit-equal"),
        (SE, "fp32", "15 of 15 convs in FP32, Conv+ReLU in one kernel each, all 16 weights bit-equal"),
        (GREY, "fp16", "7 of 7 convs in FP16, Conv+ReLU in one kernel each, all 8 weights bit-equal"),
    ],
)
def test_a_true_engine_has_no_problems_and_one_exact_line(compiled, shape, precision, line):
    network = compiled(shape, precision)
    audit = audit_of_file(network.engine, network.convolutions, network.matrices)
    assert audit.audited
    assert audit.problems == ()
    assert audit.line == line == network.line
    assert audit.by_dtype == {"float16" if precision == "fp16" else "float32": len(network.convolutions)}


def exported_line(shape, folder, precision="fp16"):
    torch.save(contiguous_float(NaiveRepVGG(shape, seed=1).state_dict()), folder / "net.pt")
    report = exporter.export(folder / "net.pt", folder / "out", trt=(precision,), size=32)
    return report.engines[0].audit["line"]


@pytest.mark.parametrize(
    ("classes", "width", "precision"),
    [(7, 16, "fp16"), (10, 16, "fp16"), (101, 16, "fp16"), (8, 17, "fp16"), (7, 17, "fp16"), (7, 17, "fp32")],
)
def test_a_classifier_of_any_size_is_found_even_where_the_compiler_pads_it(tmp_path, classes, width, precision):
    shape = Shape(classes=classes, widths=(8, 8, 12, 16, width))
    assert exported_line(shape, tmp_path, precision).endswith("all 8 weights bit-equal")


def test_a_single_number_that_the_compiler_wrote_into_code_is_said_to_be_unread(tmp_path):
    line = exported_line(Shape(classes=1), tmp_path)
    assert line.endswith("7 of 8 weights bit-equal (not readable: head/Gemm: its bias of one number)")


def narrow(width):
    """A first block that squeezes few channels to fewer; D2se's 64 channels become 4."""
    return Shape(classes=8, se=True, depths=(1, 1, 1, 1, 1), widths=(width, 128, 128, 128, 128))


@pytest.mark.parametrize("width", [16, 64])
def test_a_convolution_that_the_compiler_wrote_into_generated_code_is_audited_too(compiled, width):
    network = compiled(narrow(width))
    expand = next(conv for conv in network.convolutions if conv.node == "stage0.0/se/expand/Conv")
    assert all(expand.node not in kernel.onnx_nodes for kernel in plan_from_file(network.engine).convolutions)
    audit = audit_of_file(network.engine, network.convolutions, network.matrices)
    assert audit.problems == ()
    assert audit.line.startswith("15 of 15 convs in FP16, Conv+ReLU in one kernel each, ")
    columns = expand.weight.T.reshape(-1)
    data, place = network.bytes, network.bytes.index(columns[: expand.weight.shape[0]].tobytes())
    planted = plan_from_bytes(flipped(data, place, 3), "engine")
    problems = audit_of_plan(planted, network.convolutions, network.matrices).problems
    assert problems == (f"{expand.node}: {WEIGHTS}",)


def test_columns_whose_order_cannot_be_read_are_not_called_equal(compiled):
    """Two input channels swapped: each column stands in the engine, but not where it belongs."""
    network = compiled(narrow(64))
    index = next(i for i, conv in enumerate(network.convolutions) if conv.node == "stage0.0/se/expand/Conv")
    swapped = changed(network, index, weight=network.convolutions[index].weight[:, [1, 0, 2, 3]])
    audit = audit_of_file(network.engine, swapped, network.matrices)
    assert any("stage0.0/se/expand/Conv" in said for said in (*audit.problems, *audit.unproven))
    assert "all 16 weights bit-equal" not in audit.line


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_last_convolution_whose_relu_moved_into_the_pooling_is_said_and_is_no_fault(tmp_path, precision):
    shape = dataclasses.replace(GROUPED, depths=(1, 2, 2, 1, 1))
    line = exported_line(shape, tmp_path, precision)
    assert line.endswith("Conv+ReLU in one kernel for 6 of 7, all 8 weights bit-equal")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("stage0.0.weight", f"stage0.0/Conv: {WEIGHTS}"),
        ("stage2.1.weight", f"stage2.1/Conv: {WEIGHTS}"),
        ("stage0.0.bias", f"stage0.0/Conv: {BIAS}"),
        ("stage4.0.bias", f"stage4.0/Conv: {BIAS}"),
        ("head.weight", f"head/Gemm: {WEIGHTS}"),
        ("head.bias", f"head/Gemm: {BIAS}"),
    ],
)
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_is_named(network, audited, name, problem, bit):
    data = network.bytes
    audit = audited(flipped(data, constant_of(data, name).position, bit), network)
    assert audit.problems == (problem,)
    assert audit.line.endswith("Conv+ReLU in one kernel each, 7 of 8 weights bit-equal")


@pytest.mark.parametrize("shape", [PLAIN, GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_any_changed_byte_of_any_weight_or_bias_is_named_after_its_node(compiled, shape, precision):
    network = compiled(shape, precision)
    data, plan = network.bytes, plan_from_file(network.engine)
    places = []
    for kernel, expected in zip(plan.convolutions, network.convolutions, strict=True):
        places.append((expected.node, kernel.weight, expected.weight.shape))
        places.append((expected.node, bias_of(kernel), (1, len(expected.bias), 1, 1)))

    @settings(max_examples=60, deadline=None)
    @given(place=st.sampled_from(places), flip=st.integers(1, 255), choice=st.data())
    def change(place, flip, choice):
        node, constant, shape = place
        index = [choice.draw(st.integers(0, extent - 1)) for extent in shape]
        itemsize = np.dtype(constant.dtype).itemsize
        position = constant.position + itemsize * int(np.dot(index, constant.strides))
        position += choice.draw(st.integers(0, itemsize - 1))
        planted = plan_from_bytes(with_bytes(data, position, bytes([data[position] ^ flip])), "engine")
        problems = audit_of_plan(planted, network.convolutions, network.matrices).problems
        assert [problem.split(":")[0] for problem in problems] == [node]

    change()


@pytest.mark.parametrize(("sign", "problems"), [(0x8000, ()), (0x0000, (f"stage1.0/Conv: {WEIGHTS}",))])
def test_minus_zero_and_zero_are_different_weights(network, audited, sign, problems):
    data = network.bytes
    planted = with_bytes(data, constant_of(data, "stage1.0.weight").position, struct.pack("<H", sign))
    weight = network.convolutions[1].weight.copy()
    weight[0, 0, 0, 0] = np.float16(-0.0)
    minus_zero = dataclasses.replace(network, convolutions=changed(network, 1, weight=weight))
    assert audited(planted, minus_zero).problems == problems


def test_a_nan_equals_itself_bit_by_bit(network, audited):
    data = network.bytes
    planted = with_bytes(data, constant_of(data, "stage1.0.weight").position, struct.pack("<H", 0x7E01))
    weight = network.convolutions[1].weight.copy()
    for bits, problems in ((0x7E01, ()), (0x7E02, (f"stage1.0/Conv: {WEIGHTS}",))):
        weight.view(np.uint16)[0, 0, 0, 0] = bits
        expected = dataclasses.replace(network, convolutions=changed(network, 1, weight=weight))
        assert audited(planted, expected).problems == problems


def test_padding_of_the_first_convolution_that_is_not_zero_is_named(network, audited):
    data = network.bytes
    constant = constant_of(data, "stage0.0.weight")
    assert constant.dims == (8, 4, 3, 3)
    padding = constant.position + 2 * 3 * constant.strides[1]
    assert audited(with_bytes(data, padding, b"\x01"), network).problems == (f"stage0.0/Conv: {WEIGHTS}",)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("index", [0, 3, 6])
def test_two_swapped_channels_are_named(network, index, axis):
    convolution = network.convolutions[index]
    weight = convolution.weight.copy()
    order = [1, 0, *range(2, weight.shape[axis])]
    convolutions = changed(network, index, weight=np.take(weight, order, axis))
    audit = audit_of_file(network.engine, convolutions, network.matrices)
    assert audit.problems == (f"{convolution.node}: {WEIGHTS}",)


def test_two_swapped_biases_are_named(network):
    bias = network.convolutions[2].bias[[1, 0, *range(2, 8)]]
    audit = audit_of_file(network.engine, changed(network, 2, bias=bias), network.matrices)
    assert audit.problems == (f"stage1.1/Conv: {BIAS}",)


def test_two_swapped_classes_are_named(network):
    matrix = network.matrices[0]
    swapped = dataclasses.replace(matrix, weight=matrix.weight[[1, 0, *range(2, 8)]])
    audit = audit_of_file(network.engine, network.convolutions, [swapped])
    assert audit.problems == (f"head/Gemm: {WEIGHTS}",)


def test_a_transposed_square_matrix_is_not_mistaken_for_the_matrix(compiled):
    """16 channels to 16 classes: only the layout in the plan tells the two apart."""
    network = compiled(Shape(classes=16))
    transposed = dataclasses.replace(network.matrices[0], weight=network.matrices[0].weight.T.copy())
    assert audit_of_file(network.engine, network.convolutions, network.matrices).problems == ()
    assert audit_of_file(network.engine, network.convolutions, [transposed]).problems == (f"head/Gemm: {WEIGHTS}",)


@pytest.mark.parametrize("kind", ["kernel flipped", "kernel transposed"])
def test_a_convolution_instead_of_a_correlation_is_named(network, kind):
    weight = network.convolutions[1].weight
    wrong = weight[:, :, ::-1, ::-1] if kind == "kernel flipped" else weight.transpose(0, 1, 3, 2)
    audit = audit_of_file(network.engine, changed(network, 1, weight=wrong), network.matrices)
    assert audit.problems == (f"stage1.0/Conv: {WEIGHTS}",)


def test_an_engine_of_another_checkpoint_has_no_weight_in_common(compiled, network):
    other = compiled(PLAIN, seed=2)
    audit = audit_of_file(other.engine, network.convolutions, network.matrices)
    assert audit.weights_bit_equal == 0
    nodes = [*(convolution.node for convolution in network.convolutions), "head/Gemm"]
    assert list(audit.problems) == [f"{node}: {what}" for node in nodes for what in (WEIGHTS, BIAS)]


@pytest.mark.parametrize(("asked", "built"), [("fp16", "fp32"), ("fp32", "fp16")])
def test_an_engine_in_another_precision_than_the_graph_is_named_node_by_node(compiled, asked, built):
    names = {"fp16": "float16", "fp32": "float32"}
    network = compiled(PLAIN, asked)
    audit = audit_of_file(compiled(PLAIN, built).engine, network.convolutions, network.matrices)
    said = [problem for problem in audit.problems if "asked for" in problem]
    assert said == [
        f"{expected.node}: asked for {names[asked]}, compiled with {names[built]} x {names[built]}"
        for expected in (*network.convolutions, *network.matrices)
    ]
    assert audit.line.startswith(f"7 of 7 convs in {built.upper()}, ")
    assert audit.weights_bit_equal == 0


def test_one_convolution_in_another_precision_is_counted_and_named(network):
    plan = plan_from_file(network.engine)
    kernels = list(plan.convolutions)
    kernels[3] = dataclasses.replace(kernels[3], input_dtype="float32", weight_dtype="float32")
    audit = audit_of_plan(
        dataclasses.replace(plan, convolutions=tuple(kernels)), network.convolutions, network.matrices
    )
    assert audit.problems == ("stage2.0/Conv: asked for float16, compiled with float32 x float32",)
    assert audit.line.startswith("6 of 7 convs in FP16, 1 of 7 convs in FP32, ")


@pytest.mark.parametrize("dtype", ["input_dtype", "weight_dtype"])
def test_half_weights_on_a_wider_input_are_named(network, dtype):
    plan = plan_from_file(network.engine)
    kernels = (dataclasses.replace(plan.convolutions[0], **{dtype: "float32"}), *plan.convolutions[1:])
    audit = audit_of_plan(dataclasses.replace(plan, convolutions=kernels), network.convolutions, network.matrices)
    assert len(audit.problems) == 1
    assert audit.problems[0].startswith("stage0.0/Conv: asked for float16, compiled with ")


@pytest.mark.parametrize(("precision", "problems"), [("fp32", 1), ("fp16", 0)])
def test_an_engine_that_may_round_float32_to_tf32_is_found_out(compiled, precision, problems):
    network = compiled(PLAIN, precision)
    plan = plan_from_file(network.engine)
    assert not plan.tf32
    allowed = plan_from_bytes(network.bytes.replace(b"\n  tf32=0\n", b"\n  tf32=1\n"), "allowed")
    assert allowed.tf32
    found = audit_of_plan(allowed, network.convolutions, network.matrices).problems
    assert found == ("stage0.0/Conv: asked for float32, compiled with TF32 allowed; build it again",)[:problems]
    assert audit_of_plan(plan, network.convolutions, network.matrices).problems == ()


def test_a_convolution_that_no_kernel_computes_is_named(network):
    missing = ExpectedConvolution("stage5.0/Conv", "stage5.0/Relu", *(np.ones((1, 1, 3, 3)), np.ones(1)))
    audit = audit_of_file(network.engine, [*network.convolutions, missing], network.matrices)
    assert audit.problems == ("stage5.0/Conv: 0 kernels of the engine compute it, not one",)
    assert audit.line == "7 of 8 convs in FP16, Conv+ReLU in one kernel for 7 of 8, 8 of 9 weights bit-equal"


def test_a_convolution_that_two_kernels_compute_is_named(network):
    plan = plan_from_file(network.engine)
    twice = dataclasses.replace(plan, convolutions=(*plan.convolutions, plan.convolutions[2]))
    audit = audit_of_plan(twice, network.convolutions, network.matrices)
    assert audit.problems == ("stage1.1/Conv: 2 kernels of the engine compute it, not one",)


@pytest.mark.parametrize("change", [{"relu": False}, {"onnx_nodes": ("stage1.0/Conv",)}], ids=["no relu", "another's"])
def test_a_relu_outside_its_convolutions_kernel_is_counted(network, change):
    plan = plan_from_file(network.engine)
    kernels = list(plan.convolutions)
    kernels[1] = dataclasses.replace(kernels[1], **change)
    audit = audit_of_plan(
        dataclasses.replace(plan, convolutions=tuple(kernels)), network.convolutions, network.matrices
    )
    assert (audit.with_relu, audit.expected_relus) == (6, 7)
    assert "Conv+ReLU in one kernel for 6 of 7" in audit.line


@pytest.mark.parametrize(
    ("position", "content", "sdk"),
    [(24, bytes([1, 8, 0, 7]), "tensorrt_rtx 1.8.0.7"), (0, b"ftrt", "tensorrt 1.7.1.116")],
)
def test_a_plan_of_another_version_is_not_audited_and_says_so(network, audited, position, content, sdk):
    audit = audited(with_bytes(network.bytes, position, content), network)
    assert not audit.audited
    assert audit.problems == ()
    assert audit.reason == f"plans of {sdk} cannot be read (known: tensorrt_rtx 1.7.1.116)"
    assert audit.line == f"not audited: {audit.reason}"
    assert (audit.convolutions, audit.weights_bit_equal, audit.by_dtype) == (0, 0, {})


def test_an_engine_cut_short_is_rejected(network, audited):
    with pytest.raises(PlanRejected, match="the header says"):
        audited(network.bytes[:-1], network)


def test_an_export_whose_engine_is_of_other_weights_fails_and_keeps_it_as_rejected(compiled, tmp_path, monkeypatch):
    """The audit is wired into the verdict: a compiler that mixes up two networks is found out."""
    other = compiled(PLAIN, seed=2).onnx
    submit = CompilerProcess.submit
    mixed_up = lambda process, request: submit(process, dataclasses.replace(request, onnx=str(other)))  # noqa: E731
    monkeypatch.setattr(CompilerProcess, "submit", mixed_up)
    torch.save(contiguous_float(NaiveRepVGG(PLAIN, seed=1).state_dict()), tmp_path / "net.pt")
    with pytest.raises(VerificationFailed) as raised:
        exporter.export(tmp_path / "net.pt", tmp_path / "out", trt=("fp16",), size=32)
    assert str(raised.value).startswith(f"fp16, engine audit: stage0.0/Conv: {WEIGHTS}")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "net.fp16.engine.rejected" in left
    assert all(name.endswith(".rejected") for name in left)
