"""Factors moved between convolutions: the network stays what it was, and ranges become alike."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.onnx_graph import Graph
from exporter.precisions.rescaling import seams_of_graph
from exporter.quantization.equalization import changed_weights, cross_layer_factors, free_seams, with_factors
from exporter.quantization.simulation import linear, run_steps, steps_of_graph
from tests.quantized_networks import NETWORKS, float_graph, images_of, plain_network

EXACT = 1e-12
networks = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(scope="module")
def wide():
    """``wide(name)``: one of NETWORKS with weights and images in float64; made once."""
    found = {}

    def make(name):
        if name not in found:
            plain = plain_network(name)
            graph = float_graph(plain)
            weights = {key: array.astype(np.float64) for key, array in graph.weights.items()}
            for key, array in weights.items():
                if key.endswith("se.reduce.bias"):
                    array[:] = np.abs(array) + 1  # none of its few channels is dead on these images
            images = torch.from_numpy(images_of(plain.architecture)[:1]).double()
            found[name] = Graph(graph.structure, weights), images
        return found[name]

    return make


def answers(graph, images):
    """The outputs in float64."""

    def computed(step, x):
        return linear(step, x, *(torch.from_numpy(graph.weights[name]) for name in (step.weight, step.bias)))

    return run_steps(steps_of_graph(graph), images.clone(), computed)


def difference(graph, other, images, exact=None):
    """The largest of any output, relative to that output's largest value; ``exact`` where it is known."""
    exact, found = exact or answers(graph, images), answers(other, images)
    assert exact.keys() == found.keys()
    return max(float((exact[name] - found[name]).abs().max() / exact[name].abs().max()) for name in exact)


def random_factors(graph, sigma, seed=0, seams=None):
    """exp(sigma n) for the channels of every seam that may be multiplied."""
    random = np.random.default_rng(seed)
    seams = free_seams(graph) if seams is None else seams
    return {
        seam.convolution.name: np.exp(sigma * random.standard_normal(len(graph.weights[seam.convolution.input[1]])))
        for seam in seams
    }


def own_and_read(graph, seam):
    """The largest weights of a seam's channels on both sides, one by one; the bias is one of the first."""
    weight, bias = (graph.weights[name] for name in seam.convolution.input[1:])
    own = np.array([max(np.abs(row).max(), abs(b)) for row, b in zip(weight, bias, strict=True)])
    read = np.zeros(len(own))
    steps = {step.name: step for step in steps_of_graph(graph).steps}
    for node in seam.readers:
        kernel, groups = graph.weights[node.input[1]], steps[node.name].groups
        rows, columns = len(kernel) // groups, kernel.shape[1]
        for row, column in np.ndindex(kernel.shape[:2]):
            channel = row // rows * columns + column
            read[channel] = max(read[channel], np.abs(kernel[row, column]).max())
    return own, read


@networks
@settings(max_examples=4, deadline=None)
@given(sigma=st.floats(0.01, 4), seed=st.integers(0, 2**32 - 1))
def test_any_factors_leave_the_network_what_it_was(wide, name, sigma, seed):
    graph, images = wide(name)
    changed = with_factors(graph, random_factors(graph, sigma, seed))
    assert difference(graph, changed, images) < EXACT
    assert changed.weights.keys() == graph.weights.keys()
    for key, array in changed.weights.items():
        assert (array.dtype, array.shape) == (np.float64, graph.weights[key].shape)


@networks
def test_every_convolution_is_changed_but_those_whose_channels_are_seen(wide, name):
    """All but SE's, and where there is no classifier all but the outputs' own, whatever factors are given."""
    graph, images = wide(name)
    convolutions = {node.name: node for node in graph.structure.graph.node if node.op_type == "Conv"}
    everything = {
        key: np.full(len(graph.weights[node.input[1]]), 3.0) for key, node in convolutions.items() if "/se/" not in key
    }
    changed = with_factors(graph, everything)
    left = {
        key
        for key in everything
        if np.array_equal(changed.weights[convolutions[key].input[2]], graph.weights[convolutions[key].input[2]])
    }
    _, _, features, head = NETWORKS[name]
    assert len(left) == (len(features) if features else 0 if head else 1)
    assert left == set(everything) - {seam.convolution.name for seam in free_seams(graph)}
    assert difference(graph, changed, images) < EXACT


def test_a_seam_that_an_output_holds_cannot_be_forced(wide):
    """What ``free_seams`` leaves out is left out for a reason."""
    graph, images = wide("backbone")
    (fixed,) = (seam for seam in seams_of_graph(graph) if seam.fixed is not None)
    factor = random_factors(graph, 1.0, seams=[fixed])[fixed.convolution.name]
    forced = Graph(graph.structure, {**graph.weights, **changed_weights(fixed, graph.weights, factor)})
    assert difference(graph, forced, images) > 0.1


@networks
def test_a_forgotten_reader_is_seen(wide, name):
    graph, images = wide(name)
    readers, exact = [(seam, node) for seam in free_seams(graph) for node in seam.readers], answers(graph, images)
    assert any("/se/reduce/" in node.name for _, node in readers) == ("se" in name or name in ("plus", "mobile"))
    factors = random_factors(graph, 1.0)
    for seam, node in readers:
        factor = factors[seam.convolution.name]
        others = tuple(other for other in seam.readers if other is not node)
        changes = changed_weights(dataclasses.replace(seam, readers=others), graph.weights, factor)
        broken = Graph(graph.structure, {**graph.weights, **changes})
        assert difference(graph, broken, images, exact) > 1e-6, f"{seam.convolution.name} read by {node.name}"


