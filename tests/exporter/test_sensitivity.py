"""Which layers INT8 costs most: against the simulation itself, and with layers that were made to be bad."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Sequence

import numpy as np
import pytest
import torch

from engines.parity import compare
from exporter.errors import VerificationFailed
from exporter.images import noise_images
from exporter.onnx_graph import Graph, onnx_from_plain, structure_from_architecture
from exporter.plain import plain_from_repvgg
from exporter.quantization import sensitivity
from exporter.quantization.form import RTX
from exporter.quantization.gptq import rounded_to_nearest
from exporter.quantization.quantized import Quantized, QuantizedLayer
from exporter.quantization.sensitivity import Sensitivity, kept_for_budget, sensitivities, with_kept
from exporter.quantization.simulation import Simulation, run_steps, steps_of_graph
from exporter.quantization.simulation import float_layer as in_float
from tests.inference import network_from_state
from tests.networks import NaiveRepVGG, Shape

SIZE = (20, 24)
IMAGES = np.concatenate([noise_images(3, SIZE) * size for size in (1.0, 0.7, 1.3)]).astype(np.float32)
SHAPES = {
    "plain": Shape(),
    "grouped": Shape(even_groups=4),
    "se": Shape(se=True, widths=(16, 32, 32, 48, 64)),
}
BAD = "stage2.1/Conv"


def silent(label: str, done: int, total: int) -> None:
    pass


def graph_of(shape: Shape) -> Graph:
    plain = plain_from_repvgg(*network_from_state(NaiveRepVGG(shape).state_dict()), IMAGES[:1])
    return onnx_from_plain(plain, structure_from_architecture(plain.architecture, SIZE), {})


def quantized_of(graph: Graph) -> Quantized:
    """Every block's convolution and the classifier, in the plainest way: the largest value, one scale for a weight."""
    layers, peaks = {}, {}

    def computed(step, x):
        peaks[step.name] = float(x.abs().max())
        return in_float(graph)(step, x)

    steps = steps_of_graph(graph)
    run_steps(steps, torch.from_numpy(IMAGES), computed)
    for step in steps.steps:
        if step.weighted and "/se/" not in step.name:
            weight = torch.from_numpy(graph.weights[step.weight])
            scale = weight.abs().max() / 127
            codes = rounded_to_nearest(weight, scale, 127).numpy()
            bias = graph.weights[step.bias]
            layers[step.name] = QuantizedLayer(peaks[step.name] / 127, codes, scale.numpy(), bias)
    return Quantized(RTX, graph, layers, {})


def with_outlier(graph: Graph, conv: str = BAD, times: float = 300.0) -> Graph:
    """The same function, with one weight of ``conv`` so large that its other codes are 0.

    It meets channel 0 of the convolution before, which is made to be 0 on every image.
    """
    weights = {name: array.copy() for name, array in graph.weights.items()}
    steps = steps_of_graph(graph).steps
    (step,) = (step for step in steps if step.name == conv)
    (relu,) = (one for one in steps if one.output == step.inputs[0])
    (before,) = (one for one in steps if one.output == relu.inputs[0])
    weights[before.weight][0], weights[before.bias][0] = 0, -1
    weights[step.weight][0, 0, 1, 1] = times * np.abs(weights[step.weight]).max()
    return Graph(graph.structure, weights)


def sqnr_db(quantized: Quantized, kept: Collection[str]) -> float:
    """By the simulation of the whole file."""
    exact = run_steps(steps_of_graph(quantized.graph), torch.from_numpy(IMAGES), in_float(quantized.graph))
    (reference,) = (value.numpy() for value in exact.values())
    (outputs,) = Simulation(with_kept(quantized, kept, "a test")).run(IMAGES).values()
    return compare(reference, outputs).sqnr_db


@pytest.fixture(scope="module", params=SHAPES)
def sound(request: pytest.FixtureRequest) -> Quantized:
    return quantized_of(graph_of(SHAPES[request.param]))


@pytest.fixture(scope="module")
def planted() -> Quantized:
    return quantized_of(with_outlier(graph_of(Shape())))


@pytest.fixture(scope="module")
def planted_rows(planted: Quantized) -> tuple[Sensitivity, ...]:
    return sensitivities(planted, IMAGES, silent)


