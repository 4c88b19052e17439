"""Arithmetic and bytes of graphs against sums made by hand, and the least time that follows from them on a card."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engines.backends.backend import TensorDescription
from engines.errors import InputRejected
from engines.onnx_file import Node, OnnxFile, onnx_file_from_path
from engines.plan import plan_from_file
from engines.roofline import (
    PeakUnknown,
    Work,
    bound_of,
    bytes_per_image,
    operations_per_image,
    seconds_of_kernel,
    works_from_onnx,
    works_of_file,
)
from engines.roofline.cards import CARDS, Card, card_from_key
from engines.traffic import traffic_of_plan
from tests.engines.quantized_graphs import PORTABLE, RTX, Block, QuantizedGraph, engine_from_model
from tests.engines.typed_graphs import Layer, TypedGraph

LAYERS = (Layer("stage0.0", 16, stride=2), Layer("stage1.0", 32, stride=2), Layer("stage1.1", 32))
IMAGE, MAPS = 3 * 32 * 32, (16 * 16 * 16, 32 * 8 * 8, 32 * 8 * 8)
"""Numbers of an image, and of the three convolutions' results."""
PRODUCTS = (MAPS[0] * 27, MAPS[1] * 144, MAPS[2] * 288)
"""Their multiply-accumulates: 3x3 of 3, 16 and 32 channels."""
WEIGHTS = (16 * 27 + 16, 32 * 144 + 32, 32 * 288 + 32)


@pytest.fixture
def counted(tmp_path):
    """``counted(model, size)``: the works of an onnx model by their names."""

    def count(model, size=None):
        path = tmp_path / "net.onnx"
        path.write_bytes(model.SerializeToString())
        works = works_from_onnx(onnx_file_from_path(path), size)
        found = {work.name: work for work in works}
        assert len(found) == len(works)
        return found

    return count


def typed(precision="fp16", *layers, **options):
    return TypedGraph(precision, **options).layers(*(layers or LAYERS)).head(10).model()


@pytest.mark.parametrize(("precision", "width"), [("fp16", 2), ("fp32", 4)])
def test_each_kernel_of_a_plain_network(counted, precision, width):
    """An image is float32 in any precision, and so are the scores; a convolution takes its ReLU in."""
    first, second, last = MAPS
    operations = [2 * products for products in PRODUCTS]
    weights = [width * numbers for numbers in WEIGHTS]
    assert list(counted(typed(precision)).values()) == [
        Work("stage0.0/Conv", operations[0], 4 * IMAGE, width * first, weights[0], precision),
        Work("stage1.0/Conv", operations[1], width * first, width * second, weights[1], precision),
        Work("stage1.1/Conv", operations[2], width * second, width * last, weights[2], precision),
        Work("head/Pool", 0, width * last, width * 32, 0, precision),
        Work("head/Gemm", 2 * 320, width * 32, 4 * 10, width * 330, precision),
    ]


