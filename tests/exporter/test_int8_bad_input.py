"""What INT8 cannot be made from, and what is only doubtful: one line, the right exit code, nothing left on the disk."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from engines import sdk
from exporter import pipeline, processes
from exporter.errors import VerificationFailed
from tests.networks import NaiveRepVGG, Shape, contiguous_float
from tests.small_int8 import SIZE, answers, network, pictures, save_folder, save_images, save_network
from tests.unsimplified import Unsimplified

QUIET_BY_DEFAULT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
INT8 = ("--trt", "int8", "--calib", "images.npz")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small spend more time on handing work over than on the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_simplifier(monkeypatch):
    monkeypatch.setattr(processes, "SimplifierProcess", Unsimplified)


def tree(folder):
    """Every path under ``folder``, hidden ones too, with the bytes of the files."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A network and images that are fit to calibrate it."""
    folder = tmp_path_factory.mktemp("made")
    save_network(folder / "model.pt")
    save_images(folder / "images.npz", labels=answers(pictures(margin=0)))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """model.pt and images.npz where the command runs, to be changed at will."""
    for path in made.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture
def refused(command, folder):
    """Runs a command that must fail with ``code``, in one line, and leave nothing; returns the line."""

    def run(code, *flags):
        before = tree(folder)
        with warnings.catch_warnings(record=True) as caught:  # each would be one more line on a user's stderr
            warnings.simplefilter("always")
            outcome = command("model.pt", "--size", SIZE, *flags)
        assert outcome.code == code, outcome.stderr
        assert [str(w.message) for w in caught if not issubclass(w.category, QUIET_BY_DEFAULT)] == []
        assert tree(folder) == before
        return outcome.error

    return run


@pytest.fixture
def noted(command, folder, monkeypatch):
    """Runs a command up to where INT8 is calibrated, which must come; returns the lines that are notes."""

    def stop(*_arguments):
        raise VerificationFailed("calibration begins")

    def run(*flags):
        monkeypatch.setattr(pipeline, "int8_from_request", stop)
        outcome = command("model.pt", "--size", SIZE, *flags)
        assert outcome.error == "calibration begins"
        return [line.removeprefix("note: ") for line in outcome.stdout.splitlines() if line.startswith("note: ")]

    return run


def has(line, *words):
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in {line!r}"


# The command line


USAGE = {
    "no images": (["--trt", "int8"], ["--trt int8", "needs --calib", "random data would give a wrong network"]),
    "no images beside another precision": (["--trt", "fp16,int8"], ["--trt int8", "needs --calib"]),
    "an effort without INT8": (["--int8-effort", "high"], ["--int8-effort", "add --trt int8"]),
    "a report without INT8": (["--trt", "fp16", "--int8-report"], ["--int8-report", "add --trt int8"]),
    "a budget without INT8": (["--int8-budget", "30"], ["--int8-budget", "add --trt int8"]),
    "an unknown effort": ([*INT8, "--int8-effort", "weird"], ["--int8-effort weird", "choose from default, high"]),
    "a budget of 0": ([*INT8, "--int8-budget", "0"], ["--int8-budget", "0 is not a number of decibels up to 120"]),
    "a budget below 0": ([*INT8, "--int8-budget", "-3"], ["--int8-budget", "-3"]),
    "a budget of NaN": ([*INT8, "--int8-budget", "nan"], ["--int8-budget", "'nan'"]),
    "a budget of infinity": ([*INT8, "--int8-budget", "inf"], ["--int8-budget", "'inf'"]),
    "a budget of 1000": ([*INT8, "--int8-budget", "1000"], ["--int8-budget", "1000", "up to 120"]),
    "two budgets": ([*INT8, "--int8-budget", "30,31"], ["--int8-budget", "'30,31'", "not one number"]),
    "int8 twice": ([*INT8, "--trt", "int8"], ["--trt", "named twice"]),
    "uint8": (["--trt", "uint8", "--calib", "images.npz"], ["--trt uint8", "fp32, fp16, int8"]),
    "images scaled to less than is cut out": ([*INT8, "--resize", "15"], ["--resize 15", "16 to 4096"]),
    "images scaled to nothing": ([*INT8, "--resize", "0"], ["--resize 0", "16 to 4096"]),
    "images scaled to no number": ([*INT8, "--resize", "big"], ["--resize", "'big'"]),
    "labels for feature maps": ([*INT8, "--features", "1", "--labels", "images.npz"], ["--labels", "--features"]),
}


@pytest.mark.parametrize(("flags", "words"), USAGE.values(), ids=USAGE)
def test_a_wrong_use_is_one_line(flags, words, refused):
    has(refused(2, *flags), *words)


def test_a_card_without_int8_convolutions_is_one_line(refused):
    has(refused(2, *INT8, "--gpu", "sm75"), "--gpu sm75", "no INT8 convolutions", "--trt fp16")


