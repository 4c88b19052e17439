"""Images from an .npz: the arithmetic by hand, and whatever else a file may hold is one InputRejected."""

from __future__ import annotations

import io
import os
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.dataset import dataset_from_npz
from exporter.errors import InputRejected, UsageError
from exporter.images import Normalisation, noise_images, normalisation

THREE = Normalisation((0.5, 0.25, 0.0), (0.5, 2.0, 0.1), assumed=False)
ONE = Normalisation((0.5,), (0.25,), assumed=False)
SIZE = (5, 4)
RNG = np.random.default_rng(7)
COLOUR = RNG.integers(0, 256, (6, *SIZE, 3), np.uint8)
GREY = RNG.integers(0, 256, (6, *SIZE), np.uint8)
FLOAT = RNG.standard_normal((6, 3, *SIZE)).astype(np.float32)


@pytest.fixture
def npz(tmp_path):
    """Saves arrays by name; returns the path."""

    def save(**arrays):
        np.savez(tmp_path / "images.npz", **arrays)
        return tmp_path / "images.npz"

    return save


def images_from_npz(path, channels, size, normalise):
    """The four images that everything is compared on."""
    return dataset_from_npz(path, channels, size, normalise).first(4)


def rejected(path, channels=3, size=SIZE, normalise=THREE):
    with pytest.raises(InputRejected) as caught:
        images_from_npz(path, channels, size, normalise)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert len(line.splitlines()) == 1
    return line


# Numbers


def test_bytes_of_colour_images_are_normalised_per_channel(npz):
    found = images_from_npz(npz(images=COLOUR), 3, SIZE, THREE)
    assert (found.shape, found.dtype, found.flags.c_contiguous) == ((4, 3, *SIZE), np.float32, True)
    for channel, (mean, std) in enumerate(zip((0.5, 0.25, 0.0), (0.5, 2.0, 0.1), strict=True)):
        by_hand = (COLOUR[:4, :, :, channel].astype(np.float64) / 255 - mean) / std
        assert np.abs(found[:, channel] - by_hand).max() < 1e-6 * np.abs(by_hand).max()


def test_black_and_white_come_out_as_worked_out_by_hand(npz):
    pixels = np.zeros((4, *SIZE, 3), np.uint8)
    pixels[1] = 255
    found = images_from_npz(npz(images=pixels), 3, SIZE, THREE)
    assert found[0, :, 0, 0] == pytest.approx([-1.0, -0.125, 0.0])
    assert found[1, :, 0, 0] == pytest.approx([1.0, 0.375, 10.0])


def test_height_and_width_are_not_swapped(npz):
    pixels = np.zeros((4, *SIZE, 3), np.uint8)
    pixels[0, 4, 1, 2] = 255
    found = images_from_npz(npz(images=pixels), 3, SIZE, Normalisation((0, 0, 0), (1, 1, 1), assumed=False))
    assert np.argwhere(found).tolist() == [[0, 2, 4, 1]]


@pytest.mark.parametrize("images", [GREY, GREY[..., None]], ids=["NHW", "NHWC"])
def test_grey_images_have_one_channel(images, npz):
    found = images_from_npz(npz(images=images), 1, SIZE, ONE)
    assert found.shape == (4, 1, *SIZE)
    assert found[:, 0] == pytest.approx((GREY[:4].astype(np.float64) / 255 - 0.5) / 0.25, abs=1e-6)


def test_float_images_are_taken_as_they_are(npz):
    found = images_from_npz(npz(images=FLOAT), 3, SIZE, THREE)
    assert np.array_equal(found, FLOAT[:4])


def test_float_images_in_another_memory_order_are_the_same(npz):
    found = images_from_npz(npz(images=np.asfortranarray(FLOAT)), 3, SIZE, THREE)
    assert found.flags.c_contiguous
    assert np.array_equal(found, FLOAT[:4])


def test_labels_and_other_arrays_beside_the_images_do_not_matter(npz):
    path = npz(images=FLOAT, labels=np.arange(6), note=np.array("x"))
    assert np.array_equal(images_from_npz(path, 3, SIZE, THREE), FLOAT[:4])


def test_exactly_four_images_are_enough_and_three_are_not(npz):
    assert len(images_from_npz(npz(images=FLOAT[:4]), 3, SIZE, THREE)) == 4
    assert "at least 4" in rejected(npz(images=FLOAT[:3]))


# Rejections


