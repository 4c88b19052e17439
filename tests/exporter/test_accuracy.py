"""Top-1 by hand, the paired standard error against its definition, and labels that cannot be used."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.accuracy import NO_CLASS, accuracy_check, accuracy_from_labels, classes_of, row_from_answers
from exporter.dataset import dataset_from_npz
from exporter.errors import InputRejected
from exporter.images import Normalisation
from tests.conftest import EXAMPLES

PLAIN = Normalisation((0.0,), (1.0,), assumed=False)
SIZE = (2, 3)
CLASSES = 4


def one_hot(classes):
    return np.eye(CLASSES, dtype=np.float32)[classes]


@pytest.fixture
def labelled(tmp_path):
    """40 images whose brightness is their class."""

    def make(count=40, **arrays):
        answers = np.arange(count) % CLASSES
        images = np.broadcast_to(answers[:, None, None], (count, *SIZE)).astype(np.uint8)
        np.savez(tmp_path / "test.npz", **{"images": images, "labels": answers, **arrays})
        return dataset_from_npz(tmp_path / "test.npz", 1, SIZE, PLAIN, "--labels"), answers

    return make


def right(batch):
    return {"output": one_hot(np.rint(batch[:, 0, 0, 0] * 255).astype(int))}


def wrong_for_class_3(batch):
    classes = np.rint(batch[:, 0, 0, 0] * 255).astype(int)
    return {"output": one_hot(np.where(classes == 3, 0, classes))}


def test_every_precision_is_counted_on_every_image_once(labelled):
    dataset, labels = labelled()
    told = []
    rows = accuracy_from_labels(
        dataset, labels, {"fp32": right, "fp16": wrong_for_class_3}, lambda *steps: told.append(steps)
    )
    assert [(row.precision, row.images, row.top1, row.agreement) for row in rows] == [
        ("fp32", 40, 1.0, 1.0),
        ("fp16", 40, 0.75, 0.75),
    ]
    assert [row.drop for row in rows] == [0.0, 0.25]
    assert rows[1].standard_error == pytest.approx(math.sqrt(0.25 * 0.75 * 40 / 39 / 40))
    assert told[-1] == ("top-1", 40, 40)


def test_a_precision_may_be_better_than_float32(labelled):
    dataset, labels = labelled()
    rows = accuracy_from_labels(dataset, labels, {"fp32": wrong_for_class_3, "fp16": right}, lambda *steps: None)
    assert rows[1].drop == -0.25


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=2, max_size=50))
def test_the_figures_are_those_of_their_definition(triples):
    labels, baseline, answers = (np.array(column) for column in zip(*triples, strict=True))
    row = row_from_answers("fp16", answers, baseline, labels)
    difference = [int(b == t) - int(a == t) for t, b, a in triples]
    mean = sum(difference) / len(difference)
    variance = sum((d - mean) ** 2 for d in difference) / (len(difference) - 1)
    assert row.drop == pytest.approx(mean)
    assert row.standard_error == pytest.approx(math.sqrt(variance / len(difference)))
    assert row.top1 == pytest.approx(sum(a == t for t, _, a in triples) / len(triples))
    assert row.agreement == pytest.approx(sum(a == b for _, b, a in triples) / len(triples))


@pytest.mark.parametrize(
    ("max_drop", "passed", "words"),
    [(None, True, None), (25.0, True, "within --max-drop 25"), (24.9, False, "beyond --max-drop 24.9")],
)
def test_the_largest_drop_makes_a_verdict(max_drop, passed, words, labelled):
    dataset, labels = labelled()
    rows = accuracy_from_labels(dataset, labels, {"fp32": right, "fp16": wrong_for_class_3}, lambda *steps: None)
    baseline, half = (accuracy_check(row, max_drop) for row in rows)
    assert baseline.passed
    assert baseline.detail == "100.00% of 40 images"
    assert half.passed is passed
    assert "75.00% of 40 images, 25.00 points below fp32 (standard error 6.93), the same class on 75.00%" in half.detail
    assert words is None or words in half.detail


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", range(CLASSES))
def test_an_answer_with_one_value_that_is_not_finite_names_no_class(value, column):
    outputs = one_hot(np.arange(CLASSES))
    outputs[2, column] = value
    assert classes_of(outputs).tolist() == [0, 1, NO_CLASS, 3]


def nan_for_class_0(batch):
    outputs = right(batch)["output"]
    return {"output": np.where(outputs[:, :1] == 1, np.float32("nan"), outputs)}


@pytest.mark.parametrize("max_drop", [None, 100.0])
def test_outputs_that_are_not_finite_are_wrong_and_fail_whatever_may_be_lost(max_drop, labelled):
    """The largest of NaNs is the first, so class 0 would be right."""
    dataset, labels = labelled()
    baseline, half = accuracy_from_labels(
        dataset, labels, {"fp32": right, "fp16": nan_for_class_0}, lambda *steps: None
    )
    assert (baseline.non_finite, half.non_finite) == (0, 10)
    assert (half.top1, half.drop, half.agreement) == (0.75, 0.25, 0.75)
    check = accuracy_check(half, max_drop)
    assert (check.stage, check.passed) == ("fp16, top-1", False)
    assert check.detail.endswith("; on 10 of them its outputs are NaN or infinite")
    assert accuracy_check(baseline, max_drop).passed


def test_a_float32_that_is_not_finite_fails_and_agrees_with_nobody(labelled):
    dataset, labels = labelled()
    rows = accuracy_from_labels(
        dataset, labels, {"fp32": nan_for_class_0, "fp16": nan_for_class_0}, lambda *steps: None
    )
    assert [(row.non_finite, row.agreement) for row in rows] == [(10, 0.75), (10, 0.75)]
    assert not accuracy_check(rows[0], None).passed


BAD_LABELS = {
    "too few": (np.arange(39), "labels are int64 (39,); expected 40 integers"),
    "of floats": (np.zeros(40), "labels are float64 (40,)"),
    "one hot": (np.zeros((40, 4), int), "labels are int64 (40, 4)"),
    "negative": (np.full(40, -1), "labels go from -1 to -1; the network has classes 0 to 3"),
    "of more classes": (np.full(40, 4), "labels go from 4 to 4; the network has classes 0 to 3"),
    "objects": (np.array([{}] * 40, object), "cannot be read"),
}


@pytest.mark.parametrize(("labels", "words"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_cannot_be_used_are_one_line(labels, words, labelled):
    dataset, _ = labelled(labels=labels)
    with pytest.raises(InputRejected) as caught:
        dataset.labels(CLASSES)
    assert words in str(caught.value)


def test_no_labels_are_said_by_the_flag_that_needs_them(tmp_path):
    np.savez(tmp_path / "test.npz", images=np.zeros((4, *SIZE), np.uint8))
    dataset = dataset_from_npz(tmp_path / "test.npz", 1, SIZE, PLAIN, "--labels")
    with pytest.raises(InputRejected, match=r"holds no array called labels; np\.savez it beside images for --labels"):
        dataset.labels(CLASSES)


# --- the command


def test_a_nan_in_one_answer_fails_the_run_without_a_limit_too(command, tmp_path, monkeypatch):
    """Four images are compared with float64, and all labelled ones are looked at."""
    from exporter import pipeline

    class Spoiled:
        def __init__(self, session):
            self.session = session

        def run(self, batch):
            outputs = self.session.run(batch)
            if len(batch) == 16:
                outputs["output"][5, 3] = np.nan
            return outputs

    whole = pipeline.session_of_typed
    monkeypatch.setattr(pipeline, "session_of_typed", lambda typed: Spoiled(whole(typed)))
    with np.load(EXAMPLES / "fashion_test.npz") as test:
        np.savez(tmp_path / "test.npz", images=test["images"][:40], labels=test["labels"][:40])
    done = command(EXAMPLES / "fashion.pt", "--size", 28, "--trt", "fp16", "--labels", "test.npz", "--out", "out")
    assert done.code == 1
    assert done.error.startswith("fp16, top-1: ")
    assert "; on 2 of them its outputs are NaN or infinite" in done.error


def test_top1_of_every_precision_is_in_the_report(command, tmp_path):
    done = command(
        EXAMPLES / "fashion.pt", "--size", 28, "--trt", "fp16", "--labels", EXAMPLES / "fashion_test.npz",
        "--max-drop", "0.5", "--out", "out",
    )  # fmt: skip
    assert (done.code, done.stderr) == (0, "")
    assert "ok   fp32, top-1: 93.35% of 2000 images\n" in done.stdout
    assert "below fp32 (standard error 0.0" in done.stdout
    assert "within --max-drop 0.5" in done.stdout
    assert "inputs: the first 4 images of fashion_test.npz" in done.stdout


def test_labels_of_another_order_fail_the_verdict(command, tmp_path, monkeypatch):
    """The same weights, but fp16 answers as a network whose classes are in another order would."""
    from exporter import pipeline

    class Turned:
        def __init__(self, session):
            self.session = session

        def run(self, batch):
            return {name: scores[:, ::-1] for name, scores in self.session.run(batch).items()}

    right_session = pipeline.session_of_typed
    monkeypatch.setattr(pipeline, "session_of_typed", lambda typed: Turned(right_session(typed)))
    done = command(
        EXAMPLES / "fashion.pt", "--size", 28, "--trt", "fp16", "--labels", EXAMPLES / "fashion_test.npz",
        "--max-drop", "50", "--out", "out",
    )  # fmt: skip
    assert done.code == 1
    assert "fp16, top-1: " in done.error
    assert "beyond --max-drop 50" in done.error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-drop", "1"], "--max-drop: needs --labels"),
        (["--max-drop", "x", "--labels", "t.npz"], "--max-drop: 'x' is not a list of numbers"),
        (["--max-drop", "1,2", "--labels", "t.npz"], "--max-drop: '1,2' is not one number, as in 0.5"),
        (["--max-drop", "-1", "--labels", "t.npz"], "--max-drop: -1.0 is not a number of percentage points"),
        (["--max-drop", "101", "--labels", "t.npz"], "--max-drop: 101.0 is not a number of percentage points"),
    ],
)
def test_a_wrong_use_of_max_drop_is_one_line(flags, words, command, checkpoint):
    done = command(checkpoint, *flags)
    assert done.code == 2
    assert words in done.error
