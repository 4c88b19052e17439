"""Graphs whose outputs are feature maps, several of them or one, of images of a fixed or free size: every command."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from PIL import Image

from engines import backends, verification
from engines.backends import BackendEntry
from engines.backends.onnx_runtime import OnnxRuntime
from engines.build import build
from engines.errors import UsageError
from engines.manifest import manifest_from_file, sidecar_path
from tests.engines.typed_graphs import Layer, TypedGraph

FREE = "32x32:64x48:96x128"
SIZE = (64, 48)
AUDITED = "4 of 4 convs in FP16, Conv+ReLU in one kernel each, all 4 weights bit-equal"
ONNX, ENGINE = "net.fp16.onnx", "net.fp16.engine"
SHAPES = {"stage1": (32, 16, 12), "stage2": (64, 8, 6)}


def two_maps():
    graph = TypedGraph("fp16", size=SIZE).layers(Layer("stage0", 16, stride=2), Layer("stage1.0", 32, stride=2))
    graph.features("stage1").layers(Layer("stage2.0", 32, 3, 2, 0), Layer("stage2.1", 64, 1))
    return graph.features("stage2")


def one_map():
    return TypedGraph("fp16", size=SIZE).layers(Layer("stage0", 16, stride=2), Layer("stage1.0", 8)).features("output")


def answers(path, images):
    """ONNX Runtime's own, by name."""
    session = onnxruntime.InferenceSession(str(path))
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": images}), strict=True))


def write_export(folder, graph, sizes):
    """A typed graph and its golden vectors; answers on noise of a few colours, so that they differ."""
    onnx.save(graph.model(sizes=sizes), folder / ONNX)
    random = np.random.default_rng(7)
    images = (random.normal(size=(4, 3, *SIZE)) + random.normal(size=(4, 3, 1, 1))).astype(np.float32)
    wide = {name: array.astype(np.float64) for name, array in answers(folder / ONNX, images).items()}
    np.savez(folder / "golden.npz", input=images, **wide)
    pixels = (random.random((90, 70, 3)) * 255).astype(np.uint8)
    for index in range(2):
        Image.fromarray(pixels[index * 10 :]).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """``built(sizes)``: a directory with two feature maps and an engine of RTX's compiler; not to be changed."""
    made = {}

    def once(sizes):
        if sizes not in made:
            folder = tmp_path_factory.mktemp("maps")
            write_export(folder, two_maps(), sizes)
            build(folder / ONNX, folder / ENGINE, sdk="tensorrt_rtx", batch=(1, 2, 4))
            made[sizes] = folder
        return made[sizes]

    return once


@pytest.fixture(params=[None, FREE], ids=["fixed", "free"])
def folder(request, built, tmp_path):
    """A copy, to be damaged at will."""
    return shutil.copytree(built(request.param), tmp_path / "net")


# --- verify


class Card:
    """Stands in for a GPU: computes an engine's typed graph in ONNX Runtime, then does ``harm`` to all outputs."""

    def __init__(self, path, harm):
        self._inner, self._harm = OnnxRuntime(path.with_suffix(".onnx")), harm
        self.inputs, self.outputs, self.batch = self._inner.inputs, self._inner.outputs, (1, 4)

    def run(self, feeds):
        outputs = self._inner.run(feeds)
        return self._harm(outputs) or outputs

    def close(self):
        self._inner.close()


@pytest.fixture
def gpu(monkeypatch):
    """``gpu(harm)``: from now on there is a card."""

    def plug_in(harm=lambda outputs: None):
        entry = BackendEntry("tensorrt_rtx", "Card", "engines", lambda source: Card(source.path, harm))
        others = [entry for entry in backends.BACKENDS if entry.kind != "tensorrt_rtx"]
        monkeypatch.setattr(backends, "BACKENDS", (*others, entry))
        monkeypatch.setattr(verification, "gpu_compute_capability", lambda _: 86)

    return plug_in


