"""Folders of images: pixels against Pillow alone, and one line for whatever a folder can have wrong with it."""

from __future__ import annotations

import collections
import io
import json
import os
import pathlib
import sys
import threading
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from exporter.dataset import dataset_from_path
from exporter.errors import InputRejected, SdkMissing, UsageError
from exporter.image_files import image_files_from_folder, shown
from exporter.images import Normalisation
from exporter.read_ahead import in_order
from tests.conftest import EXAMPLES, run_process

THREE = Normalisation((0.5, 0.25, 0.0), (0.5, 2.0, 0.1), assumed=False)
ONE = Normalisation((0.5,), (0.25,), assumed=False)
SIZE = (12, 16)
RNG = np.random.default_rng(5)


def picture(height=20, width=30, seed=None):
    rng = RNG if seed is None else np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def encoded(image, format_name="PNG", **options):
    content = io.BytesIO()
    image.save(content, format_name, **options)
    return content.getvalue()


PNG = encoded(picture())


@pytest.fixture
def folder(tmp_path):
    """Writes files, given by their paths in the folder: bytes, or an image as PNG."""

    def write(files, name="images"):
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        for path, content in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content if isinstance(content, bytes) else encoded(content))
        return root

    return write


def opened(path, channels=3, size=SIZE, normalise=THREE, **options):
    return dataset_from_path(path, channels, size, normalise, "--calib", **options)


def pixels_of(dataset):
    return np.concatenate(list(dataset.raw(5)))


def rejected(path, **options):
    with pytest.raises(InputRejected) as caught:
        opened(path, **options)
    line = str(caught.value)
    assert line.isprintable()
    assert caught.value.exit_code == 3
    return line


def many(count, **more):
    return {f"{index:03}.png": picture(6, 8) for index in range(count)} | more


# --- pixels


def prepared(image, mode, size, resize=None):
    """torchvision's Resize and CenterCrop of an image, as their documentation has them, with Pillow alone."""
    image = image.convert(mode)
    height, width = size
    if resize is None and image.size == (width, height):
        return np.asarray(image)
    if resize is None:
        scale = max(round(height / 0.875) / image.height, round(width / 0.875) / image.width)
    else:
        scale = resize / min(image.size)
    new = [int(side * scale + 1e-9) for side in image.size]
    large = np.asarray(image.resize(new, Image.Resampling.BILINEAR))
    top, left = round((new[1] - height) / 2.0), round((new[0] - width) / 2.0)
    return large[top : top + height, left : left + width]


SHAPES = [(20, 30), (30, 20), (12, 16), (6, 7), (50, 50), (16, 24), (100, 21)]


@pytest.mark.parametrize("resize", [None, 16, 20, 57])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_resize_and_center_crop(folder, mode, resize):
    images = [picture(*shape) for shape in SHAPES]
    root = folder({f"{index}.png": image for index, image in enumerate(images)})
    normalise, channels = (THREE, 3) if mode == "RGB" else (ONE, 1)
    dataset = opened(root, channels, normalise=normalise, resize=resize)
    found = pixels_of(dataset)
    assert (found.shape, found.dtype) == ((len(SHAPES), channels, *SIZE), np.uint8)
    for image, pixels in zip(images, found, strict=True):
        expected = prepared(image, mode, SIZE, resize).reshape(*SIZE, channels).transpose(2, 0, 1)
        assert np.array_equal(pixels, expected)
    for first, second in zip(found, next(dataset.batches(99)), strict=True):
        mean, std = (np.array(values)[:, None, None] for values in (normalise.mean, normalise.std))
        assert np.abs(second - (first.astype(np.float64) / 255 - mean) / std).max() < 1e-5


def test_an_image_of_the_size_is_scaled_only_where_resize_says_so(folder):
    """torchvision's Resize(20) scales a 12x16 image, too; the default leaves it alone."""
    image = picture(*SIZE)
    root = folder({f"{index}.png": image for index in range(4)})
    kept, scaled = pixels_of(opened(root))[0], pixels_of(opened(root, resize=20))[0]
    assert np.array_equal(kept.transpose(1, 2, 0), np.asarray(image))
    assert not np.array_equal(kept, scaled)