def test_the_twin_of_all_of_these_goes_on_to_calibrate(noted):
    assert noted(*INT8, "--int8-effort", "high", "--int8-budget", 30, "--int8-report", "--resize", 16) == []


# Images that cannot be used


def without_images(folder):
    (folder / "images").mkdir()


def with_text_files(folder):
    without_images(folder)
    (folder / "images" / "readme.txt").write_text("no images here")


def with_damaged_images(folder):
    save_folder(folder / "images", pictures())
    for index in (7, 9):
        path = folder / "images" / f"{index:04}.png"
        path.write_bytes(path.read_bytes()[:60])


def with_three_images(folder):
    save_folder(folder / "images", pictures()[:3])


FOLDERS = {
    "missing": (lambda folder: None, ["images: no such file", "check --calib"]),
    "empty": (without_images, ["images: holds no JPEG, PNG or WebP image", "the folder is empty"]),
    "of other files": (with_text_files, ["images: holds no JPEG, PNG or WebP image", "found 1 .txt"]),
    "with 2 of 128 unreadable": (
        with_damaged_images,
        ["2 of 128 images cannot be read", "more than 1 in 100", "0007.png", "0009.png"],
    ),
    "of three": (with_three_images, ["holds 3 images", "at least 4"]),
}


@pytest.mark.parametrize(("prepare", "words"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_cannot_be_used_is_one_line(prepare, words, refused, folder):
    prepare(folder)
    has(refused(3, "--trt", "int8", "--calib", "images"), *words)


def arrays(change):
    """An .npz whose ``images`` are changed."""

    def prepare(folder):
        np.savez(folder / "images.npz", images=change(pictures(margin=0)))

    return prepare


def normalised_with(value):
    def change(pixels):
        values = (pixels.transpose(0, 3, 1, 2) / 255 - 0.45).astype(np.float32) / 0.225
        values[3, 1, 5, 5] = value
        return values.astype(np.float32)

    return change


def calibration_file(folder):
    (folder / "images.npz").write_text(json.dumps({"schema": 1, "binding": {}, "forms": []}))


def cut_short(folder):
    path = folder / "images.npz"
    path.write_bytes(path.read_bytes()[:-500])


ARRAYS = {
    "grey for a network of colours": (arrays(lambda x: x[..., :1]), ["uint8 (128, 16, 16, 1)", "3 channels of 16x16"]),
    "of another size": (arrays(lambda x: x[:, :15]), ["(128, 15, 16, 3)", "3 channels of 16x16", "--size"]),
    "channels first in bytes": (arrays(lambda x: x.transpose(0, 3, 1, 2)), ["(128, 3, 16, 16)", "(N, H, W, C)"]),
    "float64": (arrays(lambda x: x / 255.0), ["float64", "uint8 or float32"]),
    "of one colour each": (arrays(lambda x: x * 0 + x[:, :1, :1]), ["128 of 128 images are of one colour"]),
    "all the same": (arrays(lambda x: np.repeat(x[:1], 128, 0)), ["all 128 images are the same"]),
    "with a NaN": (arrays(normalised_with(np.nan)), ["images.npz: images hold NaN or infinite values"]),
    "with an infinity": (arrays(normalised_with(np.inf)), ["images.npz: images hold NaN or infinite values"]),
    "floats that were never normalised": (
        arrays(lambda x: x.transpose(0, 3, 1, 2).astype(np.float32)),
        ["float images hold values from 0 to 255, all whole", "save them as uint8"],
    ),
    "three": (arrays(lambda x: x[:3]), ["(3, 16, 16, 3)", "at least 4"]),
    "a calibration of an earlier run": (calibration_file, ["images.npz", "not an .npz"]),
    "cut short": (cut_short, ["images.npz"]),
}


@pytest.mark.parametrize(("prepare", "words"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_cannot_be_used_are_one_line(prepare, words, refused, folder):
    prepare(folder)
    has(refused(3, *INT8), *words)


def test_a_calibration_file_in_the_place_of_images_is_one_line(refused, folder):
    calibration_file(folder)
    (folder / "images.npz").rename(folder / "model.int8.calib.json")
    has(refused(3, "--trt", "int8", "--calib", "model.int8.calib.json"), "model.int8.calib.json", "not an .npz")


# Labels


def labels(change):
    def prepare(folder):
        pixels = pictures(40, 1, 0)
        np.savez(folder / "test.npz", images=pixels, labels=change(answers(pixels)))
        return "test.npz"

    return prepare


def class_folders(*names):
    def prepare(folder):
        save_folder(folder / "test", pictures(40, 1, 0), [names[index % len(names)] for index in range(40)])
        return "test"

    return prepare


def beside_folders(folder):
    class_folders(*"0123456")(folder)
    Image.fromarray(pictures(1, 1, 0)[0]).save(folder / "test" / "loose.png")
    return "test"


def flat(folder):
    save_folder(folder / "test", pictures(40, 1, 0))
    return "test"


LABELS = {
    "too few": (labels(lambda y: y[:-1]), ["labels are int64 (39,)", "expected 40 integers"]),
    "one hot": (labels(lambda y: np.eye(7)[y]), ["labels are float64 (40, 7)"]),
    "of an eighth class": (labels(lambda y: np.where(y == y[0], 7, y)), ["to 7; the network has classes 0 to 6"]),
    "eight folders": (class_folders(*"abcdefgh"), ["8 folders", "7 classes"]),
    "six named folders": (class_folders(*"abcdef"), ["6 folders", "7 classes", "which is which?"]),
    "a folder called 7": (class_folders(*"012347"), ["not classes 0 to 6"]),
    "no folders": (flat, ["has no folders", "one for each class"]),
    "images beside the folders": (beside_folders, ["loose.png", "beside the folders"]),
}


@pytest.mark.parametrize(("prepare", "words"), LABELS.values(), ids=LABELS)
def test_labels_that_do_not_match_are_one_line(prepare, words, refused, folder):
    has(refused(3, *INT8, "--labels", prepare(folder)), *words)


def test_six_numbered_folders_are_six_of_the_seven_classes(noted, folder):
    assert noted(*INT8, "--labels", class_folders(*"012356")(folder)) == []


# What is only doubtful


def test_images_in_both_sets_are_noted(noted, folder):
    both = np.concatenate([pictures(40, 1, 0), pictures(margin=0)[:5]])
    np.savez(folder / "test.npz", images=both, labels=answers(both))
    (line,) = noted(*INT8, "--labels", "test.npz")
    has(line, "5 of 45 labelled images are in images.npz, too", "may be too good")


def test_different_sets_are_not_noted(noted, folder):
    assert noted(*INT8, "--labels", labels(lambda y: y)(folder)) == []


@pytest.mark.parametrize("count", [4, 127])
def test_few_images_are_noted(count, noted, folder):
    np.savez(folder / "images.npz", images=pictures(margin=0)[:count])
    (line,) = noted(*INT8, "--ignore-witness")
    has(line, f"images.npz: {count} images; at least 128 are asked for, 512 recommended")


def test_copies_are_noted(noted, folder):
    np.savez(folder / "images.npz", images=np.concatenate([pictures(margin=0), pictures(margin=0)[:2]]))
    (line,) = noted(*INT8)
    has(line, "2 of 130 images are copies of others")


def test_one_unreadable_image_in_a_hundred_is_noted_and_left_out(noted, folder):
    save_folder(folder / "images", pictures(margin=0))
    (folder / "images" / "0005.png").write_bytes(b"no image")
    unread, few = noted("--trt", "int8", "--calib", "images")
    has(unread, "1 of 128 images cannot be read and are left out: 0005.png")
    has(few, "127 images; at least 128")


def test_without_int8_nothing_is_noted_of_four_images(command, folder):
    np.savez(folder / "images.npz", images=pictures(margin=0)[:4])
    outcome = command("model.pt", "--size", SIZE, "--calib", "images.npz")
    assert outcome.code == 0
    assert "note: " not in outcome.stdout


# Networks


def test_four_images_are_enough_to_calibrate_where_they_must_be(command, folder):
    np.savez(folder / "images.npz", images=pictures(margin=0)[:4])
    outcome = command("model.pt", "--size", SIZE, *INT8, "--ignore-witness", "--out", "out")
    assert (outcome.code, outcome.stderr) == (0, "")
    records = json.loads((folder / "out" / "report.json").read_text())["quantization"]
    assert [(record["images"], record["fitted_images"]) for record in records] == [(4, 4), (4, 4)]


def save_loud(folder, factor):
    """A network whose stage2.0 gives values ``factor`` times larger, and whose head makes up for it."""
    state = {name: tensor.clone() for name, tensor in network().state.items()}
    for name in state:
        if re.fullmatch(r"stage2\.0\.rbr_\w+(\.bn)?\.(weight|bias)", name):
            state[name] *= factor
    torch.save(state, folder / "model.pt")


def test_a_network_that_half_cannot_hold_in_int8_is_one_line(refused, folder):
    save_loud(folder, 1e9)
    has(refused(1, *INT8, "--ignore-witness"), "INT8: ", "take fp")


def test_a_network_without_an_answer_is_one_line(refused, folder):
    state = contiguous_float(NaiveRepVGG(Shape()).state_dict())
    state["linear.weight"][0, 0] = float("nan")
    torch.save(state, folder / "model.pt")
    has(refused(3, *INT8, "--ignore-witness"), "linear.weight", "NaN")


def test_a_missing_card_is_not_asked_for(monkeypatch, refused):
    monkeypatch.setattr(sdk, "gpu_compute_capability", lambda *_: None)
    has(refused(4, *INT8, "--require", "trt"), "--require trt", "no GPU answers here")
