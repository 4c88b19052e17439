"""Each layer fitted to what the quantized layers before it give: its codes, its scales, its bias, and what it says."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from exporter.onnx_graph import Graph
from exporter.plain import plain_from_repvgg
from exporter.quantization import layerwise
from exporter.quantization.form import EIGHT, FORMS, PORTABLE, RTX, Bits, levels
from exporter.quantization.histogram import Histogram
from exporter.quantization.layerwise import (
    EFFORTS,
    NotRepresentable,
    candidates_of,
    decibels,
    fitted_layers,
    sqnr_db,
)
from exporter.quantization.simulation import Simulation, float_layer, run_steps, steps_of_graph
from tests.conftest import EXAMPLES
from tests.inference import network_from_state
from tests.quantized_networks import float_graph, images_of, plain_network

forms = pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
efforts = pytest.mark.parametrize("effort", EFFORTS)


def silent(label, done, total):
    pass


def fit(graph, images, form=PORTABLE, effort="default", bits=EIGHT, kept=None, seen=None, ranges=None, told=silent):
    return fitted_layers(graph, images.clone(), form, effort, bits, kept or {}, seen or {}, ranges or {}, told)


def fashion(name, count):
    with np.load(EXAMPLES / name) as data:
        images = data["images"][:count].astype(np.float32)
    return (torch.from_numpy(images).reshape(-1, 1, 28, 28) / 255 - 0.5) / 0.5


@pytest.fixture(scope="module")
def trained():
    """The trained example's graph, 32 images to fit to, and 64 others."""
    state = torch.load(EXAMPLES / "fashion.pt", weights_only=True)
    images = fashion("fashion_calibration.npz", 32)
    plain = plain_from_repvgg(*network_from_state(state), images[:1].numpy())
    return float_graph(plain, (28, 28)), images, fashion("fashion_test.npz", 64)


@pytest.fixture(scope="module")
def small():
    """``small(name)``: one of the small networks and its images; made once."""
    found = {}

    def make(name):
        if name not in found:
            plain = plain_network(name)
            found[name] = float_graph(plain), torch.from_numpy(images_of(plain.architecture))
        return found[name]

    return make


def outputs_of(graph, images):
    return run_steps(steps_of_graph(graph), images.clone(), float_layer(graph))


def held_out_db(fitted, images, bits=8):
    exact = outputs_of(fitted.quantized.graph, images)
    found = Simulation(fitted.quantized, bits).run(images.numpy())
    return min(sqnr_db(value, torch.from_numpy(found[name])) for name, value in exact.items())


@efforts
@forms
@pytest.mark.parametrize("name", ["plain", "grouped", "plus", "mobile", "features with se", "backbone", "grey"])
def test_all_but_what_squeezes_is_in_codes_that_the_form_can_hold(small, name, form, effort):
    graph, images = small(name)
    fitted = fit(graph, images, form, effort)
    weighted = [step.name for step in steps_of_graph(graph).steps if step.weighted]
    assert list(fitted.quantized.layers) == [key for key in weighted if "/se/" not in key] == list(candidates_of(graph))
    assert set(fitted.quantized.kept) == {key for key in weighted if "/se/" in key}
    assert all("squeeze-and-excitation" in reason for reason in fitted.quantized.kept.values())
    steps = {step.name: step for step in steps_of_graph(graph).steps}
    for key, layer in fitted.quantized.layers.items():
        weight = graph.weights[steps[key].weight]
        assert (layer.weight.dtype, layer.weight.shape) == (np.int8, weight.shape)
        assert layer.weight_scale.dtype == form.dtype
        assert layer.weight_scale.shape == ((len(weight),) if form.per_channel else ())
        assert layer.bias.dtype == np.float32
        np.testing.assert_array_equal(layer.bias.astype(form.dtype), layer.bias)
        assert float(form.dtype.type(layer.input_scale)) == layer.input_scale
        assert fitted.fits[key].input_range == layer.input_scale * 127
    assert held_out_db(fitted, images) > (18 if form.per_channel else 12)
    for output, value in fitted.exact.items():
        assert torch.equal(value, outputs_of(graph, images)[output])


@forms
def test_the_fit_gives_what_the_simulation_gives(trained, form):
    graph, images, _ = trained
    fitted = fit(graph, images, form)
    found = Simulation(fitted.quantized).run(images.numpy())
    limit = 50 if form is PORTABLE else 30  # sums in another order; and the fit leaves out the rounding of halves
    assert all(sqnr_db(value, torch.from_numpy(found[name])) > limit for name, value in fitted.outputs.items())


@forms
def test_no_weight_is_clipped_and_each_is_the_nearest_code(trained, form):
    graph, images, _ = trained
    fitted = fit(graph, images, form)
    for key, layer in fitted.quantized.layers.items():
        weight = graph.weights[key.replace("/Conv", ".weight").replace("/Gemm", ".weight")].astype(np.float64)
        largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)) if form.per_channel else None, keepdims=True)
        np.testing.assert_array_equal(np.abs(layer.weight).max(), 127)
        rounded = 0.51 if form is PORTABLE else 0.6  # steps; the scale itself is rounded to half
        assert np.abs(layer.weight - 127 * weight / largest).max() < rounded


