"""The ledger: every figure by hand, the batches that are run, and each kind of wrong stage is seen in its own row."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engines.parity import Gate
from exporter.architecture import with_features
from exporter.errors import DeviceFailed, VerificationFailed
from exporter.ledger import (
    LARGEST_VALUES,
    LARGEST_WORK,
    Stage,
    affordable_images,
    largest_batch,
    ledger_from_stages,
    stage_from_run,
    whole_stage,
)
from exporter.measured import WIDEST_GATE, Measured, at_least, fixed
from exporter.reference import Reference
from exporter.workload import multiply_accumulates, output_values
from tests.inference import network_from_state
from tests.networks import NaiveRepVGG, Shape, contiguous_float

REFERENCE = np.array([[4.0, 1.0, -8.0], [0.0, 2.0, 1.0]])
IMAGES = np.arange(4 * 3 * 2 * 2, dtype=np.float32).reshape(4, 3, 2, 2)
GATE = Gate(max_relative_error=1e-3, top1=True)


def outputs_of(images):
    """Any function of one image alone will do: its three channels' sums, with the first class always ahead."""
    sums = images.astype(np.float64).sum(axis=(2, 3))
    return sums * [3.0, 1.0, -1.0]


def measured(largest=0):
    return Measured(reference_of(outputs_of(IMAGES)), largest)


def reference_of(outputs):
    return Reference(IMAGES, {"output": outputs}, {})


def named(run):
    """A network whose one output is what ``run`` gives."""
    return lambda batch: {"output": run(batch)}


def check(run, gate=GATE, **options):
    found = measured(options.pop("largest_size", 0))
    return found.check("stage", "title", lambda: named(run), fixed(gate), **options)


# --- rows


def test_every_row_is_worked_out_by_hand():
    first = whole_stage("first", REFERENCE + np.array([[0, 0, 1.0], [0, 0, 0]]))
    second = whole_stage("second", REFERENCE + np.array([[0, 0, 1.0], [2.0, -1.0, 0]]))
    rows = ledger_from_stages(REFERENCE, [first, second])
    assert [row.stage for row in rows] == ["first", "second"]
    assert rows[0].comparison.max_abs_error == 1.0
    assert rows[0].comparison.relative_error == 1 / 8
    assert rows[0].comparison.mean_abs_error == pytest.approx(1 / 6)
    assert rows[0].comparison.cosine == pytest.approx((16 + 1 + 56 + 4 + 1) / math.sqrt(86 * (16 + 1 + 49 + 4 + 1)))
    assert (rows[0].added, rows[1].added) == (1 / 8, 2 / 8)
    assert rows[1].comparison.flips[0].row == 1
    assert rows[1].comparison.flips[0].margin == 1.0
    assert rows[1].comparison.top1_agreement == 0.5
    assert rows[0].batches == (2,)


def test_what_a_step_adds_is_its_own_and_not_that_of_the_steps_before():
    wrong = REFERENCE + np.array([[0, 0, 1.0], [0, 0, 0]])
    rows = ledger_from_stages(REFERENCE, [whole_stage("wrong", wrong), whole_stage("keeps it", wrong.copy())])
    assert [row.added for row in rows] == [1 / 8, 0.0]
    assert [row.comparison.relative_error for row in rows] == [1 / 8, 1 / 8]