def line_of(outcome, stage):
    return next(line for line in outcome.stdout.splitlines() if line[5:].startswith(f"{stage}: "))


def test_without_a_gpu_the_engine_is_audited_and_not_run(engines_command, folder, monkeypatch):
    monkeypatch.setattr(verification, "gpu_compute_capability", lambda _: None)
    static = engines_command("verify", folder / ENGINE, "--static")
    assert (static.code, static.stderr) == (0, "")
    assert line_of(static, f"{ENGINE}, audit") == f"ok   {ENGINE}, audit: {AUDITED}"
    assert engines_command("verify", folder / ENGINE).code == 4


def test_all_outputs_are_run_joined_and_judged_without_a_top_1(engines_command, folder, gpu):
    gpu()
    for name, gate in ((ENGINE, "5.0e-03"), (ONNX, "5.0e-03")):
        outcome = engines_command("verify", folder / name)
        assert (outcome.code, outcome.stderr) == (0, "")
        line = line_of(outcome, f"{name}, run")
        assert line.startswith(f"ok   {name}, run: 2 outputs, the worst is stage")
        assert f"(gate {gate}), SQNR " in line
        assert "top-1" not in line
        assert line.endswith(" dB")


def add(name, share):
    """Moves one value of one output by a share of the largest."""

    def harm(outputs):
        outputs[name][-1, 3, 2, 1] += share * np.abs(outputs[name]).max()

    return harm


def turned(outputs):
    outputs["stage2"] = outputs["stage2"].transpose(0, 1, 3, 2)


def mixed_up(outputs):
    return {name: array[::-1] for name, array in outputs.items()}


def not_a_number(outputs):
    outputs["stage1"][0, 0, 0, 0] = np.nan


FAULTS = {
    "the first is off": (add("stage1", 0.02), "exceeds 5.0e-03; 2 outputs, the worst is stage1: relative error"),
    "the second is off": (add("stage2", 0.02), "exceeds 5.0e-03; 2 outputs, the worst is stage2: relative error"),
    "no number": (not_a_number, "2 outputs are NaN or infinite; 2 outputs, the worst is stage1: "),
    "turned": (turned, "stage2 is 64x6x8 for each image, and 64x8x6 in the golden vectors"),
    "one is missing": (lambda outputs: {"stage1": outputs["stage1"]}, "no output stage2"),
    "one too many": (lambda o: o | {"stage3": o["stage2"]}, "the golden vectors have no output stage3"),
    "rows mixed up": (mixed_up, "relative error"),
    "always the same": (lambda o: {name: np.repeat(a[:1], len(a), 0) for name, a in o.items()}, "relative error"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_any_output_fails_and_is_named(engines_command, folder, gpu, fault):
    harm, said = FAULTS[fault]
    gpu(harm)
    outcome = engines_command("verify", folder / ENGINE)
    assert outcome.code == 1
    line = line_of(outcome, f"{ENGINE}, run")
    assert line.startswith("FAIL")
    assert said in line


def test_a_fault_within_the_gate_is_none(engines_command, folder, gpu):
    gpu(add("stage2", 0.004))
    outcome = engines_command("verify", folder / ENGINE)
    assert outcome.code == 0
    assert "2 outputs, the worst is stage2: relative error 4.0e-03" in outcome.stdout


def test_a_weight_changed_in_the_graph_is_seen_in_the_engine_and_in_its_run(engines_command, folder):
    model = onnx.load(folder / ONNX)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "stage2.0.weight")
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, folder / ONNX)
    outcome = engines_command("verify", folder / ONNX)
    assert outcome.code == 1
    assert "the worst is stage2: relative error" in outcome.stdout
    facts = json.loads(engines_command("info", folder / ENGINE, "--json").stdout)
    assert facts["audit"] is None  # it is no longer the file that the sidecar names
    sidecar_path(folder / ENGINE).unlink()
    outcome = engines_command("info", folder / ENGINE)
    assert outcome.code == 1
    assert "FAIL stage2.0/Conv: its weights do not stand in the engine bit for bit" in outcome.stdout