@networks
def test_a_bias_that_is_not_multiplied_is_seen(wide, name):
    graph, images = wide(name)
    factors, exact = random_factors(graph, 1.0), answers(graph, images)
    for seam in free_seams(graph):
        changes = changed_weights(seam, graph.weights, factors[seam.convolution.name])
        del changes[seam.convolution.input[2]]
        broken = Graph(graph.structure, {**graph.weights, **changes})
        assert difference(graph, broken, images, exact) > 1e-6, seam.convolution.name


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@networks
def test_cross_layer_factors_make_both_ranges_alike(wide, name, sigma):
    graph, images = wide(name)
    graph = with_factors(graph, random_factors(graph, sigma, seed=2))
    factors = cross_layer_factors(graph)
    assert factors.keys() == {seam.convolution.name for seam in free_seams(graph)}
    changed = with_factors(graph, factors)
    assert difference(graph, changed, images) < EXACT
    before = after = 0.0
    for seam in free_seams(graph):
        before = max(before, *np.abs(np.log(np.divide(*own_and_read(graph, seam)))))
        own, read = own_and_read(changed, seam)
        np.testing.assert_allclose(own, read, rtol=0.06)
        after = max(after, *np.abs(np.log(own / read)))
    assert before > 20 * after


@pytest.mark.parametrize("name", ["plain", "plus"])
def test_one_seam_meets_at_the_root_of_the_product(wide, name):
    graph, _ = wide(name)
    seam = free_seams(graph)[-1]
    own, read = own_and_read(graph, seam)
    changes = changed_weights(seam, graph.weights, np.sqrt(read / own))
    changed = Graph(graph.structure, {**graph.weights, **changes})
    for side in own_and_read(changed, seam):
        np.testing.assert_allclose(side, np.sqrt(own * read), rtol=1e-12)


@networks
def test_a_planted_rescaling_is_undone(wide, name):
    """The equalized network hardly depends on the factors that it had before: the sweeps end at 1 % a step."""
    graph, _ = wide(name)
    planted = with_factors(graph, random_factors(graph, 1.0, seed=7))
    sides = [with_factors(one, cross_layer_factors(one)) for one in (graph, planted)]
    spread = []
    for key in graph.weights:
        kept = graph.weights[key] != 0
        spread.append(np.abs(np.log(np.abs(sides[1].weights[key][kept] / sides[0].weights[key][kept]))).max())
    moved = [
        np.abs(np.log(np.abs(planted.weights[key] / array)[array != 0])).max() for key, array in graph.weights.items()
    ]
    assert max(moved) > 2
    assert max(spread) < max(moved) / 8


@pytest.mark.parametrize("side", ["own", "read"])
@networks
def test_dead_channels_ask_for_nothing(wide, name, side):
    graph, images = wide(name)
    weights = {key: array.copy() for key, array in graph.weights.items()}
    seam = free_seams(graph)[0]
    if side == "own":
        weights[seam.convolution.input[1]][1] = weights[seam.convolution.input[2]][1] = 0
    else:
        for node in seam.readers:
            kernel = weights[node.input[1]]
            steps = {step.name: step for step in steps_of_graph(graph).steps}
            group, column = divmod(1, kernel.shape[1])
            rows = len(kernel) // steps[node.name].groups
            kernel[group * rows : (group + 1) * rows, column] = 0
    dead = Graph(graph.structure, weights)
    factors = cross_layer_factors(dead)
    assert factors[seam.convolution.name][1] == 1
    assert sum(factors[seam.convolution.name] == 1) == 1
    assert all(np.isfinite(values).all() and (values > 0).all() for values in factors.values())
    assert difference(dead, with_factors(dead, factors), images) < EXACT


def test_weights_stay_in_their_dtype_and_those_that_do_not_change_are_the_same_arrays(wide):
    graph, _ = wide("plain")
    narrow = Graph(graph.structure, {key: array.astype(np.float32) for key, array in graph.weights.items()})
    first = free_seams(narrow)[0]
    changed = with_factors(narrow, {first.convolution.name: np.full(8, 1 / 3)})
    touched = {*first.convolution.input[1:], *(node.input[1] for node in first.readers)}
    for key, array in changed.weights.items():
        assert array.dtype == np.float32
        assert (array is narrow.weights[key]) == (key not in touched)
    bias = first.convolution.input[2]
    np.testing.assert_array_equal(changed.weights[bias], (narrow.weights[bias].astype(np.float64) / 3).astype("f4"))
    assert with_factors(narrow, {}).weights == narrow.weights


def test_a_channel_that_is_all_but_its_bias_is_not_blown_up(wide):
    """Decay leaves weights of next to nothing beside a bias; their own range would make the bias the largest of all."""
    graph, _ = wide("plain")
    weights = {key: array.copy() for key, array in graph.weights.items()}
    weights["stage1.1.weight"][2] *= 1e-12
    weights["stage1.1.bias"][2] = 0.3
    factors = cross_layer_factors(Graph(graph.structure, weights))["stage1.1/Conv"]
    biases = np.abs(factors * weights["stage1.1.bias"])
    assert biases[2] < 10 * np.median(biases)
