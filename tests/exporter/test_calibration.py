"""From a graph and images to a quantized network: how near it comes, and that a step which fails is noticed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from benchmarks.rescaled_checkpoint import rescaled
from exporter.errors import VerificationFailed
from exporter.onnx_graph import Graph
from exporter.plain import plain_from_repvgg
from exporter.quantization import calibration, layerwise
from exporter.quantization.calibration import Known, Settings, calibrated_from_graph, fitted_images
from exporter.quantization.form import FORMS, PORTABLE, RTX
from exporter.quantization.layerwise import candidates_of, sqnr_db
from exporter.quantization.simulation import Simulation, float_layer, run_steps, steps_of_graph
from tests.conftest import EXAMPLES, ROOT
from tests.inference import network_from_state
from tests.quantized_networks import float_graph, images_of, plain_network

forms = pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
efforts = pytest.mark.parametrize("effort", ["default", "high"])
FLOORS = {("int8", "default"): 34.5, ("int8", "high"): 36.3, ("int8.rtx", "default"): 29.0, ("int8.rtx", "high"): 33.0}
"""SQNR in dB on images that nothing was fitted to, 1.5 below what there was; without equalization 33 and 15."""


def silent(label, done, total):
    pass


class Images:
    """A stream of an array."""

    def __init__(self, array):
        self.array, self.count = array, len(array)

    def batches(self, size, count=None):
        array = self.array[:count]
        for start in range(0, len(array), size):
            yield array[start : start + size]


def fashion(name, count):
    with np.load(EXAMPLES / name) as data:
        return (data["images"][:count].astype(np.float32).reshape(-1, 1, 28, 28) / 255 - np.float32(0.5)) / np.float32(
            0.5
        )


@pytest.fixture(scope="module")
def trained():
    """The trained example as it is, and with its channels rescaled; 128 images to calibrate on, and as many others."""
    state = torch.load(EXAMPLES / "fashion.pt", weights_only=True)
    twin = {key: value.float() if value.is_floating_point() else value for key, value in rescaled(state).items()}
    images = fashion("fashion_calibration.npz", 128)
    graphs = [float_graph(plain_from_repvgg(*network_from_state(one), images[:1]), (28, 28)) for one in (state, twin)]
    return dict(zip(("normal", "rescaled"), graphs, strict=True)), images, fashion("fashion_test.npz", 128)


@pytest.fixture(scope="module")
def sound(trained):
    """``sound(form, effort, twin)``: what calibration gives, with nothing planted; made once."""
    found = {}
    graphs, images, _ = trained

    def make(form, effort="default", twin="normal"):
        key = form.name, effort, twin
        if key not in found:
            found[key] = calibrated_from_graph(graphs[twin], Images(images), Settings(form, effort), silent)
        return found[key]

    return make


@pytest.fixture(scope="module")
def small():
    """``small(name, count)``: a small network and so many images of 20 x 24."""
    found = {}

    def make(name="plain", count=24):
        if name not in found:
            plain = plain_network(name)
            found[name] = float_graph(plain), images_of(plain.architecture)
        graph, few = found[name]
        sizes = np.linspace(0.5, 1.2, math.ceil(count / len(few)), dtype=np.float32)
        images = np.concatenate([np.roll(few, index, 3) * size for index, size in enumerate(sizes)])[:count]
        return graph, np.ascontiguousarray(images)

    return make


def outputs_of(graph, images):
    return run_steps(steps_of_graph(graph), torch.from_numpy(images.copy()), float_layer(graph))


def error_db(graph, quantized, images):
    """Against the graph that was given, not against the equalized one."""
    found = Simulation(quantized).run(images)
    return min(sqnr_db(y, torch.from_numpy(found[name])) for name, y in outputs_of(graph, images).items())


def same_codes(one, other):
    assert one.layers.keys() == other.layers.keys()
    return all(
        np.array_equal(mine, theirs)
        for key in one.layers
        for mine, theirs in zip(
            dataclasses.astuple(one.layers[key]), dataclasses.astuple(other.layers[key]), strict=True
        )
    )


@forms
@efforts
def test_the_trained_network_keeps_its_outputs(trained, sound, form, effort):
    graphs, images, others = trained
    found = sound(form, effort)
    assert error_db(graphs["normal"], found.quantized, others) > FLOORS[form.name, effort]
    assert found.sqnr_db == pytest.approx(error_db(graphs["normal"], found.quantized, images), abs=0.1)
    assert found.agreement >= 0.9
    assert (found.images, found.fitted) == (128, 128)
    assert found.equalized
    assert found.equalized_db > found.plain_db + (0.5 if form is PORTABLE else 10)


@forms
def test_high_effort_is_better(trained, sound, form):
    graphs, _, others = trained
    default, high = (error_db(graphs["normal"], sound(form, each).quantized, others) for each in ("default", "high"))
    assert high > default + (0.5 if form is PORTABLE else 2)


@forms
def test_rescaled_channels_make_no_difference(trained, sound, form):
    graphs, _, others = trained
    normal, twin = (
        error_db(graphs[name], sound(form, "default", name).quantized, others) for name in ("normal", "rescaled")
    )
    assert twin == pytest.approx(normal, abs=1.0 if form is PORTABLE else 2.0)
    assert sound(form, "default", "rescaled").plain_db < 20


def without_bias_correction(patch):
    last, made = [], layerwise.float_layer

    def float_layer(graph, *rest):
        computed = made(graph, *rest)

        def noticed(step, x):
            last[:] = [torch.from_numpy(graph.weights[step.bias]).double()]
            return computed(step, x)

        return noticed

    patch.setattr(layerwise, "float_layer", float_layer)
    patch.setattr(layerwise, "refitted", lambda moments, scale, *, per_channel: (scale, last[0]))


def without_equalization(patch):
    patch.setattr(calibration, "factors_from_images", lambda graph, images, settings: {})


def with_no_importance(patch):
    found = calibration.importance_of_channels
    patch.setattr(
        calibration,
        "importance_of_channels",
        lambda *given: {name: torch.zeros_like(values) for name, values in found(*given).items()},
    )


def with_the_range_of_one_image(patch):
    class First(layerwise.Histogram):
        def add(self, values):
            super().add(values[:1])

    patch.setattr(layerwise, "Histogram", First)
    patch.setattr(layerwise, "range_from_histogram", lambda histogram, *rest: histogram.largest)


def with_another_inputs_covariance(patch):
    found = layerwise.input_covariance
    patch.setattr(layerwise, "input_covariance", lambda x, *window: found(x.transpose(2, 3).contiguous(), *window))


def with_nearest_codes(patch):
    patch.setattr(
        layerwise,
        "rounded_by_gptq",
        lambda weight, covariance, scale, largest: layerwise.rounded_to_nearest(weight, scale, largest),
    )


@pytest.mark.parametrize(
    ("fault", "effort", "loses_db"),
    [
        (without_bias_correction, "default", 1.0),
        (without_equalization, "default", 10),
        (with_no_importance, "default", 2),
        (with_the_range_of_one_image, "default", 5),
        (with_another_inputs_covariance, "high", 1.5),
        (with_nearest_codes, "high", 1.5),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_step_that_fails_is_seen_in_the_figures(trained, sound, monkeypatch, fault, effort, loses_db):
    graphs, images, others = trained
    expected = error_db(graphs["normal"], sound(RTX, effort).quantized, others)
    fault(monkeypatch)
    found = calibrated_from_graph(graphs["normal"], Images(images), Settings(RTX, effort), silent)
    assert error_db(graphs["normal"], found.quantized, others) < expected - loses_db


@pytest.mark.parametrize(
    ("form", "effort", "count"), [(PORTABLE, "default", 40), (RTX, "high", 24), (RTX, "default", 40)]
)
def test_what_is_known_gives_the_same_codes_bit_for_bit(small, monkeypatch, form, effort, count):
    """And so does calibrating anew; with more images than layers are fitted to, too."""
    monkeypatch.setattr(calibration, "MOST_FITTED", 24)
    graph, images = small("plus", count)
    run = [calibrated_from_graph(graph, Images(images), Settings(form, effort), silent) for _ in range(2)]
    ranges = dict(run[0].ranges)
    known = calibrated_from_graph(graph, Images(images), Settings(form, effort), silent, Known(run[0].factors, ranges))
    assert same_codes(run[0].quantized, run[1].quantized)
    assert same_codes(run[0].quantized, known.quantized)
    assert (known.sqnr_db, known.agreement) == (run[0].sqnr_db, run[0].agreement)
    assert known.equalized_db is known.plain_db is None
    wrong = {name: 1.2 * value for name, value in ranges.items()}
    other = calibrated_from_graph(graph, Images(images), Settings(form, effort), silent, Known(run[0].factors, wrong))
    assert not same_codes(run[0].quantized, other.quantized)


@pytest.mark.parametrize(("count", "fitted"), [(1, 1), (15, 15), (16, 16), (17, 16), (41, 16)])
def test_layers_are_fitted_to_the_first_images_and_figures_are_of_all(small, monkeypatch, count, fitted):
    monkeypatch.setattr(calibration, "MOST_FITTED", 16)
    graph, images = small(count=count)
    np.testing.assert_array_equal(fitted_images(Images(images)).numpy(), images[:fitted])
    found = calibrated_from_graph(graph, Images(images), Settings(PORTABLE), silent)
    assert (found.images, found.fitted) == (count, fitted)
    assert found.sqnr_db == pytest.approx(error_db(graph, found.quantized, images), abs=0.1)
    exact, ours = outputs_of(graph, images)["output"].numpy(), Simulation(found.quantized).run(images)["output"]
    assert found.agreement == pytest.approx((exact.argmax(1) == ours.argmax(1)).mean())


def test_images_that_layers_are_not_fitted_to_still_count_for_ranges(small, monkeypatch):
    monkeypatch.setattr(calibration, "MOST_FITTED", 16)
    graph, images = small(count=32)
    larger = images.copy()
    larger[16:] *= 20
    few, many = (
        calibrated_from_graph(graph, Images(given), Settings(PORTABLE), silent).fits["stage0.0/Conv"].input_range
        for given in (images, larger)
    )
    assert many > 5 * few


def test_only_so_many_pixels_are_fitted_to():
    for size, fitted in ((224, 64), (448, 16), (2016, 1), (28, 512)):
        images = np.broadcast_to(np.zeros((1, 1, 1, 1), np.float32), (600, 1, size, size))

        class Broadcast(Images):
            asked = None

            def batches(self, size, count=None):
                self.asked = count if count is not None else self.asked
                yield np.zeros((1, *self.array.shape[1:]), np.float32)

        stream = Broadcast(images)
        fitted_images(stream)
        assert stream.asked == fitted


@pytest.mark.parametrize("name", ["grouped", "grey", "se", "plus", "mobile", "features with se", "backbone"])
@forms
def test_every_kind_of_network(small, name, form):
    graph, images = small(name, 16)
    found = calibrated_from_graph(graph, Images(images), Settings(form), silent)
    assert tuple(found.quantized.layers) == candidates_of(graph)
    assert error_db(graph, found.quantized, images) > (18 if form is PORTABLE else 14)
    assert found.sqnr_db == pytest.approx(error_db(graph, found.quantized, images), abs=0.3)
    assert (found.agreement is None) == (name in ("backbone", "features with se"))


def test_a_budget_keeps_layers_only_where_it_must(small):
    graph, images = small()
    told = []
    whole = calibrated_from_graph(graph, Images(images), Settings(RTX, report=True), silent)
    met = calibrated_from_graph(graph, Images(images), Settings(RTX, budget_db=whole.sqnr_db - 1), silent)
    assert same_codes(whole.quantized, met.quantized)
    assert [row.name for row in whole.sensitivities] == list(candidates_of(graph))
    wanted = whole.sqnr_db + 1.5
    found = calibrated_from_graph(
        graph, Images(images), Settings(RTX, budget_db=wanted), lambda *what: told.append(what)
    )
    assert found.sqnr_db >= wanted
    assert error_db(graph, found.quantized, images) >= wanted - 0.1
    kept = {name for name in candidates_of(graph) if name not in found.quantized.layers}
    assert kept == set(found.quantized.kept)
    assert 0 < len(kept) < len(candidates_of(graph))
    assert all(f"to reach {wanted:g} dB" in reason for reason in found.quantized.kept.values())
    assert any(label == "INT8 budget" for label, _, _ in told)


def test_a_budget_beyond_reach_is_one_line(small):
    graph, images = small()
    with pytest.raises(VerificationFailed, match=r"an SQNR of 150 dB cannot be reached: even with no layer but"):
        calibrated_from_graph(graph, Images(images), Settings(PORTABLE, budget_db=150), silent)


def test_what_a_budget_found_is_found_again_from_what_is_known(small):
    graph, images = small()
    whole = calibrated_from_graph(graph, Images(images), Settings(RTX), silent)
    settings = Settings(RTX, budget_db=whole.sqnr_db + 1.5)
    first = calibrated_from_graph(graph, Images(images), settings, silent)
    known = Known(first.factors, first.ranges)
    again = calibrated_from_graph(graph, Images(images), settings, silent, known)
    assert again.quantized.kept == first.quantized.kept
    assert same_codes(again.quantized, first.quantized)
    without = calibrated_from_graph(graph, Images(images), Settings(RTX), silent, known)
    assert same_codes(without.quantized, whole.quantized)


@forms
@pytest.mark.parametrize("fitted", [8, 64])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_are_not_numbers_are_one_line(small, monkeypatch, form, fitted, value):
    """Among the images that layers are fitted to, and behind them."""
    monkeypatch.setattr(calibration, "MOST_FITTED", fitted)
    graph, images = small(count=16)
    images[12, 0, 5, 5] = value
    with pytest.raises(VerificationFailed, match=r"INT8: .*(NaN|infinite|reaches inf)"):
        calibrated_from_graph(graph, Images(images), Settings(form), silent)


@forms
def test_huge_activations_are_for_float32_alone(small, form):
    graph, images = small()
    huge = images * np.float32(1e7)
    if form is PORTABLE:
        found = calibrated_from_graph(graph, Images(huge), Settings(form), silent)
        assert error_db(graph, found.quantized, huge) > 20
        return
    with pytest.raises(VerificationFailed, match=r"INT8: stage0\.0/Conv: its input reaches .*; take fp16"):
        calibrated_from_graph(graph, Images(huge), Settings(form), silent)


@pytest.mark.parametrize(("form", "effort"), [(PORTABLE, "high"), (RTX, "default")])
@pytest.mark.parametrize("what", ["black", "constant", "dead channel", "dead layer", "dead head", "dead reader"])
def test_what_says_nothing_is_no_obstacle(small, form, effort, what):
    """Weights of 0, as decay leaves them; images without contrast."""
    graph, images = small(count=8)
    weights = {name: array.copy() for name, array in graph.weights.items()}
    if what == "dead channel":
        weights["stage1.1.weight"][2] = 0
    elif what == "dead layer":
        weights["stage2.0.weight"][:] = 0
    elif what == "dead head":
        weights["head.weight"][:] = 0
    elif what == "dead reader":
        weights["stage1.1.weight"][:, 1] = 0
    images = {"black": images * 0, "constant": images * 0 + 1}.get(what, images)
    dead = Graph(graph.structure, weights)
    found = calibrated_from_graph(dead, Images(images), Settings(form, effort), silent)
    assert error_db(dead, found.quantized, images) > 16


@pytest.mark.parametrize(("form", "share"), [(PORTABLE, 1e-9), (PORTABLE, 0), (RTX, 1e-9)])
def test_a_channel_that_is_all_but_its_bias_does_not_spoil_the_others(trained, sound, form, share):
    """What decay leaves of a channel: weights of next to nothing, and the bias of its batch norm."""
    graphs, images, others = trained
    weights = {name: array.copy() for name, array in graphs["normal"].weights.items()}
    for block in ("stage1.0", "stage2.1"):
        weights[f"{block}.weight"][5] *= np.float32(share)
        weights[f"{block}.bias"][5] = 0.3
    dead = Graph(graphs["normal"].structure, weights)
    found = calibrated_from_graph(dead, Images(images), Settings(form), silent)
    expected = error_db(graphs["normal"], sound(form).quantized, others)
    assert error_db(dead, found.quantized, others) > expected - 3.5
    assert found.equalized


@pytest.mark.parametrize("settings", [Settings(PORTABLE), Settings(RTX, "high", report=True, budget_db=1.0)])
def test_progress_goes_up_and_ends_at_its_total(small, monkeypatch, settings):
    monkeypatch.setattr(calibration, "MOST_FITTED", 16)
    graph, images = small(count=40)
    told = []
    calibrated_from_graph(graph, Images(images), settings, lambda *what: told.append(what))
    labels = [label for label, _ in itertools.groupby(told, key=lambda one: one[0])]
    assert labels[0] == f"INT8 {settings.effort}"
    assert labels[-1] == "INT8 SQNR"
    assert "INT8 ranges" in labels
    runs = []
    for label, done, total in told:
        if runs and runs[-1][0] == (label, total) and done > runs[-1][1][-1]:
            runs[-1][1].append(done)
        else:
            runs.append(((label, total), [done]))
    for (label, total), dones in runs:
        assert dones[-1] == total, label
    assert len(runs) <= 7


GROWTH = """
    import resource, sys
    import numpy as np
    import torch
    from exporter.quantization import calibration
    from exporter.quantization.calibration import Settings, calibrated_from_graph
    from exporter.quantization.form import PORTABLE
    from tests.quantized_networks import float_graph, plain_network

    side = int(sys.argv[2])

    class Images:
        def __init__(self, count):
            self.count = count

        def batches(self, size, count=None):
            random = np.random.default_rng(0)
            left = self.count if count is None else min(count, self.count)
            while left > 0:
                yield random.standard_normal((min(size, left), 3, side, side), np.float32)
                left -= size

    calibration.MOST_FITTED = 2**18 // side**2
    torch.set_num_threads(1)
    graph = float_graph(plain_network(sys.argv[1]))
    for count in sys.argv[3:]:
        calibrated_from_graph(graph, Images(int(count)), Settings(PORTABLE), lambda label, done, total: None)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize(("name", "side", "counts"), [("plain", 64, (64, 512)), ("features with se", 160, (32, 512))])
def test_memory_does_not_grow_with_the_number_of_images(name, side, counts):
    """With the features of stages, too, which are many times as large as the classes' scores; peaks never go down."""
    command = [sys.executable, "-c", textwrap.dedent(GROWTH), name, str(side), *map(str, counts)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    few, many = map(int, done.stdout.split())
    assert many < 1.1 * few
