"""Powers of two moved between convolutions: the network's bits stay, and what was beyond half fits it."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.architecture import Architecture, Block
from exporter.onnx_graph import Graph, structure_from_architecture
from exporter.precisions.fp16 import explicit_cast_twin, half_from_float
from exporter.precisions.rescaling import HALF_MAX, PRECISE, SAFETY, rescaled, seams_of_graph
from exporter.weights import weight_problems

SIZE = 8
COMFORTABLE = HALF_MAX / SAFETY


def block(name, cin, cout, *, stride=1, groups=1, se=None, kernel=3, after=False):
    return Block(name, cin, cout, stride, groups, ("fused",), se, kernel=kernel, se_after_activation=after)


def network(*blocks, classes=5, features=()):
    stages = 1 + max(int(one.name[5:].partition(".")[0]) for one in blocks)
    fixed = {"bn_eps": 1e-5, "lineage": "official", "variant": None, "features": features}
    return Architecture(tuple(blocks), classes, stage_strides=(2,) * stages, told_strides=(False,) * stages, **fixed)


PLAIN = network(block("stage0.0", 3, 4, stride=2), block("stage1.0", 4, 6), block("stage1.1", 6, 6))
KINDS = {
    "plain": PLAIN,
    "grouped": network(
        block("stage0.0", 3, 8), block("stage1.0", 8, 8, groups=2), block("stage1.1", 8, 4, groups=4, stride=2)
    ),
    "depthwise and pointwise": network(
        block("stage0.0", 3, 6), block("stage1.0", 6, 6, groups=6), block("stage1.1", 6, 8, kernel=1)
    ),
    "SE before ReLU": network(block("stage0.0", 3, 4, se=2), block("stage1.0", 4, 4, se=3)),
    "SE after ReLU": network(block("stage0.0", 3, 4, se=2, after=True), block("stage1.0", 4, 4, se=3, after=True)),
    "backbone": network(block("stage0.0", 3, 4), block("stage1.0", 4, 6), classes=None),
    "features": network(
        block("stage0.0", 3, 4), block("stage1.0", 4, 6), block("stage1.1", 6, 6), classes=None, features=(0, 1)
    ),
}


def graph_of(architecture, seed=0, **weights):
    """The network's graph with random weights, which are of order one unless others are given."""
    structure = structure_from_architecture(architecture, (SIZE, SIZE))
    generator = np.random.default_rng(seed)
    arrays = {}
    for value in structure.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name != "input":
            fan = math.sqrt(max(1, np.prod(shape[1:])))
            arrays[value.name] = (generator.standard_normal(shape) / fan).astype(np.float32)
    return Graph(structure, {**arrays, **{name: array.astype(np.float32) for name, array in weights.items()}})


def images(seed=3, count=2):
    return np.random.default_rng(seed).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)


