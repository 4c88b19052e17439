"""The audit on every shape of graph: depthwise and pointwise convolutions, SE, several outputs, free sizes, two types.

Each engine is a real one; each planted fault is one that the audit must name after the right node, whatever the
compiler made of it: a convolution, a product of matrices, or generated code.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

from engines.audit import audit_of_plan, expected_from_onnx
from engines.compilation import CompilerProcess
from engines.compiler import Request
from engines.onnx_file import onnx_file_from_path
from engines.plan import plan_from_bytes, plan_from_file
from engines.sdk import SDKS
from tests.engines.typed_graphs import Layer, TypedGraph

RTX = SDKS[1]
SIZES = ((32, 32), (64, 64), (96, 128))
WEIGHTS = "its weights do not stand in the engine bit for bit"
BIAS = "its bias does not stand in the engine bit for bit"
EACH = "Conv+ReLU in one kernel each"


def depthwise(name, channels, stride=1, **others):
    return Layer(name, channels, 3, stride, 0, **others)


def pointwise(name, channels, **others):
    return Layer(name, channels, 1, **others)


def mobile(graph):
    """MobileOne: depthwise and pointwise in turn, some channels odd, the widest compiled as products of matrices."""
    return graph.layers(
        Layer("stage0", 30, stride=2), depthwise("stage1.0", 30, 2), pointwise("stage1.1", 50),
        depthwise("stage2.0", 50), pointwise("stage2.1", 256), depthwise("stage3.0", 256, 2),
        pointwise("stage3.1", 256), depthwise("stage3.2", 256), pointwise("stage3.3", 300),
    )  # fmt: skip


def mobile_se(graph):
    return graph.layers(
        Layer("stage0", 64, stride=2), depthwise("stage1.0", 64, 2, se="before", se_channels=4),
        pointwise("stage1.1", 128, se="before"), depthwise("stage2.0", 128, se="before"),
        pointwise("stage2.1", 128, se="before"),
    )  # fmt: skip


def plus(graph):
    """RepVGGplus: SE after the ReLU, a quarter of the channels."""
    return graph.layers(
        Layer("stage0", 64, stride=2, se="after", se_channels=16),
        Layer("stage1.0", 128, stride=2, se="after", se_channels=32),
        Layer("stage1.1", 128, se="after", se_channels=32),
    )


def d2se(graph):
    return graph.layers(
        Layer("stage0", 64, stride=2, se="before", se_channels=4),
        Layer("stage1.0", 160, stride=2, se="before", se_channels=10),
        Layer("stage1.1", 160, se="before", se_channels=10),
    )


def features(graph):
    graph.layers(Layer("stage0", 16, stride=2), Layer("stage1.0", 32, stride=2), Layer("stage1.1", 32))
    graph.features("stage1").layers(depthwise("stage2.0", 32, 2), pointwise("stage2.1", 64)).features("stage2")
    return graph.layers(Layer("stage3.0", 64, stride=2, groups=4, se="after")).features("stage3")


def backbone(graph):
    return graph.layers(Layer("stage0", 16, stride=2), Layer("stage1.0", 32, stride=2)).features("output")


def grouped(graph):
    return graph.layers(
        Layer("stage0", 16, stride=2), Layer("stage1.0", 32, stride=2), Layer("stage1.1", 32, groups=4),
        Layer("stage2.0", 64, groups=2), Layer("stage2.1", 64, groups=2), Layer("stage2.2", 64, groups=2),
    )  # fmt: skip


def kept(graph):
    """Convolutions of each kind in float32 in the middle of a network in half."""
    return graph.layers(
        Layer("stage0", 16, stride=2), Layer("stage1.0", 32, stride=2, kept=True), depthwise("stage1.1", 32),
        depthwise("stage1.2", 32, kept=True), pointwise("stage1.3", 256), pointwise("stage1.4", 256),
        pointwise("stage1.5", 256, kept=True), pointwise("stage1.6", 256),
        Layer("stage2.0", 64, se="after", kept=True), Layer("stage2.1", 64),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph, whether it has a classifier, and what the audit says of its engine in fp16 and fp32."""

    layers: object
    fp16: str
    fp32: str
    head: bool = True
    sizes: tuple | None = None
    cards: tuple = ()


