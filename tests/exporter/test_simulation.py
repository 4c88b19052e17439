"""What our simulation of a file computes: the oracle's sums of codes, and what ONNX Runtime computes from the file."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from exporter.onnx_graph import Graph
from exporter.onnxruntime_cpu import session_from_graph
from exporter.quantization.form import FORMS, PORTABLE, RTX
from exporter.quantization.qdq import graph_from_quantized
from exporter.quantization.quantized import Quantized, QuantizedLayer
from exporter.quantization.simulation import (
    Simulation,
    Step,
    codes_of,
    float_layer,
    quantized_layer,
    run_steps,
    steps_of_graph,
    unweighted,
)
from tests.quantized_networks import (
    NETWORKS,
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

SAME_DB = 50
forms = pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
networks = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(scope="module")
def made():
    """``made(name, form, kept)``: the architecture, images and codes by hand."""
    plains = {}

    def make(name, form, kept=()):
        if name not in plains:
            plains[name] = plain_network(name)
        plain = plains[name]
        images = np.concatenate([images_of(plain.architecture) * size for size in (1.0, 0.8)]).astype(np.float32)
        return plain.architecture, images, quantized_graph(float_graph(plain), images, form, kept)

    return make


def three_in_four(reference, candidate):
    return sqnr_of_images(reference, candidate)[len(next(iter(reference.values()))) // 4]


@forms
@networks
def test_it_computes_what_the_oracle_and_the_file_do(made, name, form):
    architecture, images, quantized = made(name, form)
    found = Simulation(quantized).run(images)
    assert list(found) == [output.name for output in architecture.outputs]
    rounds = half if form is RTX else exact
    oracle = codes_answer(quantized, architecture, images, reads=rounds, weighs=rounds)
    assert three_in_four(oracle, found) >= SAME_DB
    file = session_from_graph(graph_from_quantized(quantized)).run(images)
    assert three_in_four(file, found) >= SAME_DB


@forms
@pytest.mark.parametrize("name", ["plain", "plus"])
def test_kept_layers_are_in_the_forms_dtype(made, name, form):
    kept = ("stage1.0/Conv", "head/Gemm")
    architecture, images, quantized = made(name, form, kept)
    found = Simulation(quantized).run(images)
    rounds = half if form is RTX else exact
    assert three_in_four(codes_answer(quantized, architecture, images, rounds, rounds), found) >= SAME_DB
    assert sqnr_db(Simulation(made(name, form)[2]).run(images), found) < 45


@pytest.mark.parametrize("fault", ["input scale", "weight scale", "code", "bias"])
@forms
def test_a_wrong_number_in_one_layer_is_seen(made, form, fault):
    """The comparison at 50 dB is a comparison."""
    _, images, quantized = made("plain", form)
    layer = quantized.layers["stage2.0/Conv"]
    changes = {
        "input scale": {"input_scale": layer.input_scale * 1.02},
        "weight scale": {"weight_scale": (layer.weight_scale * 1.02).astype(form.dtype)},
        "code": {
            "weight": np.where(np.arange(layer.weight.size).reshape(layer.weight.shape) % 9 == 4, 0, layer.weight)
        },
        "bias": {"bias": layer.bias + np.float32(0.05)},
    }
    wrong = dataclasses.replace(layer, **changes[fault])
    broken = dataclasses.replace(quantized, layers={**quantized.layers, "stage2.0/Conv": wrong})
    file = session_from_graph(graph_from_quantized(quantized)).run(images)
    assert three_in_four(file, Simulation(broken).run(images)) < SAME_DB
    assert three_in_four(file, Simulation(quantized).run(images)) >= SAME_DB


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_round_half_to_even_and_saturate(bits):
    top = 2 ** (bits - 1) - 1
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49, 1e9, -1e9, top + 0.4, -top - 1.4, -top - 0.6])
    expected = [0, 2, 2, 0, -2, -2, 0, top, -top - 1, top, -top - 1, -top - 1]
    for scale in (1.0, 0.25, 2.0**-10):
        given = values * scale
        assert codes_of(given, scale, bits).tolist() == expected
        assert torch.equal(given, values * scale)


@forms
def test_weights_that_cannot_be_written_to_are_taken_and_left_alone(made, form):
    """As they come from a file."""
    _, images, quantized = made("plus", form)
    before = {name: array.copy() for name, array in quantized.graph.weights.items()}
    expected = Simulation(quantized).run(images)
    frozen = {name: array.copy() for name, array in quantized.graph.weights.items()}
    for array in frozen.values():
        array.flags.writeable = False
    graph = Graph(quantized.graph.structure, frozen)
    found = Simulation(Quantized(form, graph, quantized.layers, quantized.kept)).run(images)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    for name, array in before.items():
        np.testing.assert_array_equal(frozen[name], array)


@forms
@networks
def test_images_and_outputs_belong_to_the_caller(made, name, form):
    """Nothing is done in place on what goes in, and a second batch does not change the first one's outputs."""
    _, images, quantized = made(name, form)
    given, simulation = images.copy(), Simulation(quantized)
    first = simulation.run(given)
    kept = {key: value.copy() for key, value in first.items()}
    simulation.run(given * 0.5)
    np.testing.assert_array_equal(given, images)
    for key, value in kept.items():
        np.testing.assert_array_equal(first[key], value)
        assert not np.array_equal(value, simulation.run(given * 0.5)[key])