@forms
@efforts
def test_every_layers_result_has_the_float_networks_mean(trained, form, effort):
    """Bias correction: channel by channel, on the images that it was fitted to, from the quantized prefix."""
    graph, images, _ = trained
    fitted = fit(graph, images, form, effort)
    results = {"exact": {}, "codes": {}}
    exact = float_layer(graph)
    simulation = Simulation(fitted.quantized)

    def noticed(kind, computed):
        def layer(step, x):
            result = computed(step, x)
            results[kind][step.name] = result.transpose(0, 1).flatten(1).double()
            return result

        return layer

    for kind, computed in (("exact", exact), ("codes", simulation._layer)):
        run_steps(steps_of_graph(graph), images.clone(), noticed(kind, computed))
    moved = []
    for key, layer in fitted.quantized.layers.items():
        y, found = results["exact"][key], results["codes"][key]
        rounding = (2e-3 if form is PORTABLE else 2e-2) * y.std(1)
        assert bool(((y - found).mean(1).abs() <= rounding).all()), key
        bias = graph.weights[key.replace("/Conv", ".bias").replace("/Gemm", ".bias")]
        moved += list(np.abs(layer.bias - bias) / y.std(1).numpy())
    assert max(moved) > 0.04, "nothing was there to be corrected"


@forms
def test_gptq_sees_each_convolutions_own_window_and_codes(small, form, monkeypatch):
    """Kernel, stride, padding and groups of the node, and the covariance of its codes times their scale."""
    graph, images = small("mobile")
    seen, rounded = [], []
    covariance, rounding = layerwise.input_covariance, layerwise.rounded_by_gptq

    def input_covariance(x, *window):
        seen.append((x.clone(), window, covariance(x, *window)))
        return seen[-1][2]

    def rounded_by_gptq(weight, given, *rest):
        rounded.append(given.clone())
        return rounding(weight, given, *rest)

    monkeypatch.setattr(layerwise, "input_covariance", input_covariance)
    monkeypatch.setattr(layerwise, "rounded_by_gptq", rounded_by_gptq)
    fitted = fit(graph, images, form, "high")
    nodes = {node.name: node for node in graph.structure.graph.node}
    groups = iter(rounded)
    windows = set()
    for (x, window, found), (key, layer) in zip(seen, fitted.quantized.layers.items(), strict=True):
        attributes = {attribute.name: attribute for attribute in nodes[key].attribute}
        expected = (1, 1, 0, 1)
        if nodes[key].op_type == "Conv":
            expected = (
                attributes["kernel_shape"].ints[0], attributes["strides"].ints[0], attributes["pads"].ints[0],
                attributes["group"].i,
            )  # fmt: skip
        assert window == expected
        windows.add(window)
        assert torch.equal(x, x.round())
        assert float(x.abs().max()) <= 128
        for each in found:
            torch.testing.assert_close(next(groups), each * layer.input_scale**2, rtol=1e-12, atol=0)
    assert len(windows) > 4


def test_gptq_makes_up_for_what_rounding_loses(trained, monkeypatch):
    """W4A8: at least 6 dB on other images; and with the covariance of transposed images much less."""
    graph, images, others = trained
    bits = Bits(4, 8)
    nearest = held_out_db(fit(graph, images, bits=bits), others)
    high = held_out_db(fit(graph, images, effort="high", bits=bits), others)
    assert high >= nearest + 6
    covariance = layerwise.input_covariance
    monkeypatch.setattr(
        layerwise, "input_covariance", lambda x, *window: covariance(x.transpose(2, 3).contiguous(), *window)
    )
    assert held_out_db(fit(graph, images, effort="high", bits=bits), others) < high - 2


@pytest.mark.parametrize(("bits", "largest"), [(EIGHT, 127), (Bits(4, 8), 7), (Bits(6, 6), 31)])
@efforts
def test_codes_have_as_many_bits_as_asked_for(small, bits, largest, effort):
    graph, images = small("plain")
    fitted = fit(graph, images, effort=effort, bits=bits)
    for key, layer in fitted.quantized.layers.items():
        assert np.abs(layer.weight).max() == largest
        assert fitted.fits[key].input_range == layer.input_scale * levels(bits.activations)


@forms
def test_what_is_kept_is_kept_and_says_why(trained, form):
    graph, images, others = trained
    kept = {"stage0.0/Conv": "first", "head/Gemm": "last"}
    told = []
    fitted = fit(graph, images, form, kept=kept, told=lambda *what: told.append(what))
    names = [name for name in candidates_of(graph) if name not in kept]
    assert list(fitted.quantized.layers) == list(fitted.fits) == names
    assert fitted.quantized.kept == kept
    assert [done for _, done, _ in told] == list(range(1, len(names) + 1))
    assert {total for _, _, total in told} == {len(names)}
    if form is PORTABLE:
        assert held_out_db(fitted, others) > held_out_db(fit(graph, images, form), others)
    everything = dict.fromkeys(candidates_of(graph), "all")
    assert held_out_db(fit(graph, images, form, kept=everything), others) > (200 if form is PORTABLE else 50)


