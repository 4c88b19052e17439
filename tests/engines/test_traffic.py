"""The bytes that engines move, against sums made by hand from the network, and what is predicted from them."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.plan import header_from_file, plan_from_file
from engines.plan_kernels import Activation, Window
from engines.traffic import Traffic, half_traffic_of_plan, prediction, prediction_of_file, traffic_of_plan
from tests.engines.quantized_graphs import PORTABLE, RTX, Block, QuantizedGraph, engine_from_model
from tests.engines.typed_graphs import Layer, TypedGraph

BLOCKS = (Block("stage0.0", 16, stride=2), Block("stage1.0", 32, stride=2), Block("stage1.1", 32))
LAYERS = tuple(Layer(block.name, block.channels, stride=block.stride) for block in BLOCKS)
IMAGE, PADDED = 32 * 32 * 3, 32 * 32 * 4
MAPS = (16 * 16 * 16, 8 * 8 * 32, 8 * 8 * 32)
"""Numbers of the three convolutions' results."""

A0 = tuple(
    Block(f"stage{stage}.{index}", width, stride=2 if index == 0 else 1)
    for stage, (width, depth) in enumerate([(48, 1), (48, 2), (96, 4), (192, 14), (1280, 1)])
    for index in range(depth)
)
"""RepVGG-A0."""


@pytest.fixture(scope="module")
def a0(tmp_path_factory):
    """``a0(form)``: RepVGG-A0 of random numbers for 224 pixels, in a form of INT8, or FP16 where that is None."""

    @functools.cache
    def compiled(form):
        if form is None:
            graph = TypedGraph("fp16", size=(224, 224))
            graph.layers(*(Layer(block.name, block.channels, stride=block.stride) for block in A0))
        else:
            graph = QuantizedGraph(form, size=224).blocks(*A0)
        return engine_from_model(graph.head(1000).model(), tmp_path_factory.mktemp("a0"), batch=(1, 32, 128)).plan

    return compiled


@pytest.fixture
def small(compiled_int8):
    return lambda form: compiled_int8(form, *BLOCKS).plan


def test_every_byte_of_a_half_out_engine_is_counted(small):
    """A cast and pad; a convolution, then codes again; a change of layout; a mean; the head and what adds its bias."""
    traffic = traffic_of_plan(small(RTX), 8)
    first, second, last = MAPS
    convolutions = (PADDED + 2 * first) + (first + 2 * second) + (second + 2 * last)
    between = (2 * first + first) + (2 * second + second)
    ends = (4 * IMAGE + PADDED) + (2 * last + 2 * last) + (2 * last + 32) + (32 + 2 * 10) + (2 * 10 + 4 * 10)
    assert traffic.convolutions == convolutions + between
    assert traffic.activations == convolutions + between + ends
    assert traffic.batch == 8


def test_every_byte_of_a_float_out_engine_is_counted(small):
    """Its last convolution is rescaled where the mean is taken."""
    traffic = traffic_of_plan(small(PORTABLE), 8)
    first, second, last = MAPS
    convolutions = (PADDED + 4 * first) + (first + 4 * second) + (second + 4 * last)
    between = (4 * first + first) + (4 * second + second)
    ends = (4 * IMAGE + PADDED) + (4 * last + 32) + (32 + 4 * 10) + (4 * 10 + 4 * 10)
    assert traffic.convolutions == convolutions + between
    assert traffic.activations == convolutions + between + ends


@pytest.mark.parametrize("form", [RTX, PORTABLE], ids=lambda form: form.name)
def test_constants_are_codes_scales_and_biases_and_a_batch_shares_them(small, form):
    codes = 16 * 4 * 9 + 16 * 32 * 9 + 32 * 32 * 9 + 32 * 10
    vectors = 4 * (16 + 32 + 32) * (3 if form is RTX else 4)  # factors, zeros and biases; and both scales per channel
    head = {RTX: 2 * 10 + 2 * 4, PORTABLE: 2 * 4 * 10 + 2 * 4}[form]
    traffic = traffic_of_plan(small(form), 8)
    literals = traffic.constants - codes - vectors - head
    assert literals == 4 * np.dtype(form.dtype).itemsize
    assert traffic.per_image == traffic.activations + traffic.constants / 8
    alone = traffic_of_plan(small(form), 1)
    assert alone.per_image - traffic.per_image == pytest.approx(traffic.constants * 7 / 8)


@pytest.mark.parametrize("form", [RTX, PORTABLE], ids=lambda form: form.name)
def test_what_half_would_move_follows_from_the_int8_engine(small, form, tmp_path):
    graph = TypedGraph("fp16").layers(*LAYERS).head(10)
    half = traffic_of_plan(engine_from_model(graph.model(), tmp_path).plan, 8)
    computed = half_traffic_of_plan(small(form), 8)
    assert computed.convolutions == half.convolutions
    assert computed.constants == pytest.approx(half.constants, rel=0.002)
    layout = 0 if form is RTX else 2 * 2 * MAPS[2]  # the mean of float32 stands without a change of layout before it
    scores = 2 * 10  # FP16's head writes them in float32 itself
    assert half.activations - computed.activations == layout + scores