UNREAD = "not readable: {}/se/expand/Conv: the order of its columns"
MOBILE = Case(
    mobile,
    "9 of 9 convs in FP16, Conv+ReLU in one kernel for 8 of 9, all 10 weights bit-equal",
    f"9 of 9 convs in FP32, {EACH}, all 10 weights bit-equal",
)
CASES = {
    "mobile": MOBILE,
    "mobile, free size": dataclasses.replace(MOBILE, sizes=SIZES),
    "mobile, Turing": dataclasses.replace(
        MOBILE, cards=(75,), fp16=f"9 of 9 convs in FP16, {EACH}, all 10 weights bit-equal", fp32=""
    ),
    "mobile with SE": Case(
        mobile_se,
        f"13 of 13 convs in FP16, {EACH}, 13 of 14 weights bit-equal ({UNREAD.format('stage1.0')})",
        f"13 of 13 convs in FP32, {EACH}, all 14 weights bit-equal",
    ),
    "plus": Case(
        plus,
        f"9 of 9 convs in FP16, {EACH}, all 10 weights bit-equal",
        f"9 of 9 convs in FP32, {EACH}, all 10 weights bit-equal",
    ),
    "d2se": Case(
        d2se,
        f"9 of 9 convs in FP16, {EACH}, 9 of 10 weights bit-equal ({UNREAD.format('stage0')})",
        f"9 of 9 convs in FP32, {EACH}, all 10 weights bit-equal",
        sizes=SIZES,
    ),
    "features": Case(
        features,
        "8 of 8 convs in FP16, Conv+ReLU in one kernel for 6 of 7, all 8 weights bit-equal",
        "8 of 8 convs in FP32, Conv+ReLU in one kernel for 6 of 7, all 8 weights bit-equal",
        head=False,
    ),
    "features, free size": Case(
        features,
        "8 of 8 convs in FP16, Conv+ReLU in one kernel for 6 of 7, all 8 weights bit-equal",
        "8 of 8 convs in FP32, Conv+ReLU in one kernel for 6 of 7, all 8 weights bit-equal",
        head=False,
        sizes=SIZES,
    ),
    "backbone": Case(
        backbone,
        f"2 of 2 convs in FP16, {EACH}, all 2 weights bit-equal",
        f"2 of 2 convs in FP32, {EACH}, all 2 weights bit-equal",
        head=False,
    ),
    "grouped": Case(
        grouped,
        "6 of 6 convs in FP16, Conv+ReLU in one kernel for 5 of 6, all 7 weights bit-equal",
        "6 of 6 convs in FP32, Conv+ReLU in one kernel for 5 of 6, all 7 weights bit-equal",
        sizes=SIZES,
    ),
    "kept": Case(
        kept,
        f"6 of 12 convs in FP16, 6 of 12 convs in FP32, {EACH}, all 13 weights bit-equal",
        "",
    ),
}
EVERY = [(name, precision) for name in CASES for precision in ("fp16", "fp32") if getattr(CASES[name], precision)]


@dataclasses.dataclass(frozen=True)
class Engine:
    """A compiled engine, read, and what its graph says."""

    data: bytes
    plan: object
    convolutions: list
    matrices: list

    def problems(self, convolutions=None, matrices=None):
        return self.audit(convolutions, matrices).problems

    def audit(self, convolutions=None, matrices=None):
        return audit_of_plan(
            self.plan,
            self.convolutions if convolutions is None else convolutions,
            self.matrices if matrices is None else matrices,
        )

    def changed(self, index, **fields):
        """The convolutions with one of them changed."""
        return [
            dataclasses.replace(expected, **fields) if place == index else expected
            for place, expected in enumerate(self.convolutions)
        ]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """``engine(name, precision)``: of CASES, compiled once."""
    made = {}

    def compile_once(name, precision):
        if (name, precision) not in made:
            case, folder = CASES[name], tmp_path_factory.mktemp("shape")
            graph = case.layers(TypedGraph(precision))
            model = (graph.head(10) if case.head else graph).model(sizes="32x32:64x64:96x128" if case.sizes else None)
            onnx.save(model, folder / "net.onnx")
            with CompilerProcess(RTX) as process:
                process.submit(
                    Request(
                        str(folder / "net.onnx"), str(folder / "net.engine"), (1, 2, 4), case.cards, sizes=case.sizes
                    )
                )
                process.result()
            plan, expected = plan_from_file(folder / "net.engine"), onnx_file_from_path(folder / "net.onnx")
            made[name, precision] = Engine((folder / "net.engine").read_bytes(), plan, *expected_from_onnx(expected))
        return made[name, precision]

    return compile_once


@pytest.mark.parametrize(("name", "precision"), EVERY)
def test_a_true_engine_has_no_problems_and_one_exact_line(engine, name, precision):
    audit = engine(name, precision).audit()
    assert audit.problems == ()
    assert audit.line == getattr(CASES[name], precision)


