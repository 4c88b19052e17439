"""``python -m exporter --trt int8``: what it writes, says and keeps; and what the other commands make of the files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import engines
import exporter
from engines.cli import main as engines_main
from engines.files import sha256_of
from exporter import int8, pipeline
from exporter.cli import main
from exporter.quantization.calibration_file import calibration_from_file
from exporter.verify import main as verify
from tests.conftest import EXAMPLES, ROOT, Outcome
from tests.family_names import APPLE, OFFICIAL, PLUS, Shape
from tests.small_int8 import COUNT, MARGIN, SIZE, answers, pictures, save_folder, save_images, save_network

BLOCKS = ("stage0.0", "stage1.0", "stage2.0", "stage3.0", "stage4.0")
LAYERS = {*(f"{block}/Conv" for block in BLOCKS), "head/Gemm"}
FORMS = ("int8", "int8.rtx")
CALIBRATION = "model.int8.calib.json"
INT8_FILES = {f"model.{end}" for end in ("int8.onnx", "int8.rtx.onnx", "int8.engine", "int8.engine.json")} | {
    CALIBRATION
}
REPORT_FILES = {"golden.npz", "report.json", "report.md"}
REUSED = f"{CALIBRATION}: from the same checkpoint, images and method; its factors and ranges are used again"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small spend more time on handing work over than on the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def called(main, *arguments):
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


@dataclasses.dataclass(frozen=True)
class Run:
    """A command that has ended, and the directory that it wrote."""

    outcome: Outcome
    out: os.PathLike

    @property
    def files(self):
        return {path.name for path in self.out.iterdir()}

    @property
    def report(self):
        return json.loads((self.out / "report.json").read_text())

    def record(self, form):
        return next(record for record in self.report["quantization"] if record["form"] == form)

    def check(self, stage):
        return next(check for check in self.report["checks"] if check["stage"] == stage)

    def model(self, form):
        return onnx.load(self.out / f"model.{form}.onnx")


def export(folder, *flags, out="out", images="images.npz"):
    """Exports model.pt of ``folder`` in INT8."""
    out = folder / out
    calib = ("--calib", folder / images)
    return Run(called(main, folder / "model.pt", "--size", SIZE, "--trt", "int8", *calib, "--out", out, *flags), out)


def passed(run):
    assert (run.outcome.code, run.outcome.stderr) == (0, "")
    return run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A small network, its calibration images, and other images with labels."""
    folder = tmp_path_factory.mktemp("workshop")
    save_network(folder / "model.pt")
    save_images(folder / "images.npz")
    save_images(folder / "test.npz", 60, 1, labels=answers(pictures(60, 1, 0)))
    return folder


@pytest.fixture(scope="module")
def plain(workshop):
    """INT8 alone, as simply as it can be asked for."""
    return passed(export(workshop, out="plain"))


@pytest.fixture(scope="module")
def full(workshop):
    """Everything at once: other precisions beside it, effort, report, labels, --json."""
    labels = ("--labels", workshop / "test.npz", "--max-drop", 12)
    flags = ("--onnx", "--trt", "fp16", "--int8-effort", "high", "--int8-report", "--layers", "--json")
    return passed(export(workshop, *flags, *labels, out="full"))