CHANGES = {
    "stride": (Layer("stage1.1", 32, stride=2), {"operations": 1 / 4, "written_bytes": 1 / 4}),
    "groups": (Layer("stage1.1", 32, groups=4), {"operations": 1 / 4}),
    "depthwise": (Layer("stage1.1", 32, groups=0), {"operations": 1 / 32}),
    "kernel": (Layer("stage1.1", 32, kernel=1), {"operations": 1 / 9}),
    "channels": (Layer("stage1.1", 64), {"operations": 2, "written_bytes": 2}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_layer_changes_what_it_should_and_nothing_else(counted, what):
    layer, factors = CHANGES[what]
    before = counted(typed())["stage1.1/Conv"]
    after = counted(typed("fp16", *LAYERS[:2], layer))["stage1.1/Conv"]
    expected = {name: getattr(before, name) * factor for name, factor in factors.items()}
    kept = {field.name for field in dataclasses.fields(Work)} - {*factors, "weight_bytes"}
    expected |= {name: getattr(before, name) for name in kept}
    assert expected == {name: getattr(after, name) for name in expected}
    numbers = math.prod((layer.channels, 32 // (layer.groups or 32), layer.kernel, layer.kernel)) + layer.channels
    assert after.weight_bytes == 2 * numbers


def test_squeeze_and_excitation_takes_three_passes_over_its_map(counted):
    """The map is written, read for the mean, and read again for the product: the factors need all of it."""
    numbers = 16 * 16 * 16
    works = counted(typed("fp16", Layer("stage0.0", 16, stride=2, se="before", se_channels=4)))
    se = "stage0.0/se"
    assert [work.name for work in list(works.values())[:5]] == [
        "stage0.0/Conv", f"{se}/Pool", f"{se}/reduce/Conv", f"{se}/expand/Conv", f"{se}/Mul",
    ]  # fmt: skip
    assert (works["stage0.0/Conv"].written_bytes, works[f"{se}/Pool"].read_bytes) == (2 * numbers, 2 * numbers)
    assert works[f"{se}/reduce/Conv"] == Work(f"{se}/reduce/Conv", 2 * 64, 2 * 16, 2 * 4, 2 * 68, "fp16")
    assert works[f"{se}/expand/Conv"] == Work(f"{se}/expand/Conv", 2 * 64, 2 * 4, 2 * 16, 2 * 80, "fp16")
    assert works[f"{se}/Mul"] == Work(f"{se}/Mul", 0, 2 * numbers + 2 * 16, 2 * numbers, 0, "fp16")


def test_squeeze_and_excitation_behind_the_relu_is_the_same_work(counted):
    before, after = (
        counted(typed("fp16", Layer("stage0.0", 16, stride=2, se=where, se_channels=4)))
        for where in ("before", "after")
    )
    assert list(before.values()) == list(after.values())


@pytest.mark.parametrize(("form", "width"), [(RTX, 2), (PORTABLE, 4)], ids=["rtx", "portable"])
def test_int8_layers_read_and_write_a_byte_a_number(counted, form, width):
    """What is read through a QuantizeLinear alone is written as codes; what a float layer reads, as floats."""
    blocks = (Block("stage0.0", 16, stride=2), Block("stage1.0", 32, stride=2), Block("stage1.1", 32, kept=True))
    works = counted(QuantizedGraph(form).blocks(*blocks).head(10).model())
    first, second, last = MAPS
    scales = {RTX: 1, PORTABLE: 32}[form]
    float_kind = "fp16" if form is RTX else "fp32"
    own = 32 * 144 + width * 32 + (width + 1) * scales
    assert works["stage0.0/Conv"].read_bytes == 4 * IMAGE
    assert works["stage0.0/Conv"].written_bytes == first
    assert works["stage1.0/Conv"] == Work(
        "stage1.0/Conv", 2 * PRODUCTS[1], first, width * second, own + (width + 1), "int8"
    )
    assert works["stage1.1/Conv"] == Work(
        "stage1.1/Conv", 2 * PRODUCTS[2], width * second, width * last, width * WEIGHTS[2], float_kind
    )
    assert (works["head/Pool"].written_bytes, works["head/Gemm"].dtype) == (32, "int8")
    assert works["head/Gemm"].read_bytes == 32


def test_codes_that_are_flattened_on_the_way_are_still_codes(counted):
    graph = QuantizedGraph(RTX).blocks(Block("stage0.0", 16)).head(10)
    flatten = next(node for node in graph.nodes if node.op_type == "Flatten")
    dequantize = next(node for node in graph.nodes if node.output[0] == "head/input/floats")
    quantize = next(node for node in graph.nodes if node.output[0] == dequantize.input[0])
    before = counted(graph.model())["head/Gemm"]
    graph.nodes.remove(flatten)
    graph.nodes.insert(graph.nodes.index(dequantize) + 1, flatten)
    quantize.input[0], flatten.input[0], flatten.output[0] = "head/pooled", "head/input/floats", "flat"
    next(node for node in graph.nodes if node.op_type == "Gemm").input[0] = "flat"
    assert before.dtype == "int8"
    assert counted(graph.model())["head/Gemm"] == before


def test_codes_of_weights_alone_are_no_int8_arithmetic(counted):
    model = QuantizedGraph(RTX).blocks(Block("stage0.0", 16)).head(10).model()
    assert counted(model)["stage0.0/Conv"].dtype == "int8"
    next(node for node in model.graph.node if node.op_type == "Conv").input[0] = "input/half"
    assert counted(model)["stage0.0/Conv"].dtype == "fp16"


def test_a_result_that_is_read_as_codes_and_as_numbers_is_written_as_both(counted):
    graph = QuantizedGraph(RTX).blocks(Block("stage0.0", 16, stride=2), Block("stage1.0", 32, stride=2)).head(10)
    model = graph.model()
    assert counted(model)["stage0.0/Conv"].written_bytes == MAPS[0]
    model.graph.node.append(helper.make_node("Cast", ["stage0.0"], ["stage0"], to=TensorProto.FLOAT))
    model.graph.output.append(helper.make_tensor_value_info("stage0", TensorProto.FLOAT, ["N", 16, 16, 16]))
    assert counted(model)["stage0.0/Conv"].written_bytes == MAPS[0] + 4 * MAPS[0]


# --- the form with branches


def zeros(*shape):
    return np.zeros(shape, np.float32)


def graph_of(nodes, weights, shape=("N", 8, 6, 6), outputs=("y",)):
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8, None, None]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def norm(source, target):
    return helper.make_node("BatchNormalization", [source, "s", "b", "m", "v"], [target], name=target)


BRANCHES = [
    helper.make_node("Conv", ["x", "w0"], ["in"], name="stem"),
    helper.make_node("Conv", ["in", "w3"], ["c3"], name="dense", pads=[1] * 4),
    norm("c3", "n3"),
    helper.make_node("Conv", ["in", "w1"], ["c1"], name="pointwise"),
    norm("c1", "n1"),
    norm("in", "n0"),
    helper.make_node("Add", ["n3", "n1"], ["sum"], name="sum"),
    helper.make_node("Add", ["sum", "n0"], ["all"], name="all"),
    helper.make_node("Relu", ["all"], ["y"], name="relu"),
]
BRANCH_WEIGHTS = {
    "w0": zeros(8, 8, 1, 1), "w3": zeros(8, 8, 3, 3), "w1": zeros(8, 8, 1, 1), **{name: zeros(8) for name in "sbmv"},
}  # fmt: skip


def test_a_block_of_three_branches_is_a_kernel_for_each_convolution(counted):
    """The second one adds the first one's result and the normalised input, which it reads anyway."""
    numbers, norms = 8 * 6 * 6, 4 * 4 * 8
    assert list(counted(graph_of(BRANCHES, BRANCH_WEIGHTS)).values()) == [
        Work("stem", 2 * numbers * 8, 4 * numbers, 4 * numbers, 4 * 64, "fp32"),
        Work("dense", 2 * numbers * 72, 4 * numbers, 4 * numbers, 4 * 576 + norms, "fp32"),
        Work("pointwise", 2 * numbers * 8, 8 * numbers, 4 * numbers, 4 * 64 + norms, "fp32"),
    ]


def test_a_dead_end_is_not_counted(counted):
    works = counted(graph_of(BRANCHES, BRANCH_WEIGHTS, outputs=("in",)))
    assert list(works) == ["stem"]


def test_what_two_nodes_read_is_read_once_each_and_written_once(counted):
    nodes = [BRANCHES[0], BRANCHES[1], helper.make_node("Relu", ["in"], ["r"], name="r")]
    nodes += [helper.make_node("Conv", ["r", "w1"], ["y"], name="after")]
    works = counted(graph_of(nodes, BRANCH_WEIGHTS, outputs=("y", "c3")))
    assert list(works) == ["stem", "dense", "after"]
    assert [work.written_bytes for work in works.values()] == [4 * 8 * 36] * 3
    assert [work.read_bytes for work in works.values()] == [4 * 8 * 36] * 3


def test_a_relu_of_what_is_an_output_is_done_where_it_is_read(counted):
    nodes = [BRANCHES[0], helper.make_node("Relu", ["in"], ["r"], name="r")]
    nodes += [helper.make_node("Conv", ["r", "w1"], ["y"], name="after")]
    for outputs in (("y",), ("y", "in")):
        works = counted(graph_of(nodes, BRANCH_WEIGHTS, outputs=outputs))
        assert [work.written_bytes for work in works.values()] == [4 * 8 * 36] * 2


def test_what_nothing_makes_or_reads_is_a_kernel_of_its_own(counted):
    works = counted(graph_of([helper.make_node("Relu", ["x"], ["y"], name="alone")], {}))
    assert works == {"alone": Work("alone", 0, 4 * 288, 4 * 288, 0, "fp32")}


# --- against what a real engine moves


def engine_of(request, name):
    """An FP16 engine and its graph."""
    if name == "typed":
        made = engine_from_model(typed(), request.getfixturevalue("tmp_path"))
        return made.path, made.onnx
    if name == "compiled":
        network = request.getfixturevalue("compiled")()
        return network.engine, network.onnx
    folder = request.getfixturevalue("fashion_export")
    return folder / "fashion.fp16.engine", folder / "fashion.fp16.onnx"


@pytest.mark.parametrize("name", ["typed", "compiled", "fashion"])
def test_an_fp16_engine_moves_these_bytes_and_those_of_two_changes_of_layout(request, name):
    """To the byte: all that TensorRT for RTX does beside is to write and read the image once more, in half and with
    channels of zeros, as its first weight has, too; and the last map, in another layout, unless that is one pixel.
    """
    engine, graph = engine_of(request, name)
    works, plan = works_of_file(graph), plan_from_file(engine)
    traffic, weights = traffic_of_plan(plan, 8), sum(work.weight_bytes for work in works)
    convolutions = [work for work in works if work.name.endswith("/Conv")]
    (_, channels, height, width), stored = plan.convolutions[0].weight.dims, onnx_file_from_path(graph)
    padded = 2 * channels * math.prod(stored.inputs[0].shape[2:])
    last = convolutions[-1].written_bytes
    is_map = last > 2 * stored.weights["head.weight"].shape[1]
    activations = bytes_per_image(works, 8) - weights / 8
    assert traffic.activations - activations == 2 * padded + (2 * last if is_map else 0)
    assert is_map == (name == "typed")
    outputs, source = stored.weights["stage0.0.weight"].shape[:2]
    padding = 2 * (channels - source) * outputs * height * width
    assert traffic.constants - padding == pytest.approx(weights, rel=0.01)  # and a factor of 1 for each kernel


def test_the_graph_of_an_engine_is_the_one_beside_it(fashion):
    engine, graph = fashion / "fashion.fp16.engine", fashion / "fashion.fp16.onnx"
    assert works_of_file(engine) == works_of_file(graph)
    graph.write_bytes(graph.read_bytes() + b"\x2a\x00")
    with pytest.raises(InputRejected, match=r"fashion\.fp16\.onnx or fashion\.fp16\.rtx\.onnx, is not beside it"):
        works_of_file(engine)


# --- what is refused, and free extents


def test_a_graph_of_any_size_needs_one(counted):
    free = TypedGraph("fp16").layers(*LAYERS).head(10).model()
    fixed = counted(free)
    for axis, symbol in ((2, "height"), (3, "width")):
        free.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = symbol
    with pytest.raises(InputRejected, match=r"net\.onnx: input \(\?, 3, \?, \?\) has extents .* as in --size 224x224"):
        counted(free)
    assert counted(free, (32, 32)) == fixed
    larger = counted(free, (64, 32))
    convolutions = [name for name in fixed if name.endswith("/Conv")]
    assert [larger[name].operations for name in convolutions] == [2 * fixed[name].operations for name in convolutions]


def test_a_graph_of_one_size_takes_no_other(counted):
    assert counted(typed(), (32, 32)) == counted(typed())
    with pytest.raises(InputRejected, match=r"input takes images of 32x32, not 32x48; leave out --size"):
        counted(typed(), (32, 48))


def test_a_fixed_batch_is_counted_by_the_image(counted):
    model = typed()
    alone = counted(model)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 6
    assert counted(model) == alone


def test_an_unknown_operation_is_named(counted):
    model = typed()
    model.graph.node[2].op_type = "Gelu"
    with pytest.raises(InputRejected, match=r"net\.onnx: Gelu stage0\.0/Relu: an operation that is not counted here"):
        counted(model)


def test_products_of_other_numbers_are_refused(counted):
    model = graph_of([helper.make_node("Conv", ["x", "w"], ["y"], name="wide")], {"w": np.zeros((8, 8, 1, 1))})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(InputRejected, match=r"Conv wide: products of float64; its work cannot be counted"):
        counted(model)


def test_an_output_that_nothing_makes_is_refused(counted):
    with pytest.raises(InputRejected, match="nothing makes its output z"):
        counted(graph_of(BRANCHES, BRANCH_WEIGHTS, outputs=("z",)))


def test_a_graph_that_computes_nothing_is_refused(counted):
    with pytest.raises(InputRejected, match="it computes nothing"):
        counted(graph_of([helper.make_node("Identity", ["x"], ["y"])], {}))


def test_inputs_of_different_batches_are_refused(counted):
    model = graph_of([helper.make_node("Add", ["x", "z"], ["y"], name="sum")], {})
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 8, 6, 6]))
    assert counted(model)["sum"].read_bytes == 2 * 4 * 288
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(InputRejected, match="its inputs are not one batch of images"):
        counted(model)


