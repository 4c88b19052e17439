"""Images to arrays, against the same steps written once more with numpy and torch; bad images in one line."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image

from engines.backends.backend import TensorDescription
from engines.errors import InputRejected, SdkMissing
from engines.manifest import manifest_from_file, manifest_from_json
from engines.onnx_file import onnx_file_from_path
from engines.preprocessing import Preprocessing, preprocessing_from_manifest, preprocessing_from_metadata
from engines.sidecar import manifest_from_build
from tests.conftest import ROOT

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RGB = Preprocessing(MEAN, STD, (16, 24), 3)
GREY = Preprocessing((0.5,), (0.25,), (16, 24), 1)
PLAIN = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (16, 24), 3)
ASSUMPTIONS = {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225", "size": "16x24", "eps": "1e-05"}


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(height, width):
    """Slow waves, different in each channel: what resizing must not move."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    channels = [np.sin(5 * x + channel) * np.cos(3 * y - channel) for channel in range(3)]
    return np.round(np.stack(channels, axis=2) * 120 + 128).astype(np.uint8)


@pytest.fixture
def saved(tmp_path):
    def save(image, name="image.png", **options):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def test_an_image_of_the_size_is_normalised_and_nothing_else(saved):
    image = pixels(16, 24, 3)
    array = RGB.array_from_image(saved(image))
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((1, 3, 16, 24), np.float32, True)
    for channel in range(3):
        expected = (image[..., channel] / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(array[0, channel], expected, rtol=0, atol=2e-6)


def test_grey_networks_get_luminance(saved):
    image = pixels(16, 24)
    array = GREY.array_from_image(saved(image))
    assert array.shape == (1, 1, 16, 24)
    np.testing.assert_allclose(array[0, 0], (image / 255 - 0.5) / 0.25, rtol=0, atol=2e-6)
    colours = pixels(16, 24, 3)
    array = GREY.array_from_image(saved(colours))
    luminance = colours @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(array[0, 0] * 0.25 + 0.5, luminance / 255, rtol=0, atol=1.01 / 255)


def test_grey_images_fill_all_channels_of_a_colour_network(saved):
    image = pixels(16, 24)
    array = PLAIN.array_from_image(saved(image))
    for channel in range(3):
        np.testing.assert_allclose(array[0, channel], image / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 96), (40, 40), (100, 30), (30, 100), (10, 12), (18, 27), (16, 25)])
def test_another_size_is_scaled_to_cover_and_cut_in_the_centre(saved, shape):
    """Against torch's antialiased bilinear interpolation, to two levels of 256."""
    image = smooth(*shape)
    array = PLAIN.array_from_image(saved(image))
    scale = max(round(16 / 0.875) / shape[0], round(24 / 0.875) / shape[1])
    scaled = [int(side * scale + 1e-9) for side in shape]
    source = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    larger = torch.nn.functional.interpolate(source, size=scaled, mode="bilinear", antialias=True)[0].numpy()
    top, left = round((scaled[0] - 16) / 2), round((scaled[1] - 24) / 2)
    expected = larger[:, top : top + 16, left : left + 24]
    np.testing.assert_allclose(array[0] * 255, expected, rtol=0, atol=2)


def test_the_usual_evaluation_scales_to_256_and_cuts_224(saved):
    image = np.zeros((512, 768, 3), np.uint8)
    image[32:480, 160:608] = 255  # 224 of 256, in the centre
    array = dataclasses.replace(PLAIN, size=(224, 224)).array_from_image(saved(image))
    assert array.shape == (1, 3, 224, 224)
    assert array[0, :, 1:-1, 1:-1].min() == 1
    image[32:480, 160:164] = 0
    array = dataclasses.replace(PLAIN, size=(224, 224)).array_from_image(saved(image))
    assert array[0, :, :, 0].max() < 0.2


