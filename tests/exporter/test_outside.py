"""What a run makes of the batch norms' testimony: what fails, what is only told, and what is not judged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import exporter
from exporter.reference import PeakObserver, reference_from_repvgg, with_peaks_of
from exporter.witness import witness_from_images
from tests.conftest import EXAMPLES
from tests.inference import network_from_state
from tests.networks import NaiveRepVGG, Shape, contiguous_float, deployed_state

STAGE = "witness, batch norms against your images"
FASHION = [EXAMPLES / "fashion.pt", "--size", 28, "--calib", EXAMPLES / "fashion_calibration.npz", "--out", "out"]


def witness_of(tmp_path, *, rejected=False):
    report = json.loads((tmp_path / "out" / f"report.json{'.rejected' if rejected else ''}").read_text())
    return report["witness"], next(check for check in report["checks"] if check["stage"] == STAGE)


def test_the_right_assumptions_are_clear_and_nothing_is_proposed(command, tmp_path):
    assert command(*FASHION).code == 0
    witness, check = witness_of(tmp_path)
    assert (witness["verdict"], witness["images"], witness["proposal"], check["passed"]) == ("clear", 128, None, True)


@pytest.mark.parametrize(
    ("wrong", "proposed"),
    [
        (["--mean", "0", "--std", "1"], "--mean 0.5 --std 0.5"),
        (["--mean", "0.1307", "--std", "0.3081"], "--mean 0.5 --std 0.5"),
        (["--strides", "2,2,1,2,2"], "--strides 2,2,2,2,2"),
    ],
)
def test_wrong_assumptions_fail_and_the_right_ones_are_proposed(wrong, proposed, command, tmp_path):
    done = command(*FASHION, *wrong)
    assert done.code == 1
    assert done.error.startswith(f"{STAGE}: ")
    assert f"your images fit {proposed} far better" in done.error
    witness, check = witness_of(tmp_path, rejected=True)
    assert (check["passed"], witness["proposal"]["flags"]) == (False, proposed)
    assert witness["first_departure"] is not None


def test_a_failing_witness_can_be_ignored_and_is_then_not_judged(command, tmp_path):
    done = command(*FASHION, "--mean", "0", "--std", "1", "--ignore-witness")
    assert done.code == 0
    assert f"skip {STAGE}: wrong: " in done.stdout
    assert "(ignored, as --ignore-witness says)" in done.stdout
    assert witness_of(tmp_path)[1]["passed"] is None


def images_file(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3), dtype=np.uint8))
    return tmp_path / "images.npz"


def test_statistics_that_were_never_trained_judge_nothing(command, checkpoint, tmp_path):
    done = command(checkpoint, "--size", 20, "--calib", images_file(tmp_path), "--out", "out")
    assert done.code == 0
    witness, check = witness_of(tmp_path)
    assert (check["passed"], witness["proposal"]) == (None, None)
    assert "contradict each other" in check["detail"]


def test_a_deployed_file_has_no_witness(command, saved, tmp_path):
    path = saved(deployed_state(NaiveRepVGG(Shape())), "deployed.pt")
    assert command(path, "--size", 20, "--calib", images_file(tmp_path), "--out", "out").code == 0
    assert witness_of(tmp_path)[0]["verdict"] == "unavailable"
    assert witness_of(tmp_path)[1]["passed"] is None


def test_without_identity_branches_unknown_images_fail(command, saved, tmp_path):
    path = saved(contiguous_float(NaiveRepVGG(Shape(identity=False)).state_dict()), "ablation.pt")
    done = command(path, "--size", 20, "--calib", images_file(tmp_path), "--out", "out")
    assert done.code == 1
    assert done.error.startswith(f"{STAGE}: wrong: ")


def test_without_images_nobody_is_asked(command, checkpoint, tmp_path):
    assert command(checkpoint, "--size", 20, "--out", "out").code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["witness"] is None
    assert STAGE not in [check["stage"] for check in report["checks"]]


# --- the range that images show


def calibration_with_a_loud_image(folder, place):
    """Fashion-MNIST, normalised, of which one image is far out of the ordinary."""
    with np.load(EXAMPLES / "fashion_calibration.npz") as archive:
        pixels = archive["images"][:64].astype(np.float32)
    images = ((pixels / 255 - 0.5) / 0.5).reshape(64, 1, 28, 28)
    images[place] *= 3e4
    np.savez(folder / "images.npz", images=images)
    return folder / "images.npz"


@pytest.mark.parametrize("place", [1, 50], ids=["among those compared on", "behind them"])
def test_an_image_that_only_the_batch_norms_saw_counts_for_the_range_of_half(place, tmp_path):
    path = calibration_with_a_loud_image(tmp_path, place)
    report = exporter.export(
        EXAMPLES / "fashion.pt", tmp_path / "out", size=28, trt=["fp16"], calibration=path, ignore_witness=True
    )
    rows = {row.convolution: row for row in report.headroom}
    loud = rows["stage0.0/Conv"]
    assert loud.before.factor < 1
    assert any(loud.exponents)
    assert loud.after.factor >= 4
    assert list(report.engines[0].kept_in_float32) == ["head/Gemm"]  # whose result nothing can rescale


def test_what_the_batch_norms_saw_is_what_the_reference_would_have(tmp_path):
    architecture, tensors = network_from_state(torch.load(EXAMPLES / "fashion.pt", weights_only=True))
    with np.load(EXAMPLES / "fashion_calibration.npz") as archive:
        images = ((archive["images"][:32].astype(np.float32) / 255 - 0.5) / 0.5).reshape(32, 1, 28, 28)
    witnessed = PeakObserver()
    witness_from_images(architecture, tensors, [images[:20], images[20:]], witnessed)
    reference = reference_from_repvgg(architecture, tensors, images)
    assert reference.peaks.keys() - witnessed.peaks.keys() == {"input"}
    for name, peaks in witnessed.peaks.items():
        np.testing.assert_allclose(peaks, reference.peaks[name], rtol=1e-4, atol=1e-4)
    fewer = reference_from_repvgg(architecture, tensors, images[:4])
    seen = with_peaks_of(fewer, [witnessed.peaks])
    assert all((seen.peaks[name] >= fewer.peaks[name]).all() for name in fewer.peaks)
    assert any((seen.peaks[name] > 1.2 * fewer.peaks[name]).any() for name in fewer.peaks)
