"""Factors by predicted noise: it is near what codes do, the factors lower it, and where they begin is no matter."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from exporter.onnx_graph import Graph
from exporter.quantization import noise
from exporter.quantization.equalization import cross_layer_factors, free_seams, with_factors
from exporter.quantization.form import EIGHT, FORMS, PORTABLE, RTX, Bits, levels
from exporter.quantization.noise import PEAK, Statistics, importance_of_channels, noise_aware_factors
from exporter.quantization.simulation import Simulation, float_layer, linear, run_steps, steps_of_graph
from exporter.quantization.simulation import unweighted as in_place
from tests.quantized_networks import float_graph, images_of, plain_network, quantized_graph

NAMES = ("plain", "grouped", "plus", "mobile", "features with se", "backbone")
networks = pytest.mark.parametrize("name", NAMES)
forms = pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])


class Made:
    """A float32 network, its images, and what the factors are found from."""

    def __init__(self, graph, images, probes=None):
        self.graph, self.images = graph, images
        self.names = [step.name for step in steps_of_graph(graph).steps if step.weighted and "/se/" not in step.name]
        self.inputs, self.outputs = observed(graph, images)
        self.statistics = {name: statistics_of(self.inputs[name]) for name in self.names}
        self.importance = importance_of_channels(graph, images, self.names)

    @functools.cache  # noqa: B019
    def exactly(self, name):
        return importance_exactly(self.graph, self.images, name)

    @functools.cache  # noqa: B019 - there are as many networks as the fixtures make
    def factors(self, per_channel, bits=EIGHT, weight_share=1.0):
        return self.factors_by(self.importance, per_channel, bits, weight_share)

    def factors_by(self, importance, per_channel, bits=EIGHT, weight_share=1.0):
        return noise_aware_factors(
            self.graph, self.statistics, importance, per_channel=per_channel, bits=bits, weight_share=weight_share
        )


def observed(graph, images):
    """By layer the float network's input; by name its outputs."""
    inputs, layer = {}, float_layer(graph)

    def noticed(step, x):
        inputs[step.name] = x.clone()
        return layer(step, x)

    return inputs, run_steps(steps_of_graph(graph), images.clone(), noticed)


def statistics_of(x):
    columns = x.transpose(0, 1).flatten(1).double().numpy()
    return Statistics(np.abs(columns).max(axis=1), (columns**2).mean(axis=1), (columns != 0).mean(axis=1))