@pytest.mark.parametrize("shape", [(64, 96), (40, 40), (100, 30), (30, 100), (10, 12), (16, 24), (31, 17), (24, 31)])
@pytest.mark.parametrize("resize", [24, 28, 61])
def test_with_resize_the_shorter_side_is_scaled_to_it_whatever_the_image(saved, shape, resize):
    """torchvision's Resize(N) and CenterCrop, with the formulas of their documentation and Pillow's own resize."""
    image = Image.fromarray(pixels(*shape, 3))
    array = dataclasses.replace(PLAIN, resize=resize).array_from_image(saved(image))
    short, long = min(shape), max(shape)
    scaled = {short: resize, long: int(resize * long / short)}
    larger = image.resize((scaled[shape[1]], scaled[shape[0]]), Image.Resampling.BILINEAR)
    top, left = round((larger.height - 16) / 2.0), round((larger.width - 24) / 2.0)
    expected = np.asarray(larger)[top : top + 16, left : left + 24]
    np.testing.assert_allclose(array[0].transpose(1, 2, 0) * 255, expected, rtol=0, atol=1e-3)


def test_resize_changes_what_an_image_becomes(saved):
    """The default is the resize of 18 only where the shorter side is the one that binds."""
    path = saved(pixels(32, 48, 3))
    default, same, other = (
        dataclasses.replace(PLAIN, size=(16, 16), resize=resize).array_from_image(path) for resize in (None, 18, 19)
    )
    assert np.array_equal(default, same)
    assert not np.array_equal(default, other)
    path = saved(pixels(16, 16, 3))
    assert not np.array_equal(
        dataclasses.replace(PLAIN, size=(16, 16)).array_from_image(path),
        dataclasses.replace(PLAIN, size=(16, 16), resize=18).array_from_image(path),
    )


def test_the_pixels_are_those_that_are_normalised(saved):
    path = saved(smooth(50, 60))
    preprocessing = dataclasses.replace(RGB, resize=30)
    found = preprocessing.pixels_from_image(path)
    assert (found.shape, found.dtype, found.flags.c_contiguous) == ((3, 16, 24), np.uint8, True)
    mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
    expected = (found / 255 - mean) / std
    np.testing.assert_allclose(preprocessing.array_from_image(path)[0], expected, rtol=0, atol=2e-6)
    with open(path, "rb") as file:
        assert np.array_equal(preprocessing.pixels_from_image(file, ("PNG",)), found)
    with pytest.raises(Image.UnidentifiedImageError):
        preprocessing.pixels_from_image(path, ("JPEG",))


def test_threads_leave_the_filters_of_warnings_as_they_are(saved):
    """``warnings.catch_warnings`` in two threads at once would leave the one's filters behind."""
    path = saved(pixels(64, 64, 3))
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: RGB.pixels_from_image(path), range(64)))
    assert warnings.filters == before
    assert all(np.array_equal(one, found[0]) for one in found)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_the_image_is_turned_as_its_exif_data_say(saved, orientation):
    shape = (24, 16, 3) if orientation > 4 else (16, 24, 3)
    image = pixels(*shape)
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = PLAIN.array_from_image(saved(image, exif=exif))
    np.testing.assert_allclose(array[0].transpose(1, 2, 0) * 255, TURNS[orientation](image), rtol=0, atol=1e-3)


