"""The shipped checkpoint and images: what the README and the training script say of them."""

from __future__ import annotations

import importlib.util

import numpy as np
import onnxruntime
import pytest
import torch

import exporter
from tests.conftest import EXAMPLES, run_process


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("fashion")
    calibration = EXAMPLES / "fashion_calibration.npz"
    report = exporter.export(EXAMPLES / "fashion.pt", out, size=28, trt=["fp16"], calibration=calibration)
    return out, report


@pytest.fixture(scope="module")
def training_script():
    spec = importlib.util.spec_from_file_location("train_fashion", EXAMPLES / "train_fashion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_checkpoint_is_small_and_the_images_are_what_they_are_said_to_be():
    assert (EXAMPLES / "fashion.pt").stat().st_size <= 1_500_000
    for name, count in (("calibration", 512), ("test", 2000)):
        with np.load(EXAMPLES / f"fashion_{name}.npz") as archive:
            assert archive["images"].shape == (count, 28, 28)
            assert archive["images"].dtype == np.uint8
            assert archive["labels"].shape == (count,)


def test_the_exported_graphs_keep_the_top1_of_the_trained_network(exported, training_script):
    """On all test images: the training script's own network, the ONNX file, and the fp16 file."""
    out, _ = exported
    with np.load(EXAMPLES / "fashion_test.npz") as archive:
        images, labels = training_script.normalised(archive["images"]), archive["labels"]
    network = training_script.RepVGG()
    network.load_state_dict(torch.load(EXAMPLES / "fashion.pt", weights_only=True))
    network.eval()
    with torch.no_grad():
        trained = network(images).numpy()
    top1 = (trained.argmax(1) == labels).mean()
    assert top1 >= 0.90
    for name in ("fashion.onnx", "fashion.fp16.onnx"):
        session = onnxruntime.InferenceSession(str(out / name), providers=["CPUExecutionProvider"])
        found = session.run(None, {"input": images.numpy()})[0]
        assert abs((found.argmax(1) == labels).mean() - top1) <= 0.001
        assert np.abs(found - trained).max() / np.abs(trained).max() < (2e-6 if name == "fashion.onnx" else 5e-3)


def test_golden_vectors_are_the_networks_answers_to_the_first_images(exported, training_script):
    out, report = exported
    assert report.inputs == "the first 4 images of fashion_calibration.npz"
    with np.load(out / "golden.npz") as golden, np.load(EXAMPLES / "fashion_calibration.npz") as archive:
        assert golden["input"].dtype == np.float32
        assert golden["output"].dtype == np.float64
        expected = training_script.normalised(archive["images"][:4])
        assert np.abs(golden["input"] - expected.numpy()).max() < 1e-6
        network = training_script.RepVGG()
        network.load_state_dict(torch.load(EXAMPLES / "fashion.pt", weights_only=True))
        with torch.no_grad():
            answer = network.double().eval()(torch.from_numpy(golden["input"]).double()).numpy()
        assert np.abs(answer - golden["output"]).max() < 1e-12


def test_the_engine_is_all_half(exported):
    _, report = exported
    line = report.engines[0].audit["line"]
    assert line == "11 of 11 convs in FP16, Conv+ReLU in one kernel each, all 12 weights bit-equal"


def test_the_expected_answers_are_those_of_the_trained_network(training_script):
    network = training_script.RepVGG()
    network.load_state_dict(torch.load(EXAMPLES / "fashion.pt", weights_only=True))
    network.eval()
    with np.load(EXAMPLES / "fashion_expected.npz") as archive, np.load(EXAMPLES / "fashion_test.npz") as test:
        assert np.array_equal(archive["input"], training_script.normalised(test["images"][:16]).numpy())
        with torch.no_grad():
            answers = network(torch.from_numpy(archive["input"])).numpy()
        assert np.abs(archive["output"] - answers).max() < 1e-5 * np.abs(answers).max()
        assert (archive["output"].argmax(1) == test["labels"][:16]).mean() > 0.8


def test_the_script_writes_the_files_that_ship(tmp_path):
    done = run_process([EXAMPLES / "expect_fashion.py", "--out", tmp_path], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("fashion_classes.txt", "ankle_boot.png"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes()
    with np.load(tmp_path / "fashion_expected.npz") as made, np.load(EXAMPLES / "fashion_expected.npz") as shipped:
        assert np.abs(made["output"] - shipped["output"]).max() < 1e-4