def faults_of(weight):
    """Wrong weights made of right ones, by what is wrong: the last bit of one, two channels, its window, its sides."""
    out, channels, height, _ = weight.shape
    flipped = weight.copy()
    flipped.reshape(-1).view(f"u{weight.itemsize}")[weight.size // 2] ^= 1
    yield "a bit", flipped
    if out > 1:
        yield "two outputs", weight[[1, 0, *range(2, out)]]
    if channels > 1:
        yield "two inputs", weight[:, [1, 0, *range(2, channels)]]
    if height > 1:
        yield "upside down", weight[:, :, ::-1].copy()
        yield "turned", weight.transpose(0, 1, 3, 2).copy()
    if out == channels > 1:
        yield "transposed", weight.transpose(1, 0, 2, 3).copy()


@pytest.mark.parametrize(("name", "precision"), EVERY)
def test_a_wrong_weight_or_bias_of_any_node_is_named_and_no_other(engine, name, precision):
    built = engine(name, precision)
    unread = built.audit().unproven
    for index, expected in enumerate(built.convolutions):
        for fault, weight in faults_of(expected.weight):
            if fault == "two inputs" and f"{expected.node}: the order of its columns" in unread:
                continue  # said not to be readable
            assert built.problems(built.changed(index, weight=weight)) == (f"{expected.node}: {WEIGHTS}",), fault
        bias = expected.bias.copy()
        bias[-1] = np.nextafter(bias[-1], bias.dtype.type(9))
        assert built.problems(built.changed(index, bias=bias)) == (f"{expected.node}: {BIAS}",)
    for matrix in built.matrices:
        swapped = dataclasses.replace(matrix, weight=matrix.weight[:, [1, 0, *range(2, matrix.weight.shape[1])]])
        assert built.problems(matrices=[swapped]) == (f"{matrix.node}: {WEIGHTS}",)


@pytest.mark.parametrize(("name", "precision"), EVERY)
def test_two_swapped_convolutions_of_one_shape_are_both_named(engine, name, precision):
    built = engine(name, precision)
    pairs = [
        (first, second)
        for first, expected in enumerate(built.convolutions)
        for second, other in enumerate(built.convolutions)
        if first < second
        and expected.weight.shape == other.weight.shape
        and expected.weight.dtype == other.weight.dtype
    ]
    assert pairs or name in ("backbone", "plus", "features", "features, free size")
    for first, second in pairs:
        one, two = built.convolutions[first], built.convolutions[second]
        swapped = list(built.convolutions)
        swapped[first] = dataclasses.replace(one, weight=two.weight, bias=two.bias)
        swapped[second] = dataclasses.replace(two, weight=one.weight, bias=one.bias)
        named = {problem.split(":")[0] for problem in built.problems(swapped)}
        assert named == {one.node, two.node}


@pytest.mark.parametrize(("asked", "built"), [("fp16", "fp32"), ("fp32", "fp16")])
@pytest.mark.parametrize("name", ["mobile", "mobile with SE", "plus", "features", "grouped"])
def test_every_convolution_in_another_precision_than_asked_for_is_named(engine, name, asked, built):
    wanted, found = engine(name, asked), engine(name, built)
    audit = found.audit(wanted.convolutions, wanted.matrices)
    named = {problem.split(":")[0] for problem in audit.problems}
    assert named == {expected.node for expected in (*wanted.convolutions, *wanted.matrices)}
    assert audit.weights_bit_equal == 0
    dtype = {"fp16": "float16", "fp32": "float32"}[asked]
    assert dtype not in audit.by_dtype


def test_one_convolution_that_was_not_kept_in_float32_is_named(engine):
    """Half where float32 was asked for, and the other way round, in an engine that has both."""
    built = engine("kept", "fp16")
    for index, expected in enumerate(built.convolutions):
        other = np.float32 if expected.weight.dtype == np.float16 else np.float16
        changed = built.changed(index, weight=expected.weight.astype(other), bias=expected.bias.astype(other))
        said = [problem for problem in built.problems(changed) if "asked for" in problem]
        has = expected.weight.dtype
        assert said == [f"{expected.node}: asked for {np.dtype(other)}, compiled with {has} x {has}"]


# --- products of matrices


def test_wide_pointwise_convolutions_are_products_of_matrices_with_the_weight_first(engine):
    built = engine("mobile", "fp16")
    kernels = {kernel.onnx_nodes[0]: kernel for kernel in built.plan.matrices}
    assert list(kernels) == ["stage3.1/Conv", "stage3.3/Conv", "head/Gemm"]
    assert [kernel.weight_first for kernel in kernels.values()] == [True, True, False]
    assert [kernel.weight.dims for kernel in kernels.values()] == [(1, 256, 256), (1, 300, 256), (300, 10)]
    assert [kernel.relu for kernel in kernels.values()] == [True, False, False]
    for kernel in kernels.values():
        assert (kernel.input_dtype, kernel.weight_dtype) == ("float16", "float16")


@pytest.mark.parametrize("node", ["stage3.1/Conv", "stage3.3/Conv"])
def test_a_changed_byte_of_a_product_of_matrices_is_named(engine, node):
    built = engine("mobile", "fp16")
    kernel = next(kernel for kernel in built.plan.matrices if node in kernel.onnx_nodes)
    for place in (kernel.weight.position, kernel.weight.position + kernel.weight.size // 2 + 1):
        data = bytearray(built.data)
        data[place] ^= 1
        planted = dataclasses.replace(built, plan=plan_from_bytes(bytes(data), "planted"))
        assert planted.problems() == (f"{node}: {WEIGHTS}",)


def test_a_bias_that_moved_into_the_kernel_behind_is_found_there_and_nowhere_else(engine):
    built = engine("mobile", "fp16")
    kernel = next(kernel for kernel in built.plan.matrices if "stage3.3/Conv" in kernel.onnx_nodes)
    (expected,) = (expected for expected in built.convolutions if expected.node == "stage3.3/Conv")
    assert all(constant.size < expected.bias.nbytes for constant in kernel.constants if constant != kernel.weight)
    (bias,) = (
        constant
        for constant in built.plan.constants_behind("stage3.3/Conv")
        if np.array_equal(built.plan.array(constant).reshape(-1)[:300], expected.bias)
    )
    data = bytearray(built.data)
    data[bias.position] ^= 1
    planted = dataclasses.replace(built, plan=plan_from_bytes(bytes(data), "planted"))
    assert planted.problems() == (f"stage3.3/Conv: {BIAS}",)
    functions = tuple(dataclasses.replace(function, behind=frozenset()) for function in built.plan.functions)
    apart = dataclasses.replace(built, plan=dataclasses.replace(built.plan, functions=functions))
    unbound = "no kernel of the engine computes the ReLU behind it"
    assert apart.problems() == (f"stage3.3/Conv: {BIAS}", f"stage3.3/Conv: {unbound}")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"weight_first": False}, f"stage3.1/Conv: {WEIGHTS}"),
        ({"weight": None}, f"stage3.1/Conv: {WEIGHTS}"),
        ({"input_dtype": "float32"}, "stage3.1/Conv: asked for float16, compiled with float32 x float16"),
        ({"weight_dtype": "int8"}, "stage3.1/Conv: asked for float16, compiled with float16 x int8"),
    ],
)
def test_a_product_of_matrices_that_is_not_the_convolution_is_named(engine, change, problem):
    built = engine("mobile", "fp16")
    first, *others = built.plan.matrices
    plan = dataclasses.replace(built.plan, matrices=(dataclasses.replace(first, **change), *others))
    assert dataclasses.replace(built, plan=plan).problems() == (problem,)