def test_repvgg_a0_moves_what_was_worked_out_for_it(a0):
    """MB of a batch of 32 in convolutions and between them: 249 in FP16, 354 half out, 584 float out."""

    def moved(plan, traffic_of=traffic_of_plan):
        traffic = traffic_of(plan, 32)
        return (32 * traffic.convolutions + traffic.constants) / 1e6

    assert moved(a0(None)) == pytest.approx(249, rel=0.03)
    assert moved(a0(RTX)) == pytest.approx(354, rel=0.02)
    assert moved(a0(PORTABLE)) == pytest.approx(584, rel=0.02)
    assert moved(a0(RTX), half_traffic_of_plan) == pytest.approx(moved(a0(None)), rel=0.001)
    assert prediction(traffic_of_plan(a0(RTX), 32), traffic_of_plan(a0(None), 32)) == (
        "INT8 moves 1.3x the bytes of FP16 on TensorRT for RTX: 12.2 MB against 9.36 MB an image in a batch of 32; "
        "expect no speed-up on small networks, which memory bounds (predicted from the file, not measured)"
    )
    assert "moves 2.0x the bytes" in prediction(traffic_of_plan(a0(PORTABLE), 32), traffic_of_plan(a0(None), 32))
    alone = prediction(*(traffic_of(a0(RTX), 1) for traffic_of in (traffic_of_plan, half_traffic_of_plan)))
    assert "moves 0.8x the bytes" in alone  # alone, an image pays for all the weights


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        (1.42, "INT8 moves 1.4x the bytes of FP16 on TensorRT for RTX: 1.42 MB against 1 MB an image in a batch of 4; "
               "expect no speed-up on small networks, which memory bounds (predicted from the file, not measured)"),
        (1.11, "expect no speed-up on small networks"),
        (1.09, "expect a speed-up only where arithmetic is the limit"),
        (0.91, "expect a speed-up only where arithmetic is the limit"),
        (0.89, "expect up to 1.1x the speed where memory is the limit"),
        (0.5, "INT8 moves 0.5x the bytes of FP16 on TensorRT for RTX: 0.5 MB against 1 MB an image in a batch of 4; "
              "expect up to 2.0x the speed where memory is the limit (predicted from the file, not measured)"),
    ],
)  # fmt: skip
def test_what_to_expect_follows_from_the_ratio(moved, said):
    int8, fp16 = (Traffic(4, round(bytes_ * 1e6), 0, 0) for bytes_ in (moved, 1.0))
    assert said in prediction(int8, fp16)


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    model = QuantizedGraph(RTX).blocks(*BLOCKS).head(10).model(sizes="32x32:48x64:64x64")
    for axis, name in ((2, "height"), (3, "width")):
        assert model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param == name
    sizes = ((32, 32), (48, 64), (64, 64))
    return engine_from_model(model, tmp_path_factory.mktemp("free"), sizes=sizes)


def test_an_engine_for_any_size_moves_what_one_for_that_size_does(small, free):
    fixed = traffic_of_plan(small(RTX), 8)
    found = traffic_of_plan(free.plan, 8, (32, 32))
    assert (found.activations, found.convolutions) == (fixed.activations, fixed.convolutions)
    assert traffic_of_plan(free.plan, 8, (48, 64)).convolutions == 3 * fixed.convolutions


def test_without_a_size_there_is_no_figure_and_none_is_made_up(free):
    with pytest.raises(ValueError, match=r"the extent .* is free"):
        traffic_of_plan(free.plan, 8)
    assert prediction_of_file(free.path, 8) is None
    assert prediction_of_file(free.path, 8, (48, 64)).startswith("INT8 moves ")


def test_an_engine_of_a_fixed_batch_moves_as_much_for_an_image(small, tmp_path):
    model = QuantizedGraph(RTX).blocks(*BLOCKS).head(10).model()
    fixed = traffic_of_plan(engine_from_model(model, tmp_path, batch=(4, 4, 4)).plan, 4)
    assert fixed.convolutions == traffic_of_plan(small(RTX), 4).convolutions


def test_a_prediction_is_made_for_int8_alone(compiled, compiled_int8, tmp_path):
    assert prediction_of_file(compiled().engine, 8) is None
    quantized = compiled_int8(RTX, *BLOCKS)
    said = prediction_of_file(quantized.path, 8)
    assert said == prediction(traffic_of_plan(quantized.plan, 8), half_traffic_of_plan(quantized.plan, 8))
    fp16 = compiled().engine
    against = prediction_of_file(quantized.path, 8, fp16=fp16)
    assert against == prediction(traffic_of_plan(quantized.plan, 8), traffic_of_plan(plan_from_file(fp16), 8))
    assert against != said
    other = tmp_path / "full.engine"
    other.write_bytes(b"ftrt" + quantized.bytes[4:])
    assert header_from_file(other).sdk == "tensorrt"
    assert prediction_of_file(other, 8) is None


def test_a_type_of_unknown_width_is_not_guessed(small):
    plan = small(RTX)
    (kernel, *others) = plan.convolutions
    odd = dataclasses.replace(kernel, writes=(Activation("fp8", (1, 16, 16, 16)),))
    with pytest.raises(ValueError, match="fp8"):
        traffic_of_plan(dataclasses.replace(plan, convolutions=(odd, *others)), 8)


@given(extent=st.integers(1, 64), before=st.integers(0, 3), stride=st.integers(1, 3), kernel=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_a_window_has_as_many_places_as_can_be_counted(extent, before, stride, kernel):
    window = Window((before,), (before,), (stride,), (1,))
    places = len(range(0, extent + 2 * before - kernel + 1, stride))
    assert max(window.results(0, extent, kernel), 0) == places
