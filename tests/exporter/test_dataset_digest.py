"""What a dataset is known by: its digest, each image's fingerprint, and the images that two sets have in common."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from exporter.calibration_images import duplicate_warnings, duplicates
from exporter.dataset import dataset_from_path
from exporter.images import Normalisation

THREE = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), assumed=True)
ONE = Normalisation((0.5,), (0.25,), assumed=False)
SIZE = (6, 5)
RNG = np.random.default_rng(11)
PIXELS = RNG.integers(0, 256, (12, *SIZE, 3), np.uint8)


def floats(pixels):
    """As torchvision's ToTensor and Normalize make them."""
    mean, std = np.array(THREE.mean, np.float32), np.array(THREE.std, np.float32)
    return ((pixels.astype(np.float32) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)


@pytest.fixture
def npz(tmp_path):
    def save(images, name="images.npz", savez=np.savez, channels=3, **more):
        savez(tmp_path / name, images=images, **more)
        return dataset_from_path(tmp_path / name, channels, SIZE, THREE if channels == 3 else ONE)

    return save


@pytest.fixture
def folder(tmp_path):
    def save(images, name="images", names=None, size=SIZE, **options):
        root = tmp_path / name
        for index, image in enumerate(images):
            path = root / (f"{index:02}.png" if names is None else names[index])
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        return dataset_from_path(root, 3, size, THREE, **options)

    return save


# --- the digest


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"savez": np.savez_compressed},
        {"name": "other.npz"},
        {"labels": np.arange(12)},
        {"images": np.asfortranarray(PIXELS)},
    ],
    ids=["again", "compressed", "another name", "labels beside", "another memory order"],
)
def test_an_npz_of_the_same_images_has_the_same_digest(change, npz):
    first = npz(PIXELS).digest
    assert len(first) == 64
    assert npz(**({"images": PIXELS} | change)).digest == first


def turned(images, place, by=1):
    changed = images.copy()
    changed[place] ^= by
    return changed


@pytest.mark.parametrize(
    "images",
    [turned(PIXELS, (11, 5, 4, 2)), turned(PIXELS, (0, 0, 0, 0)), PIXELS[:-1], PIXELS[::-1], PIXELS[..., ::-1]],
    ids=["last value", "first value", "one fewer", "other order", "channels"],
)
def test_an_npz_of_other_images_has_another_digest(images, npz):
    assert npz(images).digest != npz(PIXELS, "first.npz").digest


def test_the_digest_tells_types_and_shapes_of_the_same_bytes_apart(npz):
    zeros = [np.zeros(shape, np.uint8) for shape in ((8, *SIZE), (8, *SIZE, 1))]
    digests = {npz(images, channels=1).digest for images in zeros}
    digests.add(npz(np.zeros((8, 1, *SIZE), np.float32), channels=1).digest)
    assert len(digests) == 3


def test_the_digest_of_an_npz_is_of_all_its_numbers(npz):
    expected = hashlib.sha256(b"|u1 (12, 6, 5, 3)" + PIXELS.tobytes()).hexdigest()
    assert npz(PIXELS).digest == expected


def test_the_digest_of_a_folder_is_of_paths_and_bytes_alone(folder, tmp_path):
    dataset = folder(PIXELS)
    expected = hashlib.sha256()
    for index in range(12):
        content = (tmp_path / "images" / f"{index:02}.png").read_bytes()
        expected.update(f"6 {index:02}.png".encode() + hashlib.sha256(content).digest())
    assert dataset.digest == expected.hexdigest()
    (tmp_path / "images" / "notes.txt").write_text("beside")
    assert folder(PIXELS).digest == dataset.digest
    assert folder(PIXELS, "elsewhere").digest == dataset.digest
    assert folder(PIXELS, size=(3, 3)).digest == dataset.digest, "preprocessing is not in it"


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (turned(PIXELS, (7, 3, 2, 1)), None),
        (PIXELS[:-1], None),
        (PIXELS[::-1], None),
        (PIXELS, [f"{index:02}.PNG" for index in range(12)]),
        (PIXELS, [f"a/{index:02}.png" for index in range(12)]),
    ],
    ids=["one value", "one fewer", "exchanged", "other names", "other folder"],
)
def test_a_folder_of_other_images_or_names_has_another_digest(images, names, folder):
    assert folder(images, "other", names).digest != folder(PIXELS).digest


