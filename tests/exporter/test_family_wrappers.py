"""What training code wraps around the weights: each producer's own layout, through the command line to the answer."""

from __future__ import annotations

import argparse
import collections

import pytest
import torch

from tests.families import Network
from tests.family_exports import SIZE, assert_answers, export
from tests.family_names import FAST_REID, OFFICIAL, SIXD, TIMM, Shape
from tests.family_states import prefixed, settings, whole, with_counters


def optimizer():
    parameter = torch.nn.Parameter(torch.zeros(3))
    return torch.optim.SGD([parameter], lr=0.1, momentum=0.9).state_dict()


def ordered(state):
    return collections.OrderedDict(state)


LONE = {
    "official, released": lambda s: s,
    "official, old script under DataParallel": lambda s: {
        "epoch": 120,
        "arch": "RepVGG-A0",
        "state_dict": ordered(prefixed(s, "module.")),
        "best_acc1": torch.tensor(72.4),
        "optimizer": optimizer(),
        "scheduler": {"last_epoch": 120},
    },
    "official, main.py with its config": lambda s: {
        "model": s,
        "optimizer": optimizer(),
        "lr_scheduler": {"last_epoch": 3},
        "max_accuracy": 72.4,
        "epoch": 3,
        "config": settings(),
    },
    "timm, without averages": lambda s: {
        "epoch": 3,
        "arch": "repvgg_a0",
        "state_dict": prefixed(s, "_orig_mod.", "module."),
        "optimizer": optimizer(),
        "version": 2,
        "args": argparse.Namespace(lr=0.1, data="imagenet"),
        "metric": 71.0,
    },
    "mmengine, without averages": lambda s: {"meta": {"epoch": 3}, "state_dict": s, "message_hub": {"log": []}},
    "super-gradients, without averages": lambda s: {"net": prefixed(s, "module."), "acc": 0.7, "epoch": 1},
    "fast-reid": lambda s: {"model": s, "optimizer": optimizer(), "iteration": 100},
    "6DRepNet": lambda s: {"epoch": 30, "model_state_dict": s, "optimizer_state_dict": optimizer()},
    "Lightning": lambda s: {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.1",
        "state_dict": prefixed(s, "model."),
        "loops": {},
        "callbacks": {},
        "optimizer_states": [optimizer()],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1},
    },
    "a network": lambda s: {"network": s},
    "two levels": lambda s: {"model": {"state_dict": prefixed(s, "module.")}, "epoch": 1},
    "module in the middle of a name": lambda s: {
        name.replace(".rbr_dense.", ".module.rbr_dense."): tensor for name, tensor in s.items()
    },
}
FAMILY_OF = {"fast-reid": (FAST_REID, Shape()), "6DRepNet": (SIXD, Shape(outputs=6))}


@pytest.mark.parametrize("layout", LONE)
def test_weights_are_found_in_what_each_producer_saves(layout, tmp_path):
    timm = layout.startswith("timm")
    network = Network(*FAMILY_OF.get(layout, (TIMM if timm else OFFICIAL, Shape())))
    made = export(tmp_path, LONE[layout](with_counters(whole(network))), *SIZE)
    assert made.outcome.code == 0, made.outcome.stderr
    assert_answers(made, network, network.state)


def test_what_stands_beside_a_prefixed_network_can_be_ignored_by_its_own_name(tmp_path):
    """A metric of the training module, without which every name would begin with model."""
    network = Network(OFFICIAL, Shape())
    content = {"state_dict": prefixed(network.state, "model.") | {"loss.weight": torch.ones(7)}}
    refused = export(tmp_path, content, *SIZE)
    assert (refused.outcome.code, refused.directory.exists()) == (3, False)
    made = export(tmp_path, content, *SIZE, "--ignore-keys", "loss.*")
    assert made.outcome.code == 0, made.outcome.stderr
    assert "with the prefix model." in made.outcome.stdout
    assert_answers(made, network, network.state)


def test_a_tensor_is_ignored_by_its_name_with_the_prefix_and_without(tmp_path):
    network = Network(OFFICIAL, Shape())
    content = prefixed(network.state | {"aux.weight": torch.ones(7)}, "model.")
    assert export(tmp_path, content, *SIZE).outcome.code == 3
    for glob in ("model.aux.*", "aux.*"):
        assert export(tmp_path, content, *SIZE, "--ignore-keys", glob).outcome.code == 0