def test_stages_in_other_batches_are_compared_row_by_row():
    first = Stage("first", REFERENCE[[0, 1]], ((0, 1),))
    second = Stage("second", REFERENCE[[1, 0, 0]], ((1,), (0, 0)))
    rows = ledger_from_stages(REFERENCE, [first, second, first])
    assert [row.added for row in rows] == [0.0, 0.0, 0.0]
    assert [row.comparison.rows for row in rows] == [2, 3, 2]
    assert rows[1].batches == (1, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_counted_in_its_row(value):
    wrong = REFERENCE.copy()
    wrong[1, 2] = value
    row = ledger_from_stages(REFERENCE, [whole_stage("wrong", wrong)])[0]
    assert row.comparison.non_finite == 1
    assert not row.added <= 1.0


def test_a_stage_of_fewer_images_is_compared_on_those():
    first = Stage("one image", REFERENCE[:1] + np.array([[0, 0, 1.0]]), ((0,),))
    rows = ledger_from_stages(REFERENCE, [first, whole_stage("both", REFERENCE)])
    assert [row.added for row in rows] == [1 / 8, 1 / 8]
    assert [row.comparison.rows for row in rows] == [1, 2]


def test_outputs_that_are_all_zero_have_no_relative_error_unless_they_differ():
    nothing = np.zeros((2, 3))
    rows = ledger_from_stages(nothing, [whole_stage("same", nothing), whole_stage("other", nothing + 1)])
    assert [row.added for row in rows] == [0.0, math.inf]


# --- batches


@pytest.mark.parametrize(("largest", "batches"), [(0, (1, 3)), (3, (1, 3)), (4, (1, 3, 4)), (32, (1, 3, 32))])
def test_images_go_through_in_batches_of_one_three_and_the_largest(largest, batches):
    seen = []
    stage = stage_from_run("stage", lambda batch: seen.append(len(batch)) or outputs_of(batch), IMAGES, largest)
    assert tuple(seen) == stage.batches == batches
    assert np.array_equal(stage.outputs, outputs_of(IMAGES)[stage.order])


def test_the_largest_batch_holds_every_image_in_another_order():
    stage = stage_from_run("stage", outputs_of, IMAGES, 32)
    last = stage.rows[-1]
    assert sorted(last) == sorted(list(range(4)) * 8)
    assert last != tuple(range(4)) * 8


def test_many_images_go_through_in_parts():
    images = np.zeros((70, 3, 2, 2), np.float32)
    assert stage_from_run("stage", outputs_of, images).batches == (1, 32, 32, 5)


MIX_UPS = {
    "rows turned around": lambda batch: outputs_of(batch)[::-1],
    "the first row for all": lambda batch: np.repeat(outputs_of(batch)[:1], len(batch), axis=0),
    "rows one on": lambda batch: np.roll(outputs_of(batch), 1, axis=0),
    "the batch's mean taken away": lambda batch: outputs_of(batch) - outputs_of(batch).mean(axis=0),
}


@pytest.mark.parametrize("run", MIX_UPS.values(), ids=MIX_UPS)
def test_a_graph_that_mixes_up_a_batch_fails(run):
    assert check(outputs_of).passed
    assert not check(run).passed


@pytest.mark.parametrize("run", MIX_UPS.values(), ids=MIX_UPS)
def test_a_mix_up_fails_also_where_the_answers_are_nearer_to_each_other_than_the_gate(run):
    """As on noise, where every image has nearly the same answer."""

    def alike(batch):
        return 1000.0 * np.array([[1.0, 0.5, -1.0]]) + outputs_of(batch) / 1e3

    def mixed(batch):
        return 1000.0 * np.array([[1.0, 0.5, -1.0]]) + run(batch) / 1e3 + 1e-5

    found = Measured(reference_of(alike(IMAGES)), 0)
    right = found.check("s", "t", lambda: named(lambda batch: alike(batch) + 1e-5), fixed(GATE))
    assert right.passed is None
    assert right.detail.startswith("undecided: a constant answer would pass, too; give real images; relative error")
    wrong = found.check("s", "t", lambda: named(mixed), fixed(GATE))
    assert wrong.passed is False
    assert "is nearer to that of another image: rows are mixed up, or all alike" in wrong.detail


def test_a_graph_that_mixes_up_only_the_largest_batch_fails():
    def run(batch):
        return np.roll(outputs_of(batch), 1, axis=0) if len(batch) > 4 else outputs_of(batch)

    assert check(run, largest_size=32).passed
    assert not check(run, largest_size=32, largest=True).passed
    assert check(outputs_of, largest_size=32, largest=True).passed


def test_a_batch_that_comes_back_in_another_number_of_rows_fails_by_name():
    found = check(lambda batch: outputs_of(batch)[:2])
    assert not found.passed
    assert found.detail == "output: stage: a batch of 3 came back as 2 rows"


# --- checks


@pytest.mark.parametrize("error", [VerificationFailed("refused"), DeviceFailed("refused"), ValueError("refused")])
def test_a_stage_that_cannot_be_run_is_a_check_that_failed_and_no_row(error):
    def opened():
        raise error

    found = measured()
    assert found.check("stage", "title", opened, fixed(GATE)).passed is False
    assert found.ledger == ()


def test_a_stage_that_is_not_judged_is_left_out_where_it_cannot_be_run():
    def opened():
        raise VerificationFailed("refused")

    found = measured()
    found.keep("cannot", opened)
    found.keep("can", lambda: named(outputs_of))
    assert [row.stage for row in found.ledger] == ["can"]


@pytest.mark.parametrize(("factor", "passes"), [(1.0005, True), (1.002, False)])
def test_the_gate_decides(factor, passes):
    found = check(lambda batch: outputs_of(batch) * factor)
    assert found.passed is passes
    assert found.value == pytest.approx(factor - 1)
    assert found.gate == 1e-3


def test_float32_has_the_wider_gate_only_where_the_training_network_loses_as_much():
    asked = []
    gate = Gate(max_relative_error=5e-6, top1=True)

    def loss(value):
        return lambda: asked.append(value) or value

    run = named(lambda batch: outputs_of(batch) * 1.00002)
    judged = [measured().check("s", "t", lambda: run, at_least(gate, loss(value), 4.0)) for value in (1e-6, 1e-5)]
    assert [found.passed for found in judged] == [False, True]
    assert [found.gate for found in judged] == [5e-6, 4e-5]
    assert asked == [1e-6, 1e-5]
    assert measured().check("s", "t", lambda: named(outputs_of), at_least(gate, loss(1.0), 4.0)).gate == 5e-6
    assert asked == [1e-6, 1e-5]


@pytest.mark.parametrize(("loss", "gate"), [(0.2, WIDEST_GATE), (math.inf, 5e-6), (math.nan, 5e-6)])
def test_no_loss_makes_the_gate_wide_enough_for_a_wrong_answer(loss, gate):
    judge = at_least(Gate(max_relative_error=5e-6, top1=True), lambda: loss, 4.0)
    found = measured().check("s", "t", lambda: named(lambda batch: outputs_of(batch) * 1.01), judge)
    assert (found.passed, found.gate) == (False, gate)


def test_a_nan_is_given_no_wider_gate():
    run = named(lambda batch: outputs_of(batch) * np.nan)
    found = measured().check("s", "t", lambda: run, at_least(GATE, lambda: math.inf, 4.0))
    assert not found.passed
    assert "12 outputs are NaN or infinite" in found.detail


# --- several outputs


NAMED = {
    "stage1": outputs_of(IMAGES).reshape(4, 3, 1, 1),
    "stage2": 1e-6 * outputs_of(IMAGES)[:, :2].reshape(4, 1, 2, 1),
}
"""Feature maps whose scales are a million apart."""
ROWS = {images.tobytes(): row for row, images in enumerate(IMAGES)}


def features(images, **factors):
    rows = [ROWS[image.tobytes()] for image in images]
    return {name: values[rows] * factors.get(name, 1.0) for name, values in NAMED.items()}


def check_of_features(run):
    found = Measured(Reference(IMAGES, NAMED, {}), 0, at=" at 2x2")
    return found, found.check("stage", "title", lambda: run, fixed(GATE))


def test_feature_maps_are_compared_each_in_its_own_scale():
    found, check = check_of_features(features)
    assert (check.stage, check.passed, check.value) == ("title at 2x2", True, 0.0)
    assert [row.stage for row in found.ledger] == ["stage at 2x2"]
    assert "top-1" not in check.detail


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(("factor", "passes"), [(1.0005, True), (1.002, False)])
def test_the_gate_decides_on_every_output(name, factor, passes):
    _, check = check_of_features(lambda batch: features(batch, **{name: factor}))
    assert check.passed is passes
    assert check.value == pytest.approx(factor - 1)


WRONG_OUTPUTS = {
    "one is missing": (lambda found: {"stage1": found["stage1"]}, "stage1, stage2: no output stage2"),
    "other names": (lambda found: {"output": found["stage1"]}, "stage1, stage2: no output stage1, stage2"),
    "other rows": (lambda found: {**found, "stage2": found["stage2"][:0]}, "stage1, stage2: outputs of 0, 1 rows"),
    "in each other's place": (lambda found: dict(zip(found, reversed(found.values()), strict=True)), None),
    "not a number": (lambda found: {**found, "stage2": found["stage2"] * np.nan}, "8 outputs are NaN or infinite"),
}


@pytest.mark.parametrize(("change", "words"), WRONG_OUTPUTS.values(), ids=WRONG_OUTPUTS)
def test_outputs_that_are_lost_or_of_another_name_fail(change, words):
    _, check = check_of_features(lambda batch: change(features(batch)))
    assert check.passed is False
    assert words is None or check.detail.startswith(words)


def test_a_batch_of_feature_maps_that_is_mixed_up_fails():
    _, check = check_of_features(lambda batch: {name: values[::-1] for name, values in features(batch).items()})
    assert check.passed is False


def test_what_was_computed_elsewhere_is_joined_by_name():
    found = Measured(Reference(IMAGES, NAMED, {}), 0)
    found.keep_outputs("all", dict(reversed(NAMED.items())))
    found.keep_outputs("two", {name: values[:2] * 1.5 for name, values in NAMED.items()})
    assert [row.comparison.relative_error for row in found.ledger] == [0.0, pytest.approx(0.5, rel=0.6)]
    assert [row.comparison.rows for row in found.ledger] == [4, 2]
    with pytest.raises(ValueError, match="no output stage2"):
        found.keep_outputs("one", {"stage1": NAMED["stage1"]})


# --- work


def architecture_of(shape):
    return network_from_state(contiguous_float(NaiveRepVGG(shape).state_dict()))[0]


def test_the_work_is_counted_by_hand():
    architecture = architecture_of(Shape())
    expected = architecture.classes * architecture.blocks[-1].out_channels
    height = 20
    for block in architecture.blocks:
        height = math.ceil(height / block.stride)
        expected += block.out_channels * (block.in_channels // block.groups) * 9 * height * height
        expected += 2 * block.out_channels * (block.se_channels or 0)
    assert multiply_accumulates(architecture, (20, 20)) == expected


def test_the_numbers_in_feature_maps_are_counted_by_hand():
    architecture = architecture_of(Shape())
    assert output_values(architecture, (20, 20)) == 7
    cut = with_features(architecture, (0, 1, 3))
    assert output_values(cut, (20, 20)) == 8 * 10 * 10 + 8 * 5 * 5 + 16 * 2 * 2
    assert output_values(cut, (21, 33)) == 8 * 11 * 17 + 8 * 6 * 9 + 16 * 2 * 3


def test_feature_maps_that_are_large_make_the_largest_batch_smaller():
    cut = with_features(architecture_of(Shape()), (0,))
    each = output_values(cut, (2000, 2000))
    assert each == 8 * 1000 * 1000
    assert largest_batch(cut, (1000, 1000), 32) == LARGEST_VALUES // output_values(cut, (1000, 1000)) == 4
    assert largest_batch(cut, (20, 20), 32) == 32


def test_the_largest_batch_is_what_the_work_allows():
    architecture = architecture_of(Shape())
    each = multiply_accumulates(architecture, (20, 20))
    assert largest_batch(architecture, (20, 20), 32) == 32
    assert largest_batch(architecture, (20, 20), 10**9) == int(LARGEST_WORK // each)
    assert affordable_images(architecture, (20, 20), 4) == 4
    assert affordable_images(architecture, (200_000, 200_000), 4) == 1
    assert largest_batch(architecture, (200_000, 200_000), 4) == 0