@pytest.mark.parametrize(
    "images",
    [
        COLOUR[:, :4],
        COLOUR.transpose(0, 2, 1, 3),
        COLOUR.transpose(0, 3, 1, 2),
        COLOUR[..., :1],
        COLOUR[..., :2],
        np.concatenate([COLOUR, COLOUR[..., :1]], axis=3),
        COLOUR[0],
        COLOUR[None],
        GREY,
        FLOAT[:, :1],
        FLOAT.transpose(0, 2, 3, 1),
        FLOAT[:, :, :4],
        FLOAT[0],
        FLOAT[:0],
        FLOAT[:, :, :, :0],
        COLOUR[:0],
        np.float32(3),
        np.uint8(3),
        np.ones(4, np.float32),
        np.ones(4, np.uint8),
    ],
)
def test_images_of_another_shape_are_rejected_with_both_shapes(images, npz):
    line = rejected(npz(images=images))
    assert str(np.atleast_1d(images).shape) in line
    assert "3 channels of 5x4" in line
    assert "--size" in line


@pytest.mark.parametrize("dtype", ["f8", "f2", ">f4", "i1", "i4", "i8", "u2", "?", "c8", "U3", "S3", "M8[s]"])
def test_images_of_another_type_are_rejected_by_name(dtype, npz):
    line = rejected(npz(images=np.zeros((4, 3, *SIZE), dtype)))
    assert f"images are {np.dtype(dtype)}" in line
    assert "uint8 or float32" in line


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_rejected(value, npz):
    images = FLOAT.copy()
    images[3, 2, 4, 3] = value
    assert "NaN or infinite" in rejected(npz(images=images))


def test_a_value_that_is_not_finite_in_an_image_that_is_not_used_does_not_matter(npz):
    images = FLOAT.copy()
    images[4:] = np.nan
    assert np.array_equal(images_from_npz(npz(images=images), 3, SIZE, THREE), FLOAT[:4])