def test_every_format_orientation_and_kind_of_colour_is_read(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = Image.fromarray(np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8))
    root = folder(
        {
            "a.JPG": encoded(smooth, "JPEG", quality=95),
            "b.jpeg": encoded(smooth.convert("CMYK"), "JPEG", quality=95),
            "c.Png": encoded(smooth.convert("RGBA")),
            "d.WEBP": encoded(smooth, "WEBP", quality=95),
            "e.png": encoded(smooth.rotate(90, expand=True), exif=exif),
            "f.webp": encoded(smooth, "WEBP", lossless=True),
        }
    )
    dataset = opened(root)
    assert [dataset.name_of(index) for index in range(6)] == ["a.JPG", "b.jpeg", "c.Png", "d.WEBP", "e.png", "f.webp"]
    expected = prepared(smooth, "RGB", SIZE).transpose(2, 0, 1).astype(int)
    for pixels in pixels_of(dataset):
        assert np.abs(pixels - expected).max() < 12
    assert np.array_equal(pixels_of(dataset)[4], expected)


def test_a_stream_is_the_same_each_time_in_any_pieces(folder):
    dataset = opened(folder(many(11)))
    whole = next(dataset.raw(99))
    assert (dataset.count, dataset.holds_pixels, len(whole)) == (11, True, 11)
    for size in (1, 4, 11):
        pieces = list(dataset.raw(size))
        assert [len(piece) for piece in pieces] == [size] * (11 // size) + [11 % size] * (11 % size > 0)
        assert np.array_equal(np.concatenate(pieces), whole)
    assert [len(piece) for piece in dataset.batches(4, 6)] == [4, 2]
    assert np.array_equal(dataset.first(3), dataset.normalised(whole[:3]))


def test_opening_reports_every_image(folder):
    told = []
    opened(folder(many(5)), progress=lambda *step: told.append(step))
    assert told == [("reading --calib", done, 5) for done in range(1, 6)]


# --- which files, and in which order


def test_a_flat_folder_is_taken_by_name_and_hidden_and_other_files_are_passed_over(folder):
    root = folder(many(4, **{".hidden.png": b"", "notes.txt": b"", "masks.gif": b"", ".cache/x.png": b"no image"}))
    (root / "empty").mkdir()
    assert image_files_from_folder(root).names == ("000.png", "001.png", "002.png", "003.png")
    assert opened(root).notes == ()


def test_the_first_images_of_a_tree_are_of_many_classes(folder):
    root = folder({f"{kind}/{index:02}.png": b"" for kind in "abcd" for index in range(32)})
    names = image_files_from_folder(root).names
    assert set(names) == {f"{kind}/{index:02}.png" for kind in "abcd" for index in range(32)}
    for start in range(0, 128, 32):
        counts = collections.Counter(name[0] for name in names[start : start + 32])
        assert len(counts) == 4, "sorted by name it would be 1"
        assert max(counts.values()) < 18


LAYOUT = st.dictionaries(
    st.lists(st.text("ab.1 é\n", min_size=1, max_size=4).filter(lambda part: part.strip(".")), min_size=1, max_size=3)
    .map(tuple),
    st.sampled_from(["", ".png", ".JPG", ".jpeg", ".WebP", ".txt", ".png.bak"]),
    max_size=8,
)  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=LAYOUT)
def test_exactly_the_images_that_are_not_hidden_are_found(layout, tmp_path_factory):
    root = tmp_path_factory.mktemp("layout")
    expected = set()
    for parts, suffix in layout.items():
        path = root.joinpath(*parts[:-1], parts[-1] + suffix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError:  # a file stands where this one needs a folder
            continue
        if path.is_file():
            relative = path.relative_to(root)
            is_image = relative.name.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))
            if is_image and not any(part.startswith(".") for part in relative.parts):
                expected.add(relative.as_posix())
    if not expected:
        with pytest.raises(InputRejected, match="holds no JPEG, PNG or WebP image; found ") as caught:
            image_files_from_folder(root)
        assert str(caught.value).isprintable()
        return
    files = image_files_from_folder(root)
    assert set(files.names) == expected
    assert len(files.names) == len(expected)
    assert files == image_files_from_folder(root)
    assert set(files.folders) == {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}


# --- labels


def tree(**classes):
    return {f"{name}/{index}.png": PNG for name, count in classes.items() for index in range(count)}


def labels_by_name(dataset, classes):
    found = zip((dataset.name_of(index) for index in range(dataset.count)), dataset.labels(classes), strict=True)
    assert dataset.labels(classes).dtype == np.int64
    return {name: int(label) for name, label in found}


def test_folders_are_classes_in_the_order_of_their_names(folder):
    root = folder(tree(dog=3, cat=2, Zebra=1) | {"dog/more/9.png": PNG})
    assert labels_by_name(opened(root), 3) == {
        "Zebra/0.png": 0, "cat/0.png": 1, "cat/1.png": 1,
        "dog/0.png": 2, "dog/1.png": 2, "dog/2.png": 2, "dog/more/9.png": 2,
    }  # fmt: skip


