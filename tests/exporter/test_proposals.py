"""Proposals: each mistake that is made on purpose is put right, and what is right is left alone."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from exporter.images import Normalisation
from exporter.lineages import lineage_from_tensors
from exporter.proposals import (
    COLOUR_NORMALISATIONS,
    GREY_NORMALISATIONS,
    LARGEST_WORK,
    proposal_from_images,
)
from exporter.recognition import architecture_from_tensors
from exporter.request import Request, floats_from_text, strides_from_text
from exporter.strides import stride_choices, with_strides
from exporter.workload import multiply_accumulates
from tests.conftest import EXAMPLES
from tests.families import Network
from tests.family_names import APPLE, QAREPVGG, QAREPVGG_V1
from tests.family_names import Shape as FamilyShape
from tests.inference import network_from_state
from tests.networks import NaiveRepVGG, Shape, deployed_state

RIGHT = Normalisation((0.5,), (0.5,), assumed=False)
COLOUR_MEAN, COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOUR = Normalisation(COLOUR_MEAN, COLOUR_STD, assumed=False)


@pytest.fixture(scope="module")
def fashion():
    return network_from_state(torch.load(EXAMPLES / "fashion.pt", weights_only=True))


@pytest.fixture(scope="module")
def pixels():
    with np.load(EXAMPLES / "fashion_calibration.npz") as archive:
        return archive["images"][:64, None]


def normalised(pixels, normalise):
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (normalise.mean, normalise.std))
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def colour_pixels(seed=0):
    """Smooth noise with a brightness and a contrast of its own in each channel: uint8 (64, 3, 32, 32)."""
    generator = np.random.default_rng(seed)
    coarse = np.kron(generator.standard_normal((64, 3, 8, 8)), np.ones((4, 4)))
    values = coarse + 0.3 * generator.standard_normal((64, 3, 32, 32))
    scaled = values * np.array([40.0, 30.0, 22.0])[:, None, None] + np.array([150.0, 115.0, 80.0])[:, None, None]
    return np.clip(scaled, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def colour():
    """A network whose running statistics are those of colour_pixels(), normalised as ImageNet."""
    model = NaiveRepVGG(Shape(strides=(2, 1, 2, 2, 2), depths=(1, 2, 3, 2, 1)))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
    with torch.no_grad():
        model.train()(torch.from_numpy(normalised(colour_pixels(), COLOUR)))
    return network_from_state(model.state_dict(), strides=(2, 1, 2, 2, 2))


# Normalisation


def test_nothing_is_proposed_where_everything_is_right(fashion, pixels):
    proposal = proposal_from_images(*fashion, pixels, RIGHT)
    assert (proposal.found, proposal.flags, proposal.reversed_channels) == (False, "", False)
    assert proposal.drift_before == proposal.drift_after
    assert proposal.line.startswith(f"none of {len(proposal.tried)} other normalisations")
    assert {"MNIST", "0..1", "strides 1,2,2,2,2", "strides 2,2,1,2,2"} <= set(proposal.tried)
    assert "-1..1" not in proposal.tried


@pytest.mark.parametrize("name", [name for name, _, std in GREY_NORMALISATIONS if std != (0.5,)])
def test_a_wrong_normalisation_of_a_grey_network_is_put_right(fashion, pixels, name):
    mean, std = next(values for known, *values in GREY_NORMALISATIONS if known == name)
    proposal = proposal_from_images(*fashion, pixels, Normalisation(mean, std, assumed=True))
    assert (proposal.found, proposal.flags) == (True, "--mean 0.5 --std 0.5")
    assert proposal.drift_after < 0.3 * proposal.drift_before
    before, after = f"{proposal.drift_before:.2g}", f"{proposal.drift_after:.2g}"
    assert proposal.line == f"your images fit --mean 0.5 --std 0.5 far better (drift {after} instead of {before})"


@pytest.mark.parametrize("name", ["-1..1", "0..1", "0..255", "ImageNet mean in 0..255, no std"])
@pytest.mark.parametrize("reverse", [False, True], ids=["RGB", "BGR"])
def test_a_wrong_normalisation_of_a_colour_network_is_put_right_in_either_order(colour, name, reverse):
    mean, std = next(values for known, *values in COLOUR_NORMALISATIONS if known == name)
    images = colour_pixels()[:, ::-1] if reverse else colour_pixels()
    proposal = proposal_from_images(*colour, images, Normalisation(mean, std, assumed=True))
    assert proposal.flags == "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
    assert proposal.reversed_channels is reverse
    assert ("reverse the channels of the images" in proposal.line) is reverse


def test_the_flags_are_what_the_command_line_reads(colour):
    assumed = Normalisation((0.0,) * 3, (1.0,) * 3, assumed=True)
    proposal = proposal_from_images(*colour, colour_pixels(), assumed)
    _, mean, _, std = proposal.flags.split()
    assert floats_from_text("--mean", mean) == COLOUR_MEAN
    assert floats_from_text("--std", std) == COLOUR_STD


@pytest.mark.parametrize(("name", "mean", "std"), [*COLOUR_NORMALISATIONS, *GREY_NORMALISATIONS])
def test_every_normalisation_can_be_asked_for(name, mean, std, tmp_path):
    request = Request(path=tmp_path / "a.pt", out=tmp_path, mean=mean, std=std)
    assert len(request.mean) == len(request.std) == (3 if (name, mean, std) in COLOUR_NORMALISATIONS else 1)


# Channel order


def test_bytes_in_bgr_order_are_seen_and_need_no_flag(colour):
    proposal = proposal_from_images(*colour, colour_pixels()[:, ::-1], COLOUR)
    assert (proposal.found, proposal.flags, proposal.reversed_channels) == (True, "", True)
    assert proposal.line.startswith("your images fit BGR order (reverse the channels of the images) far better")


def test_floats_that_were_normalised_in_bgr_order_are_to_be_reversed_before_that(colour):
    images = normalised(colour_pixels()[:, ::-1], COLOUR)
    proposal = proposal_from_images(*colour, images, COLOUR)
    assert (proposal.found, proposal.flags, proposal.reversed_channels) == (True, "", True)
    assert "reverse the channels of the images before normalising them" in proposal.line
    assert proposal.tried[:2] == ("channels reversed", "channels reversed before normalising")


def test_floats_that_were_reversed_after_normalising_are_to_be_reversed_back(colour):
    images = np.ascontiguousarray(normalised(colour_pixels(), COLOUR)[:, ::-1])
    proposal = proposal_from_images(*colour, images, COLOUR)
    assert proposal.reversed_channels
    assert "before normalising" not in proposal.line


def test_neither_order_nor_normalisation_of_right_floats_is_touched(colour):
    proposal = proposal_from_images(*colour, normalised(colour_pixels(1), COLOUR), COLOUR)
    assert not proposal.found
    assert not any("mean" in name or "0.." in name for name in proposal.tried)


# Strides


@pytest.mark.parametrize("wrong", [(1, 2, 2, 2, 2), (2, 2, 1, 2, 2), (1, 2, 1, 2, 2)])
def test_wrong_strides_of_a_trained_network_are_put_right(fashion, pixels, wrong):
    architecture, tensors = fashion
    proposal = proposal_from_images(with_strides(architecture, wrong), tensors, pixels, RIGHT)
    assert proposal.flags == "--strides 2,2,2,2,2"
    assert strides_from_text(proposal.flags.removeprefix("--strides ")) == architecture.stage_strides


def test_wrong_strides_and_a_wrong_normalisation_are_put_right_together(fashion, pixels):
    architecture, tensors = fashion
    assumed = Normalisation((0.0,), (1.0,), assumed=True)
    proposal = proposal_from_images(with_strides(architecture, (1, 2, 2, 2, 2)), tensors, pixels, assumed)
    assert proposal.flags == "--strides 2,2,2,2,2 --mean 0.5 --std 0.5"


def test_strides_are_put_right_for_floats_too(fashion, pixels):
    architecture, tensors = fashion
    wrong = with_strides(architecture, (2, 2, 1, 2, 2))
    assert proposal_from_images(wrong, tensors, normalised(pixels, RIGHT), RIGHT).flags == "--strides 2,2,2,2,2"


def test_the_choices_are_those_that_the_tensors_leave(fashion):
    """Of fashion.pt, stages 1, 3 and 4 keep the width and have no identity branch: theirs is 2."""
    assert stride_choices(fashion[0]) == ((1, 2), (2,), (1, 2), (2,), (2,))
    naive = NaiveRepVGG(Shape(strides=(2, 1, 2, 2, 1)))
    told = network_from_state(naive.float().state_dict(), strides=(2, 1, 2, 2, 1))[0]
    assert stride_choices(told) == ((1, 2), (1,), (1, 2), (1, 2), (1,))
    assert stride_choices(network_from_state(deployed_state(naive))[0]) == ((1, 2),) * 5


def test_other_strides_make_the_architecture_that_the_flag_would(colour):
    architecture, tensors = colour
    for strides in ((1, 1, 2, 2, 2), (2, 1, 1, 1, 2)):
        found = with_strides(architecture, strides)
        lineage = lineage_from_tensors({"stage0.rbr_dense.conv.weight": torch.zeros(8, 3, 3, 3)}, "test")
        asked = architecture_from_tensors(tensors, lineage, unexpected=(), where="test", strides=strides, eps=None)
        assert found.blocks == asked.blocks
        assert found.stage_strides == asked.stage_strides


def test_strides_that_are_too_expensive_are_left_out_and_not_said_to_be_tried(colour, monkeypatch):
    architecture, tensors = colour
    images = colour_pixels()
    largest = 8 * multiply_accumulates(architecture, images.shape[2:])
    monkeypatch.setattr("exporter.proposals.LARGEST_WORK", largest)
    proposal = proposal_from_images(architecture, tensors, images, COLOUR)
    patterns = {name for name in proposal.tried if name.startswith("strides ")}
    assert "strides 1,1,2,2,2" not in patterns
    monkeypatch.setattr("exporter.proposals.LARGEST_WORK", LARGEST_WORK)
    assert "strides 1,1,2,2,2" in proposal_from_images(architecture, tensors, images, COLOUR).tried


# Other families


@pytest.mark.parametrize("family", [QAREPVGG, QAREPVGG_V1, APPLE], ids=["QARepVGG", "QARepVGG V1", "MobileOne"])
def test_a_wrong_normalisation_of_another_family_is_put_right(family):
    pixels = colour_pixels()
    seen = torch.from_numpy(normalised(pixels, COLOUR))
    network = network_from_state(Network(family, FamilyShape(convs=2 if family is APPLE else 1), seen=seen).state)
    assert not proposal_from_images(*network, pixels, COLOUR).found
    proposal = proposal_from_images(*network, pixels, Normalisation((0.0,) * 3, (1.0,) * 3, assumed=True))
    assert (proposal.found, proposal.flags) == (True, "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225")
    assert proposal_from_images(*network, pixels[:, ::-1], COLOUR).reversed_channels


def test_wrong_strides_of_a_network_with_identities_that_have_no_tensors_are_put_right():
    """Where the stride decides whether there is an identity at all."""
    shape = FamilyShape(strides=(2, 1, 2, 2, 2))
    seen = torch.from_numpy(normalised(colour_pixels(), COLOUR))
    state = Network(QAREPVGG, shape, seen=seen).state
    assumed = network_from_state(state)
    assert assumed[0].stage_strides == (2, 2, 2, 2, 2)
    assert stride_choices(assumed[0]) == ((1, 2),) * 5
    proposal = proposal_from_images(*assumed, colour_pixels(), COLOUR)
    assert (proposal.found, proposal.flags) == (True, "--strides 2,1,2,2,2")
    right = network_from_state(state, strides=shape.strides)
    assert not proposal_from_images(*right, colour_pixels(), COLOUR).found


# What goes into the report


def test_the_record_is_json(fashion, pixels):
    proposal = proposal_from_images(*fashion, pixels[:16], RIGHT)
    assert json.loads(json.dumps(proposal.record(), allow_nan=False)) == {
        **dataclasses.asdict(proposal),
        "tried": list(proposal.tried),
    }