def test_any_other_free_extent_is_refused(counted):
    model = graph_of([helper.make_node("Relu", ["x"], ["y"])], {}, shape=("N", "channels", 6, 6))
    with pytest.raises(InputRejected, match=r"x \(\?, \?, 6, 6\) has extents that are not known"):
        counted(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Small graphs with every kind of kernel."""
    folder = tmp_path_factory.mktemp("whole")
    quantized = QuantizedGraph(RTX, size=4).blocks(Block("a", 4), Block("b", 4, se=2), Block("c", 4, kept=True)).head(3)
    for name, model in (("int8", quantized.model()), ("branches", graph_of(BRANCHES, BRANCH_WEIGHTS))):
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    return folder


@given(st.sampled_from(["int8", "branches"]), st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_graph_is_counted_or_refused_and_nothing_else(whole, name, data):
    content = (whole / f"{name}.onnx").read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        content = content[:start] + data.draw(st.binary(max_size=4)) + content[start + data.draw(st.integers(0, 4)) :]
    path = whole / "damaged.onnx"
    path.write_bytes(content)
    refusal = ""
    try:
        works = works_from_onnx(onnx_file_from_path(path))
    except InputRejected as error:
        works, refusal = (), str(error)
    assert bool(works) != bool(refusal)
    assert all(min(work.operations, work.read_bytes, work.written_bytes, work.weight_bytes) >= 0 for work in works)
    assert not refusal or refusal.startswith(f"{path}: ")


# --- the bound

CARD = Card(
    key="x",
    title="X",
    device_names=("NVIDIA X",),
    compute_capability=80,
    operations_per_second={"fp32": 1e12, "fp16": 8e12, "int8": None},
    bytes_per_second=1e11,
    sources=("none",),
    notes="",
)
HEAVY, LIGHT = Work("heavy", 10**9, 1000, 1000, 500, "fp16"), Work("light", 1000, 10**8, 10**8, 10**6, "fp32")
COUNTS = st.integers(0, 10**10)
WORKS = st.lists(
    st.builds(Work, st.just("k"), COUNTS, COUNTS, st.integers(1, 10**9), COUNTS, st.sampled_from(["fp32", "fp16"])),
    min_size=1,
    max_size=6,
)


def test_the_bound_of_two_kernels_by_hand():
    bound = bound_of([HEAVY, LIGHT, HEAVY], CARD, 4)
    assert bound.arithmetic_seconds == pytest.approx(2 * 4e9 / 8e12)
    assert bound.memory_seconds == pytest.approx((4 * 2e8 + 1e6) / 1e11)
    assert bound.seconds == bound.arithmetic_seconds + bound.memory_seconds
    assert (bound.arithmetic_kernels, bound.memory_kernels, bound.binds) == (2, 1, "memory")
    assert bound_of([HEAVY], CARD, 4).binds == "arithmetic"
    assert bytes_per_image([HEAVY, LIGHT], 4) == 2000 + 500 / 4 + 2e8 + 1e6 / 4
    assert operations_per_image([HEAVY, LIGHT]) == 10**9 + 1000


@pytest.mark.parametrize(("operations", "kernels"), [(79, (0, 1)), (81, (1, 0))])
def test_a_kernel_goes_over_from_memory_to_arithmetic_where_they_take_as_long(operations, kernels):
    """Eighty operations to a byte are the card's own ratio."""
    bound = bound_of([Work("balanced", operations, 1, 0, 0, "fp16")], CARD, 1)
    assert (bound.arithmetic_kernels, bound.memory_kernels) == kernels
    assert bound.seconds == pytest.approx(max(operations / 8e12, 1e-11))


@pytest.mark.parametrize(("work", "bandwidth", "peak"), [(LIGHT, 2, 1), (HEAVY, 1, 2)], ids=["memory", "arithmetic"])
def test_only_what_binds_counts(work, bandwidth, peak):
    """How much longer it takes with half the bandwidth, and with half the peak."""
    slow = dataclasses.replace(CARD, bytes_per_second=CARD.bytes_per_second / 2)
    weak = dataclasses.replace(CARD, operations_per_second={"fp32": 0.5e12, "fp16": 4e12, "int8": None})
    seconds = bound_of([work], CARD, 8).seconds
    assert bound_of([work], slow, 8).seconds == pytest.approx(bandwidth * seconds)
    assert bound_of([work], weak, 8).seconds == pytest.approx(peak * seconds)


@given(WORKS, st.integers(1, 256))
@settings(max_examples=150, deadline=None)
def test_a_bound_is_one_for_arithmetic_and_for_memory_and_no_more_than_their_sum(works, batch):
    bound = bound_of(works, CARD, batch)
    arithmetic = sum(seconds_of_kernel(work, CARD, batch)[0] for work in works)
    memory = batch * bytes_per_image(works, batch) / CARD.bytes_per_second
    assert max(arithmetic, memory) * (1 - 1e-9) <= bound.seconds <= (arithmetic + memory) * (1 + 1e-9)
    assert bound.arithmetic_kernels + bound.memory_kernels == len(works)
    assert (bound.binds == "arithmetic") == (bound.arithmetic_seconds > bound.memory_seconds)


@given(WORKS, st.integers(1, 128))
@settings(max_examples=100, deadline=None)
def test_a_larger_batch_takes_no_less_and_no_more_for_an_image(works, batch):
    one, two = bound_of(works, CARD, batch).seconds, bound_of(works, CARD, 2 * batch).seconds
    assert one * (1 - 1e-9) <= two <= 2 * one * (1 + 1e-9)


def test_a_precision_without_a_peak_has_no_bound_unless_nothing_is_computed_in_it():
    with pytest.raises(PeakUnknown, match=r"^no peak of int8 is known for X$"):
        bound_of([LIGHT, dataclasses.replace(HEAVY, dtype="int8")], CARD, 1)
    moved = Work("moved", 0, 10**6, 0, 0, "int8")
    assert bound_of([moved], CARD, 1).seconds == pytest.approx(1e-5)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.key)
