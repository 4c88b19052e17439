"""The ends of a range of sizes: images of them, the training-time answers to them, and the peaks of all sizes."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from engines.parity import Gate
from exporter import sizes
from exporter.architecture import with_features
from exporter.dataset import dataset_from_npz
from exporter.images import noise_images, normalisation
from exporter.inputs import inputs_from_request
from exporter.measured import Measured, fixed
from exporter.reference import Reference, reference_from_repvgg, with_peaks_of
from exporter.request import Request
from exporter.sizes import images_of_size, measured_at_ends
from tests.inference import answers, network_from_state
from tests.networks import NaiveRepVGG, Shape, contiguous_float

USUAL, RANGE = (20, 24), ((16, 18), (40, 32))
GATE = Gate(max_relative_error=1e-5, top1=True)


@pytest.fixture(scope="module")
def model():
    return NaiveRepVGG(Shape(se=True))


@pytest.fixture(scope="module")
def network(model):
    return network_from_state(contiguous_float(model.state_dict()))


@pytest.fixture
def asked(tmp_path, network):
    """``asked(images, **fields)``: the inputs of a request, and the request; noise where ``images`` is None."""

    def ask(images=None, **fields):
        if images is not None:
            np.savez(tmp_path / "images.npz", images=images)
            fields["calibration"] = tmp_path / "images.npz"
        request = Request(path=pathlib.Path("x.pt"), out=tmp_path, **{"size": USUAL, "size_range": RANGE, **fields})
        return inputs_from_request(request, network[0], normalisation(3, request.mean, request.std)), request

    return ask


# --- images


def test_without_images_there_is_noise_of_every_size(asked):
    inputs, _ = asked()
    for size in ((16, 18), (40, 32), (21, 33)):
        images = images_of_size(inputs, 3, size)
        assert images.dtype == np.float32
        assert np.array_equal(images, noise_images(3, size))
        assert images.shape == (4, 3, *size)


def ramps():
    """Four images (4, 3, 20, 24) that rise evenly to the right, each channel and image by itself."""
    across = np.arange(24, dtype=np.float32) / 23
    slopes = np.arange(1, 13, dtype=np.float32).reshape(4, 3, 1, 1)
    return np.broadcast_to(slopes * across, (4, 3, *USUAL)).copy()


def test_images_are_scaled_to_the_size_and_stay_what_they_show(asked):
    inputs, _ = asked(ramps())
    assert np.array_equal(inputs.images, ramps())
    for size in ((40, 48), (10, 12), (31, 17)):
        images = images_of_size(inputs, 3, size)
        assert (images.shape, images.dtype) == ((4, 3, *size), np.float32)
        assert images == pytest.approx(np.broadcast_to(images[:, :, :1], images.shape), rel=1e-5, abs=1e-5)
        inner = images[:, :, 0, 2:-2]
        steps = np.diff(inner, axis=2)
        slopes = np.arange(1, 13).reshape(4, 3, 1) * 24 / 23 / size[1]
        assert steps == pytest.approx(np.broadcast_to(slopes, steps.shape), rel=5e-2)
        assert images.mean(axis=(2, 3)) == pytest.approx(ramps().mean(axis=(2, 3)), rel=1e-2)


def test_scaling_down_takes_all_pixels_into_account(asked):
    """One bright column in four becomes a quarter; looking at the nearest pixels only would miss it."""
    stripes = np.broadcast_to(np.arange(USUAL[1]) % 4 == 0, (4, 3, *USUAL)).astype(np.float32)
    inputs, _ = asked(stripes)
    images = images_of_size(inputs, 3, (5, 6))
    assert images[..., 1:-1] == pytest.approx(np.full((4, 3, 5, 4), 0.25), abs=0.02)


def test_labelled_images_are_scaled_too(asked, tmp_path, network):
    np.savez(tmp_path / "test.npz", images=ramps(), labels=np.arange(4))
    labelled = dataset_from_npz(tmp_path / "test.npz", 3, USUAL, normalisation(3, None, None), "--labels")
    inputs, _ = asked()
    real = dataclasses.replace(inputs, images=ramps(), labelled=labelled)
    assert not np.array_equal(images_of_size(real, 3, (40, 48)), noise_images(3, (40, 48)))
    assert images_of_size(real, 3, USUAL) == pytest.approx(ramps(), abs=1e-6)


# --- the answers at both ends


def test_a_fixed_size_has_no_ends(asked, network):
    inputs, request = asked(size_range=None)
    assert measured_at_ends(*network, inputs, request) == ()


def test_both_ends_are_the_training_networks_own_answers(asked, network, model):
    inputs, request = asked()
    found = measured_at_ends(*network, inputs, request)
    assert [one.at for one in found] == [" at 16x18", " at 40x32"]
    for one, size in zip(found, RANGE, strict=True):
        assert np.array_equal(one.images, noise_images(3, size)[: sizes.IMAGES])
        expected = model.answer(torch.from_numpy(one.images)).numpy()
        assert one.reference == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_real_images_are_used_at_both_ends(asked, network):
    inputs, request = asked(ramps())
    for one, size in zip(measured_at_ends(*network, inputs, request), RANGE, strict=True):
        assert np.array_equal(one.images, images_of_size(inputs, 3, size)[: sizes.IMAGES])


def test_two_equal_ends_are_measured_once(asked, network):
    inputs, request = asked(size_range=(USUAL, USUAL))
    assert [one.at for one in measured_at_ends(*network, inputs, request)] == [" at 20x24"]


def test_an_expensive_network_answers_one_image(asked, network, monkeypatch):
    inputs, request = asked()
    monkeypatch.setattr(sizes, "affordable_images", lambda architecture, size, wanted: 1)
    assert [len(one.images) for one in measured_at_ends(*network, inputs, request)] == [1, 1]


def test_feature_maps_have_the_size_of_each_end(asked, network):
    architecture, tensors = network
    inputs, request = asked()
    ends = measured_at_ends(with_features(architecture, (1, 3)), tensors, inputs, request)
    for one, (height, width) in zip(ends, RANGE, strict=True):
        frames = [-(-height // factor) * -(-width // factor) for factor in (4, 16)]
        assert [one.source.named[name][0].size for name in ("stage1", "stage3")] == [8 * frames[0], 16 * frames[1]]


# --- what a size that was baked into a file does there


def session(network, area=None):
    """The network in float32; with ``area``, its head divides by that many pixels and not by as many as there are."""
    architecture, tensors = network

    def run(images):
        last = with_features(architecture, (4,))
        features = answers(last, tensors, torch.from_numpy(images))
        pooled = features.sum(dim=(2, 3)) / (area or features.shape[2] * features.shape[3])
        return {"output": (pooled @ tensors["head.weight"].T + tensors["head.bias"]).numpy()}

    return run


def checks(network, asked, run):
    inputs, request = asked()
    usual = Measured(reference_from_repvgg(*network, inputs.images), 0)
    everywhere = (usual, *measured_at_ends(*network, inputs, request))
    return [one.check("stage", "title", lambda: run, fixed(GATE)) for one in everywhere]


def test_a_right_network_passes_at_every_size(network, asked):
    assert [(check.stage, check.passed) for check in checks(network, asked, session(network))] == [
        ("title", True), ("title at 16x18", True), ("title at 40x32", True),
    ]  # fmt: skip


def test_a_pooling_that_was_made_for_one_size_fails_at_the_others(network, asked):
    """At 20x24 the last feature map has one pixel, as at 16x18; at 40x32 it has two."""
    found = checks(network, asked, session(network, area=1))
    assert [(check.stage, check.passed) for check in found] == [
        ("title", True), ("title at 16x18", True), ("title at 40x32", False),
    ]  # fmt: skip


@pytest.mark.parametrize("size", RANGE)
def test_a_batch_that_is_mixed_up_at_one_end_fails(size, network, asked):
    def run(images):
        outputs = session(network)(images)["output"]
        return {"output": outputs[::-1] if images.shape[2:] == size else outputs}

    failed = [check.stage for check in checks(network, asked, run) if check.passed is False]
    assert failed == [f"title at {size[0]}x{size[1]}"]


def test_a_file_that_takes_one_size_only_fails_at_the_others(network, asked):
    def run(images):
        if images.shape[2:] != USUAL:
            raise ValueError("invalid dimensions")
        return session(network)(images)

    found = checks(network, asked, run)
    assert [check.passed for check in found] == [True, False, False]
    assert found[1].detail == "output: invalid dimensions"


# --- peaks


def measured(peaks):
    reference = Reference(np.zeros((1, 3, 2, 2), np.float32), {"output": np.ones((1, 2))}, peaks)
    return Measured(reference, 0)


def test_the_largest_peaks_of_all_sizes_are_kept_channel_by_channel():
    usual = measured({"a": np.array([1.0, 5.0]), "b": np.array([2.0])}).source
    ends = [
        measured({"a": np.array([3.0, 4.0]), "b": np.array([1.0])}),
        measured({"a": np.array([0.0, 6.0]), "b": np.array([2.5])}),
    ]
    seen = with_peaks_of(usual, [end.source.peaks for end in ends])
    assert {name: values.tolist() for name, values in seen.peaks.items()} == {"a": [3.0, 6.0], "b": [2.5]}
    assert usual.peaks["a"].tolist() == [1.0, 5.0]
    assert np.array_equal(seen.outputs, usual.outputs)
    assert with_peaks_of(usual, []).peaks == usual.peaks


def test_a_channel_that_only_a_large_image_makes_loud_is_seen(asked, network):
    inputs, request = asked()
    usual = reference_from_repvgg(*network, inputs.images)
    ends = measured_at_ends(*network, inputs, request)
    loud = dataclasses.replace(
        ends[1].source, peaks={name: 100 + value for name, value in ends[1].source.peaks.items()}
    )
    ends[1].source = loud
    seen = with_peaks_of(usual, [end.source.peaks for end in ends])
    assert all(np.array_equal(seen.peaks[name], loud.peaks[name]) for name in usual.peaks)
