"""Sidecars: a real one comes back as it is; an edited or damaged one is refused by the name of what is wrong in it."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import InputRejected
from engines.manifest import Manifest, manifest_from_file, manifest_from_json, sidecar_path

FIELDS = tuple(field.name for field in dataclasses.fields(Manifest))
TEXT = """{
  "schema": 1, "name": "net.fp16.engine", "precision": "fp16",
  "sha256": {"checkpoint": "CHECKPOINT", "onnx": "ONNX", "engine": "ENGINE"},
  "sdk": {"name": "tensorrt_rtx", "version": "1.7.1.116"}, "compute_capabilities": [80, 86],
  "inputs": [{"name": "input", "dtype": "float32", "shape": ["N", 3, 32, 48]}],
  "outputs": [{"name": "output", "dtype": "float32", "shape": ["N", 10]}],
  "profile": {"input": [[1, 3, 32, 48], [8, 3, 32, 48], [32, 3, 32, 48]]},
  "preprocessing": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "size": [32, 48], "channels": 3},
  "assumptions": {"strides": "2,2,2,2,2", "size": "32x48", "mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225"},
  "tolerance": 0.005, "audit": {"audited": true, "problems": [], "line": "22 of 22 convs in FP16"},
  "golden": "golden.npz"
}"""
for word, digit in (("CHECKPOINT", "0"), ("ONNX", "1"), ("ENGINE", "a")):
    TEXT = TEXT.replace(word, digit * 64)
SIDECAR = json.loads(TEXT)


def changed(path, value):
    """A copy of the sidecar with one value replaced, or added."""
    fields = copy.deepcopy(SIDECAR)
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(fields)


def refusal(content):
    with pytest.raises(InputRejected) as caught:
        manifest_from_json(content, "net.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("net.json: ")
    assert message.endswith("or build the engine again")
    return message.removeprefix("net.json: ")


def test_the_sidecar_of_a_real_engine_comes_back_letter_by_letter(fashion_export):
    path = sidecar_path(fashion_export / "fashion.fp16.engine")
    assert path.name == "fashion.fp16.engine.json"
    manifest = manifest_from_file(path)
    assert manifest.to_json() == path.read_text()
    assert manifest.profile == {"input": ((1, 1, 28, 28), (8, 1, 28, 28), (32, 1, 28, 28))}
    assert manifest.preprocessing == {"mean": (0.5,), "std": (0.5,), "size": (28, 28), "channels": 1}


def test_every_value_is_what_stands_there():
    manifest = manifest_from_json(TEXT, "net.json")
    assert json.loads(manifest.to_json()) == SIDECAR
    assert manifest.sha256["engine"] == "a" * 64
    assert manifest.compute_capabilities == (80, 86)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("compute_capabilities",), []),
        (("sdk",), {"name": "tensorrt", "version": "10.13.3.9.post1"}),
        (("inputs", 0, "shape"), ["N", 3, "H", 48]),
        (("profile", "input"), [[4, 3, 32, 48]] * 3),
        (("tolerance",), 0.999),
        (("name",), "名前 net.engine"),
        (("assumptions",), {}),
        (("audit", "kernels"), 26),
    ],
)
def test_what_may_differ_is_accepted(path, value):
    assert json.loads(manifest_from_json(changed(path, value), "net.json").to_json()) == json.loads(
        changed(path, value)
    )


@pytest.mark.parametrize("field", ["schema", *FIELDS])
def test_a_missing_field_is_named(field):
    fields = {name: value for name, value in SIDECAR.items() if name != field}
    assert refusal(json.dumps(fields)).startswith(f"{field}: missing; ")


@pytest.mark.parametrize("field", ["schema", *FIELDS])
@pytest.mark.parametrize("value", [None, True, -1, 1.5, "", [[]], {"a": 1}])
def test_a_field_of_another_type_is_named(field, value):
    assert refusal(changed((field,), value)).startswith(field)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema",), 2, "schema: expected 1, the only schema"),
        (("note",), "x", "note: not a name that belongs here"),
        (("sdk", "build"), 1, "sdk.build: not a name that belongs here"),
        (("name",), "../net.engine", "name: expected a plain file name"),
        (("golden",), "/etc/passwd", "golden: expected a plain file name"),
        (("golden",), "..", "golden: expected a plain file name"),
        (("golden",), "a\\b", "golden: expected a plain file name"),
        (("golden",), "a\x1b[2Jb", "golden: expected a text"),
        (("golden",), "\ud800", "golden: expected a text"),
        (("sha256", "engine"), "a" * 63, "sha256.engine: expected 64 hexadecimal digits"),
        (("sha256", "engine"), "A" * 64, "sha256.engine: expected 64 hexadecimal digits"),
        (("sha256", "onnx"), "g" * 64, "sha256.onnx: expected 64 hexadecimal digits"),
        (("sdk", "name"), "onnxruntime", "sdk.name: expected one of tensorrt, tensorrt_rtx"),
        (("sdk", "version"), "newest", "sdk.version: expected a version"),
        (("sdk", "version"), "\u0661.\u0667", "sdk.version: expected a version"),
        (("inputs", 0, "shape"), ["Né", 3, 32, 48], "inputs[0].shape[0]: expected"),
        (("compute_capabilities",), [86, 86], "compute_capabilities: expected compute capabilities"),
        (("compute_capabilities",), [8.6], "compute_capabilities[0]: expected a whole number"),
        (("compute_capabilities",), [1000], "compute_capabilities: expected compute capabilities"),
        (("inputs",), [], "inputs: expected one or more tensors"),
        (("inputs",), SIDECAR["inputs"] * 2, "inputs: expected one or more tensors of different names"),
        (("inputs", 0, "dtype"), "float", "inputs[0].dtype: expected one of float32"),
        (("inputs", 0, "shape"), [], "inputs[0].shape: expected a shape"),
        (("inputs", 0, "shape", 1), 0, "inputs[0].shape[1]: expected a whole number of at least 1"),
        (("inputs", 0, "shape", 1), 2**40, "inputs[0].shape[1]: expected a whole number"),
        (("inputs", 0, "shape", 0), "N M", "inputs[0].shape[0]: expected a whole number"),
        (("outputs", 0, "name"), "", "outputs[0].name: expected a text"),
        (("profile", "other"), SIDECAR["profile"]["input"], "profile: expected shapes of the inputs input"),
        (("profile",), {}, "profile: expected shapes of the inputs input"),
        (("profile", "input"), SIDECAR["profile"]["input"][:2], "profile.input: expected a list of 3"),
        (("profile", "input"), SIDECAR["profile"]["input"][::-1], "profile.input: expected three shapes, minimum <="),
        (("profile", "input", 1, 0), 0, "profile.input[1][0]: expected a whole number of at least 1"),
        (("profile", "input", 1, 0), 33, "profile.input: expected three shapes, minimum <="),
        (("profile", "input", 2), [32, 3, 32], "profile.input: expected three shapes"),
        (("profile", "input"), [[1, 3, 32, 64]] * 3, "profile.input: expected shapes of the input's form"),
        (("preprocessing", "mean"), [0.5, 0.5], "preprocessing.mean: expected a list of 3"),
        (("preprocessing", "mean"), [0.5, 0.5, "0"], "preprocessing.mean[2]: expected a number"),
        (("preprocessing", "mean"), [0.485, 0.456, 0.41], "preprocessing.mean: expected 0.485,0.456,0.406, as in assu"),
        (("preprocessing", "std"), [0.229, 0.224, 0], "preprocessing.std[2]: expected a number above 0"),
        (("preprocessing", "std"), [1, 1, 1], "preprocessing.std: expected 0.229,0.224,0.225, as in assumptions.std"),
        (("preprocessing", "size"), [48, 32], "preprocessing.size: expected 32x48, as in assumptions.size"),
        (("preprocessing", "channels"), 1, "preprocessing.mean: expected a list of 1"),
        (("assumptions", "eps"), 1e-5, "assumptions.eps: expected a text"),
        (("tolerance",), 0, "tolerance: expected a number above 0"),
        (("tolerance",), 1, "tolerance: expected a relative error below 1"),
        (("tolerance",), 10**400, "tolerance: expected a finite number"),
        (("audit", "problems"), ["conv0: 2 kernels"], "audit.problems: expected none"),
        (("audit", "audited"), 1, "audit.audited: expected true or false"),
    ],
)
def test_a_value_that_cannot_be_right_is_named(path, value, said):
    assert refusal(changed(path, value)).startswith(said)


def test_a_size_that_is_not_the_inputs_is_named():
    fields = json.loads(changed(("preprocessing", "size"), [64, 64]))
    fields["assumptions"]["size"] = "64x64"
    assert refusal(json.dumps(fields)).startswith("preprocessing: expected images of the input's form ['N', 3, 32, 48]")


FREE = {
    "inputs": [{"name": "input", "dtype": "float32", "shape": ["N", 3, "height", "width"]}],
    "outputs": [{"name": "stage1", "dtype": "float32", "shape": ["N", 64, "stage1_height", "stage1_width"]}],
    "profile": {"input": [[1, 3, 16, 24], [8, 3, 32, 48], [32, 3, 64, 64]]},
    "assumptions": SIDECAR["assumptions"] | {"size": "16x24:32x48:64x64", "features": "1"},
}


def test_a_sidecar_of_images_of_free_size_says_the_three_sizes():
    manifest = manifest_from_json(json.dumps(SIDECAR | FREE), "net.json")
    assert json.loads(manifest.to_json()) == SIDECAR | FREE
    assert manifest.profile["input"][2] == (32, 3, 64, 64)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("assumptions", "size"), "16x24:32x48:64x65", "profile.input: expected shapes of 16x24:32x48:64x65, as in a"),
        (("assumptions", "size"), "32x48", "profile.input: expected shapes of 32x48, as in assumptions.size"),
        (("assumptions", "size"), "16x24:40x48:64x64", "preprocessing.size: expected 40x48, as in assumptions.size"),
        (("assumptions", "size"), ":", "preprocessing.size: expected , as in assumptions.size"),
        (("preprocessing", "size"), [16, 24], "preprocessing.size: expected 32x48, as in assumptions.size"),
        (("profile", "input", 0, 2), 33, "profile.input: expected three shapes, minimum <= optimum <= maximum"),
        (("profile", "input", 0, 1), 1, "profile.input: expected shapes of the input's form ['N', 3, 'height', 'wi"),
        (("profile", "input", 1, 2), 33, "preprocessing: expected images of the input's form ['N', 3, 'height', 'w"),
        (("inputs", 0, "shape", 3), 48, "profile.input: expected shapes of the input's form ['N', 3, 'height', 48]"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(path, value, said):
    fields = copy.deepcopy(SIDECAR | FREE)
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert refusal(json.dumps(fields)).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "the file: expected an object, found [1]"),
        (TEXT[: len(TEXT) // 2].encode(), "not JSON"),
        (TEXT.replace("0.005", "NaN").encode(), "NaN is no JSON number"),
        (TEXT.replace("0.005", "-Infinity").encode(), "-Infinity is no JSON number"),
        (TEXT.replace("0.005", "1e999").encode(), "tolerance: expected a number above 0"),
        (TEXT.replace('"golden"', '"tolerance"').encode(), '"tolerance" stands there twice'),
        (b"[" * 100_000, "not JSON"),
        (TEXT.replace("[80, 86]", "[" * 400 + "]" * 400).encode(), "compute_capabilities[0]: expected a whole number"),
    ],
)
def test_text_that_is_no_sidecar_is_refused(content, said):
    assert refusal(content).startswith(said)


def test_a_file_that_cannot_be_read_or_is_far_too_large_is_refused(tmp_path):
    with pytest.raises(
        InputRejected, match=r"none\.json: cannot be read \(No such file or directory\); check the path"
    ):
        manifest_from_file(tmp_path / "none.json")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(1 << 26)
    with pytest.raises(InputRejected, match="larger than any sidecar"):
        manifest_from_file(tmp_path / "large.json")


def places(value, path=()):
    """The path of every value inside."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from places(inner, (*path, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def read_or_refuse(content):
    try:
        manifest = manifest_from_json(content, "net.json")
    except InputRejected as error:
        refused = str(error)
    else:
        refused = None
    if refused is not None:
        assert "\n" not in refused
        return
    assert manifest_from_json(manifest.to_json(), "again") == manifest


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(places(SIDECAR))), JSON)
def test_a_sidecar_with_any_value_anywhere_is_read_or_refused(path, value):
    read_or_refuse(changed(path, value))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.integers(0, 3), st.binary(max_size=3))
def test_a_sidecar_with_any_bytes_anywhere_is_read_or_refused(position, removed, inserted):
    content = TEXT.encode()
    read_or_refuse(content[:position] + inserted + content[position + removed :])