def test_every_card_bounds_every_precision(counted, card):
    for model in (typed("fp16"), typed("fp32"), QuantizedGraph(RTX).blocks(Block("a", 16)).head(10).model()):
        bound = bound_of(tuple(counted(model).values()), card, 8)
        assert 1e-8 < bound.seconds < 1e-2


# --- figures worked out apart from this code: milliseconds of a batch of 32 at 224 pixels, by layer, from the shapes

NETWORKS = {
    "A0": ((1, 2, 4, 14, 1), (48, 48, 96, 192, 1280)),
    "B1": ((1, 4, 6, 16, 1), (64, 128, 256, 512, 2048)),
}
WORKED_OUT = {
    ("A0", "fp16"): {"t4": 1.57, "l4": 1.07, "rtx3090": 1.26, "rtx4090": 0.59, "a100": 0.31},
    ("A0", "int8"): {"t4": 0.79, "l4": 0.53, "rtx3090": 0.34, "rtx4090": 0.18, "a100": 0.16},
    ("B1", "fp16"): {"l4": 6.58, "rtx3090": 10.7, "rtx4090": 4.63, "a100": 2.45},
    ("B1", "int8"): {"l4": 3.29, "rtx3090": 2.69, "rtx4090": 1.19, "a100": 1.22},
}