def test_one_feature_map_is_judged_without_naming_it(engines_command, tmp_path):
    write_export(tmp_path, one_map(), None)
    outcome = engines_command("verify", tmp_path / ONNX)
    assert (outcome.code, outcome.stderr) == (0, "")
    line = line_of(outcome, f"{ONNX}, run")
    assert line.startswith(f"ok   {ONNX}, run: relative error ")
    assert "top-1" not in line


# --- run


def described(array):
    shape = "x".join(map(str, array.shape))
    return f"{shape}  min {array.min():.6g}, mean {array.mean(dtype=np.float64):.6g}, max {array.max():.6g}"


def test_the_shape_and_values_of_each_output_are_said_and_saved(engines_command, folder):
    outcome = engines_command("run", folder / ONNX, folder / "0.png", folder / "1.png", "--save", "maps.npz")
    assert (outcome.code, outcome.stderr) == (0, "")
    with np.load(folder.parent / "maps.npz", allow_pickle=False) as saved:
        arrays = {name: saved[name] for name in saved.files}
    assert {name: array.shape for name, array in arrays.items()} == {name: (2, *s) for name, s in SHAPES.items()}
    pixels = preprocessed(folder, ["0.png", "1.png"])
    for name, array in answers(folder / ONNX, pixels).items():
        np.testing.assert_allclose(arrays[name], array, rtol=1e-3, atol=1e-3)
    first, *lines = outcome.stdout.splitlines()
    assert first.startswith("preprocessing: RGB, 64x48 (any other size is scaled to cover 73x55, ")
    expected = []
    for index in range(2):
        expected += [str(folder / f"{index}.png"), *(f"  {name}  {described(arrays[name][index])}" for name in arrays)]
    assert lines == expected


def preprocessed(folder, names):
    """Scaled and cut as the module says, by Pillow."""
    from engines.preprocessing import Preprocessing

    told = Preprocessing((0.5,) * 3, (0.5,) * 3, SIZE, 3)
    return np.concatenate([told.array_from_image(folder / name) for name in names])


def test_json_has_the_same_numbers(engines_command, folder):
    outcome = engines_command("run", folder / ONNX, folder / "0.png", "--json")
    (entry,) = json.loads(outcome.stdout)["images"]
    expected = answers(folder / ONNX, preprocessed(folder, ["0.png"]))
    assert list(entry["outputs"]) == list(expected)
    for name, array in expected.items():
        found = entry["outputs"][name]
        assert found["shape"] == list(array.shape[1:])
        assert [found[key] for key in ("min", "max")] == pytest.approx([array.min(), array.max()], abs=1e-3)
        assert found["mean"] == pytest.approx(array.mean(dtype=np.float64), abs=1e-4)


@pytest.mark.parametrize("option", [("--names", "classes.txt"), ("--top", "3")])
def test_what_is_for_classes_is_a_usage_error(engines_command, folder, option):
    outcome = engines_command("run", folder / ONNX, folder / "0.png", *option)
    assert outcome.code == 2
    assert outcome.error == f"{option[0]}: {folder / ONNX} has feature maps, which have no classes; leave it out"
    assert outcome.stdout == ""


def test_a_file_that_cannot_be_saved_is_one_line(engines_command, folder):
    outcome = engines_command("run", folder / ONNX, folder / "0.png", "--save", "none/maps.npz")
    assert outcome.code == 5
    assert outcome.error.startswith("none/maps.npz: cannot be written (")
    assert "--out" not in outcome.error


# --- info