@pytest.mark.parametrize("at_once", [5, 64])
def test_each_figure_is_that_of_the_whole_simulation(
    sound: Quantized, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not computed anew would be the same."""
    monkeypatch.setattr(sensitivity, "AT_ONCE", at_once)
    rows, names = sensitivities(sound, IMAGES, silent), list(sound.layers)
    assert [row.name for row in rows] == names
    for row in rows:
        assert row.alone_db == pytest.approx(sqnr_db(sound, set(names) - {row.name}), abs=0.01)
        assert row.all_but_db == pytest.approx(sqnr_db(sound, {row.name}), abs=0.01)
    assert len({round(row.alone_db, 2) for row in rows}) == len(rows)
    assert len({round(row.all_but_db, 2) for row in rows}) > len(rows) / 2


def test_a_planted_layer_is_the_one_that_is_named(planted: Quantized, planted_rows: Sequence[Sensitivity]) -> None:
    worst, best_without = (
        min(planted_rows, key=lambda row: row.alone_db),
        max(planted_rows, key=lambda row: row.all_but_db),
    )
    assert worst.name == best_without.name == BAD
    others = [row for row in planted_rows if row.name != BAD]
    assert worst.alone_db < min(row.alone_db for row in others) - 15
    assert best_without.all_but_db > max(row.all_but_db for row in others) + 10
    assert sqnr_db(planted, ()) < 15


def test_without_the_plant_it_is_not_named() -> None:
    rows = sensitivities(quantized_of(graph_of(Shape())), IMAGES, silent)
    assert min(rows, key=lambda row: row.alone_db).name != BAD


def test_a_budget_is_met_by_exactly_the_planted_layer(planted: Quantized, planted_rows: Sequence[Sensitivity]) -> None:
    budget = next(row.all_but_db for row in planted_rows if row.name == BAD) - 1
    kept = kept_for_budget(planted, IMAGES, budget, planted_rows, silent)
    assert kept.names == (BAD,)
    assert kept.sqnr_db == pytest.approx(sqnr_db(planted, [BAD]), abs=0.01)
    assert kept.sqnr_db >= budget


def test_two_planted_layers_are_both_kept() -> None:
    """Neither of them helps by itself: a ranking that is not measured again would not see it."""
    both = {BAD, "stage1.1/Conv"}
    graph = with_outlier(with_outlier(graph_of(Shape())), "stage1.1/Conv")
    quantized = quantized_of(graph)
    budget = sqnr_db(quantized, both) - 0.5
    kept = kept_for_budget(quantized, IMAGES, budget, sensitivities(quantized, IMAGES, silent), silent)
    assert set(kept.names) == both
    assert list(kept.names) == [name for name in quantized.layers if name in both]
    assert max(sqnr_db(quantized, [name]) for name in both) < budget - 3


def test_a_budget_that_is_met_already_keeps_nothing(planted: Quantized, planted_rows: Sequence[Sensitivity]) -> None:
    now = sqnr_db(planted, ())
    assert kept_for_budget(planted, IMAGES, now - 0.1, planted_rows, silent).names == ()
    assert kept_for_budget(planted, IMAGES, now + 0.1, planted_rows, silent).names != ()


def test_no_list_is_much_longer_than_the_shortest_and_none_has_a_member_too_many(sound: Quantized) -> None:
    """Against all subsets of one, two and three, each with the budget that only the best of them meets."""
    rows, names = sensitivities(sound, IMAGES, silent), list(sound.layers)
    best = {0: sqnr_db(sound, ())}
    for size in (1, 2, 3):
        best[size] = max(sqnr_db(sound, subset) for subset in itertools.combinations(names, size))
    lengths = []
    for budget in (best[1] - 0.01, best[2] - 0.01, best[3] - 0.01, max(row.alone_db for row in rows) - 0.01):
        kept = kept_for_budget(sound, IMAGES, budget, rows, silent)
        lengths.append(len(kept.names))
        assert kept.sqnr_db == pytest.approx(sqnr_db(sound, kept.names), abs=0.01)
        assert kept.sqnr_db >= budget
        assert all(sqnr_db(sound, set(kept.names) - {name}) < budget for name in kept.names)
    assert lengths[0] == 1
    assert lengths[1] in {2, 3}
    assert lengths[2] in {3, 4, 5}
    assert lengths == sorted(lengths)
    assert lengths[3] == len(names) - 1


def test_a_budget_that_nothing_meets_says_what_is_reachable(
    planted: Quantized, planted_rows: Sequence[Sensitivity]
) -> None:
    best = max(planted_rows, key=lambda row: row.alone_db)
    expected = f"an SQNR of {best.alone_db + 1:g} dB cannot be reached: even with no layer but {best.name} in INT8"
    with pytest.raises(VerificationFailed, match=re.escape(expected) + rf" it is {best.alone_db:.1f} dB"):
        kept_for_budget(planted, IMAGES, best.alone_db + 1, planted_rows, silent)


def test_a_layer_that_gives_nan_is_the_worst_and_is_kept(planted: Quantized) -> None:
    layer = planted.layers["stage3.0/Conv"]
    broken = Quantized(
        planted.form,
        planted.graph,
        {
            **planted.layers,
            "stage3.0/Conv": QuantizedLayer(layer.input_scale, layer.weight, np.float32(math.nan), layer.bias),
        },
        {},
    )
    rows = {row.name: row for row in sensitivities(broken, IMAGES, silent)}
    assert rows["stage3.0/Conv"].alone_db < -1000
    assert rows[BAD].all_but_db < -1000
    kept = kept_for_budget(broken, IMAGES, sqnr_db(planted, [BAD]) - 1, list(rows.values()), silent)
    assert set(kept.names) == {BAD, "stage3.0/Conv"}


def test_no_more_than_so_many_images_are_looked_at(planted: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "IMAGES", 4)
    monkeypatch.setattr(sensitivity, "AT_ONCE", 3)
    told: list[tuple[str, int, int]] = []
    rows = sensitivities(planted, IMAGES, lambda *what: told.append(what))
    assert rows == sensitivities(planted, IMAGES[:4], silent)
    assert rows != sensitivities(planted, IMAGES[1:5], silent)
    assert told == [("INT8 sensitivity", 1, 2), ("INT8 sensitivity", 2, 2)]


def test_what_is_kept_says_why(planted: Quantized) -> None:
    changed = with_kept(with_kept(planted, ["head/Gemm"], "asked for"), [BAD], "costs 20 dB")
    assert changed.kept == {"head/Gemm": "asked for", BAD: "costs 20 dB"}
    assert [*changed.layers] == [name for name in planted.layers if name not in changed.kept]
    assert not planted.kept
