"""The plan reader on real engines, and on damaged ones: a Plan or PlanRejected, nothing else, and soon."""

from __future__ import annotations

import importlib.metadata
import itertools
import struct
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines.plan import AUDITED_VERSIONS, Header, PlanRejected, header_from_file, plan_from_bytes, plan_from_file
from tests.networks import Shape

PLAIN = Shape(classes=8)
GROUPED = {
    groups: Shape(classes=8, even_groups=groups, depths=(1, 2, 2, 2, 1), widths=(8, 8, 16, 16, 16)) for groups in (2, 4)
}
SE = Shape(classes=8, se=True, depths=(1, 1, 1, 1, 1), widths=(128,) * 5)
SHAPES = {"plain": PLAIN, "grouped by 2": GROUPED[2], "grouped by 4": GROUPED[4], "se": SE}
DTYPES = {"fp16": "float16", "fp32": "float32"}
TABLE, TABLE_END = 64, 112
EVERY_NETWORK = [
    pytest.param(shape, precision, id=f"{n}-{precision}") for n, shape in SHAPES.items() for precision in DTYPES
]


def chunks(data):
    """(tag, start, size) of each entry of the chunk table."""
    return [struct.unpack_from("<4s4xQQ", data, TABLE + 24 * index) for index in range(2)]


def program(data):
    """Start and end of the main program's text."""
    start = data.index(b"header {\n")
    return start, data.index(b"\0", start)


def patched(data, *changes):
    """A copy with bytes replaced: (position, bytes)."""
    copy = bytearray(data)
    for position, value in changes:
        copy[position : position + len(value)] = value
    return bytes(copy)


def file_of(text, weights=b""):
    """The smallest file around a program's text that the header and the table fit."""
    engine = text + b"\0"
    start, end = TABLE_END, TABLE_END + len(engine)
    size = end + len(weights)
    header = struct.pack("<4s4xQQ4B4sI", b"vtrt", 2, size, 1, 7, 1, 116, b"vtrt", 0x7E).ljust(TABLE, b"\0")
    table = struct.pack("<4s4xQQ4s4xQQ", b"NGNE", start, len(engine), b"THGW", end, len(weights))
    return header + table + engine + weights


def read(data):
    """A Plan or a PlanRejected; fails on any other exception, on two seconds, and on views outside the file."""
    started = time.monotonic()
    try:
        outcome = plan_from_bytes(data, "file.engine")
    except PlanRejected as rejected:
        outcome = rejected
    assert time.monotonic() - started < 2
    if isinstance(outcome, PlanRejected):
        assert str(outcome).startswith("file.engine: ")
        assert "\n" not in str(outcome)
    for constant in getattr(outcome, "constants", ()):
        assert 0 <= constant.position <= constant.position + constant.size <= len(data)
        if constant.dtype in ("float16", "float32", "int8", "int32", "int64"):
            assert outcome.array(constant).shape == constant.dims
    return outcome


@pytest.mark.parametrize("precision", DTYPES)
def test_the_header_says_sdk_version_size_and_cards(compiled, precision):
    engine = compiled(PLAIN, precision).engine
    header = header_from_file(engine)
    assert header == Header(
        "tensorrt_rtx", (1, 7, 1, 116), engine.stat().st_size, (80, 86, 89, 120, 121), newer_cards=True
    )
    assert header.version_text == "1.7.1.116"
    assert plan_from_file(engine).header == header


def test_the_installed_compiler_is_one_whose_plans_are_audited():
    installed = tuple(int(part) for part in importlib.metadata.version("tensorrt-rtx-cu12").split("."))
    assert installed in AUDITED_VERSIONS


@pytest.mark.parametrize(
    ("mask", "cards", "newer"),
    [
        (0x01, (75,), False),
        (0x04, (86,), False),
        (0x7E, (80, 86, 89, 120, 121), True),
        (0x3F, (75, 80, 86, 89, 120, 121), False),
    ],
)
def test_each_bit_of_the_mask_is_a_card(compiled, mask, cards, newer):
    header = read(patched(compiled().bytes, (32, struct.pack("<I", mask)))).header
    assert (header.compute_capabilities, header.newer_cards) == (cards, newer)