def test_transparency_is_dropped_and_the_colour_below_counts(saved):
    image = pixels(16, 24, 4)
    array = PLAIN.array_from_image(saved(image))
    np.testing.assert_allclose(array[0].transpose(1, 2, 0) * 255, image[..., :3], rtol=0, atol=1e-3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_kind_of_eight_bits_is_read(saved, mode):
    image = Image.new("RGB", (24, 16), (255, 255, 255)).convert(mode)
    array = PLAIN.array_from_image(saved(image, "image.tiff"))
    assert array.min() == array.max() == 1


@pytest.mark.parametrize(
    ("image", "name", "kind"),
    [
        (np.full((16, 24), 40_000, np.uint16), "image.png", "I;16"),
        (np.full((16, 24), 0.5, np.float32), "image.tiff", "F"),
        (np.full((16, 24), 70_000, np.int32), "image.tiff", "I"),
    ],
)
def test_pixels_that_would_be_clipped_in_silence_are_refused(saved, image, name, kind):
    with pytest.raises(InputRejected, match=f"pixels of kind {kind}; convert it to 8 bits per channel"):
        PLAIN.array_from_image(saved(image, name))


def test_an_image_that_is_a_bomb_is_refused(saved, monkeypatch):
    path = saved(np.zeros((100, 100), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)  # Pillow warns above, and refuses twice as much
    with pytest.raises(InputRejected, match=r"image\.png: no image can be read here \(Image size \(10000 pixels\) exc"):
        PLAIN.array_from_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(InputRejected, match=r"\(Image size \(10000 pixels\) exceeds"):
        PLAIN.array_from_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert PLAIN.array_from_image(path).max() == 0


def test_an_image_that_scaling_would_make_a_bomb_is_refused(saved):
    path = saved(np.zeros((1, 1_000_000), np.uint8))
    with pytest.raises(InputRejected, match="1000000x1 pixels are too narrow for 24x16; cut it first"):
        PLAIN.array_from_image(path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", None])
def test_a_file_that_is_no_whole_image_is_refused_in_one_line(saved, tmp_path, content):
    path = saved(pixels(64, 64, 3))
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(InputRejected, match=r"image\.png: no image can be read here \(") as caught:
        PLAIN.array_from_image(path)
    assert "\n" not in str(caught.value)


def test_a_path_without_an_image_is_refused(tmp_path):
    with pytest.raises(InputRejected, match=r"none\.png: no such image; check the path"):
        PLAIN.array_from_image(tmp_path / "none.png")
    with pytest.raises(InputRejected, match="no image can be read here"):
        PLAIN.array_from_image(tmp_path)


def test_without_pillow_the_line_that_installs_it_is_given(saved, monkeypatch):
    path = saved(pixels(16, 24))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SdkMissing, match=r"pip install 'repvgg-exporter\[images\]'$"):
        PLAIN.array_from_image(path)


# --- where it is written


def test_a_sidecar_and_the_metadata_of_its_graph_say_the_same(fashion_export):
    import onnx

    manifest = manifest_from_file(fashion_export / "fashion.fp16.engine.json")
    metadata = {entry.key: entry.value for entry in onnx.load(fashion_export / "fashion.fp16.onnx").metadata_props}
    found = preprocessing_from_manifest(manifest, "engine")
    assert found == Preprocessing((0.5,), (0.5,), (28, 28), 1)
    assert preprocessing_from_metadata(metadata, TensorDescription("x", "float32", (None, 1, 28, 28)), "o") == found


def test_the_line_says_every_number():
    assert RGB.line == (
        "RGB, 16x24 (any other size is scaled to cover 18x27, and the centre cut out), pixels in 0..1 minus "
        "0.485,0.456,0.406, divided by 0.229,0.224,0.225"
    )
    assert GREY.line.startswith("grey, 16x24 ")
    assert dataclasses.replace(GREY, resize=30).line == (
        "grey, 16x24 (the shorter side is scaled to 30, and the centre cut out), pixels in 0..1 minus 0.5, divided by "
        "0.25"
    )


@pytest.mark.parametrize("shape", [(None, 3, 16, 24), (None, 3, None, None), (None, None, None, None), (1, 3, 16, 24)])
def test_metadata_that_fit_the_input_are_read(shape):
    metadata = {"assumptions": json.dumps(ASSUMPTIONS)}
    assert preprocessing_from_metadata(metadata, TensorDescription("x", "float32", shape), "net.onnx") == RGB


def test_resize_is_read_where_it_was_given():
    description = TensorDescription("x", "float32", (None, 3, 16, 24))
    for text, resize in (("24", 24), ("256", 256)):
        metadata = {"assumptions": json.dumps({**ASSUMPTIONS, "resize": text})}
        expected = dataclasses.replace(RGB, resize=resize)
        assert preprocessing_from_metadata(metadata, description, "net.onnx") == expected


def test_images_of_free_size_are_prepared_in_the_optimal_one():
    metadata = {"assumptions": json.dumps({**ASSUMPTIONS, "size": "8x16:16x24:32x32"})}
    description = TensorDescription("x", "float32", (None, 3, None, None))
    assert preprocessing_from_metadata(metadata, description, "net.onnx") == RGB


@pytest.mark.parametrize(
    ("change", "shape", "said"),
    [
        (None, (None, 3, 16, 24), "says nothing of how images are prepared for it"),
        ({}, (None, 3), "says nothing of how images are prepared for it"),
        ({"mean": "0.5"}, (None, 3, 16, 24), "mean and std are not 3 numbers each"),
        ({"mean": "0.5,0.5,nan"}, (None, 3, 16, 24), "mean and std are not 3 numbers each"),
        ({"mean": "0.5,0.5,x"}, (None, 3, 16, 24), "metadata assumptions: could not convert string to float"),
        ({"std": "0.2,0,0.2"}, (None, 3, 16, 24), "std and size must be above 0"),
        ({"size": "16"}, (None, 3, 16, 24), "metadata assumptions: '16' is no size"),
        ({"size": 16}, (None, 3, 16, 24), "metadata assumptions: size: expected a text, found 16"),
        ({"size": "8x8:16x24"}, (None, 3, None, None), "metadata assumptions: not enough values to unpack"),
        ({"size": "8x8:7x24:16x24"}, (None, 3, None, None), "metadata assumptions: '8x8:7x24:16x24' is not a minimum"),
        ({"size": "8x8:16x24:32x32"}, (None, 3, 16, 24), "its input is (None, 3, 16, 24), its metadata say (16, 24)"),
        ({"resize": "23"}, (None, 3, 16, 24), "images scaled to 23 do not cover 16x24"),
        ({"resize": "0"}, (None, 3, 16, 24), "metadata assumptions: resize: '0' is not a number of pixels"),
        ({"resize": "24.5"}, (None, 3, 16, 24), "metadata assumptions: resize: '24.5' is not a number of pixels"),
        ({"resize": "²²"}, (None, 3, 16, 24), "metadata assumptions: resize: '²²' is not a number of pixels"),
        ({"resize": 256}, (None, 3, 16, 24), "metadata assumptions: resize: expected a text, found 256"),
        ({"size": "24x16"}, (None, 3, 16, 24), "its input is (None, 3, 16, 24), its metadata say (24, 16)"),
        ({"size": "0x0"}, (None, 3, None, None), "std and size must be above 0"),
        ({}, (None, 4, 16, 24), "takes 4 channels; only grey and RGB images can be read"),
        ({}, (None, 1, 16, 24), "mean and std are not 1 numbers each"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(change, shape, said):
    metadata = {} if change is None else {"assumptions": json.dumps({**ASSUMPTIONS, **change})}
    with pytest.raises(InputRejected) as caught:
        preprocessing_from_metadata(metadata, TensorDescription("x", "float32", shape), "net.onnx")
    assert str(caught.value).startswith(f"net.onnx: {said}")


def test_a_sidecar_of_more_channels_is_refused(fashion_export):
    manifest = manifest_from_file(fashion_export / "fashion.fp16.engine.json")
    fields = {"mean": (0.5,) * 4, "std": (0.5,) * 4, "size": (28, 28), "channels": 4}
    with pytest.raises(InputRejected, match="takes 4 channels; only grey and RGB"):
        preprocessing_from_manifest(dataclasses.replace(manifest, preprocessing=fields), "net.engine")


# --- resize in the sidecar


def sidecar(fashion_export, resize=None, assumed=None):
    """A real sidecar's text, with ``resize`` in its preprocessing, and ``assumed`` in its assumptions."""
    fields = json.loads((fashion_export / "fashion.fp16.engine.json").read_text())
    if resize is not None:
        fields["preprocessing"]["resize"] = resize
    if assumed is not None:
        fields["assumptions"]["resize"] = assumed
    return json.dumps(fields)


def test_a_sidecar_with_resize_is_read_and_written_again(fashion_export):
    manifest = manifest_from_json(sidecar(fashion_export, 32, "32"), "s")
    assert preprocessing_from_manifest(manifest, "engine") == Preprocessing((0.5,), (0.5,), (28, 28), 1, 32)
    assert manifest_from_json(manifest.to_json(), "s") == manifest
    without = manifest_from_json(sidecar(fashion_export), "s")
    assert "resize" not in without.preprocessing
    assert preprocessing_from_manifest(without, "engine").resize is None


def test_the_schema_has_resize_as_a_choice(fashion_export):
    schema = json.loads((ROOT / "engines" / "sidecar.schema.json").read_text())["properties"]
    for resize, assumed in ((32, "32"), (None, None)):
        fields = json.loads(sidecar(fashion_export, resize, assumed))
        for name in ("preprocessing", "assumptions"):
            jsonschema.validate(fields[name], schema[name])
    for resize, name in ((0, "preprocessing"), ("32", "preprocessing"), ("0", "assumptions"), (32, "assumptions")):
        fields = json.loads(sidecar(fashion_export, resize, resize))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(fields[name], schema[name])


@pytest.mark.parametrize(
    ("resize", "assumed", "said"),
    [
        (32, None, "preprocessing: expected a resize of none, as in assumptions.resize"),
        (None, "32", "preprocessing: expected a resize of 32, as in assumptions.resize"),
        (32, "33", "preprocessing: expected a resize of 33, as in assumptions.resize"),
        (27, "27", "preprocessing.resize: expected a whole number of at least 28"),
        ("32", "32", "preprocessing.resize: expected a whole number of at least 28"),
        (True, "True", "preprocessing.resize: expected a whole number of at least 28"),
    ],
)
def test_a_sidecar_whose_resize_contradicts_itself_is_refused(resize, assumed, said, fashion_export):
    with pytest.raises(InputRejected) as caught:
        manifest_from_json(sidecar(fashion_export, resize, assumed), "s")
    assert str(caught.value).startswith(f"s: {said}")


@pytest.fixture
def typed(fashion_export):
    """Makes the typed file anew with other assumptions."""
    onnx = onnx_file_from_path(fashion_export / "fashion.fp16.onnx")

    def change(**assumptions):
        told = {**json.loads(onnx.metadata["assumptions"]), **assumptions}
        return dataclasses.replace(onnx, metadata={**onnx.metadata, "assumptions": json.dumps(told)})

    return change


def built(onnx):
    return manifest_from_build(
        onnx,
        name="net.engine",
        sha256={"onnx": "cd" * 32, "engine": "ef" * 32},
        sdk={"name": "tensorrt_rtx", "version": "1.7.1.116"},
        cards=(86,),
        batch=(1, 8, 32),
        audit={"audited": True, "line": "7 of 7 convs in FP16", "problems": []},
    )


def test_a_build_takes_resize_from_the_graph(typed):
    found = built(typed(resize="32"))
    assert found.preprocessing == {"mean": (0.5,), "std": (0.5,), "size": (28, 28), "channels": 1, "resize": 32}
    assert found.assumptions["resize"] == "32"
    assert manifest_from_json(found.to_json(), "s").to_json() == found.to_json()
    assert "resize" not in built(typed()).preprocessing


def test_a_build_refuses_a_resize_that_cannot_be(typed):
    with pytest.raises(
        InputRejected, match="images scaled to 27, as its assumptions say, do not cover 28x28; build it"
    ):
        built(typed(resize="27"))
    with pytest.raises(InputRejected, match="its assumptions are not JSON with mean, std and size"):
        built(typed(resize="x"))