@forms
@efforts
def test_known_ranges_give_the_same_codes_bit_for_bit(trained, form, effort):
    graph, images, _ = trained
    first = fit(graph, images, form, effort)
    again = fit(graph, images, form, effort)
    known = fit(graph, images, form, effort, ranges={name: one.input_range for name, one in first.fits.items()})
    wider = fit(graph, images, form, effort, ranges={name: 1.1 * one.input_range for name, one in first.fits.items()})
    for key, layer in first.quantized.layers.items():
        for other in (again, known):
            assert same(layer, other.quantized.layers[key])
        assert not same(layer, wider.quantized.layers[key])


def same(layer, other):
    return all(
        np.array_equal(one, two)
        for one, two in zip(dataclasses.astuple(layer), dataclasses.astuple(other), strict=True)
    )


def test_what_other_images_had_widens_the_range(trained):
    graph, images, _ = trained
    seen = Histogram()
    seen.add(torch.full((100_000,), 40.0))
    plain, wider = fit(graph, images), fit(graph, images, seen={"stage2.0/Conv": seen})
    assert wider.fits["stage2.0/Conv"].input_range > 30 > plain.fits["stage2.0/Conv"].input_range
    assert wider.fits["stage1.0/Conv"] == plain.fits["stage1.0/Conv"]


def test_figures_of_a_layer_are_its_own(trained):
    """The share of values beyond the range, and the SQNR of its result, which is worse for fewer bits."""
    graph, images, _ = trained
    fitted, coarse = fit(graph, images), fit(graph, images, bits=Bits(8, 4))
    first = fitted.fits["stage0.0/Conv"]
    assert first.clipped == float((images.abs() > first.input_range).sum()) / images.numel()
    for key, one in fitted.fits.items():
        assert 0 <= one.clipped < 0.01
        assert 15 < one.sqnr_db < 80
        assert coarse.fits[key].sqnr_db < one.sqnr_db - 5


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("images", r"stage0\.0/Conv: its input reaches 1e\+07, too near to half's largest"),
        ("weights", r"stage1\.0/Conv: a scale is beyond float16"),
        ("bias", r"stage1\.0/Conv: a bias is beyond float16"),
    ],
)
def test_what_half_cannot_hold_is_named(small, what, line):
    """And float32 can."""
    graph, images = small("plain")
    weights = {name: array.copy() for name, array in graph.weights.items()}
    if what == "images":
        images = images / images.abs().max() * 1e7
    elif what == "weights":
        weights["stage1.0.weight"] *= np.float32(1e-6)
    else:
        weights["stage1.0.bias"][1] = -1e6
    changed = Graph(graph.structure, weights)
    with pytest.raises(NotRepresentable, match=line):
        fit(changed, images, RTX)
    assert held_out_db(fit(changed, images, PORTABLE), images) > 15


@forms
@efforts
@pytest.mark.parametrize("what", ["black", "constant", "dead layer", "dead channel", "dead head", "one image"])
def test_inputs_and_layers_that_say_nothing_are_no_obstacle(small, what, form, effort):
    graph, images = small("plain")
    weights = {name: array.copy() for name, array in graph.weights.items()}
    if what == "dead channel":
        weights["stage2.0.weight"][3] = 0
    elif what.startswith("dead"):
        name = {"dead layer": "stage2.0", "dead head": "head"}[what]
        weights[f"{name}.weight"][:] = 0
    images = {"black": images * 0, "constant": images * 0 + 0.7, "one image": images[:1]}.get(what, images)
    fitted = fit(Graph(graph.structure, weights), images, form, effort)
    for layer in fitted.quantized.layers.values():
        assert layer.input_scale > 0
        assert np.isfinite(layer.bias).all()
        assert (layer.weight_scale > 0).all()
    assert held_out_db(fitted, images) > 15
    if what == "black":
        assert fitted.fits["stage0.0/Conv"].input_range == pytest.approx(1, rel=1e-3)


def test_a_nan_among_the_images_is_no_range(small):
    graph, images = small("plain")
    images = images.clone()
    images[1, 0, 3, 3] = math.nan
    with pytest.raises((NotRepresentable, ValueError), match="NaN or infinite"):
        fit(graph, images)


def test_decibels():
    assert decibels(100.0, 1.0) == pytest.approx(20)
    assert decibels(1.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) < -2000
    for bad in (math.nan, math.inf):
        assert decibels(1.0, bad) == decibels(bad, 1.0) == -math.inf
    y, found = torch.randn(17, 5, 3, 2), torch.randn(17, 5, 3, 2)
    expected = 10 * math.log10(float(y.double().square().sum() / (y.double() - found.double()).square().sum()))
    assert sqnr_db(y, found) == pytest.approx(expected, abs=1e-4)
    assert sqnr_db(y, y) == math.inf
    found[3, 1] = math.nan
    assert sqnr_db(y, found) == -math.inf