@pytest.mark.parametrize(("shape", "precision"), EVERY_NETWORK)
def test_every_convolution_is_one_kernel_with_its_relu_and_its_weights(compiled, shape, precision):
    network = compiled(shape, precision)
    plan = plan_from_file(network.engine)
    kernels = {kernel.onnx_nodes[0]: kernel for kernel in plan.convolutions}
    assert [kernel.onnx_nodes[0] for kernel in plan.convolutions] == [conv.node for conv in network.convolutions]
    for expected in network.convolutions:
        kernel = kernels[expected.node]
        assert (kernel.input_dtype, kernel.weight_dtype, kernel.output_dtype) == (DTYPES[precision],) * 3
        assert kernel.relu == (expected.relu_node is not None)
        assert (expected.relu_node in kernel.onnx_nodes) == (expected.relu_node is not None)
        out, channels, *window = expected.weight.shape
        stored = plan.array(kernel.weight)
        assert (kernel.weight.dims[0], *kernel.weight.dims[2:]) == (out, *window)
        np.testing.assert_array_equal(stored[:, :channels], expected.weight)
        vectors = [plan.array(constant).reshape(-1) for constant in kernel.constants]
        assert sum(np.array_equal(vector, expected.bias) for vector in vectors) == 1


@pytest.mark.parametrize("precision", DTYPES)
def test_a_plain_network_is_its_convolutions_and_three_kernels_more(compiled, precision):
    plan = plan_from_file(compiled(PLAIN, precision).engine)
    assert (len(plan.convolutions), plan.kernels) == (7, 10)  # input layout, mean, classifier


@pytest.mark.parametrize("precision", DTYPES)
def test_the_classifier_is_a_product_of_matrices_with_the_weight_second(compiled, precision):
    network = compiled(PLAIN, precision)
    plan = plan_from_file(network.engine)
    (kernel,), (expected,) = plan.matrices, network.matrices
    assert expected.node in kernel.onnx_nodes
    assert (kernel.input_dtype, kernel.weight_dtype) == (DTYPES[precision],) * 2
    assert (kernel.relu, kernel.weight_first) == (False, False)
    np.testing.assert_array_equal(plan.array(kernel.weight).T, expected.weight)
    vectors = [plan.array(constant).reshape(-1) for constant in kernel.constants]
    assert sum(np.array_equal(vector, expected.bias) for vector in vectors) == 1


def test_generated_code_knows_whose_results_it_reads(compiled):
    network = compiled(PLAIN)
    plan = plan_from_file(network.engine)
    (pooling,) = (function for function in plan.functions if "head/Pool" in function.onnx_nodes)
    last = network.convolutions[-1]
    assert pooling.behind == {last.node, last.relu_node}
    (entrance,) = (function for function in plan.functions if "input/Cast" in function.onnx_nodes)
    assert entrance.behind == frozenset()


@pytest.mark.parametrize("groups", GROUPED)
def test_grouped_convolutions_are_read_out_of_their_run_time_fusions(compiled, groups):
    network = compiled(GROUPED[groups])
    grouped = [conv.node for conv in network.convolutions[2::2]]
    fused = [line for line in network.bytes.split(b"\n") if b"runtime_fusion={" in line and b"backbone=conv" in line]
    assert [any(f"[ONNX Layer: {node}]".encode() in line for line in fused) for node in grouped] == [True] * 3
    kernels = [kernel for kernel in plan_from_file(network.engine).convolutions if kernel.onnx_nodes[0] in grouped]
    assert [kernel.weight.dims[1] * groups for kernel in kernels] == [8, 16, 16]
    assert [kernel.onnx_nodes for kernel in kernels] == [(node, node.replace("Conv", "Relu")) for node in grouped]


def test_squeeze_and_excitation_has_its_relu_in_the_reducing_convolution_alone(compiled):
    plan = plan_from_file(compiled(SE).engine)
    by_name = {kernel.onnx_nodes[0]: kernel.relu for kernel in plan.convolutions}
    assert len(by_name) == 15
    assert {name for name, relu in by_name.items() if relu} == {f"stage{i}.0/se/reduce/Conv" for i in range(5)}


def test_the_first_half_weight_is_padded_to_four_channels_of_zeros(compiled):
    plan = plan_from_file(compiled().engine)
    first = plan.array(plan.convolutions[0].weight)
    assert first.shape == (8, 4, 3, 3)
    assert not first[:, 3].any()
    assert first[:, :3].all()


@pytest.mark.parametrize(("shape", "precision"), EVERY_NETWORK)
def test_constants_fill_the_weights_chunk_without_overlap(compiled, shape, precision):
    data = compiled(shape, precision).bytes
    (_, start, size) = chunks(data)[1]
    constants = read(data).constants
    assert constants[0].position == start
    for before, after in itertools.pairwise(constants):
        assert 0 <= after.position - (before.position + before.size) < 128
        assert (after.position - start) % 128 == 0
    assert 0 <= start + size - (constants[-1].position + constants[-1].size) < 128
    assert len({constant.name for constant in constants}) == len(constants)


def test_a_constant_is_a_view_of_the_file_that_cannot_be_written(compiled):
    plan = plan_from_file(compiled().engine)
    view = plan.array(plan.convolutions[1].weight)
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0, 0, 0] = 1