def convolutions_of(name, precision):
    """A network's convolutions as a file, whose images and result are in the precision, too. Weights take no room."""
    dtype = {"fp16": "float16", "int8": "int8"}[precision]
    weights = {"scale": np.ones((), np.float16), "zero": np.zeros((), np.int8)}
    nodes, last, channels = [], "input", 3

    def node(operation, inputs, output, **attributes):
        nodes.append(Node(output, operation, "", tuple(inputs), (output,), attributes))
        return output

    for stage, (depth, width) in enumerate(zip(*NETWORKS[name], strict=True)):
        for index in range(depth):
            block = f"stage{stage}.{index}"
            weights[f"{block}.weight"] = np.broadcast_to(np.zeros((), dtype), (width, channels, 3, 3))
            operands = [last, f"{block}.weight"]
            if precision == "int8":
                operands = [node("DequantizeLinear", [x, "scale", "zero"], f"{block}/{x}") for x in operands]
            made = node("Conv", operands, f"{block}/conv", pads=(1,) * 4, strides=(1 if index else 2,) * 2)
            last, channels = node("Relu", [made], block), width
            if precision == "int8":
                last = node("QuantizeLinear", [last, "scale", "zero"], f"{block}/codes")
    images = (TensorDescription("input", dtype, (None, 3, 224, 224)),)
    result = (TensorDescription(last, dtype, (None, channels, 7, 7)),)
    return OnnxFile(pathlib.Path("net.onnx"), "", {"": 19}, {}, images, result, tuple(nodes), weights)


@pytest.mark.parametrize(("name", "precision"), WORKED_OUT, ids=" ".join)
def test_the_bounds_are_those_that_were_worked_out_apart_from_this_code(name, precision):
    works = works_from_onnx(convolutions_of(name, precision))
    assert {work.dtype for work in works} == {precision}
    for key, milliseconds in WORKED_OUT[name, precision].items():
        found = bound_of(works, card_from_key(key), 32).seconds * 1e3
        assert found == pytest.approx(milliseconds, rel=0.01, abs=0.0051)