def predicted(made, factors, importance, per_channel, bits=EIGHT, weight_share=1.0):
    """The module's formula with true maxima, channel by channel: the outputs' relative noise."""
    steps = {step.name: step for step in steps_of_graph(made.graph).steps}
    sources = {node.name: seam.convolution.name for seam in free_seams(made.graph) for node in seam.readers}
    total = 0.0
    for name in made.names:
        step, of, of_channels = steps[name], made.statistics[name], importance[name].double().numpy()
        weight = made.graph.weights[step.weight].astype(np.float64)
        weight = weight.reshape(*weight.shape[:2], -1)
        inner = factors.get(sources.get(name), np.ones(len(of.peak)))
        outer = factors.get(name, np.ones(len(weight)))
        input_step = (inner * of.peak).max() / levels(bits.activations)
        rows, columns = len(weight) // step.groups, weight.shape[1]
        largest, of_weights = np.zeros(len(weight)), np.zeros(len(weight))
        for o in range(len(weight)):
            channels = slice(o // rows * columns, (o // rows + 1) * columns)
            share = of.non_zero[channels] / inner[channels] ** 2
            total += of_channels[o] * input_step**2 / 12 * (share * (weight[o] ** 2).sum(axis=1)).sum()
            largest[o] = outer[o] * (np.abs(weight[o]).max(axis=1) / inner[channels]).max() / levels(bits.weights)
            of_weights[o] = (inner[channels] ** 2 * of.mean_square[channels]).sum() * weight.shape[2] / outer[o] ** 2
        steps_of_weights = largest if per_channel else np.full(len(weight), largest.max())
        total += weight_share * (of_channels * steps_of_weights**2 / 12 * of_weights).sum()
    return total


def decibels(value):
    return -10 * math.log10(value)


def rescaled(graph, sigma=1.0, seed=5):
    random = np.random.default_rng(seed)
    return with_factors(
        graph,
        {
            seam.convolution.name: np.exp(sigma * random.standard_normal(len(graph.weights[seam.convolution.input[1]])))
            for seam in free_seams(graph)
        },
    )


@pytest.fixture(scope="module")
def made():
    """``made(name)``; with ``sigma``, after a rescaling that changes nothing."""
    found = {}

    def make(name, sigma=0.0):
        if (name, sigma) not in found:
            plain = plain_network(name)
            images = torch.from_numpy(images_of(plain.architecture))
            graph = float_graph(plain)
            found[name, sigma] = Made(rescaled(graph, sigma) if sigma else graph, images)
        return found[name, sigma]

    return make


@pytest.fixture(scope="module")
def begun(made):
    """``begun(name, sigma)``: the same after cross-layer equalization."""
    found = {}

    def make(name, sigma):
        if (name, sigma) not in found:
            network = made(name, sigma)
            found[name, sigma] = Made(with_factors(network.graph, cross_layer_factors(network.graph)), network.images)
        return found[name, sigma]

    return make


@forms
@networks
def test_predicted_noise_is_lower_afterwards(made, name, form):
    """By the formula, written again; and lower still for what begins far from the optimum."""
    gains = {}
    for sigma in (0.0, 1.0):
        network = made(name, sigma)
        factors = network.factors(form.per_channel)
        assert factors.keys() == {seam.convolution.name for seam in free_seams(network.graph)}
        before, after = (
            decibels(predicted(network, each, network.importance, form.per_channel)) for each in ({}, factors)
        )
        gains[sigma] = after - before
    assert gains[0.0] > 0.3
    assert gains[1.0] > gains[0.0] + 2


@forms
@pytest.mark.parametrize("name", ["plain", "grouped", "plus"])
def test_where_it_begins_does_not_matter(made, begun, name, form):
    """From cross-layer equalization on, rescaled channels end at the same noise; without either they do not."""
    after, raw = [], []
    for sigma in (0.0, 1.0):
        network, equalized = made(name, sigma), begun(name, sigma)
        importance = {key: equalized.exactly(key) for key in equalized.names}
        factors = equalized.factors_by(importance, form.per_channel)
        after.append(decibels(predicted(equalized, factors, importance, form.per_channel)))
        raw.append(decibels(predicted(network, {}, network.importance, form.per_channel)))
    assert after[1] == pytest.approx(after[0], abs=0.3)
    assert raw[0] > raw[1] + 2


def importance_exactly(graph, images, name):
    """By one gradient for each of the outputs' numbers: sum of squares over outputs, positions and images."""
    steps, results = steps_of_graph(graph), {}

    def noticed(step, x):
        result = linear(step, x, *(torch.from_numpy(graph.weights[key]) for key in (step.weight, step.bias)))
        if step.name == name:
            result = results[name] = result.detach().requires_grad_()
        return result

    def unweighted(step, inputs):
        return torch.relu(inputs[0]) if step.operation == "Relu" else in_place(step, inputs)

    total = 0.0
    for output in run_steps(steps, images.clone(), noticed, unweighted).values():
        if not output.requires_grad:
            continue
        scale = float(output.detach().square().sum())
        flat = output.flatten(1)
        for number in range(flat.shape[1]):
            (gradient,) = torch.autograd.grad(flat[:, number].sum(), results[name], retain_graph=True)
            total = total + gradient.double().square().transpose(0, 1).flatten(1).sum(1) / scale
    return total


@pytest.mark.parametrize("name", ["plain", "grouped", "plus", "mobile"])
def test_importance_is_what_gradients_of_every_output_give(made, name, monkeypatch):
    """Hutchinson's estimate: near with the few probes there are, nearer with more."""
    monkeypatch.setattr(noise, "PROBES", 64)
    network = made(name)
    many = importance_of_channels(network.graph, network.images, network.names)
    chosen = [network.names[0], network.names[len(network.names) // 2], network.names[-1]]
    few_errors, many_errors = [], []
    for layer in chosen:
        exact = network.exactly(layer)
        alive = exact > exact.max() * 1e-3
        few_errors += (network.importance[layer] / exact - 1)[alive].abs().tolist()
        many_errors += (many[layer] / exact - 1)[alive].abs().tolist()
        assert bool((many[layer][exact == 0] == 0).all())
    assert np.median(many_errors) < 0.12
    assert np.median(few_errors) < (0.45 if name != "mobile" else 1)
    assert np.median(many_errors) < np.median(few_errors)


def test_importance_is_what_noise_in_a_channel_does(made):
    """White noise added to one channel of one layer, and what the outputs' squared error becomes."""
    network = made("plain")
    layer, generator = "stage1.1/Conv", torch.Generator().manual_seed(1)
    exact = network.exactly(layer)
    computed, sigma = float_layer(network.graph), 1e-3 * float(network.inputs["stage2.0/Conv"].abs().max())
    (reference,) = network.outputs.values()
    for channel in exact.argsort(descending=True)[:3].tolist():
        noise_power = []
        for _ in range(24):

            def disturbed(step, x, channel=channel):
                result = computed(step, x)
                if step.name == layer:
                    result[:, channel] += sigma * torch.randn(result[:, channel].shape, generator=generator)
                return result

            (found,) = run_steps(steps_of_graph(network.graph), network.images.clone(), disturbed).values()
            noise_power.append(float((found - reference).double().square().sum() / reference.double().square().sum()))
        assert np.mean(noise_power) / sigma**2 == pytest.approx(float(exact[channel]), rel=0.35)


@pytest.mark.parametrize("name", ["plain", "grouped"])
def test_the_prediction_is_what_codes_by_nearest_rounding_do(made, name):
    """Within 7 dB of the simulation, and on the safe side: weights below half a step lose less than a uniform error."""
    measured, expected = [], []
    for sigma in (0.0, 0.5):
        network = made(name, sigma)
        quantized = quantized_graph(network.graph, network.images.numpy(), PORTABLE)
        (found,), (exact,) = Simulation(quantized).run(network.images.numpy()).values(), network.outputs.values()
        exact = exact.double().numpy()
        measured.append(decibels(((exact - found) ** 2).sum() / (exact**2).sum()))
        importance = {key: network.exactly(key) for key in network.names}
        expected.append(decibels(predicted(network, {}, importance, per_channel=True)))
    np.testing.assert_allclose(expected, measured, atol=7)
    assert all(cautious < found + 1 for cautious, found in zip(expected, measured, strict=True))
    assert expected[0] > expected[1] + 2
    assert measured[0] > measured[1] + 0.5


@forms
def test_another_layers_importance_gives_worse_factors(made, form):
    """The channels' importances in another order, and none at all."""
    network = made("plain", 1.0)
    generator = torch.Generator().manual_seed(0)
    shuffled = {
        key: values[torch.randperm(len(values), generator=generator)] for key, values in network.importance.items()
    }
    nothing = {key: torch.zeros_like(values) for key, values in network.importance.items()}
    right, wrong, none = (
        decibels(predicted(network, network.factors_by(given, form.per_channel), network.importance, form.per_channel))
        for given in (network.importance, shuffled, nothing)
    )
    assert right > none + 3
    assert right > wrong + (0.2 if form.per_channel else -0.2)


@networks
def test_channels_peak_where_half_is_at_ease(made, name):
    """One factor for all channels of a convolution changes nothing, and is chosen so."""
    network = made(name, 1.0)
    factors = network.factors(per_channel=False)
    for seam in free_seams(network.graph):
        peaks = [network.statistics[node.name].peak for node in seam.readers if node.name in network.statistics]
        for peak in peaks:
            assert (factors[seam.convolution.name] * peak).max() == pytest.approx(PEAK, rel=1e-9)
    before = {key: network.statistics[key].peak.max() for key in network.names[1:]}
    assert max(abs(math.log(peak / PEAK)) for peak in before.values()) > 0.5


@pytest.mark.parametrize("bits", [EIGHT, Bits(4, 8), Bits(8, 4)])
def test_factors_go_by_the_bits_of_both(made, bits):
    """What is optimal for these bits is better than what is optimal for others."""
    network = made("plain")
    own, *theirs = (
        predicted(
            network, network.factors(per_channel=True, bits=each), network.importance, per_channel=True, bits=bits
        )
        for each in sorted((EIGHT, Bits(4, 8), Bits(8, 4)), key=lambda each: each != bits)
    )
    assert 1.05 * own < min(theirs)


def test_a_smaller_share_of_the_weights_noise_favours_activations(made):
    network = made("plain")
    whole, little = (network.factors(per_channel=True, weight_share=share) for share in (1.0, 0.1))
    for share, better, worse in ((1.0, whole, little), (0.1, little, whole)):
        assert predicted(network, better, network.importance, per_channel=True, weight_share=share) < predicted(
            network, worse, network.importance, per_channel=True, weight_share=share
        )


@forms
@pytest.mark.parametrize("what", ["channel", "layer", "head", "image"])
def test_what_is_always_zero_gives_factors_all_the_same(made, form, what):
    """A channel or layer whose weights are 0, as decay leaves them; a classifier of zeros; black images."""
    sound = made("plain")
    weights = {key: array.copy() for key, array in sound.graph.weights.items()}
    if what == "channel":
        weights["stage1.1.weight"][2] = 0
    elif what == "layer":
        weights["stage2.0.weight"][:] = 0
    elif what == "head":
        weights["head.weight"][:] = weights["head.bias"][:] = 0
    images = sound.images * 0 if what == "image" else sound.images
    network = Made(Graph(sound.graph.structure, weights), images)
    factors = network.factors(form.per_channel)
    assert factors.keys() == {seam.convolution.name for seam in free_seams(network.graph)}
    for name, values in factors.items():
        assert np.isfinite(values).all(), name
        assert (values > 0).all(), name


@pytest.mark.parametrize("form", [PORTABLE, RTX], ids=["int8", "rtx"])
def test_nothing_to_choose_is_no_factors(form):
    """A network whose every convolution is an output."""
    plain = plain_network("features")
    blocks = [block.name for block in plain.architecture.blocks][:1]
    graph = float_graph(plain)
    (node,) = (node for node in graph.structure.graph.node if node.name == f"{blocks[0]}/Conv")
    structure = type(graph.structure)()
    structure.CopyFrom(graph.structure)
    del structure.graph.node[2:]
    del structure.graph.output[1:]
    structure.graph.output[0].name = structure.graph.node[1].output[0]
    only = Graph(structure, {name: graph.weights[name] for name in node.input[1:]})
    network = Made(only, torch.from_numpy(images_of(plain.architecture)))
    assert network.names == [node.name]
    assert network.factors(form.per_channel) == {}