def test_an_empty_folder_is_a_class_without_images(folder):
    root = folder(tree(a=2, c=2))
    (root / "b").mkdir()
    assert set(labels_by_name(opened(root), 3).values()) == {0, 2}


def test_folders_with_numbers_are_those_classes(folder):
    root = folder(tree(**{"10": 2, "9": 1, "002": 1}))
    assert labels_by_name(opened(root), 1000) == {"10/0.png": 10, "10/1.png": 10, "9/0.png": 9, "002/0.png": 2}


def test_a_tree_of_the_examples_images_has_the_labels_of_their_npz(folder):
    normalise = Normalisation((0.5,), (0.5,), assumed=True)
    npz = dataset_from_path(EXAMPLES / "fashion_test.npz", 1, (28, 28), normalise)
    images, labels = next(npz.raw(300))[:, 0], npz.labels(10)[:300]
    root = folder({f"{label}/{index}.png": Image.fromarray(images[index]) for index, label in enumerate(labels)})
    dataset = opened(root, 1, (28, 28), normalise)
    known = dict(zip(npz.fingerprints()[:300].tolist(), labels.tolist(), strict=True))
    assert [known[found] for found in dataset.fingerprints().tolist()] == dataset.labels(10).tolist()
    assert len(set(dataset.labels(10)[:60].tolist())) == 10


@pytest.mark.parametrize(
    ("files", "classes", "words"),
    [
        (
            {str(i) + ".png": PNG for i in range(4)},
            3,
            "has no folders; labels need one for each class, with its images",
        ),
        (tree(a=4) | {"b.png": PNG}, 1, "b.png beside the folders of the classes; labels need every image in the fold"),
        (tree(a=2, b=2), 3, "2 folders (a, b) for the network's 3 classes; which is which? Make an empty one for each"),
        (tree(a=2, b=2), 1, "2 folders (a, b) for the network's 1 classes; give a folder with one for each class"),
        (tree(**{"0": 2, "1": 2, "x": 1}), 4, "3 folders (0, 1, x) for the network's 4 classes; which is which?"),
        (tree(**{"0": 2, "2": 2}), 2, "its folders 0, 2 are not classes 0 to 1, each at most once"),
        (tree(**{"1": 2, "01": 2}), 5, "its folders 01, 1 are not classes 0 to 4, each at most once"),
        (tree(**{"0": 2, "1": 2, "2": 1}), 2, "3 folders (0, 1, 2) for the network's 2 classes; give a folder with"),
        (tree(**{"²": 2, "³": 2}), 3, "for the network's 3 classes; which is which?"),
    ],
)
def test_folders_that_do_not_say_which_class_each_is_are_rejected(files, classes, words, folder):
    dataset = opened(folder(files))
    with pytest.raises(InputRejected) as caught:
        dataset.labels(classes)
    assert words in str(caught.value)
    assert "images: " in str(caught.value)


# --- what cannot be read


