"""What a build writes into the sidecar, what it must be told by the ONNX file, and that both files appear together."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from engines import sidecar
from engines.backends.backend import TensorDescription
from engines.compiler import Options
from engines.errors import InputRejected, OutputFailed
from engines.manifest import manifest_from_json
from engines.onnx_file import OnnxFile, onnx_file_from_path
from engines.parity import GATES
from engines.plan import Header
from engines.replacement import replace_together
from engines.sidecar import compute_capabilities, manifest_from_build, origin_from_onnx

ASSUMPTIONS = {"mean": "0.485,0.456,0.40625001", "std": "0.229,1e-3,3", "size": "28x32", "eps": "1e-05"}
AUDIT = {"audited": True, "line": "7 of 7 convs in FP16", "problems": []}


FREE = (None, 3, None, None)
RANGE = json.dumps(ASSUMPTIONS | {"size": "20x24:28x32:56x64"})


def typed_file(shape=(None, 3, 28, 32), outputs=((None, 10),), **metadata):
    told = {
        "precision": "fp16",
        "checkpoint_sha256": "ab" * 32,
        "assumptions": json.dumps(ASSUMPTIONS),
    }
    return OnnxFile(
        path=pathlib.Path("net.fp16.onnx"),
        producer="repvgg-exporter",
        opsets={"": 17},
        metadata={key: value for key, value in (told | metadata).items() if value is not None},
        inputs=(TensorDescription("input", "float32", shape),),
        outputs=tuple(TensorDescription("output", "float32", one) for one in outputs),
        nodes=(),
        weights={},
    )


def manifest(onnx, **changes):
    told = {
        "name": "net.fp16.engine",
        "sha256": {"onnx": "cd" * 32, "engine": "ef" * 32},
        "sdk": {"name": "tensorrt_rtx", "version": "1.7.1.116"},
        "cards": (80, 86),
        "batch": (1, 8, 32),
        "audit": AUDIT,
    }
    return manifest_from_build(onnx, **(told | changes))


def test_everything_in_a_sidecar_comes_from_the_graph_the_build_and_the_gates():
    found = manifest(typed_file())
    assert dataclasses.asdict(found) == {
        "name": "net.fp16.engine",
        "precision": "fp16",
        "sha256": {"checkpoint": "ab" * 32, "onnx": "cd" * 32, "engine": "ef" * 32},
        "sdk": {"name": "tensorrt_rtx", "version": "1.7.1.116"},
        "compute_capabilities": (80, 86),
        "inputs": ({"name": "input", "dtype": "float32", "shape": ["N", 3, 28, 32]},),
        "outputs": ({"name": "output", "dtype": "float32", "shape": ["N", 10]},),
        "profile": {"input": ((1, 3, 28, 32), (8, 3, 28, 32), (32, 3, 28, 32))},
        "preprocessing": {
            "mean": (0.485, 0.456, 0.40625001),
            "std": (0.229, 1e-3, 3.0),
            "size": (28, 32),
            "channels": 3,
        },
        "assumptions": ASSUMPTIONS,
        "tolerance": GATES["fp16"].max_relative_error,
        "audit": AUDIT,
        "golden": "golden.npz",
    }


def test_it_is_read_back_as_it_was_written():
    numbers = {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225"}
    written = manifest(typed_file(assumptions=json.dumps(ASSUMPTIONS | numbers)))
    assert manifest_from_json(written.to_json(), "net.json").to_json() == written.to_json()


def test_where_height_and_width_are_free_the_profile_covers_batch_and_size():
    onnx = typed_file(FREE, outputs=((None, 64, None, None), (None, 10)), assumptions=RANGE)
    onnx = dataclasses.replace(onnx, outputs=tuple(map(renamed, onnx.outputs, ("stage1", "output"))))
    found = manifest(onnx)
    assert found.inputs == ({"name": "input", "dtype": "float32", "shape": ["N", 3, "height", "width"]},)
    assert [tensor["shape"] for tensor in found.outputs] == [["N", 64, "stage1_height", "stage1_width"], ["N", 10]]
    assert found.profile == {"input": ((1, 3, 20, 24), (8, 3, 28, 32), (32, 3, 56, 64))}
    assert found.preprocessing["size"] == (28, 32)
    assert found.assumptions == json.loads(RANGE)
    numbers = {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225", "size": "20x24:28x32:56x64"}
    written = manifest(typed_file(FREE, assumptions=json.dumps(ASSUMPTIONS | numbers)))
    assert manifest_from_json(written.to_json(), "net.json").to_json() == written.to_json()


def renamed(value, name):
    return dataclasses.replace(value, name=name)


def test_sizes_of_the_build_take_the_place_of_the_files():
    found = manifest(typed_file(FREE, assumptions=RANGE), sizes=((28, 28), (32, 30), (40, 50)))
    assert found.profile == {"input": ((1, 3, 28, 28), (8, 3, 32, 30), (32, 3, 40, 50))}
    assert found.preprocessing["size"] == (32, 30)
    assert found.assumptions["size"] == "28x28:32x30:40x50"


def test_sizes_for_a_file_of_a_fixed_one_are_rejected():
    with pytest.raises(InputRejected, match=r"^net\.fp16\.onnx: the size of input input is fixed in the graph"):
        manifest(typed_file(), sizes=((28, 28), (32, 30), (40, 50)))


@pytest.mark.parametrize("precision", GATES)
def test_the_tolerance_is_the_gate_of_the_precision(precision):
    assert manifest(typed_file(precision=precision)).tolerance == GATES[precision].max_relative_error


def test_a_real_build_writes_what_the_exporter_writes(compiled):
    network = compiled()
    exported = json.loads(network.sidecar.read_text())
    found = manifest(
        onnx_file_from_path(network.onnx),
        **{key: exported[key] for key in ("name", "sha256", "sdk", "audit")},
        cards=tuple(exported["compute_capabilities"]),
    )
    assert json.loads(found.to_json()) == exported


REJECTED = {
    "no precision": ({"precision": None}, "its metadata has no precision, so the exporter did not write it"),
    "nothing": (
        {"precision": None, "checkpoint_sha256": None, "assumptions": None},
        "has no precision, checkpoint_sha256, assumptions",
    ),
    "another precision": ({"precision": "bf16"}, "its precision is 'bf16', not fp32 or fp16"),
    "no digest": ({"checkpoint_sha256": "ab"}, "its checkpoint_sha256 is not a SHA-256"),
    "no JSON": ({"assumptions": "mean 0.5"}, "its assumptions are not JSON with mean, std and size"),
    "a list": ({"assumptions": "[]"}, "its assumptions are not JSON"),
    "deep JSON": ({"assumptions": "[" * 100_000}, "its assumptions are not JSON"),
    "no size": ({"assumptions": json.dumps({"mean": "0", "std": "1"})}, "its assumptions are not JSON"),
    "three sides": ({"assumptions": json.dumps(ASSUMPTIONS | {"size": "1x2x3"})}, "its assumptions are not JSON"),
    "words for numbers": ({"assumptions": json.dumps(ASSUMPTIONS | {"mean": "a,b,c"})}, "its assumptions are not JSON"),
    "not a number": ({"assumptions": json.dumps(ASSUMPTIONS | {"mean": "0,nan,0"})}, "its assumptions are not JSON"),
    "an infinite std": ({"assumptions": json.dumps(ASSUMPTIONS | {"std": "1,inf,1"})}, "its assumptions are not JSON"),
    "a zero std": ({"assumptions": json.dumps(ASSUMPTIONS | {"std": "1,0,1"})}, "its assumptions are not JSON"),
    "another size": ({"shape": (None, 3, 28, 28)}, "is not images as its assumptions have them"),
    "another channel": ({"shape": (None, 1, 28, 32)}, "is not images as its assumptions have them"),
    "fewer stds": ({"assumptions": json.dumps(ASSUMPTIONS | {"std": "1,1"})}, "is not images as its assumptions"),
    "a fixed batch": ({"shape": (1, 3, 28, 32)}, "is not images as its assumptions have them"),
    "a free width": ({"shape": (None, 3, 28, None)}, "is not images as its assumptions have them"),
    "a range for a fixed size": ({"assumptions": RANGE}, "is not images as its assumptions have them"),
    "a free height of a range": (
        {"shape": (None, 3, None, 32), "assumptions": RANGE},
        "is not images as its assumptions have them",
    ),
    "free channels of a range": (
        {"shape": FREE, "assumptions": RANGE, "outputs": ((None, None, None, None),)},
        "its outputs have no fixed shape",
    ),
    "free classes of a range": (
        {"shape": FREE, "assumptions": RANGE, "outputs": ((None, None),)},
        "its outputs have no fixed shape",
    ),
    "a free map of a fixed size": ({"outputs": ((None, 8, None, None),)}, "its outputs have no fixed shape"),
    "two sizes": ({"assumptions": json.dumps(ASSUMPTIONS | {"size": "1x1:2x2"})}, "its assumptions are not JSON"),
    "sizes in another order": (
        {"shape": FREE, "assumptions": json.dumps(ASSUMPTIONS | {"size": "9x9:8x8:10x10"})},
        "its assumptions are not JSON",
    ),
    "a size of nothing": (
        {"shape": FREE, "assumptions": json.dumps(ASSUMPTIONS | {"size": "0x9:9x9:10x10"})},
        "its assumptions are not JSON",
    ),
    "free classes": ({"outputs": ((None, None),)}, "its outputs have no fixed shape"),
    "no output": ({"outputs": ()}, "its outputs have no fixed shape"),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_a_graph_that_cannot_say_where_it_comes_from_is_rejected(kind):
    changes, said = REJECTED[kind]
    with pytest.raises(InputRejected) as error:
        origin_from_onnx(typed_file(**changes))
    message = str(error.value)
    assert message.startswith("net.fp16.onnx: ")
    assert said in message
    assert message.endswith("; export it again with python -m exporter")


# --- for which cards


@pytest.mark.parametrize(
    ("header", "level", "capability", "cards"),
    [
        ((80, 86), None, 75, (80, 86)),
        ((), None, 86, (86,)),
        ((), "same_compute_capability", 86, (86,)),
        ((), "ampere_plus", 86, ()),
        ((), None, None, ()),
    ],
)
def test_the_cards_are_the_headers_or_this_machines(monkeypatch, header, level, capability, cards):
    monkeypatch.setattr(sidecar, "gpu_compute_capability", lambda: capability)
    read = Header("tensorrt", (11, 4, 0, 106), 1000, header, newer_cards=False)
    assert compute_capabilities(read, Options(hardware_compatibility=level)) == cards


# --- together or not at all


@pytest.fixture
def folder(tmp_path):
    """Two finished files, older ones in their places, and a place to keep those."""
    (tmp_path / "earlier").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"new {name}").write_text(f"new {name}")
        (tmp_path / name).write_text(f"old {name}")
    return tmp_path


def moves(folder, *names):
    return {folder / f"new {name}": folder / name for name in names}


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_files_take_their_places(folder):
    replace_together(moves(folder, "a", "b"), folder / "earlier")
    assert texts(folder) == {"a": "new a", "b": "new b"}


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
@pytest.mark.parametrize("first", ["old", "none"])
@pytest.mark.parametrize("fault", ["a directory in its place", "no such file", "interrupted"])
def test_where_one_cannot_those_before_it_are_put_back(folder, monkeypatch, fault, first, links):
    if not links:
        monkeypatch.setattr("os.link", lambda *arguments: (_ for _ in ()).throw(OSError("no links")))
    if first == "none":
        (folder / "a").unlink()
    if fault == "a directory in its place":
        (folder / "b").unlink()
        (folder / "b").mkdir()
    elif fault == "no such file":
        (folder / "new b").unlink()
    else:
        replace = pathlib.Path.replace

        def interrupted(self, target):
            if target.name == "b" and self.name == "new b":
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(pathlib.Path, "replace", interrupted)
    before = texts(folder)
    with pytest.raises(KeyboardInterrupt if fault == "interrupted" else OutputFailed) as error:
        replace_together(moves(folder, "a", "b"), folder / "earlier")
    if fault != "interrupted":
        assert str(error.value).startswith(f"{folder / 'b'}: cannot be written (")
    after = texts(folder)
    assert {name: text for name, text in after.items() if not name.startswith("new")} == {
        name: text for name, text in before.items() if not name.startswith("new")
    }