def run(graph, x):
    """Every output by ONNX Runtime, without optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.structure.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"input": x, **graph.weights})


def tensors_of(graph, x):
    """Every tensor of a float32 graph by its name, computed by torch in the dtype of x."""
    values = {name: torch.from_numpy(array).to(x.dtype) for name, array in graph.weights.items()} | {"input": x}
    functions = {
        "Relu": torch.relu,
        "Sigmoid": torch.sigmoid,
        "Mul": torch.mul,
        "GlobalAveragePool": lambda y: y.mean(dim=(2, 3), keepdim=True),
        "Flatten": lambda y: y.flatten(1),
        "Gemm": lambda y, weight, bias: y @ weight.T + bias,
    }
    for node in graph.structure.graph.node:
        given = [values[name] for name in node.input]
        if node.op_type == "Conv":
            of = {attribute.name: attribute for attribute in node.attribute}
            stride = of["strides"].ints[0] if "strides" in of else 1
            padding = of["pads"].ints[0] if "pads" in of else 0
            groups = of["group"].i if "group" in of else 1
            values[node.output[0]] = torch.conv2d(*given, stride, padding, 1, groups)
        else:
            values[node.output[0]] = functions[node.op_type](*given)
    return values


def peaks_of(graph, x):
    found = tensors_of(graph, torch.from_numpy(x).double())
    return {
        name: value.abs().transpose(0, 1).flatten(1).amax(1).numpy()
        for name, value in found.items()
        if name not in graph.weights
    }


def imagined_peaks(graph, seed, decades):
    """Peaks of up to so many decades, whatever the network really does: any exponents can come of them."""
    generator = np.random.default_rng(seed)
    truth = peaks_of(graph, images(count=1))
    fixed = {name for seam in seams_of_graph(graph) if seam.fixed for name in seam.tensors} | {"input", "output"}
    imagined = {name: 10 ** generator.uniform(0, decades, len(value)) for name, value in truth.items()}
    return {name: truth[name] if name in fixed else value for name, value in imagined.items()}


def same_bits(one, other):
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(one, other, strict=True))


def outputs_in(graph, dtype, x):
    found = tensors_of(graph, torch.from_numpy(x).to(dtype))
    return [found[value.name].numpy() for value in graph.structure.graph.output]


# --- the algebra


def divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def networks(draw):
    """Up to four blocks with any groups, kernels, strides and SE, and a classifier or some of the feature maps."""
    channels, blocks = 3, []
    count = draw(st.integers(2, 4))
    for index in range(count):
        out = draw(st.sampled_from([2, 4, 6]))
        groups = draw(st.sampled_from(divisors(math.gcd(channels, out))))
        se = draw(st.sampled_from([None, None, 1, 2]))
        name = f"stage{min(index, 1)}.{max(index - 1, 0)}"
        one = block(
            name, channels, out, stride=draw(st.sampled_from([1, 2])), groups=groups, se=se,
            kernel=draw(st.sampled_from([1, 3])), after=draw(st.booleans()),
        )  # fmt: skip
        blocks.append(one)
        channels = out
    features = draw(st.sampled_from([(), (), (0, 1), (1,)]))
    classes = None if features else draw(st.sampled_from([None, 5]))
    return network(*blocks, classes=classes, features=features)


@settings(max_examples=80, deadline=None)
@given(networks(), st.integers(0, 2**32 - 1), st.sampled_from([6.0, 12.0]))
def test_any_network_gives_the_same_bits_whatever_is_rescaled(architecture, seed, decades):
    graph, x = graph_of(architecture, seed), images(seed)
    fitted = rescaled(graph, imagined_peaks(graph, seed, decades))
    assert same_bits(run(graph, x), run(fitted.graph, x))
    for dtype in (torch.float32, torch.float64):
        assert same_bits(outputs_in(graph, dtype, x), outputs_in(fitted.graph, dtype, x))
    scaled = {name: array.astype(np.float64) for name, array in fitted.graph.weights.items()}
    assert weight_problems(fitted.graph.weights, architecture, graph.weights, [], fitted.exponents) == []
    assert all(np.isfinite(array).all() for array in scaled.values())
    for name, array in graph.weights.items():
        mantissas = [np.frexp(values.astype(np.float64))[0] for values in (array, fitted.graph.weights[name])]
        np.testing.assert_array_equal(*mantissas)


@pytest.mark.parametrize("architecture", KINDS.values(), ids=KINDS)
def test_every_tensor_in_between_is_its_own_times_the_power_of_two_that_was_recorded(architecture):
    graph, x = graph_of(architecture), images()
    peaks = imagined_peaks(graph, 1, 9.0)
    fitted = rescaled(graph, peaks)
    before, after = (tensors_of(one, torch.from_numpy(x)) for one in (graph, fitted.graph))
    seams = {seam.convolution.name: seam for seam in seams_of_graph(graph)}
    assert fitted.exponents.keys() <= {name for name, seam in seams.items() if seam.fixed is None}
    assert fitted.exponents.keys() >= {"stage0.0/Conv"} - {name for name, seam in seams.items() if seam.fixed}
    assert fitted.exponents
    moved = set()
    for name, exponents in fitted.exponents.items():
        for tensor in seams[name].tensors:
            factor = torch.from_numpy(np.ldexp(np.ones(len(exponents), np.float32), exponents))
            factor = factor.reshape(1, -1, *[1] * (before[tensor].dim() - 2))
            assert torch.equal(before[tensor] * factor, after[tensor]), tensor
            np.testing.assert_array_equal(np.ldexp(peaks[tensor], exponents), fitted.peaks[tensor])
            moved.add(tensor)
    for tensor in before.keys() - moved - graph.weights.keys():
        assert torch.equal(before[tensor], after[tensor]), tensor
        np.testing.assert_array_equal(fitted.peaks[tensor], peaks[tensor])


FIXED = {
    "plain": {},
    "SE before ReLU": {"stage0.0/se/expand/Conv": "stage0.0/se/Sigmoid reads stage0.0/se/expanded"},
    "SE after ReLU": {"stage1.0/se/expand/Conv": "stage1.0/se/Sigmoid reads stage1.0/se/expanded"},
    "backbone": {"stage1.0/Conv": "output is an output"},
    "features": {"stage0.0/Conv": "stage0 is an output", "stage1.1/Conv": "stage1 is an output"},
}


@pytest.mark.parametrize("kind", FIXED)
def test_what_cannot_be_made_up_for_is_left_alone_and_says_why(kind):
    graph = graph_of(KINDS[kind])
    seams = {seam.convolution.name: seam.fixed for seam in seams_of_graph(graph)}
    found = {name: reason for name, reason in seams.items() if reason is not None}
    assert FIXED[kind].items() <= found.items()
    assert all(name in FIXED[kind] or "/se/expand/" in name for name in found)
    fitted = rescaled(graph, imagined_peaks(graph, 1, 9.0))
    assert not fitted.exponents.keys() & found.keys()


def test_a_squeezed_tensor_is_what_it_was_and_has_exponents_of_its_own():
    architecture = KINDS["SE before ReLU"]
    graph, x = graph_of(architecture), torch.from_numpy(images())
    peaks = peaks_of(graph, images()) | {"stage0.0/conv": np.full(4, 1e6)}
    fitted = rescaled(graph, peaks)
    before, after = tensors_of(graph, x), tensors_of(fitted.graph, x)
    assert list(fitted.exponents) == ["stage0.0/Conv"]
    assert torch.equal(before["stage0.0/se/reduced"], after["stage0.0/se/reduced"])
    assert torch.equal(before["stage0.0/se"] / 64, after["stage0.0/se"])
    inner = rescaled(graph, peaks_of(graph, images()) | {"stage0.0/se/reduced": np.full(2, 1e6)})
    assert list(inner.exponents) == ["stage0.0/se/reduce/Conv"]


# --- what a mistake would look like


def changed(graph, **weights):
    return dataclasses.replace(graph, weights={**graph.weights, **weights})


FORGOTTEN = [
    ("plain", "stage0.0.bias"),
    ("plain", "stage1.0.weight"),
    ("plain", "head.weight"),
    ("grouped", "stage1.1.weight"),
    ("depthwise and pointwise", "stage1.0.weight"),
    ("depthwise and pointwise", "stage1.1.weight"),
    ("SE before ReLU", "stage1.0.se.reduce.weight"),
    ("SE before ReLU", "stage1.0.se.expand.weight"),
    ("SE after ReLU", "stage0.0.se.reduce.weight"),
    ("features", "stage1.1.weight"),
]


@pytest.mark.parametrize(("kind", "name"), FORGOTTEN)
def test_a_reader_that_is_forgotten_is_seen_in_the_bits_and_by_the_contract(kind, name):
    architecture = KINDS[kind]
    graph, x = graph_of(architecture), images()
    fitted = rescaled(graph, imagined_peaks(graph, 1, 9.0))
    wrong = changed(fitted.graph, **{name: graph.weights[name]})
    assert not same_bits(run(graph, x), run(wrong, x))
    problems = weight_problems(wrong.weights, architecture, graph.weights, [], fitted.exponents)
    assert problems == [f"weight {name} differs from the fused one times its channels' powers of two"]


def test_a_factor_of_three_is_not_exact():
    graph, x = graph_of(PLAIN), images(count=64)
    weights = {name: graph.weights[f"stage0.0.{name}"] * np.float32(3) for name in ("weight", "bias")}
    after = graph.weights["stage1.0.weight"] / np.float32(3)
    wrong = changed(
        graph, **{f"stage0.0.{name}": array for name, array in weights.items()}, **{"stage1.0.weight": after}
    )
    assert not same_bits(run(graph, x), run(wrong, x))
    for one, other in zip(run(graph, x), run(wrong, x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract_takes_the_half_file_with_its_own_exponents_and_no_others(kind):
    architecture = KINDS[kind]
    graph = graph_of(architecture)
    rewritten = half_from_float(graph, imagined_peaks(graph, 2, 8.0))
    written = rewritten.graph.weights
    half = [name for name, array in written.items() if array.dtype == np.float16]
    assert half

    def problems(exponents):
        return weight_problems(written, architecture, graph.weights, half, exponents)

    assert problems(rewritten.exponents) == []
    for name, exponents in rewritten.exponents.items():
        for channel in range(len(exponents)):
            one_off = exponents.copy()
            one_off[channel] += 1
            assert problems({**rewritten.exponents, name: one_off}), (name, channel)
        assert problems({other: values for other, values in rewritten.exponents.items() if other != name})
        short = problems({**rewritten.exponents, name: exponents[1:]})
        assert short == [f"{name} was rescaled in {len(exponents) - 1} channels where it has {len(exponents)}"]
    plain_half = {name: graph.weights[name].astype(array.dtype) for name, array in written.items()}
    assert weight_problems(plain_half, architecture, graph.weights, half, {}) == []
    assert bool(weight_problems(plain_half, architecture, graph.weights, half, rewritten.exponents)) == bool(
        rewritten.exponents
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("backbone", "stage1.0/Conv"),
        ("features", "stage0.0/Conv"),
        ("SE before ReLU", "stage0.0/se/expand/Conv"),
        ("plain", "head/Gemm"),
        ("plain", "stage1.0/se/reduce/Conv"),
    ],
)
def test_the_contract_refuses_exponents_of_what_nothing_makes_up_for(kind, name):
    architecture = KINDS[kind]
    graph = graph_of(architecture)
    exponents = {name: np.array([-1, 0, 0, 0])}
    problems = weight_problems(graph.weights, architecture, graph.weights, [], exponents)
    assert problems == [f"{name} was rescaled, which its readers cannot make up for"]


# --- which exponents


def fitted_to(peak, *, maker=None, reader=None, bias=None, architecture=PLAIN, channel=1):
    """The exponent of one channel of stage0.0 that reached ``peak``, all others having room."""
    weights = {}
    if maker is not None:
        weights["stage0.0.weight"] = graph_of(architecture).weights["stage0.0.weight"].copy()
        weights["stage0.0.weight"][channel] = maker
    if bias is not None:
        weights["stage0.0.bias"] = graph_of(architecture).weights["stage0.0.bias"].copy()
        weights["stage0.0.bias"][channel] = bias
    if reader is not None:
        weights["stage1.0.weight"] = graph_of(architecture).weights["stage1.0.weight"].copy()
        weights["stage1.0.weight"][:, channel] = reader
    graph = graph_of(architecture, **weights)
    peaks = {name: np.ones(len(value)) for name, value in peaks_of(graph, images()).items()}
    peaks["stage0.0"][channel] = peak
    peaks["stage0.0/conv"] = peaks["stage0.0"]
    found = rescaled(graph, peaks).exponents.get("stage0.0/Conv", np.zeros(4, np.int64))
    assert np.count_nonzero(np.delete(found, channel)) == 0
    return int(found[channel])


@pytest.mark.parametrize(
    ("peak", "exponent"),
    [
        (1.0, 0),
        (COMFORTABLE, 0),
        (COMFORTABLE * 1.001, -1),
        (2 * COMFORTABLE, -1),
        (HALF_MAX, -2),
        (180_000.0, -4),
        (COMFORTABLE * 2**20, -20),
        (math.inf, 0),
        (math.nan, 0),
    ],
)
def test_the_exponent_is_the_smallest_that_leaves_room_for_four_times_the_peak(peak, exponent):
    assert fitted_to(peak) == exponent


@pytest.mark.parametrize(
    ("peak", "maker", "reader", "exponent"),
    [
        (1e6, 1e3, 1e-3, -7),  # the readers' weights are lifted to where half is precise
        (1e6, 1e3, 1e-1, -6),  # they are nearly so with the smallest exponent
        (1e6, 1.0, 1e-6, -9),  # no further than to where the maker's own are as small
        (1e6, 1e3, 0.0, -6),  # what nobody reads asks for nothing
        (1e6, 1e3, 1e3, -6),
        (1.0, 1e-3, 1e5, 1),  # too large a reader of a small channel
        (1.0, 1e-3, 1e8, 11),
        (1.0, 1e-3, 1e9, 0),  # the channel would leave no room
        (1e4, 1e-3, 1e5, 0),
        (0.0, 1e-3, 1e5, 0),  # nothing was seen: nobody knows
        (1e4, 1e5, 1.0, -1),  # too large a maker
        (1e-3, 1e5, 1.0, 0),  # its channel would be lost in half
    ],
)
def test_weights_move_an_exponent_where_they_are_out_of_range(peak, maker, reader, exponent):
    assert fitted_to(peak, maker=maker, reader=reader) == exponent


@pytest.mark.parametrize(
    ("bias", "exponent"), [(1.0, -9), (1e6, -9), (3e9, -16)], ids=["small", "of the peak's size", "beyond half"]
)
def test_a_large_bias_does_not_make_the_kernel_smaller_than_its_readers(bias, exponent):
    assert fitted_to(1e6, maker=1.0, reader=1e-6, bias=bias) == exponent


def test_a_reader_that_grew_too_much_is_made_smaller_in_its_turn():
    """The whole chain fits half, although 1e6 in one place only moves to the next."""
    small = graph_of(PLAIN).weights["head.weight"] * 1e-5
    graph = graph_of(PLAIN, **{"stage1.0.weight": np.full((6, 4, 3, 3), 5e4), "head.weight": small})
    peaks = peaks_of(graph, images()) | {"stage0.0/conv": np.full(4, 1e6)}
    fitted = rescaled(graph, peaks)
    assert list(fitted.exponents) == ["stage0.0/Conv", "stage1.0/Conv", "stage1.1/Conv"]
    assert set(fitted.exponents["stage0.0/Conv"].tolist()) == {-6}
    assert max(fitted.largest.values()) <= HALF_MAX
    assert half_from_float(graph, peaks).kept == {}


@pytest.mark.parametrize("smallest", [1e-37, 2.0**-126, 1e-40])
def test_a_factor_that_would_round_a_float32_weight_is_not_used(smallest):
    weight = graph_of(PLAIN).weights["stage0.0.weight"].copy()
    weight[1, 0, 0, 0] = smallest
    graph = graph_of(PLAIN, **{"stage0.0.weight": weight})
    peaks = {"stage0.0/conv": np.full(4, 1e5)}
    found = rescaled(graph, peaks).exponents["stage0.0/Conv"]
    assert found.tolist() == ([-3] * 4 if smallest == 1e-37 else [-3, 0, -3, -3])
    kept = half_from_float(graph, peaks).kept
    assert ("stage0.0/Conv" in kept) == (smallest != 1e-37)


def test_a_network_with_room_is_not_touched_at_all():
    for architecture in KINDS.values():
        graph = graph_of(architecture)
        fitted = rescaled(graph, peaks_of(graph, images()))
        assert fitted.exponents == {}
        assert all(fitted.graph.weights[name] is array for name, array in graph.weights.items())
        assert rescaled(graph, {}).exponents == {}


# --- what it is for


def loud(architecture, name, factor, seed=0):
    """The network with one block's weights times ``factor``, and its readers' divided by it."""
    graph = graph_of(architecture, seed)
    after = {block.name: following.name for block, following in itertools.pairwise(architecture.blocks)}
    weights = {f"{name}.{part}": graph.weights[f"{name}.{part}"] * factor for part in ("weight", "bias")}
    readers = [f"{after[name]}.weight" if name in after else "head.weight"]
    readers += [f"{name}.se.reduce.weight"] if f"{name}.se.reduce.weight" in graph.weights else []
    return graph_of(architecture, seed, **weights, **{reader: graph.weights[reader] / factor for reader in readers})


LOUD = [(kind, block.name) for kind in KINDS for block in KINDS[kind].blocks]
LOUD = [(kind, name) for kind, name in LOUD if kind not in ("backbone", "features")] + [("features", "stage1.0")]


@pytest.mark.parametrize("factor", [1e5, 1e7])
@pytest.mark.parametrize(("kind", "name"), LOUD)
def test_a_block_beyond_half_is_brought_back_and_computed_in_half_as_precisely(kind, name, factor):
    graph, x = loud(KINDS[kind], name, factor), images()
    rewritten = half_from_float(graph, peaks_of(graph, x))
    assert rewritten.kept == {}
    assert rewritten.exponents
    twin, quiet = (
        explicit_cast_twin(one) for one in (rewritten.graph, half_from_float(graph_of(KINDS[kind]), {}).graph)
    )
    for truth, found, usual in zip(run(graph, x), run(twin, x), run(quiet, x), strict=True):
        error, expected = (np.abs(one - truth).max() / np.abs(truth).max() for one in (found, usual))
        assert error < 5e-3
        assert error < 3 * expected + 1e-4


def disordered(architecture, seed, decades):
    """The network with channels of very different scales, from 1e-3 up, each made up for by its readers."""
    graph, generator = graph_of(architecture, seed), np.random.default_rng(seed)
    weights = {name: array.astype(np.float64) for name, array in graph.weights.items()}
    outputs = {output.block for output in architecture.outputs}
    before = np.ones(architecture.in_channels)
    for one in architecture.blocks:
        inner, outer = one.in_channels // one.groups, one.out_channels // one.groups
        for out, index in itertools.product(range(one.out_channels), range(inner)):
            weights[f"{one.name}.weight"][out, index] /= before[out // outer * inner + index]
        before = np.ones(one.out_channels)
        if one.name not in outputs:
            before = 10 ** generator.uniform(-3, decades, one.out_channels)
        weights[f"{one.name}.weight"] *= before[:, None, None, None]
        weights[f"{one.name}.bias"] *= before
        if one.se_channels is not None:
            weights[f"{one.name}.se.reduce.weight"] /= before[:, None, None]
    if "head.weight" in weights:
        weights["head.weight"] /= before
    return graph_of(architecture, seed, **weights)


@pytest.mark.parametrize("decades", [2, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_any_scale_are_brought_back(kind, decades):
    graph, x = disordered(KINDS[kind], 1, decades), images(count=8)
    rewritten = half_from_float(graph, peaks_of(graph, x))
    assert rewritten.kept == {}
    for truth, found in zip(run(graph, x), run(explicit_cast_twin(rewritten.graph), x), strict=True):
        assert np.abs(found - truth).max() < 5e-3 * np.abs(truth).max()


def test_without_rescaling_the_same_block_is_kept(monkeypatch):
    from exporter.precisions import fp16

    def nothing(graph, peaks):
        return dataclasses.replace(rescaled(graph, {}), peaks=dict(peaks))

    graph, x = loud(PLAIN, "stage1.0", 1e5), images()
    monkeypatch.setattr(fp16, "rescaled", nothing)
    assert {"stage1.0/Conv", "stage1.0/Relu", "stage1.1/Conv"} <= set(half_from_float(graph, peaks_of(graph, x)).kept)


def test_precise_is_where_the_largest_weight_and_what_is_2048_times_smaller_are_normal():
    assert float(np.finfo(np.float16).smallest_normal) == PRECISE / 2**11