DAMAGED = {
    "truncated": (encoded(picture(64, 64), "JPEG")[:-200], "truncated"),
    "truncated png": (encoded(picture(64, 64))[:-200], "truncated"),
    "empty": (b"", "no JPEG, PNG or WebP image"),
    "text": (b"no image\n", "no JPEG, PNG or WebP image"),
    "sixteen bits": (encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16))), "pixels of kind I;16"),
    "gif": (encoded(picture(), "GIF"), "no JPEG, PNG or WebP image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no JPEG, PNG or WebP image"),
    "too narrow": (encoded(Image.new("L", (1_000_000, 1))), "too narrow"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_one_image_of_a_hundred_may_be_damaged_and_is_named(kind, folder):
    content, words = DAMAGED[kind]
    root = folder(many(99, **{"050x.png": content}))
    dataset = opened(root)
    (note,) = dataset.notes
    assert note.startswith(f"{root}: 1 of 100 images cannot be read and are left out: 050x.png (")
    assert words in note
    assert dataset.count == len(pixels_of(dataset)) == 99
    assert [dataset.name_of(index) for index in (50, 51)] == ["050.png", "051.png"]
    assert len(dataset.fingerprints()) == 99
    (root / "098.png").unlink()
    line = rejected(root)
    assert f"{root}: 1 of 99 images cannot be read, more than 1 in 100: 050x.png (" in line
    assert line.endswith("; repair or remove them")


def test_a_bomb_is_named_and_no_warning_is_left_behind(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    root = folder({f"{index}.png": picture(size, size) for index, size in enumerate((9, 9, 9, 9, 23, 99))})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = rejected(root)
    assert "2 of 6 images cannot be read, more than 1 in 100: 4.png (Image size (529 pixels) exceeds" in line
    assert "5.png (Image size (9801 pixels) exceeds" in line
    assert caught == []


def test_many_that_cannot_be_read_are_counted_and_the_first_are_named(folder):
    root = folder(many(10) | {f"x{index}.png": b"" for index in range(7)})
    line = rejected(root)
    assert "7 of 17 images cannot be read" in line
    assert line.count("no JPEG, PNG or WebP image") == 3
    assert "x0.png" in line
    assert "and 4 more" in line


def test_pipes_links_to_nowhere_and_what_is_forbidden_are_no_images(folder, monkeypatch):
    root = folder(many(4))
    os.mkfifo(root / "pipe.png")
    (root / "nowhere.png").symlink_to(root / "none.png")
    (root / "round.png").symlink_to("round.png")
    (root / "nowhere").symlink_to("none")
    (root / "secret.png").write_bytes(PNG)
    read = pathlib.Path.read_bytes
    monkeypatch.setattr(
        pathlib.Path, "read_bytes", lambda path: forbidden(path) if path.stem == "secret" else read(path)
    )
    line = rejected(root)
    assert "4 of 8 images cannot be read" in line
    assert "nowhere.png (No such file or directory), pipe.png (not a file), round.png (Too many levels of" in line
    for name in ("pipe", "nowhere", "round"):
        (root / f"{name}.png").unlink()
    assert "1 of 5 images cannot be read, more than 1 in 100: secret.png (Permission denied)" in rejected(root)


def forbidden(path):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), "was read before and cannot be now (No such file or directory); run it again"),
        (lambda path: path.write_bytes(PNG[:100]), "was read before and cannot be now ("),
        (lambda path: path.write_bytes(encoded(picture())), "changed while the run went on; run it again"),
    ],
)
def test_an_image_that_changes_between_two_readings_is_an_error(change, words, folder):
    root = folder(many(9))
    dataset = opened(root)
    assert len(pixels_of(dataset)) == 9
    change(root / "005.png")
    with pytest.raises(InputRejected) as caught:
        pixels_of(dataset)
    assert str(caught.value).startswith(f"{root / '005.png'}: {words}")
    assert len(dataset.first(4)) == 4


# --- folders that cannot be used


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "nothing: the folder is empty"),
        ({"a.txt": b"", "b.txt": b"", "c.GIF": b"", "README": b""}, "2 .txt, 1 .gif, 1 without a suffix"),
        ({".a.png": b"", ".b/c.png": b""}, "2 hidden"),
        ({"inner/x.npy": b"", "other/y.npy": b""}, "2 .npy, 2 more folders"),
    ],
)
def test_a_folder_without_images_is_rejected_with_what_it_holds(files, found, folder):
    root = folder(files)
    assert rejected(root) == f"{root}: holds no JPEG, PNG or WebP image; found {found}"


def test_too_few_images_are_rejected(folder):
    root = folder(many(3))
    assert rejected(root) == f"{root}: holds 3 images; expected at least 4"
    folder(many(4))
    assert opened(root).count == 4


def test_a_path_where_nothing_is_is_rejected(tmp_path):
    assert rejected(tmp_path / "none") == f"{tmp_path / 'none'}: no such file; check --calib"


@pytest.mark.parametrize("to", ["..", ".", "../a", "../../images"])
def test_a_folder_that_is_met_twice_is_rejected(to, folder):
    root = folder(tree(a=4, b=4))
    (root / "b" / "again").symlink_to(to)
    line = rejected(root)
    assert line.endswith("remove the link, or the images count twice")
    assert "is the folder " in line


def test_links_to_images_and_folders_elsewhere_are_followed(folder):
    folder({"x.png": PNG, "inner/y.png": PNG}, "elsewhere")
    root = folder(many(3))
    (root / "link.png").symlink_to("../elsewhere/x.png")
    (root / "linked").symlink_to("../elsewhere/inner")
    assert set(image_files_from_folder(root).names) == {"000.png", "001.png", "002.png", "link.png", "linked/y.png"}


def test_a_folder_that_may_not_be_read_is_rejected(folder, monkeypatch):
    root = folder(tree(a=4, b=4))
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: forbidden(path) if str(path).endswith("b") else scan(path))
    assert rejected(root) == f"{root / 'b'}: the folder cannot be read (Permission denied); check it"