@networks
def test_tensors_are_forgotten_once_nothing_reads_them(made, name):
    """No more than what is still to be read is there at any step; all of it is."""
    quantized = made(name, PORTABLE)[2]
    steps = steps_of_graph(quantized.graph)
    there, gone = {steps.image}, set()
    for index, (step, forgotten) in enumerate(steps):
        assert set(step.inputs) <= there
        there |= {step.output}
        there -= set(forgotten)
        gone |= set(forgotten)
        later = {key for one in steps.steps[index + 1 :] for key in one.inputs}
        assert there == {key for key in there | gone if key in later or key in steps.outputs} & (there | gone)
        assert later & gone == set()
    assert there == set(steps.outputs)
    assert gone == {steps.image, *(step.output for step in steps.steps)} - set(steps.outputs)


def test_a_network_without_forgetting_would_be_seen(made):
    """What a run holds at most is few tensors, however deep the network is."""
    _, images, quantized = made("plain", PORTABLE)
    alive, most = [0], [0]

    class Counted:
        def __init__(self, value):
            self.value = value
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    steps, layer = steps_of_graph(quantized.graph), float_layer(quantized.graph)
    run_steps(
        steps,
        Counted(torch.from_numpy(images)),
        lambda step, x: Counted(layer(step, x.value)),
        lambda step, inputs: Counted(unweighted(step, [one.value for one in inputs])),
    )
    assert len(steps.steps) > 15
    assert most[0] <= 3


def test_what_a_layer_gives_can_be_counted_by_hand():
    """One convolution of one number: s_x s_w C_w c_x + b."""
    step = Step("c", "Conv", ("x",), "y", "w", "b", 1, 0, 1)
    x = torch.tensor([[[[0.26, -9.0, 0.125]]]])
    for dtype in (np.float32, np.float16):
        layer = QuantizedLayer(0.25, np.array([[[[3]]]], np.int8), np.array([0.5], dtype), np.array([1.5], np.float32))
        assert quantized_layer(step, x.clone(), layer).flatten().tolist() == [1.5 + 0.375, 1.5 - 36 * 0.375, 1.5]
        assert quantized_layer(step, x.clone(), layer, 4).flatten().tolist() == [1.5 + 0.375, 1.5 - 8 * 0.375, 1.5]


def test_an_operation_that_plain_networks_do_not_have_is_named():
    step = Step("head/Odd", "Softmax", ("x",), "y", "", "", 1, 0, 1)
    with pytest.raises(ValueError, match=r"head/Odd: Softmax is not an operation of a plain network"):
        unweighted(step, [torch.zeros(1)])
