"""Images to calibrate on: each fault that is certain is refused, each that only looks like one is a warning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from exporter.calibration_images import calibration_problems
from exporter.dataset import dataset_from_npz, dataset_from_path
from exporter.errors import InputRejected
from exporter.images import IMAGENET_MEAN, IMAGENET_STD, Normalisation
from tests.conftest import EXAMPLES

IMAGENET = Normalisation(IMAGENET_MEAN, IMAGENET_STD, assumed=True)
BYTES = Normalisation((0.0,) * 3, (0.00392157,) * 3, assumed=False)
UNIT = Normalisation((0.0,) * 3, (1.0,) * 3, assumed=False)
SIZE = (3, 4)
RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (300, *SIZE, 3), np.uint8)
NORMAL = ((PIXELS / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2).astype(np.float32)


@pytest.fixture
def problems(tmp_path):
    def find(images, normalise=IMAGENET):
        np.savez(tmp_path / "calib.npz", images=images)
        return calibration_problems(dataset_from_npz(tmp_path / "calib.npz", 3, SIZE, normalise))

    return find


def refusal(problems, *arguments):
    with pytest.raises(InputRejected) as caught:
        problems(*arguments)
    line = str(caught.value)
    assert "calib.npz: " in line
    assert len(line.splitlines()) == 1
    return line.rpartition("calib.npz: ")[2]


@pytest.mark.parametrize("images", [PIXELS, NORMAL, PIXELS[:128]], ids=["bytes", "floats", "128"])
def test_enough_different_normalised_images_are_no_problem(images, problems):
    assert problems(images) == []


def test_the_projects_own_calibration_images_are_no_problem():
    dataset = dataset_from_path(EXAMPLES / "fashion_calibration.npz", 1, (28, 28), Normalisation((0.5,), (0.5,), True))  # noqa: FBT003
    assert calibration_problems(dataset) == []


# --- how many


@pytest.mark.parametrize("count", [4, 40, 127])
def test_few_images_are_a_warning(count, problems):
    (line,) = problems(PIXELS[:count])
    assert line.endswith(f"calib.npz: {count} images; at least 128 are asked for, 512 recommended")


def test_copies_do_not_count(problems):
    (line,) = problems(np.concatenate([PIXELS[:100]] * 2))
    assert line.endswith("200 images, 100 of them different; at least 128 are asked for, 512 recommended")
    (line,) = problems(np.concatenate([PIXELS, PIXELS[:7]]))
    assert line.endswith("7 of 307 images are copies of others in it")


@pytest.mark.parametrize("images", [PIXELS, NORMAL], ids=["bytes", "floats"])
def test_images_that_are_all_the_same_are_refused(images, problems):
    assert refusal(problems, images[:1].repeat(200, 0)) == (
        "all 200 images are the same; give different ones for --calib"
    )
    almost = images[:1].repeat(200, 0)
    almost[199] = images[1]
    assert "200 images, 2 of them different" in problems(almost)[0]


# --- of one colour


def with_constant(images, places):
    changed = images.copy()
    for number, place in enumerate(places):
        first = changed[place].reshape(-1)[:3] if changed.dtype == np.uint8 else changed[place][:, 0, 0]
        colour = np.array([number * 40, 255 - number, 9]) if changed.dtype == np.uint8 else first + number / 8
        changed[place] = colour if changed.dtype == np.uint8 else colour[:, None, None]
    return changed


@pytest.mark.parametrize("images", [PIXELS, NORMAL], ids=["bytes", "floats"])
def test_images_of_one_colour_are_named_and_refused_above_one_in_a_hundred(images, problems):
    (line,) = problems(with_constant(images, [5, 77, 299]))
    assert line.endswith("calib.npz: 3 of 300 images are of one colour: image 5, image 77, image 299")
    line = refusal(problems, with_constant(images, [5, 77, 200, 299]))
    assert line == "4 of 300 images are of one colour: image 5, image 77, image 200 and 1 more; leave them out"
    touched = with_constant(images, [5, 77, 200, 299])
    touched[200].reshape(-1)[-1] += 1
    assert "3 of 300 images" in problems(touched)[0]


def test_files_of_one_colour_are_told_by_name(tmp_path):
    for index in range(100):
        Image.fromarray(PIXELS[index]).save(tmp_path / f"{index:02}.png")
    Image.new("RGB", (40, 30), (9, 8, 7)).save(tmp_path / "42.png")
    warnings = calibration_problems(dataset_from_path(tmp_path, 3, SIZE, IMAGENET))
    assert warnings == [
        f"{tmp_path}: 1 of 100 images are of one colour: 42.png",
        f"{tmp_path}: 100 images; at least 128 are asked for, 512 recommended",
    ]
    Image.new("L", (40, 30), 0).save(tmp_path / "07.png")
    with pytest.raises(InputRejected, match=r"2 of 100 images are of one colour: 07\.png, 42\.png; leave them out"):
        calibration_problems(dataset_from_path(tmp_path, 3, SIZE, IMAGENET))


# --- values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 299])
def test_values_that_are_not_finite_are_refused(value, place, problems):
    images = NORMAL.copy()
    images[place, 1, 2, 3] = value
    assert "hold NaN or infinite values" in refusal(problems, images)


WHOLE = PIXELS.transpose(0, 3, 1, 2).astype(np.float32)


def test_floats_that_are_the_bytes_themselves_are_refused(problems):
    line = refusal(problems, WHOLE)
    assert line == (
        "float images hold values from 0 to 255, all whole, and pixels normalised with mean 0.485,0.456,0.406 and std "
        "0.229,0.224,0.225 lie in -2.12 to 2.64: save them as uint8 (N, H, W, C), or give the --mean and --std that "
        "they went through"
    )
    assert problems(WHOLE, BYTES) == [], "a network that takes 0..255"


@pytest.mark.parametrize(
    ("images", "normalise"),
    [(WHOLE + np.float32(0.25), IMAGENET), (WHOLE / 255 * 8, UNIT), (NORMAL * 4, IMAGENET), (NORMAL - 9, IMAGENET)],
    ids=["resized bytes", "eight times", "another std", "another mean"],
)
def test_floats_far_from_normalised_pixels_are_a_warning(images, normalise, problems):
    (line,) = problems(images, normalise)
    assert ": look at --mean, --std and how the file was made" in line


def test_floats_in_0_to_1_are_a_warning_where_black_should_be_below_0(problems):
    (line,) = problems(WHOLE / 255)
    assert "hold values from 0 to 1, and pixels normalised with" in line
    assert line.endswith("none is darker than the mean, so they may not have been normalised")
    assert problems(WHOLE / 255, UNIT) == []
    darker = WHOLE / 255
    darker[123, 2, 1, 1] = -1
    assert problems(darker) == []


def test_a_little_overshoot_is_no_problem(problems):
    assert problems(NORMAL * np.float32(1.2)) == []
    assert len(problems(NORMAL * np.float32(1.7))) == 1


@settings(max_examples=60, deadline=None)
@given(
    mean=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    std=st.lists(st.floats(0.004, 2), min_size=3, max_size=3),
)
def test_pixels_normalised_as_told_are_never_a_problem(mean, std, tmp_path_factory):
    images = ((PIXELS[:130] / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    path = tmp_path_factory.mktemp("calib") / "calib.npz"
    np.savez(path, images=images)
    normalise = Normalisation(tuple(mean), tuple(std), assumed=False)
    assert calibration_problems(dataset_from_npz(path, 3, SIZE, normalise)) == []
