"""What decides whether answers are the network's: the gate, and that no answer is another image's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import InputRejected
from engines.golden import Golden
from engines.judgement import gate_of_engine, gate_with_tolerance, judgement, telling_golden
from engines.outputs import layout_from_outputs
from engines.parity import GATES, Gate

GATE = Gate(max_relative_error=1e-3, top1=True)
LOOSE = Gate(max_relative_error=0.9, top1=False, min_sqnr_db=1.0)


def golden_of(outputs, rows=4):
    layout = layout_from_outputs(outputs)
    images = np.arange(rows * 12, dtype=np.float32).reshape(rows, 3, 2, 2)
    return Golden(images, layout.joined(outputs), layout, {name: array.shape[1:] for name, array in outputs.items()})


SCORES = np.random.default_rng(0).normal(size=(4, 6))
GOLDEN = golden_of({"output": SCORES})


def judged(output, gate=GATE, images=None, golden=GOLDEN):
    return judgement(golden, {"output": np.asarray(output)}, gate, images)


def test_the_networks_own_answers_pass():
    found = judged(SCORES.astype(np.float32))
    assert found.failure is None
    assert found.line == found.detail
    assert found.detail.startswith("relative error ")
    assert "(gate 1.0e-03), SQNR 1" in found.detail
    assert found.detail.endswith(" dB, top-1 agrees on 4 of 4")
    assert (found.gate, found.comparison.rows) == (GATE, 4)


def swapped(one, other):
    rows = SCORES.copy()
    rows[[one, other]] = rows[[other, one]]
    return rows


def with_value(value):
    changed = SCORES.copy()
    changed[2, 3] = value
    return changed


@pytest.mark.parametrize(
    ("output", "gate", "said"),
    [
        (SCORES * 1.01, GATE, "relative error 1.00e-02 exceeds 1.0e-03"),
        (with_value(np.nan), LOOSE, "1 outputs are NaN or infinite"),
        (with_value(np.inf), GATE, "1 outputs are NaN or infinite"),
        (SCORES * 0.6, LOOSE, None),
        (SCORES * 0.05, LOOSE, "relative error 9.50e-01 exceeds 9.0e-01"),
        (np.zeros_like(SCORES), Gate(1.0, top1=False, min_sqnr_db=1.0), "SQNR 0.0 dB is below 1 dB"),
        (swapped(0, 1), Gate(9.0, top1=False), "answer 0 is nearer to that of another image: rows are mixed up"),
        (swapped(2, 3), Gate(9.0, top1=False), "answer 2 is nearer to that of another image: rows are mixed up"),
        (np.roll(SCORES, 1, axis=0), Gate(9.0, top1=False), "answer 0 is nearer"),
        (SCORES[[0, 0, 0, 0]], Gate(9.0, top1=False), "answer 1 is nearer to that of another image"),
    ],
)
def test_each_fault_is_told(output, gate, said):
    found = judged(output, gate)
    if said is None:
        assert found.failure is None
        return
    assert found.failure.startswith(said)
    assert found.line == f"{found.failure}; {found.detail}"


def test_a_label_that_changes_fails_only_where_labels_are_scores():
    scores = np.array([[1.0, 0.0], [0.0, 1.0]])
    flipped = np.array([[0.45, 0.5], [0.0, 1.0]])
    gate = Gate(max_relative_error=0.9, top1=True)
    assert judged(flipped, gate, golden=golden_of({"output": scores}, 2)).failure.startswith("top-1 differs in 1 of 2")
    maps = golden_of({"stage1": scores.reshape(2, 2, 1, 1)}, 2)
    found = judgement(maps, {"stage1": flipped.reshape(2, 2, 1, 1)}, gate)
    assert found.failure is None
    assert "top-1" not in found.line
    assert found.gate.top1 is False


# --- rows of a batch


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.data())
def test_rows_are_held_to_the_images_that_they_are_for(rows, data):
    assert judged(SCORES[rows], images=rows).failure is None
    place = data.draw(st.integers(0, len(rows) - 1))
    wrong = [*rows]
    wrong[place] = (wrong[place] + data.draw(st.integers(1, 3))) % 4
    found = judged(SCORES[wrong], Gate(9.0, top1=False), rows)
    assert found.failure == f"answer {place} is nearer to that of another image: rows are mixed up, or all alike"
    assert judged(SCORES[wrong], images=rows).failure.startswith("relative error")


@pytest.mark.parametrize("share", [0.9, 1.1])
@pytest.mark.parametrize("row", range(4))
def test_one_image_alone_is_held_to_the_same_error_as_among_the_others(row, share):
    """The scale is that of all golden answers: an image whose answer is small is no worse when it is alone."""
    scores = SCORES * np.array([[0.1], [1], [10], [0.5]])
    golden, gate = golden_of({"output": scores}), Gate(GATE.max_relative_error, top1=False)
    changed = scores.copy()
    changed[row, 1] += share * GATE.max_relative_error * np.abs(scores).max()
    together, alone = (
        judged(output, gate, rows, golden) for output, rows in ((changed, None), (changed[[row]], [row]))
    )
    assert (together.failure is None) == (alone.failure is None) == (share < 1)
    assert alone.comparison.relative_error == pytest.approx(share * GATE.max_relative_error)


@pytest.mark.parametrize("row", range(4))
def test_one_image_alone_is_held_to_the_same_noise_as_among_the_others(row):
    """Noise is set against the mean power of all golden answers."""
    scores = SCORES * np.array([[0.1], [1], [10], [0.5]])
    golden, gate = golden_of({"output": scores}), Gate(1.0, top1=False, min_sqnr_db=20.0)
    noise = np.sqrt((scores**2).mean()) * 10 ** (-25 / 20)
    changed = scores + noise * np.where(np.arange(6) % 2, 1, -1)
    assert judged(changed, gate, golden=golden).comparison.sqnr_db == pytest.approx(25)
    assert judged(changed[[row]], gate, [row], golden).comparison.sqnr_db == pytest.approx(25)


@pytest.mark.parametrize(
    ("outputs", "images", "said"),
    [
        ({"output": SCORES[:3]}, None, "outputs cannot be compared: shapes (4, 6) and (3, 6)"),
        ({"output": SCORES}, [0, 1], "outputs cannot be compared: shapes (2, 6) and (4, 6)"),
        ({"output": SCORES[:, :5]}, None, "output is 5 for each image, and 6 in the golden vectors"),
        ({"output": SCORES, "more": SCORES}, None, "the golden vectors have no output more"),
        ({"other": SCORES}, None, "the golden vectors have no output other"),
        ({}, None, "output"),
    ],
)
def test_outputs_that_are_not_those_of_the_vectors_cannot_be_judged(outputs, images, said):
    with pytest.raises(ValueError, match=r".") as caught:
        judgement(GOLDEN, outputs, GATE, images)
    assert said in str(caught.value)


def test_of_several_outputs_the_worst_is_named():
    maps = {name: np.random.default_rng(seed).normal(size=(4, 2, 3, 3)) for seed, name in enumerate(("s1", "s2"))}
    golden = golden_of(maps)
    assert judgement(golden, maps, GATE).failure is None
    for name, values in maps.items():
        changed = {**maps, name: values * 1.01}
        assert judgement(golden, changed, GATE).detail.startswith(f"2 outputs, the worst is {name}: relative error")
        rows = [3, 1, 1]
        part = {inner: array[rows] for inner, array in changed.items()}
        assert f"the worst is {name}:" in judgement(golden, part, GATE, rows).detail


def test_vectors_that_a_constant_would_pass_are_said_to_be():
    near = golden_of({"output": 10 + 1e-3 * SCORES})
    assert judged(10 + 1e-3 * SCORES, golden=near).detail.endswith(
        "a constant answer would pass, too: export with --calib for vectors that tell more"
    )
    assert "constant" not in judged(SCORES).detail


# --- vectors and gates


@pytest.mark.parametrize(
    ("outputs", "telling"),
    [([[1, 2], [3, 4]], True), ([[1, 2], [1, 2]], False), ([[1, 1], [2, 2]], False), ([[0, 0], [0, 0]], False)],
)
def test_vectors_that_tell_nothing_are_refused(tmp_path, outputs, telling):
    path = tmp_path / "golden.npz"
    images = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    np.savez(path, input=images, output=np.array(outputs, np.float64))
    if telling:
        np.testing.assert_array_equal(telling_golden(path).outputs, outputs)
        return
    with pytest.raises(InputRejected, match=r"golden\.npz: two answers or all values are the same"):
        telling_golden(path)


def test_vectors_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(InputRejected, match=r"golden\.npz: no such file"):
        telling_golden(tmp_path / "golden.npz")


@pytest.mark.parametrize("precision", [*GATES, "bf16", ""])
def test_another_tolerance_changes_the_largest_error_alone(precision):
    gate, usual = gate_with_tolerance(precision, 0.125), GATES.get(precision)
    assert gate.max_relative_error == 0.125
    expected = (True, None) if usual is None else (usual.top1, usual.min_sqnr_db)
    assert (gate.top1, gate.min_sqnr_db) == expected


@pytest.mark.parametrize(
    ("precision", "tolerance", "kept"),
    [("fp16", 1e-3, 1e-3), ("fp16", 0.5, 5e-3), ("int8", 9.0, 0.25), ("fp4", 0.5, 0.5)],
)
def test_a_sidecar_narrows_the_gate_of_its_precision_and_never_widens_it(precision, tolerance, kept):
    assert gate_of_engine(precision, tolerance).max_relative_error == kept