def test_names_that_are_no_utf8_are_read_and_told_in_escapes(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for index in range(4):
        path = os.fsencode(root) + b"/\xff\n%d.png" % index
        with open(path, "wb") as file:
            file.write(PNG)
    dataset = opened(root)
    assert [dataset.name_of(index) for index in range(4)] == [rf"\xff\n{index}.png" for index in range(4)]
    with open(os.fsencode(root) + b"/\xfe.png", "wb"):
        pass
    assert r"1 of 5 images cannot be read, more than 1 in 100: \xfe.png (no JPEG" in rejected(root)
    assert shown("a é\x1b[2J") == r"a é\x1b[2J"


def test_a_network_of_other_channels_is_told_of_npz(folder):
    root = folder(many(4))
    normalise = Normalisation((0.0,) * 4, (1.0,) * 4, assumed=False)
    line = rejected(root, channels=4, normalise=normalise)
    assert line == (
        f"{root}: the network takes 4 channels and images have 1 or 3; give an .npz with images (N, 4, H, W) in float32"
    )


@pytest.mark.parametrize("resize", [11, 15, 1])
def test_a_resize_that_does_not_cover_the_size_is_a_usage_error(resize, folder):
    root = folder(many(4))
    with pytest.raises(UsageError, match=f"^--resize: images scaled to {resize} do not cover 12x16; give 16 or more$"):
        opened(root, resize=resize)
    assert opened(root, resize=16).count == 4


def test_without_pillow_the_line_that_installs_it_is_given(folder, monkeypatch):
    root = folder(many(4))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SdkMissing, match=r"pip install 'repvgg-exporter\[images\]'$"):
        opened(root)


def test_ten_thousand_images_are_opened(tmp_path):
    root = tmp_path / "images"
    content = [encoded(picture(2, 2, seed)) for seed in range(10)]
    for index in range(10_000):
        if index % 100 == 0:
            (root / str(index)).mkdir(parents=True)
        if index < 10:
            (root / str(index // 100 * 100) / f"{index}.png").write_bytes(content[index])
        else:
            os.link(root / "0" / f"{index % 10}.png", root / str(index // 100 * 100) / f"{index}.png")
    dataset = opened(root, size=(2, 2))
    assert dataset.count == 10_000
    assert len(np.unique(dataset.fingerprints())) == 10


# --- threads and memory


def readers():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_a_stream_that_is_closed_or_fails_leaves_no_thread(folder):
    root = folder(many(40))
    dataset = opened(root)
    assert readers() == []
    stream = dataset.raw(4)
    next(stream)
    assert 1 <= len(readers()) <= 2
    stream.close()
    assert readers() == []
    dataset.first(2)
    assert readers() == []
    (root / "020.png").unlink()
    with pytest.raises(InputRejected, match="cannot be now"):
        pixels_of(dataset)
    assert readers() == []
    with pytest.raises(KeyboardInterrupt):
        opened(folder(many(40)), progress=interrupt)
    assert readers() == []


def interrupt(*step):
    raise KeyboardInterrupt


def test_results_keep_their_order_and_few_wait():
    barrier, begun = threading.Barrier(2, timeout=30), []

    def work(item):
        begun.append(item)
        if item < 2:
            barrier.wait()  # both threads are in here at once, or this fails
        return item * item

    results = in_order(work, range(50), threads=2, ahead=6)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert max(begun) <= 3 + 6
    assert list(results) == [item * item for item in range(3, 50)]


def test_what_a_function_raises_is_raised_in_its_turn():
    results = in_order(lambda item: 6 // (3 - item), range(9), threads=2, ahead=4)
    assert [next(results) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert readers() == []


MEMORY = """
import json, pathlib, sys, tracemalloc
from exporter.dataset import dataset_from_path
from exporter.images import Normalisation

def peak(count, kept):
    tracemalloc.start()
    path = pathlib.Path(sys.argv[1]) / str(count)
    dataset = dataset_from_path(path, 3, (64, 64), Normalisation((0.5,) * 3, (0.5,) * 3, assumed=False))
    stream = dataset.batches(16)
    seen = sum(map(len, list(stream) if kept else stream))
    assert seen == count, seen
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most

peak(64, False)
print(json.dumps([(peak(1024, False) - peak(64, False)) / 960, (peak(256, True) - peak(64, True)) / 192]))
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Names and hashes do, by less than 2 kB an image; a stream that is kept would, by its 48 kB."""
    content = [encoded(picture(64, 64, seed)) for seed in range(8)]
    for count in (64, 256, 1024):
        (tmp_path / str(count)).mkdir()
        for index in range(count):
            (tmp_path / str(count) / f"{index}.png").write_bytes(content[index % 8])
    done = run_process(["-c", MEMORY, tmp_path], tmp_path)
    assert done.returncode == 0, done.stderr
    streamed, kept = json.loads(done.stdout)
    assert streamed < 2_000
    assert kept > 40_000