def initializers(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def float_convolutions(model):
    """The names of Conv and Gemm nodes whose weight is a floating-point tensor of the file."""
    held = initializers(model)
    return {node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm") and node.input[1] in held}


# What is written


def test_the_files_are_those_that_the_report_lists(plain):
    assert plain.files == INT8_FILES | REPORT_FILES
    listed = {file["name"]: (file["bytes"], file["sha256"]) for file in plain.report["files"]}
    assert set(listed) == plain.files - {"report.json", "report.md"}
    assert all((plain.out / name).stat().st_size == size for name, (size, _) in listed.items())
    assert all(sha256_of(plain.out / name) == sha256 for name, (_, sha256) in listed.items())


@pytest.mark.parametrize("name", ["plain", "full"])
def test_the_report_is_valid_and_has_a_record_of_each_form(name, request):
    run = request.getfixturevalue(name)
    jsonschema.validate(run.report, json.loads((ROOT / "exporter/report/report.schema.json").read_text()))
    assert [record["form"] for record in run.report["quantization"]] == list(FORMS)
    for record in run.report["quantization"]:
        assert (record["file"], record["images"], record["fitted_images"]) == (
            f"model.{record['form']}.onnx",
            COUNT,
            COUNT,
        )
        assert {layer["layer"] for layer in record["layers"]} == LAYERS
        assert record["kept"] == {}
        assert record["sqnr_db"] == run.check(f"{record['form']}, all of --calib against float32")["value"] > 20
        assert record["simulation_db"] is None or record["simulation_db"] > 60  # JSON has no word for infinity
    assert [bool(record["traffic"]) for record in run.report["quantization"]] == [False, True]
    assert run.report["passed"] is True


def test_the_calibration_is_valid_and_says_what_it_was_made_from(plain, workshop):
    path = plain.out / CALIBRATION
    schema = json.loads((ROOT / "exporter/quantization/calibration.schema.json").read_text())
    jsonschema.validate(json.loads(path.read_text()), schema)
    found = calibration_from_file(path)
    assert found.binding.checkpoint == sha256_of(workshop / "model.pt")
    assert (found.binding.images, found.binding.method["effort"]) == (COUNT, "default")
    assert [form.form for form in found.forms] == list(FORMS)
    for form in found.forms:
        held = initializers(plain.model(form.form))
        scales = {name: array for name, array in held.items() if array.dtype != np.int8 and "scale" in name}
        assert set(form.ranges) == LAYERS
        for layer in LAYERS:
            wanted = np.array(form.weight_scales[layer])
            assert any(np.array_equal(np.atleast_1d(scale).astype(np.float64), wanted) for scale in scales.values())


def test_the_sidecar_is_of_the_form_that_was_compiled(plain):
    sidecar = json.loads((plain.out / "model.int8.engine.json").read_text())
    assert (sidecar["name"], sidecar["precision"]) == ("model.int8.engine", "int8")
    assert sidecar["sha256"]["onnx"] == sha256_of(plain.out / "model.int8.rtx.onnx")
    assert sidecar["sha256"]["engine"] == sha256_of(plain.out / "model.int8.engine")
    audit = sidecar["audit"]
    assert (audit["audited"], audit["problems"], audit["by_dtype"]) == (True, [], {"int8": 5})
    assert (audit["weights_bit_equal"], audit["expected_weights"]) == (6, 6)
    assert plain.report["engines"][0]["audit"] == audit


@pytest.mark.parametrize("form", FORMS)
def test_a_form_has_the_types_that_its_compiler_fuses(form, plain):
    model = plain.model(form)
    held = initializers(model)
    kinds = {array.dtype for array in held.values()} - {np.dtype(np.int64)}
    assert kinds == {np.dtype(np.int8), np.dtype(np.float16 if form == "int8.rtx" else np.float32)}
    codes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(codes) == len(LAYERS)
    assert all(held[node.input[2]].dtype == np.int8 and not held[node.input[2]].any() for node in codes)
    assert float_convolutions(model) == set()
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["precision"] == "int8"


def test_what_is_printed_says_what_it_costs_without_a_traceback_of_numbers(plain):
    lines = plain.outcome.stdout.splitlines()
    assert sum(line.startswith("ok   int8, all of --calib against float32: SQNR ") for line in lines) == 1
    assert sum(line.startswith("ok   int8.rtx, all of --calib against float32: SQNR ") for line in lines) == 1
    assert sum(line.startswith("prediction: INT8 moves ") for line in lines) == 1
    assert lines[-2] == "PASS: 17 of 17 checks hold, 1 not run"
    assert lines[-1].startswith(f"written to {plain.out}/: golden.npz, model.int8.calib.json, model.int8.engine")


# What other commands make of it


def test_the_serving_side_verifies_and_shows_the_directory(plain):
    verified = called(engines_main, "verify", plain.out, "--static")
    assert (verified.code, verified.stderr) == (0, "")
    assert "model.int8.engine" in verified.stdout
    assert "model.int8.onnx" in verified.stdout
    shown = called(engines_main, "info", plain.out / "model.int8.engine")
    assert (shown.code, shown.stderr) == (0, "")
    assert "5 of 5 convs in INT8" in shown.stdout


def test_the_serving_side_sees_another_engine_in_its_place(plain, full, tmp_path):
    copy = shutil.copytree(plain.out, tmp_path / "copy")
    shutil.copy(full.out / "model.fp16.engine", copy / "model.int8.engine")
    verified = called(engines_main, "verify", copy, "--static")
    assert verified.code == 1
    assert "model.int8.engine" in verified.stderr


@pytest.mark.parametrize("form", FORMS)
def test_the_int8_file_is_compared_with_the_float32_file(form, full, workshop):
    files = (full.out / "model.onnx", full.out / f"model.{form}.onnx")
    compared = called(verify, *files, "--inputs", workshop / "images.npz")
    assert (compared.code, compared.stderr) == (0, "")


@pytest.mark.parametrize("form", FORMS)
def test_a_runner_gives_what_onnx_runtime_gives(form, plain, workshop):
    path = plain.out / f"model.{form}.onnx"
    with np.load(plain.out / "golden.npz") as golden:
        images, exact = golden["input"].astype(np.float32), golden["output"]
    with engines.load(path) as runner:
        found = runner.run({"input": images})["output"]
    (theirs,) = onnxruntime.InferenceSession(str(path)).run(None, {"input": images})
    np.testing.assert_array_equal(found, theirs)
    assert 0.001 < np.abs(found - exact).max() / np.abs(exact).max() < 0.25


# What can be asked for


def test_json_is_the_report_and_nothing_else(full):
    assert json.loads(full.outcome.stdout) == full.report


def test_other_precisions_are_written_beside_it(full):
    assert full.files == INT8_FILES | REPORT_FILES | {
        "model.onnx", "model.fp16.onnx", "model.fp16.engine", "model.fp16.engine.json",
    }  # fmt: skip
    assert [engine["precision"] for engine in full.report["engines"]] == ["fp16", "int8"]
    assert [record["precision"] for record in full.report["accuracy"]] == ["fp32", "fp16", *FORMS]


def test_high_effort_is_better_on_the_same_images(full, plain):
    for form in FORMS:
        assert (full.record(form)["effort"], plain.record(form)["effort"]) == ("high", "default")
        assert full.record(form)["sqnr_db"] > plain.record(form)["sqnr_db"] + 0.1


def test_the_report_says_what_each_layer_costs_where_it_is_asked_to(full, plain):
    for form in FORMS:
        for layer in full.record(form)["layers"]:
            assert layer["alone_db"] > full.record(form)["sqnr_db"]
            assert layer["without_db"] > full.record(form)["sqnr_db"] - 3
        assert {layer["alone_db"] for layer in plain.record(form)["layers"]} == {None}
        assert {layer["without_db"] for layer in plain.record(form)["layers"]} == {None}


def test_the_layers_compared_are_those_of_the_float_graphs(full):
    assert "layers" in full.report
    named = {stage for row in full.report["layers"] for stage in row["errors"]}
    assert not [stage for stage in named if stage.startswith("int8")]
    assert [stage for stage in named if stage.startswith("fp16")]


def test_the_labels_are_counted_for_both_forms(full):
    rows = {row["precision"]: row for row in full.report["accuracy"]}
    assert rows["fp32"]["top1"] == 1.0  # labelled by the network itself
    for form in FORMS:
        assert (rows[form]["images"], rows[form]["non_finite"]) == (60, 0)
        assert rows[form]["drop"] == pytest.approx(1 - rows[form]["top1"])
        assert full.check(f"{form}, top-1")["detail"].endswith("within --max-drop 12")


@pytest.fixture(scope="module")
def budgeted(workshop):
    """35 dB, which this network does not reach with every layer in INT8."""
    return passed(export(workshop, "--int8-budget", 35, out="budgeted"))


@pytest.mark.parametrize("form", FORMS)
def test_a_budget_keeps_few_layers_by_name_and_is_met(form, budgeted, plain):
    record = budgeted.record(form)
    assert plain.record(form)["sqnr_db"] < 35 <= record["sqnr_db"]
    assert record["budget_db"] == 35
    assert set(record["kept"]) < LAYERS
    assert set(record["kept"].values()) == {"to reach 35 dB"}
    assert float_convolutions(budgeted.model(form)) == set(record["kept"])
    assert {layer["layer"] for layer in record["layers"]} == LAYERS - set(record["kept"])
    dtype = "float16" if form == "int8.rtx" else "float32"
    said = budgeted.check(f"{form}, precision asked for")["detail"]
    assert said.startswith(f"{len(LAYERS) - len(record['kept'])} of {len(LAYERS)} layers in INT8; ")
    assert all(f"{layer} kept in {dtype}: to reach 35 dB" in said for layer in record["kept"])


def test_without_the_budget_its_calibration_serves_the_layers_that_it_kept(budgeted, plain, workshop):
    copy = shutil.copytree(budgeted.out, workshop / "after the budget")
    again = passed(export(workshop, out=copy.name))
    assert "is refused" not in again.outcome.stdout
    assert f"{CALIBRATION}: from the same checkpoint, images and method" in again.outcome.stdout
    for form in FORMS:
        assert again.record(form)["kept"] == {}
        assert again.record(form)["sqnr_db"] == pytest.approx(plain.record(form)["sqnr_db"], abs=0.5)


def test_a_budget_beyond_reach_is_one_line_and_leaves_nothing(workshop):
    refused = export(workshop, "--int8-budget", 119, out="impossible")
    assert refused.outcome.code == 1
    assert "119" in refused.outcome.error
    assert not refused.out.exists()


def test_a_drop_beyond_the_limit_fails_by_name_and_the_files_are_kept(workshop, monkeypatch):
    whole = pipeline.session_of_typed

    class Turned:
        """Answers as a network whose classes are in another order."""

        def __init__(self, session):
            self.session = session

        def run(self, batch):
            return {name: scores[:, ::-1] for name, scores in self.session.run(batch).items()}

    monkeypatch.setattr(
        pipeline, "session_of_typed", lambda one: Turned(whole(one)) if one.name == "int8.rtx" else whole(one)
    )
    labels = ("--labels", workshop / "test.npz", "--max-drop", 12)
    failed = export(workshop, *labels, out="dropped")
    assert failed.outcome.code == 1
    assert failed.outcome.error.startswith("int8.rtx, top-1: ")
    assert "beyond --max-drop 12" in failed.outcome.error
    assert "int8, top-1" not in failed.outcome.error
    assert failed.files == {f"{name}.rejected" for name in INT8_FILES | REPORT_FILES}


# Folders of images


@pytest.fixture(scope="module")
def from_folders(workshop):
    """The same images as files with a margin that --resize and --size cut off."""
    save_folder(workshop / "images", pictures())
    pixels = pictures(60, 1)
    save_folder(workshop / "test", pixels, answers(pixels[:, MARGIN:-MARGIN, MARGIN:-MARGIN]))
    (workshop / "test" / "3").mkdir(exist_ok=True)
    flags = ("--resize", SIZE + 2 * MARGIN, "--labels", workshop / "test")
    return passed(export(workshop, *flags, out="from folders", images="images"))


def test_a_folder_gives_the_codes_of_the_same_images_in_an_array(from_folders, plain):
    for form in FORMS:
        theirs, ours = (initializers(run.model(form)) for run in (from_folders, plain))
        assert theirs.keys() == ours.keys()
        assert all(np.array_equal(theirs[name], ours[name]) for name in ours)


def test_a_folder_of_classes_labels_its_images(from_folders):
    rows = {row["precision"]: row for row in from_folders.report["accuracy"]}
    assert (rows["fp32"]["images"], rows["fp32"]["top1"]) == (60, 1.0)


def test_how_images_were_scaled_is_in_every_file(from_folders, plain):
    resize = SIZE + 2 * MARGIN
    assert from_folders.report["assumptions"]["resize"] == str(resize)
    for form in FORMS:
        properties = {entry.key: entry.value for entry in from_folders.model(form).metadata_props}
        assert json.loads(properties["assumptions"])["resize"] == str(resize)
    sidecar = json.loads((from_folders.out / "model.int8.engine.json").read_text())
    assert sidecar["preprocessing"]["resize"] == resize
    assert calibration_from_file(from_folders.out / CALIBRATION).binding.preprocessing["resize"] == str(resize)
    assert "resize" not in plain.report["assumptions"]


# Other networks


OTHERS = {
    "SE before the ReLU, feature maps": (OFFICIAL, Shape(depths=(1, 1, 1, 1, 1), se=3), 0, ["--features", "1,2"]),
    "SE behind the ReLU": (PLUS, Shape(depths=(1, 1, 1, 2, 1), se=3), 1, []),
    "grouped, of many sizes": (OFFICIAL, Shape(depths=(1, 1, 1, 1, 1), even_groups=2), 0, ["--size", "12:16:16"]),
    "depthwise": (APPLE, Shape(depths=(1, 1, 1, 1, 1), convs=2), 2, ["--int8-effort", "high"]),
}


@pytest.mark.parametrize(("family", "shape", "seed", "flags"), OTHERS.values(), ids=OTHERS)
def test_other_networks_go_all_the_way(family, shape, seed, flags, tmp_path):
    save_network(tmp_path / "model.pt", family, shape, seed)
    save_images(tmp_path / "images.npz")
    run = passed(export(tmp_path, *flags))
    audit = run.report["engines"][0]["audit"]
    for form in FORMS:
        record = run.record(form)
        assert all("squeeze-and-excitation" in reason for reason in record["kept"].values())
        assert float_convolutions(run.model(form)) == set(record["kept"])
        assert bool(record["kept"]) is bool(shape.se)
        assert all("/se/" in layer for layer in record["kept"])
        outputs = [output.name for output in run.model(form).graph.output]
        assert outputs == (["stage1", "stage2"] if "--features" in flags else ["output"])
        assert (record["agreement"] is None) is ("--features" in flags)
    assert audit["by_dtype"]["int8"] == len(record["layers"]) - ("--features" not in flags)
    if "--size" in flags:
        sidecar = json.loads((run.out / "model.int8.engine.json").read_text())
        assert [shape[2:] for shape in sidecar["profile"]["input"]] == [[12, 12], [16, 16], [16, 16]]
        assert called(engines_main, "verify", run.out, "--static").code == 0


# Runs into the same directory


@pytest.fixture
def again(plain, workshop, tmp_path):
    """``again(*flags)``: another run into a copy of the directory, with inputs that may be changed."""
    shutil.copytree(plain.out, tmp_path / "out")
    for name in ("model.pt", "images.npz"):
        shutil.copy(workshop / name, tmp_path)
    return lambda *flags, **options: export(tmp_path, *flags, **options)


def said_of_the_calibration(run):
    return [line for line in run.outcome.stdout.splitlines() if line.removeprefix("note: ").startswith(CALIBRATION)]


def test_the_same_run_again_starts_from_the_calibration_and_gives_the_same_codes(again, plain, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("calibrated anew")

    monkeypatch.setattr("exporter.quantization.calibration.factors_from_images", never)
    run = passed(again())
    assert said_of_the_calibration(run) == [REUSED]
    for form in FORMS:
        assert sha256_of(run.out / f"model.{form}.onnx") == sha256_of(plain.out / f"model.{form}.onnx")
        assert run.record(form)["sqnr_db"] == plain.record(form)["sqnr_db"]
        assert run.record(form)["equalized_db"] is None
    assert sha256_of(run.out / CALIBRATION) == sha256_of(plain.out / CALIBRATION)


def another_checkpoint(folder):
    save_network(folder / "model.pt", seed=3)
    return []


def other_images(folder):
    save_images(folder / "images.npz", seed=2)
    return ["--ignore-witness"]


def cut_short(folder):
    path = folder / "out" / CALIBRATION
    path.write_bytes(path.read_bytes()[:-200])
    return []


def edited(change):
    """``change`` gets what the calibration says of its first form."""

    def prepare(folder):
        path = folder / "out" / CALIBRATION
        content = json.loads(path.read_text())
        change(content["forms"][0])
        path.write_text(json.dumps(content))
        return []

    return prepare


def with_a_negative_range(form):
    form["ranges"]["stage2.0/Conv"] *= -1


def with_a_factor_less(form):
    form["factors"]["stage1.0/Conv"].pop()


def with_another_layer(form):
    for name in ("ranges", "methods", "weight_scales"):
        form[name]["stage9.0/Conv"] = form[name]["stage2.0/Conv"]


STALE = {
    "another checkpoint": (another_checkpoint, "made from another checkpoint (sha256 "),
    "other images": (other_images, "made with other images (sha256 "),
    "another effort": (lambda _: ["--int8-effort", "high"], "made with --int8-effort default, not high"),
    "another scaling": (lambda _: ["--resize", 20], "made without --resize, and this run has 20"),
    "another epsilon": (lambda _: ["--eps", "1.1e-5"], "made with --eps 1e-05, not 1.1e-05"),
    "cut short": (cut_short, "this calibration is damaged or was edited"),
    "a negative range": (edited(with_a_negative_range), "this calibration is damaged or was edited"),
    "a factor less": (edited(with_a_factor_less), "its 7 factors of stage1.0/Conv are not of this network"),
    "another layer": (edited(with_another_layer), "it has a range of stage9.0/Conv, which this network has not"),
}
CHANGED_IN_FULL = ("another checkpoint", "cut short")


@pytest.mark.parametrize(("change", "words"), STALE.values(), ids=STALE)
def test_a_calibration_from_anything_else_is_refused_by_name(change, words, again, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(int8, "calibrated_forms", lambda *arguments: used.append(arguments[3]) or stop())
    run = again(*change(tmp_path))
    assert (run.outcome.code, used) == (1, [{}])
    (line,) = said_of_the_calibration(run)
    assert line.startswith(f"note: {CALIBRATION} is refused: ")
    assert words in line
    assert line.endswith("; calibrating anew")


def stop():
    raise exporter.errors.VerificationFailed("far enough")


@pytest.mark.parametrize("change", [STALE[name][0] for name in CHANGED_IN_FULL], ids=CHANGED_IN_FULL)
def test_what_was_refused_is_made_anew(change, again, plain, tmp_path):
    flags = change(tmp_path)
    run = passed(again(*flags))
    assert REUSED not in run.outcome.stdout
    found = calibration_from_file(run.out / CALIBRATION)
    assert found.binding.checkpoint == sha256_of(tmp_path / "model.pt")
    same = sha256_of(tmp_path / "out" / "model.int8.onnx") == sha256_of(plain.out / "model.int8.onnx")
    assert same is (change is cut_short)


def test_a_run_without_int8_removes_what_one_with_it_made(again, tmp_path):
    exported = called(main, tmp_path / "model.pt", "--size", SIZE, "--out", tmp_path / "out")
    assert exported.code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == REPORT_FILES | {"model.onnx"}


# From Python, and on trained weights


def test_python_takes_the_same_options(workshop, plain, tmp_path):
    report = exporter.export(
        workshop / "model.pt", tmp_path / "out", onnx=False, trt=("int8",), size=SIZE, resize=20,
        calibration=workshop / "images.npz", int8_effort="high", int8_report=True, int8_budget=21.0,
    )  # fmt: skip
    assert report.passed
    assert report.assumptions["resize"] == "20"
    for record in report.quantization:
        assert (record.effort, record.budget_db) == ("high", 21.0)
        assert all(layer.alone_db is not None for layer in record.layers)
    with pytest.raises(exporter.errors.UsageError, match="--trt int8: needs --calib"):
        exporter.export(workshop / "model.pt", tmp_path / "never", trt=("int8",), size=SIZE)


def test_trained_weights_keep_their_answers(tmp_path):
    with np.load(EXAMPLES / "fashion_calibration.npz") as data:
        np.savez(tmp_path / "images.npz", images=data["images"][:128])
    with np.load(EXAMPLES / "fashion_test.npz") as data:
        np.savez(tmp_path / "test.npz", images=data["images"][:200], labels=data["labels"][:200])
    shutil.copy(EXAMPLES / "fashion.pt", tmp_path / "model.pt")
    run = passed(export(tmp_path, "--size", 28, "--labels", tmp_path / "test.npz", "--max-drop", 1))
    assert run.record("int8")["sqnr_db"] > 32
    assert run.record("int8.rtx")["sqnr_db"] > 27
    assert "11 of 11 convs in INT8" in run.outcome.stdout