def test_info_shows_every_output(engines_command, folder, request):
    free = "free" in request.node.callspec.id
    facts = json.loads(engines_command("info", folder / ENGINE, "--json").stdout)
    side = (lambda name, size: [f"{name}_height", f"{name}_width"]) if free else (lambda name, size: list(size))
    assert {output["name"]: output["shape"] for output in facts["outputs"]} == {
        name: ["N", channels, *side(name, size)] for name, (channels, *size) in SHAPES.items()
    }
    shown = engines_command("info", folder / ENGINE).stdout
    assert "stage2 float32 (N, 64, stage2_height, stage2_width)" in shown if free else "stage2 float32 (N, 64, 8, 6)"
    assert AUDITED in shown
    vectors = json.loads(engines_command("info", folder / "golden.npz", "--json").stdout)["vectors"]
    assert {name: vector["shape"] for name, vector in vectors.items()} == {
        "input": [4, 3, *SIZE], **{name: [4, *shape] for name, shape in SHAPES.items()}
    }  # fmt: skip
    graph = json.loads(engines_command("info", folder / ONNX, "--json").stdout)
    assert [output["name"] for output in graph["outputs"]] == list(SHAPES)


# --- build


def test_a_build_takes_the_sizes_from_the_file(built):
    manifest = manifest_from_file(sidecar_path(built(FREE) / ENGINE))
    assert manifest.profile == {"input": ((1, 3, 32, 32), (2, 3, 64, 48), (4, 3, 96, 128))}
    assert [tensor["shape"] for tensor in manifest.inputs] == [["N", 3, "height", "width"]]
    assert manifest.preprocessing["size"] == SIZE
    assert manifest.assumptions["size"] == FREE


def test_sizes_may_be_chosen_anew_around_the_golden_vectors(engines_command, built, tmp_path):
    folder = shutil.copytree(built(FREE), tmp_path / "net")
    outcome = engines_command("build", folder / ONNX, "--size", "48:64x48:80x112", "--batch", "1:1:2")
    assert outcome.code == 0, outcome.stderr
    assert ", batch 1:1:2, size 48x48:64x48:80x112, in " in outcome.stdout
    manifest = manifest_from_file(sidecar_path(folder / ENGINE))
    assert manifest.profile == {"input": ((1, 3, 48, 48), (1, 3, 64, 48), (2, 3, 80, 112))}
    assert manifest.assumptions["size"] == "48x48:64x48:80x112"
    program = (folder / ENGINE).read_bytes()  # which checks the shapes that it is given
    assert b"out of bounds [48, 80]" in program
    assert b"out of bounds [48, 112]" in program
    assert engines_command("verify", folder / ENGINE, "--static").code == 0


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("72:80:96", "--size: 72x72:80x80:96x96 is without 64x48, so that no engine could be compared with the golden"),
        ("64:32:96", "--size: 64x64:32x32:96x96 is not MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= 4096"),
        ("32:64:9999", "--size: 32x32:64x64:9999x9999 is not MIN:OPT:MAX with"),
        ("0:64:96", "--size: 0x0:64x64:96x96 is not MIN:OPT:MAX with"),
        ("32:64", "--size: '32:64' is not MIN:OPT:MAX, each a number or HxW, as in 160:224:320"),
        ("32x:64:96", "--size: '32x:64:96' is not MIN:OPT:MAX, each a number"),
    ],
)
def test_sizes_that_no_engine_could_have_are_a_usage_error(engines_command, built, tmp_path, sizes, said):
    outcome = engines_command("build", built(FREE) / ONNX, "--out", "net.engine", "--size", sizes)
    assert outcome.code == 2
    assert outcome.error.startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_sizes_for_a_graph_of_a_fixed_one_are_a_usage_error(built, tmp_path):
    path = built(None) / ONNX
    with pytest.raises(UsageError) as raised:
        build(path, tmp_path / "net.engine", sizes=((32, 32), (64, 48), (96, 96)))
    assert str(raised.value) == (
        f"--size: {path} is for images of 64x48 alone; leave it out, or export with --size MIN:OPT:MAX"
    )