@pytest.mark.parametrize(
    "version", [(1, 7, 1, 117), (1, 7, 0, 116), (1, 8, 1, 116), (0, 0, 0, 0), (255, 255, 255, 255)]
)
def test_an_unknown_version_is_not_audited_and_never_guessed(compiled, version):
    text = ".".join(map(str, version))
    data = patched(compiled().bytes, (24, bytes(version)))
    assert str(read(data)) == f"file.engine: not audited: the layout of tensorrt_rtx {text} plans is not known"


def test_a_plan_of_full_tensorrt_is_not_audited(compiled, tmp_path):
    path = tmp_path / "full.engine"
    path.write_bytes(patched(compiled().bytes, (0, b"ftrt")))
    header = header_from_file(path)
    assert (header.sdk, header.compute_capabilities, header.newer_cards) == ("tensorrt", (), False)
    with pytest.raises(PlanRejected, match=r"not audited: the layout of tensorrt 1\.7\.1\.116 plans is not known"):
        plan_from_file(path)


@pytest.mark.parametrize("reader", [plan_from_file, header_from_file])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("onnx", "not a TensorRT engine"),
        ("empty", "no engine can be read here"),
        ("short", "63 bytes are too few for an engine"),
        ("directory", "no engine can be read here"),
        ("missing", "no engine can be read here"),
    ],
)
def test_what_is_no_engine_is_rejected_in_one_line_that_names_it(compiled, tmp_path, reader, kind, said):
    path = tmp_path / "thing.engine"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        content = {"onnx": compiled().onnx.read_bytes(), "empty": b"", "short": compiled().bytes[:63]}[kind]
        path.write_bytes(content)
    with pytest.raises(PlanRejected) as raised:
        reader(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: {said}")
    assert "\n" not in message
    assert message.endswith(("build it again", "check the path"))
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(
    "field",
    [
        pytest.param(range(4), id="tag"),
        pytest.param(range(8, 16), id="format number"),
        pytest.param(range(16, 24), id="size"),
        pytest.param(range(28, 32), id="second tag"),
    ],
)
def test_a_header_with_a_changed_tag_format_number_or_size_is_rejected(compiled, field):
    data = compiled().bytes
    for position in field:
        for bit in range(8):
            changed = patched(data, (position, bytes([data[position] ^ 1 << bit])))
            assert isinstance(read(changed), PlanRejected), f"bit {bit} of byte {position}"


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(lambda first, second: (second, first), id="swapped"),
        pytest.param(lambda first, second: ((b"THGW", *first[1:]), (b"NGNE", *second[1:])), id="tags swapped"),
        pytest.param(lambda first, second: ((b"NGNE", *second[1:]), (b"THGW", *first[1:])), id="places swapped"),
        pytest.param(lambda first, second: (first, first), id="the engine twice"),
        pytest.param(lambda first, second: (first, (b"THGW", 2**64 - 1, 2**64 - 1)), id="far outside"),
        pytest.param(lambda first, second: (first, (b"THGW", second[1], second[2] + 128)), id="past the end"),
        pytest.param(lambda first, second: (first, (b"THGW", second[1], second[2] - 128)), id="too short"),
        pytest.param(lambda first, second: ((b"NGNE", first[1], 16), second), id="no program"),
        pytest.param(lambda first, second: ((b"NGNE", first[1], 0), (b"THGW", second[1], 0)), id="nothing at all"),
    ],
)
def test_a_chunk_table_that_contradicts_the_file_is_rejected(compiled, entry):
    data = compiled().bytes
    table = b"".join(struct.pack("<4s4xQQ", *chunk) for chunk in entry(*chunks(data)))
    outcome = read(patched(data, (TABLE, table)))
    assert isinstance(outcome, PlanRejected)
    assert "the engine contradicts itself" in str(outcome)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(b"const_payload_size=576 ", b"const_payload_size=976 ", id="payload longer than its place"),
        pytest.param(b"const_payload_size=576 ", b"const_payload_size=-76 ", id="payload of a negative size"),
        pytest.param(b"const_payload_size=576 ", b"const_payload_size=x76 ", id="size no number"),
        pytest.param(b"dims={ 8 4 3 3 }", b"dims={ 9 4 3 3 }", id="more channels than bytes"),
        pytest.param(b"dims={ 8 4 3 3 }", b"dims={ 8 4 3   }", id="fewer dims than strides"),
        pytest.param(b"dims={ 8 4 3 3 }", b"dims={ 0 4 3 3 }", id="no channels"),
        pytest.param(b"strides={ 36 1 12 4 }", b"strides={ 36 1 92 4 }", id="strides past the end"),
        pytest.param(b"strides={ 36 1 12 4 }", b"strides={ 36 1 -2 4 }", id="negative stride"),
        pytest.param(b" offset=1 ", b" offset=0 ", id="two constants of one rank"),
        pytest.param(b" constant=true", b" constant=tru3", id="no constants"),
        pytest.param(b"\nmain {", b"\nnain {", id="no kernels"),
        pytest.param(b'input={"stage0.0', b'input={"stage9.9', id="input unheard of"),
        pytest.param(b"header {\n", b"hedaer {\n", id="no program"),
    ],
)
def test_a_program_that_contradicts_itself_is_rejected_or_has_nothing_to_show(compiled, before, after):
    data = compiled().bytes
    text = slice(*program(data))
    assert before in data[text]
    changed = data[: text.start] + data[text].replace(before, after) + data[text.stop :]
    assert len(changed) == len(data)
    outcome = read(changed)
    if after == b"\nnain {":
        assert outcome.convolutions == ()
    else:
        assert isinstance(outcome, PlanRejected)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"  tensor={ " + b"x" * 20_000 + b" }\n", id="one long word"),
        pytest.param(b'  tensor={ name="a" layers="' + b"[ONNX Layer: " * 8_000 + b'" }\n', id="layers that never end"),
        pytest.param(b"  tensor={ " * 6_000, id="braces that never close"),
        pytest.param(b"  tensor={ a=" + b"{ " * 20_000 + b"} " * 20_000 + b"}\n", id="braces in braces"),
        pytest.param(b'  tensor={ " ' * 6_000, id="quotes that never close"),
        pytest.param(b"  tensor={ a" + b" " * 60_000 + b"}\n", id="one long gap"),
    ],
)
@pytest.mark.parametrize("part", ["descriptors", "main"])
def test_a_hostile_program_takes_no_longer_than_two_seconds(part, text):
    descriptors, operations = text, b""
    if part == "main":
        descriptors, operations = b"", text.replace(b"tensor={", b"runtime_fusion={ backbone=conv ")
    whole = b"header {\n}\ndescriptors {\n" + descriptors + b"}\nmain {\n" + operations + b"}\n"
    read(file_of(whole))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=2048), tagged=st.booleans())
