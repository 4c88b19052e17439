"""``python -m engines run``: the classes of an image, with the file's own preprocessing."""

from __future__ import annotations

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from PIL import Image

from tests.conftest import EXAMPLES

NAMES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@pytest.fixture
def images(tmp_path):
    """Three test images of Fashion-MNIST as files, with their labels."""
    with np.load(EXAMPLES / "fashion_test.npz") as archive:
        arrays, labels = archive["images"][:3], archive["labels"][:3].tolist()
    for index, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{index}.png")
    return arrays, labels


@pytest.fixture
def names(tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return tmp_path / "classes.txt"


def answers(file, arrays):
    """Logits by ONNX Runtime alone, with the preprocessing written out."""
    batch = ((arrays.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5))[:, None]
    return onnxruntime.InferenceSession(str(file)).run(None, {"input": batch})[0].astype(np.float64)


def test_the_right_classes_are_named_with_softmax_probabilities(engines_command, fashion, images, names):
    arrays, labels = images
    file = fashion / "fashion.onnx"
    outcome = engines_command("run", file, "0.png", "1.png", "2.png", "--names", names)
    assert (outcome.code, outcome.stderr) == (0, "")
    first, *lines = outcome.stdout.splitlines()
    assert first == (
        "preprocessing: grey, 28x28 (any other size is scaled to cover 32x32, and the centre cut out), "
        "pixels in 0..1 minus 0.5, divided by 0.5"
    )
    assert len(lines) == 3 * 6
    for index, logits in enumerate(answers(file, arrays)):
        title, *block = lines[6 * index : 6 * index + 6]
        assert title == f"{index}.png"
        probabilities = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-probabilities)[:5]
        assert order[0] == labels[index]
        assert block == [f"  {probabilities[c]:7.2%}  class {c}  {NAMES[c]}" for c in order]


def test_json_has_every_number(engines_command, fashion, images):
    arrays, labels = images
    outcome = engines_command("run", fashion / "fashion.onnx", "0.png", "1.png", "--top", 10, "--json")
    found = json.loads(outcome.stdout)
    assert [entry["image"] for entry in found["images"]] == ["0.png", "1.png"]
    for entry, logits in zip(found["images"], answers(fashion / "fashion.onnx", arrays), strict=False):
        assert sum(row["probability"] for row in entry["top"]) == pytest.approx(1, abs=1e-12)
        assert sorted(row["class"] for row in entry["top"]) == list(range(10))
        by_class = {row["class"]: row["probability"] for row in entry["top"]}
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose([by_class[c] for c in range(10)], expected, rtol=1e-6)
    assert [entry["top"][0]["class"] for entry in found["images"]] == labels[:2]


def test_top_is_how_many_are_printed(engines_command, fashion, images):
    for top, printed in ((1, 1), (10, 10), (99, 10)):
        outcome = engines_command("run", fashion / "fashion.onnx", "0.png", "--top", top)
        assert len(outcome.stdout.splitlines()) == 2 + printed
    assert engines_command("run", fashion / "fashion.onnx", "0.png", "--top", 0).error == (
        "--top 0: give a number of at least 1"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a\nb\n", "--names: 2 lines for 10 classes; give one line for each, in order"),
        (b"\xff\n" * 10, "classes.txt: no names can be read here ("),
        (None, "classes.txt: no names can be read here ([Errno 2] No such file"),
    ],
)
def test_names_that_do_not_fit_are_refused(engines_command, fashion, images, tmp_path, content, said):
    if content is not None:
        (tmp_path / "classes.txt").write_bytes(content)
    outcome = engines_command("run", fashion / "fashion.onnx", "0.png", "--names", "classes.txt")
    assert outcome.code == 3
    assert outcome.error.startswith(said)


def test_a_file_or_image_that_cannot_be_read_is_refused(engines_command, fashion, images):
    for arguments, said in [
        (["none.onnx", "0.png"], "none.onnx: no such file; check the path"),
        ([fashion / "fashion.onnx", "9.png"], "9.png: no such image; check the path"),
        ([fashion / "fashion.onnx", fashion / "report.md"], f"{fashion / 'report.md'}: no image can be read here"),
    ]:
        outcome = engines_command("run", *arguments)
        assert outcome.code == 3
        assert outcome.error.startswith(said)


def test_a_foreign_graph_says_nothing_of_preprocessing(engines_command, fashion, images):
    model = onnx.load(fashion / "fashion.onnx")
    del model.metadata_props[:]
    onnx.save(model, fashion / "foreign.onnx")
    outcome = engines_command("run", fashion / "foreign.onnx", "0.png")
    assert outcome.code == 3
    assert "foreign.onnx: says nothing of how images are prepared for it" in outcome.error


def test_an_answer_that_is_no_number_is_not_ranked(engines_command, fashion, images):
    model = onnx.load(fashion / "fashion.onnx")
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [10])
    values = numpy_helper.to_array(bias).copy()
    values[3] = np.nan
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(model, fashion / "nan.onnx")
    outcome = engines_command("run", fashion / "nan.onnx", "0.png")
    assert outcome.code == 1
    assert outcome.error == "0.png: the answer holds NaN or infinite values; verify the file"
    assert not re.search("class", outcome.stdout)


def test_a_damaged_engine_is_refused_before_a_gpu_is_asked_for(engines_command, fashion, images):
    engine = fashion / "fashion.fp16.engine"
    engine.write_bytes(engine.read_bytes()[:-1])
    outcome = engines_command("run", engine, "0.png")
    assert outcome.code == 3
    assert "its SHA-256 is" in outcome.error
    assert outcome.error.endswith(f"python -m engines build {fashion / 'fashion.fp16.onnx'}")