class Planted:
    """Unpickling it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_array_of_objects_is_rejected_and_its_code_not_run(npz, tmp_path):
    path = npz(images=np.array([Planted(tmp_path / "mark")], object))
    assert "np.savez" in rejected(path)
    assert not (tmp_path / "mark").exists()
    with np.load(path, allow_pickle=True) as unsafe:
        assert unsafe["images"].shape == (1,)
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; check --calib"),
        (b"", "not an .npz"),
        (b"pixels\n", "not an .npz"),
        (b"PK\x03\x04", "not an .npz"),
        (b"PK\x05\x06" + bytes(18), "no array called images"),
        (b"\x80\x04.", "not an .npz"),
    ],
    ids=["missing", "empty", "text", "cut", "empty zip", "pickle"],
)
def test_a_file_that_is_no_npz_is_rejected(content, words, tmp_path):
    path = tmp_path / "images.npz"
    if content is not None:
        path.write_bytes(content)
    assert words in rejected(path)


def test_a_single_array_is_not_an_npz(tmp_path):
    np.save(tmp_path / "images.npy", FLOAT)
    assert "np.savez" in rejected(tmp_path / "images.npy")


def test_a_folder_is_rejected_with_what_to_do(tmp_path):
    assert "npz" in rejected(tmp_path)


def test_a_member_that_is_no_array_is_rejected(tmp_path):
    (tmp_path / "images.npz").write_bytes(archive(b"pixels"))
    assert "np.savez" in rejected(tmp_path / "images.npz")


def test_an_npz_without_images_is_rejected(npz):
    assert "no array called images" in rejected(npz(x=FLOAT))


def test_a_bad_file_is_one_line_of_the_command(command, checkpoint, npz):
    npz(images=FLOAT)
    outcome = command(checkpoint.name, "--size", "20", "--calib", "images.npz")
    assert outcome.code == 3
    assert "images.npz: images are float32 (6, 3, 5, 4); expected at least 4 with 3 channels of 20x20" in outcome.error
    assert not (checkpoint.parent / "model").exists()


def test_the_images_are_what_the_golden_vectors_hold(command, checkpoint, npz, tmp_path):
    images = RNG.standard_normal((5, 3, 20, 20)).astype(np.float32)
    npz(images=images)
    assert command(checkpoint.name, "--size", "20", "--calib", "images.npz").code == 0
    assert np.array_equal(np.load(tmp_path / "model" / "golden.npz")["input"], images[:4])


# Normalisation and noise


@pytest.mark.parametrize(
    ("channels", "mean", "std"), [(3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (1, (0.5,), (0.5,))]
)
def test_the_usual_normalisation_is_an_assumption(channels, mean, std):
    assert normalisation(channels, None, None) == Normalisation(mean, std, assumed=True)
    assert normalisation(channels, mean, None) == Normalisation(mean, std, assumed=False)
    assert normalisation(channels, None, std) == Normalisation(mean, std, assumed=False)


@pytest.mark.parametrize("flag", ["--mean", "--std"])
@pytest.mark.parametrize(("channels", "values"), [(3, (0.5,)), (1, (0.5, 0.5, 0.5)), (3, (0.5, 0.5)), (3, ())])
def test_a_normalisation_for_other_channels_is_a_usage_error(channels, values, flag):
    mean, std = (values, None) if flag == "--mean" else (None, values)
    with pytest.raises(UsageError, match=rf"{flag}: {len(values)} values for {channels} channels"):
        normalisation(channels, mean, std)


def test_noise_is_the_same_every_time_and_looks_like_noise():
    noise = noise_images(3, (40, 30))
    assert (noise.shape, noise.dtype) == ((4, 3, 40, 30), np.float32)
    assert np.array_equal(noise, noise_images(3, (40, 30)))
    assert noise.std(axis=(2, 3)).mean(axis=1) == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=0.05)
    colours = noise.mean(axis=(2, 3))
    assert colours[:, 0] == pytest.approx([-1.0, -1 / 3, 1 / 3, 1.0], abs=0.1)
    assert colours[0] == pytest.approx([-1.0, 1.0, 1 / 3], abs=0.1)


# Damage


def archive(payload=None):
    """An .npz of FLOAT; with ``payload``, one whose member is that text, under a checksum that is right."""
    target = io.BytesIO()
    if payload is None:
        np.savez(target, images=FLOAT)
    else:
        with zipfile.ZipFile(target, "w") as file:
            file.writestr("images.npy", payload)
    return target.getvalue()


def member():
    target = io.BytesIO()
    np.save(target, FLOAT)
    return target.getvalue()


edit = st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), st.floats(0, 1), st.binary(max_size=6))


def edited(content, edits, within):
    """``content`` with bytes set, inserted, deleted or cut off, at places among the first ``within``."""
    changed = bytearray(content)
    for kind, place, new in edits:
        at = int(place * min(within, len(changed)))
        if kind == "set":
            changed[at : at + len(new)] = new
        elif kind == "insert":
            changed[at:at] = new
        elif kind == "delete":
            del changed[at : at + len(new)]
        else:
            del changed[at:]
    return bytes(changed)


def arrays_or_rejection(path, content):
    path.write_bytes(content)
    found, line = None, f"{path}: "
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = images_from_npz(path, 3, SIZE, THREE)
        except InputRejected as error:
            line = str(error)
    assert line.startswith(f"{path}: ")
    assert len(line.splitlines()) == 1
    assert [str(w.message) for w in caught if issubclass(w.category, UserWarning | RuntimeWarning)] == []
    if found is not None:
        assert (found.shape, found.dtype) == ((4, 3, *SIZE), np.float32)
        assert np.isfinite(found).all()
    return found


fuzzed = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(edits=st.lists(edit, min_size=1, max_size=3), within=st.sampled_from([64, 300, 10**6]))
def test_a_damaged_archive_is_rejected_or_gives_the_images(edits, within, tmp_path):
    found = arrays_or_rejection(tmp_path / "images.npz", edited(archive(), edits, within))
    if found is not None:
        assert np.array_equal(found, FLOAT[:4])


@fuzzed
@given(edits=st.lists(edit, min_size=1, max_size=3), within=st.sampled_from([12, 128, 10**6]))
def test_a_damaged_array_under_a_right_checksum_is_rejected_or_finite(edits, within, tmp_path):
    arrays_or_rejection(tmp_path / "images.npz", archive(edited(member(), edits, within)))


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (6L, 3, 5, 4), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 3, 5, 4), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3, 5, 4), }",
        b"{'descr': '|V4000000000', 'fortran_order': False, 'shape': (4, 3, 5, 4), }",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4, 3, 5, 4), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
        b"(" * 200,
        b"{" * 40 + b"}" * 40,
        b"'\\d'",
        b"1 if 1 is 1 else {}",
    ],
)
def test_a_strange_header_is_rejected_in_one_line(header, tmp_path):
    text = header + b" " * (128 - 10 - 1 - len(header) % 128) + b"\n"
    payload = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4 * 6 * 3 * 20)
    found = arrays_or_rejection(tmp_path / "images.npz", archive(payload))
    assert found is None or not found.any()