@example(data=bytes(64), tagged=False)
@example(data=bytes(112), tagged=True)
def test_arbitrary_bytes_are_rejected(data, tagged):
    if tagged and len(data) >= 36:
        data = patched(data, (0, b"vtrt"), (16, struct.pack("<Q", len(data))), (24, bytes([1, 7, 1, 116])))
    assert isinstance(read(data), PlanRejected)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet='header tensor=corrltn {}"\n[ONNX Layer: 0129\x00', max_size=400))
def test_an_arbitrary_program_is_read_or_rejected(text):
    read(file_of(b"header {\n" + text.encode()))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_truncated_plan_is_rejected(compiled, data):
    whole = compiled().bytes
    length = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 200))
    assert isinstance(read(whole[:length]), PlanRejected)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_truncated_plan_is_rejected_even_if_its_header_says_so(compiled, data):
    whole = compiled().bytes
    (_, start, size) = chunks(whole)[1]
    length = data.draw(st.integers(64, start + size - 1) | st.integers(64, 200))
    assert isinstance(read(patched(whole[:length], (16, struct.pack("<Q", length)))), PlanRejected)


@settings(max_examples=50, deadline=None)
@given(tail=st.binary(min_size=1, max_size=300))
def test_a_plan_with_something_after_it_is_rejected(compiled, tail):
    assert isinstance(read(compiled().bytes + tail), PlanRejected)


@pytest.mark.parametrize("region", ["anywhere", "header", "program"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_mutated_plan_is_read_or_rejected(compiled, name, region):
    whole = compiled(SHAPES[name]).bytes
    first, last = {"anywhere": (0, len(whole)), "header": (0, TABLE_END), "program": program(whole)}[region]
    anything, syntax = st.integers(0, 255), st.sampled_from(list(b'{}"=\n -019ax\x00\xff'))
    change = st.tuples(st.integers(first, last - 1), anything | syntax)

    @settings(max_examples=120, deadline=None)
    @given(changes=st.lists(change, min_size=1, max_size=40))
    def mutate(changes):
        read(patched(whole, *((position, bytes([value])) for position, value in changes)))

    mutate()


@pytest.mark.parametrize("name", ["plain", "grouped by 4"])
def test_a_program_with_lines_moved_or_lost_is_read_or_rejected(compiled, name):
    whole = compiled(SHAPES[name]).bytes
    start, end = program(whole)
    lines = whole[start:end].split(b"\n")

    @settings(max_examples=120, deadline=None)
    @given(data=st.data())
    def shuffle(data):
        order = data.draw(st.lists(st.integers(0, len(lines) - 1), max_size=len(lines)))
        text = b"\n".join([lines[0], *(lines[index] for index in order)])
        read(patched(whole, (start, text[: end - start].ljust(end - start))))

    shuffle()