def test_the_same_bytes_in_other_metadata_are_another_file_and_the_same_image(folder, tmp_path):
    first = folder(PIXELS)
    Image.fromarray(PIXELS[3]).save(tmp_path / "images" / "03.png", compress_level=0)
    second = dataset_from_path(tmp_path / "images", 3, SIZE, THREE)
    assert second.digest != first.digest
    assert np.array_equal(second.fingerprints(), first.fingerprints())


# --- fingerprints


def test_an_image_has_one_fingerprint_in_every_kind_of_file(npz, folder):
    prints = [
        npz(PIXELS).fingerprints(),
        npz(floats(PIXELS), "floats.npz").fingerprints(),
        folder(PIXELS).fingerprints(),
    ]
    for found in prints:
        assert (found.shape, found.dtype) == ((12,), np.uint64)
        assert np.array_equal(found, prints[0])
    assert len(set(prints[0].tolist())) == 12


def test_grey_images_have_fingerprints_too(npz):
    grey = PIXELS[..., 0]
    assert np.array_equal(npz(grey, channels=1).fingerprints(), npz(grey[..., None], channels=1).fingerprints())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=4, max_size=9))
def test_fingerprints_are_alike_exactly_where_images_are(tmp_path_factory, values):
    images = np.stack([turned(PIXELS[0], (5, 4, 2), np.uint8(value)) for value in values])
    path = tmp_path_factory.mktemp("prints") / "images.npz"
    np.savez(path, images=images)
    found = dataset_from_path(path, 3, SIZE, THREE).fingerprints()
    for i, first in enumerate(values):
        assert [bool(found[i] == other) for other in found] == [first == second for second in values]


def test_fingerprints_are_of_what_the_network_gets(folder):
    """Two files that differ, prepared to the same numbers, are one image; without the cut they are two."""
    large = np.repeat(np.repeat(RNG.integers(0, 256, (1, 20, 20, 3), np.uint8), 4, 0), 1, 1)
    framed = large.copy()
    framed[1, 0, 0] ^= 255  # in the corner, which is cut off
    assert len(set(folder(framed, "cut", size=(4, 4), resize=20).fingerprints().tolist())) == 1
    assert len(set(folder(framed, "whole", size=(20, 20)).fingerprints().tolist())) == 2


# --- duplicates


def test_duplicates_are_the_labelled_images_that_were_calibrated_on(npz, folder):
    labelled = PIXELS[[0, 4, 4, 9, 11]]
    calibration = folder(PIXELS[:10])
    other = npz(turned(labelled, np.s_[:, 0, 0, 0]), "other.npz")
    assert duplicates(calibration, npz(labelled)) == 4
    assert duplicates(npz(PIXELS, "all.npz"), npz(labelled)) == 5
    assert duplicates(npz(floats(PIXELS[:1].repeat(4, 0)), "floats.npz"), npz(labelled)) == 1
    assert duplicates(calibration, other) == 0
    assert duplicate_warnings(calibration, other) == []
    (line,) = duplicate_warnings(calibration, npz(labelled))
    assert "images.npz: 4 of 5 labelled images are in " in line
    assert line.endswith("images, too; top-1 on images that were calibrated on may be too good, so label others")


def test_the_same_file_twice_is_all_duplicates(npz):
    dataset = npz(PIXELS)
    assert duplicates(dataset, npz(PIXELS)) == dataset.count == 12


def test_two_photographs_are_no_duplicates_for_one_bit(folder, tmp_path):
    content = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(content, "JPEG", quality=90)
    first = folder(PIXELS[:4])
    second = folder([np.asarray(Image.open(content)), *PIXELS[4:8]], "second")
    assert duplicates(first, second) == 0
