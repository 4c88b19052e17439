"""Two sets of weights in one file: averaged ones and raw ones, which are networks that give other answers.

Which one was taken is told by what comes out, and by the user's own outputs where the wrong one was asked for.
"""

from __future__ import annotations

import argparse

import pytest
import torch

from tests.families import Network
from tests.family_exports import SIZE, assert_answers, difference, export, save_expectation
from tests.family_names import OFFICIAL, Shape
from tests.family_states import prefixed, settings

PAIRS = {
    "official, main.py": lambda raw, ema: {"model": raw, "ema": ema, "epoch": 3, "config": settings()},
    "timm": lambda raw, ema: {
        "state_dict": raw,
        "state_dict_ema": prefixed(ema, "module."),
        "args": argparse.Namespace(model_ema=True),
        "version": 2,
    },
    "model_ema": lambda raw, ema: {"model": raw, "model_ema": ema},
    "super-gradients": lambda raw, ema: {"net": raw, "ema_net": ema, "acc": 0.7},
    "RT-DETR": lambda raw, ema: {"model": raw, "ema": {"module": ema, "updates": 100}},
    "mmengine, swapped as it is saved": lambda raw, ema: {
        "meta": {"mmengine_version": "0.10.4"},
        "message_hub": {},
        "state_dict": ema,
        "ema_state_dict": {"steps": torch.tensor(7), **prefixed(raw, "module.")},
    },
    "not mmengine's, so not swapped": lambda raw, ema: {"state_dict": raw, "ema_state_dict": ema},
}


@pytest.fixture(scope="module")
def twins():
    """The raw and the averaged weights of one network."""
    return Network(OFFICIAL, Shape(), seed=1), Network(OFFICIAL, Shape(), seed=2)


@pytest.mark.parametrize("layout", PAIRS)
def test_of_two_sets_of_weights_the_average_is_taken_and_said_to_be(layout, twins, tmp_path):
    raw, ema = twins
    made = export(tmp_path, PAIRS[layout](raw.state, ema.state), *SIZE)
    assert_taken(made, ema, raw, "ema")
    assert "--weights raw" in made.outcome.stdout


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("official, main.py", "raw"),
        ("timm", "raw"),
        ("RT-DETR", "raw"),
        ("mmengine, swapped as it is saved", "raw"),
        ("mmengine, swapped as it is saved", "ema"),
    ],
)
def test_the_set_that_was_asked_for_is_taken(layout, kind, twins, tmp_path):
    raw, ema = twins
    made = export(tmp_path, PAIRS[layout](raw.state, ema.state), *SIZE, "--weights", kind)
    chosen, other = (raw, ema) if kind == "raw" else (ema, raw)
    assert_taken(made, chosen, other, kind)


def assert_taken(made, chosen, other, kind):
    assert_answers(made, chosen, chosen.state)
    assert difference(other.answer(other.noise()), chosen.answer(chosen.noise())) > 0.1
    assert made.report["checkpoint"]["weights"] == kind
    assert f'"weights": "{kind}"' in made.metadata["assumptions"]


@pytest.mark.parametrize("layout", ["timm", "mmengine, swapped as it is saved"])
def test_the_wrong_twin_fails_against_the_outputs_of_the_other(layout, twins, tmp_path):
    raw, ema = twins
    path = save_expectation(tmp_path, ema.noise(), ema.answer(ema.noise()))
    content = PAIRS[layout](raw.state, ema.state)
    right = export(tmp_path, content, *SIZE, "--expect", path)
    assert right.outcome.code == 0, right.outcome.stdout
    wrong = export(tmp_path, content, *SIZE, "--expect", path, "--weights", "raw")
    assert wrong.outcome.code == 1
    assert "FAIL expectation" in wrong.outcome.stdout
    assert "are these the weights of the model that made io.npz?" in wrong.outcome.stdout


def test_weights_that_are_not_there_are_an_error(tmp_path):
    made = export(tmp_path, {"state_dict": Network(OFFICIAL, Shape()).state}, *SIZE, "--weights", "ema")
    assert (made.outcome.code, made.directory.exists()) == (3, False)
    assert "--weights ema: the file holds only the raw weights (state_dict)" in made.error


def test_an_unknown_kind_of_weights_is_a_mistake_of_usage(tmp_path):
    made = export(tmp_path, {}, *SIZE, "--weights", "averaged")
    assert made.outcome.code == 2
    assert "--weights averaged: unknown; choose from ema, raw" in made.error