@pytest.mark.parametrize(
    ("times", "said"), [(0, "do not stand in the engine"), (2, "2 kernels of the engine compute it")]
)
@pytest.mark.parametrize("node", ["stage3.1/Conv", "head/Gemm"])
def test_a_product_of_matrices_that_is_missing_or_there_twice_is_named(engine, node, times, said):
    built = engine("mobile", "fp16")
    kernels = [kernel for kernel in built.plan.matrices for _ in range(times if node in kernel.onnx_nodes else 1)]
    problems = dataclasses.replace(built, plan=dataclasses.replace(built.plan, matrices=tuple(kernels))).problems()
    assert {problem.split(":")[0] for problem in problems} == {node}
    assert times == 0 or said in problems[0]


def test_a_window_is_never_taken_for_a_product_of_matrices(engine):
    built = engine("mobile", "fp16")
    node = built.convolutions[0].node
    first, *others = built.plan.matrices
    matrices = (dataclasses.replace(first, onnx_nodes=(node,)), *others)
    convolutions = tuple(kernel for kernel in built.plan.convolutions if node not in kernel.onnx_nodes)
    plan = dataclasses.replace(built.plan, matrices=matrices, convolutions=convolutions)
    problem = f"{node}: compiled as a product of matrices, which a window of 3 is not"
    assert problem in dataclasses.replace(built, plan=plan).problems()
