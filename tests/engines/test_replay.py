"""``python -m engines replay``: a receipt that was changed is found out, by name; one that was not is consistent."""

from __future__ import annotations

import base64
import copy
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exporter
from engines.bench import Options
from engines.errors import InputRejected
from engines.json_value import Malformed
from engines.manifest import manifest_from_file
from engines.receipts import received, replay_throughput
from engines.receipts.figures import FIGURES
from engines.receipts.receipt import Request, receipt_from_folders
from engines.receipts.received import receipt_from_file
from engines.receipts.replay import checks_of_receipt
from engines.receipts.replay_throughput import TOLD, differences
from tests.conftest import EXAMPLES
from tests.engines import fake_nvml, pretended_receipts
from tests.engines.fake_tensorrt import engine_bytes
from tests.engines.pretended_receipts import (
    PROFILE,
    pretended_export,
    pretended_machine,
    scaled,
    sealed,
    written_receipt,
)
from tests.engines.sdk_bindings import FULL

UNSAID = "load"
HASHED = ("checkpoint", "onnx", "engine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("receipts")


@pytest.fixture(scope="module")
def sound(fashion_export, folder):
    """A receipt without a fault; not to be changed."""
    with written_receipt(fashion_export, folder, batches=(1,), duration=0.1) as value:
        return value


@pytest.fixture(scope="module")
def failed(fashion_export, tmp_path_factory):
    """One of an engine with a fault in stage1.2."""
    harm = scaled("stage1.2.weight")
    with written_receipt(
        fashion_export, tmp_path_factory.mktemp("failed"), harm=harm, batches=(1,), duration=0.1
    ) as value:
        return value


@pytest.fixture
def replayed(engines_command, tmp_path):
    """``replayed(value)``: what the command does with it."""

    def run(value, *arguments):
        (tmp_path / "receipt.json").write_text(json.dumps(value))
        return engines_command("replay", "receipt.json", *arguments)

    return run


def changed(value, *path, to):
    """A copy with another value at a place; ``to`` may be a function of the old one."""
    made = copy.deepcopy(value)
    inner = made
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to(inner[path[-1]]) if callable(to) else to
    return made


def problems_of(value, path):
    """What does not follow, or why it cannot be read."""
    path.write_text(json.dumps(value))
    try:
        return [problem for check in checks_of_receipt(receipt_from_file(path)) for problem in check.problems]
    except (InputRejected, Malformed) as error:
        return [str(error)]


# --- a receipt as it was written


def test_a_sound_receipt_is_consistent_and_what_that_means_is_said(sound, replayed):
    outcome = replayed(sound)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "FAIL" not in outcome.stdout
    assert outcome.stdout.splitlines()[-2:] == [
        "note a receipt can be forged by who wants to; it cannot change by accident unseen",
        "the receipt is consistent; it says: PASS: 11 of 11 checks hold, 2 not run",
    ]


def test_a_receipt_of_a_failure_is_consistent_too_and_says_what_failed(failed, replayed):
    outcome = replayed(failed)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.splitlines()[-1].endswith("it says: FAIL: 9 of 11 checks hold, 2 not run")
    assert "ok   export, fashion.fp32.engine: relative error 8.59e-03 exceeds 5.0e-06" in outcome.stdout
    assert "ok   export, fashion.fp32.engine, layers: departs first at stage1.2" in outcome.stdout


def test_however_the_file_is_laid_out(sound, tmp_path, engines_command):
    (tmp_path / "receipt.json").write_text(json.dumps(sound, indent=4, sort_keys=True))
    assert engines_command("replay", "receipt.json").code == 0


# --- a receipt that was changed by accident


def leaves(value, path=()):
    """The place of every number, true and false."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in pairs:
            yield from leaves(inner, (*path, name))
    elif isinstance(value, bool | int | float):
        yield path


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_other_number_is_found_out_by_the_digest(sound, folder, data):
    place = data.draw(st.sampled_from(list(leaves(sound))))
    value = changed(sound, *place, to=lambda old: not old if isinstance(old, bool) else old + 1)
    assert problems_of(value, folder / "changed.json")


def test_any_other_text_is_found_out_by_the_digest(sound, replayed):
    outcome = replayed(changed(sound, "versions", "numpy", to="0.1"))
    assert outcome.code == 1
    assert "digest: its SHA-256 is" in outcome.error


# --- one that was changed on purpose, and given a new digest


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_other_number_does_not_follow_from_the_raw_data(sound, folder, data):
    """But for what nothing depends on, which is named."""
    places = [place for place in leaves(sound) if not set(place) & {*TOLD, UNSAID} and not unused(place, sound)]
    place = data.draw(st.sampled_from(places))
    factor = data.draw(st.sampled_from([0.5, 0.999, 1.001, 2, -1]))

    def other(old):
        if isinstance(old, bool):
            return not old
        return old + 1 if isinstance(old, int) or old == 0 else old * factor

    assert problems_of(sealed(changed(sound, *place, to=other)), folder / "forged.json")


def unused(place, value):
    """A peak, which may bind no kernel, or the size of a file that is not listed."""
    if place[:2] == ("card", "operations_per_second"):
        return True
    file = value["exports"][0]["files"][place[3]] if place[2:3] == ("files",) else {"listed": True}
    return file["listed"] is None


EXPORT = ("exports", 0)
UNANSWERED = dict.fromkeys(("answers", *FIGURES)) | {"detail": "no GPU answers here"}
FP32 = (*EXPORT, "engines", 0)
ROW = (*EXPORT, "throughput", "rows", 3)
LATER = (*EXPORT, "throughput", "rows", 7)


def other_numbers(dtype, factor):
    def change(text):
        numbers = np.frombuffer(base64.b64decode(text), dtype) * np.dtype(dtype).type(factor)
        return base64.b64encode(numbers.tobytes()).decode()

    return change


def said_to_be(name, to):
    """The sidecar's text with something else said."""
    return lambda text: json.dumps({**json.loads(text), name: to}, indent=2) + "\n"


def other_times(text):
    times = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u8") + np.uint64(10**6)
    return base64.b64encode(zlib.compress(times.tobytes())).decode()


@pytest.mark.parametrize(
    ("place", "to", "said"),
    [
        (("ran_on_gpu",), False, "verdict: ran_on_gpu: False is written, and True follows"),
        (("passed",), False, "verdict: passed: False is written"),
        (("verdict",), "PASS: 99 of 99 checks hold", "verdict: verdict: PASS: 99 of 99 checks hold is written"),
        (("machine", "gpu"), "NVIDIA L4", "machine: NVIDIA GeForce RTX 3090 is not what a GPU called NVIDIA L4"),
        (("machine", "driver"), "1.2", "machine: machine.driver: 580.65.06 is written, and 1.2 follows"),
        (("machine", "compute_capability"), 89, "is sm86, and the GPU sm89"),
        (("card", "bytes_per_second"), 1e12, "bound.milliseconds"),
        (("card",), None, "bound"),
        ((*EXPORT, "golden", "outputs", "output", "base64"), other_numbers("<f8", 1.5), "relative_error"),
        ((*EXPORT, "golden"), None, "answers can be told apart"),
        ((*EXPORT, "findings", 1, "passed"), False, "answers can be told apart"),
        ((*EXPORT, "findings", 2, "passed"), False, "no finding says that it is sound"),
        ((*EXPORT, "files", 0, "sha256"), "0" * 64, "its sidecar's SHA-256 is not the file's"),
        ((*EXPORT, "files", 6, "sha256"), "0" * 64, "fashion.onnx: not as listed, and no finding says so"),
        ((*EXPORT, "files", 0, "name"), "other.engine", "an engine of which nothing else is said"),
        ((*EXPORT, "files", 1, "name"), "fashion.fp16.engine", "a file is named twice"),
        ((*FP32, "answers", "output", "base64"), other_numbers("<f4", 1.001), "relative_error"),
        ((*FP32, "answers", "output", "base64"), other_numbers("<f4", np.nan), "non_finite: 0 is written, and 40"),
        ((*FP32, "relative_error"), 1e-9, "relative_error: 1e-09 is written"),
        ((*FP32, "detail"), "relative error 1.0e-09 (gate 5.0e-06)", "detail: relative error 1.0e-09"),
        ((*FP32, "passed"), False, "passed: False is written, and True follows"),
        ((*FP32, "sidecar"), said_to_be("tolerance", 1e-3), "wider than that of fp32"),
        ((*FP32, "sidecar"), said_to_be("tolerance", 4.99e-6), "text is not that of the file that was hashed"),
        ((*FP32, "sidecar"), said_to_be("precision", "fp16"), "fp32 of tensorrt, which its sidecar does not say"),
        ((*FP32, "sidecar"), said_to_be("golden", "golden2.npz"), "text is not that of the file that was hashed"),
        ((*EXPORT, "files", 4, "sha256"), "0" * 64, "text is not that of the file that was hashed"),
        ((*EXPORT, "files", 4, "name"), "other.json", "fp32.engine: is not among the files, or its sidecar is not"),
        ((*EXPORT, "files", 4, "bytes"), 1, "text is not that of the file that was hashed"),
        ((*EXPORT, "files", 0, "bytes"), 1, "fashion.fp16.engine: not as listed, and no finding says so"),
        ((*EXPORT, "files", 7, "name"), "other.npz", "golden.npz: was read, and is not among the files"),
        ((*EXPORT, "files", 6, "name"), "other.onnx", "other.onnx: 0 findings of run, and there must be 1"),
        ((*EXPORT, "findings"), lambda found: found[:-1], "fashion.onnx: 0 findings of run, and there must be 1"),
        ((*EXPORT, "findings"), lambda found: found + found[-1:], "fashion.onnx: 2 findings of run, and there must be"),
        ((*EXPORT, "findings"), lambda found: found[1:], "no finding says whether the files are as listed"),
        ((*EXPORT, "findings", 3, "check"), "looked at", "fashion.fp16.engine: 0 findings of audit"),
        ((*EXPORT, "findings", 0, "file"), "golden.npz", "no finding says whether the files are as listed"),
        ((*FP32, "sidecar"), lambda text: text + " ", "text is not that of the file that was hashed"),
        ((*FP32, "answers"), None, "there are no answers that they follow from"),
        (FP32, lambda engine: engine | UNANSWERED, "figures or a verdict are written, and there are no answers"),
        ((*FP32, "sidecar"), said_to_be("compute_capabilities", [80, 89]), "it answered on sm86, which its sidecar"),
        ((*EXPORT, "throughput", "tool"), "0.0", "tool: 0.0 is written"),
        ((*EXPORT, "throughput", "versions"), {}, "versions.python: is missing"),
        ((*EXPORT, "throughput", "settings", 0, "value"), "1,8", "settings: batch: 1,8 is written, and 1 follows"),
        ((*EXPORT, "throughput", "rows"), lambda rows: rows[:-1], "fp16.engine, batch 1: is not measured in every way"),
        ((*ROW, "way"), "by hand", "fashion.fp32.engine, batch 1: is measured in a way that there is not"),
        ((*ROW, "telemetry"), None, "rows: the card tells nothing of itself"),
        ((*FP32, "layers"), [], "layers are told of an engine that fails, and of no other"),
        ((*FP32, "sidecar"), said_to_be("sha256", dict.fromkeys(HASHED, "0" * 64)), "its sidecar's SHA-256 is not"),
        ((*EXPORT, "throughput"), None, "there is a benchmark, or why there is none"),
        ((*EXPORT, "throughput_problem"), "none", "there is a benchmark, or why there is none"),
        ((*EXPORT, "works", "fashion.fp32.engine", 0, "operations"), 1, "operations_per_image"),
        ((*EXPORT, "works"), {}, "operations_per_image"),
        ((*EXPORT, "throughput", "files", 0, "sha256"), "0" * 64, "is not the one that was hashed"),
        ((*EXPORT, "throughput", "files", 0, "precision"), "fp16", "which its sidecar does not say"),
        ((*EXPORT, "throughput", "files", 0, "parity", "passed"), False, "verdict: PASS: 2 of 2"),
        ((*EXPORT, "throughput", "verdict"), "PASS: 3 of 3 files", "verdict: PASS: 3 of 3 files is written"),
        ((*ROW, "images_per_second", "value"), 1e6, "rows[3].images_per_second.value: 1000000.0 is written"),
        ((*ROW, "images_per_second", "low"), 1.0, "rows[3].images_per_second.low"),
        ((*ROW, "latency_ms", "p50", "value"), 1.0, "rows[3].latency_ms.p50.value"),
        ((*ROW, "latency_ms", "p99"), {"value": 1.0, "low": 1.0, "high": 1.0}, "rows[3].latency_ms.p99"),
        ((*ROW, "settled"), False, "rows[3].settled: False is written"),
        ((*ROW, "windows"), [1.0, 1.0, 1.0], "rows[3].windows[0]"),
        ((*ROW, "bound", "percent"), 99.0, "rows[3].bound.percent"),
        (("card", "operations_per_second", "fp32"), 1e9, "rows[3].bound.binds"),
        ((*ROW, "bound", "binds"), "memory alone", "rows[3].bound.binds"),
        ((*ROW, "batch"), 2, "rows[3].images_per_second.value"),
        ((*ROW, "raw", "latencies"), other_times, "rows[3].latency_ms"),
        ((*ROW, "raw", "parts", "compute"), other_times, "rows[3].parts_ms.compute"),
        ((*ROW, "raw", "walls", -1), 9.0, "rows[3].queries_per_second"),
        ((*ROW, "telemetry", "joules_per_image"), 1.0, "rows[3].telemetry.power_w"),
        ((*LATER, "speedup", "value"), 100.0, "rows[7].speedup.value: 100.0 is written"),
        ((*LATER, "speedup"), None, "rows[7].speedup"),
        ((*LATER, "no_speedup"), "slow", "rows[7].no_speedup"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_does_not_follow_is_named(sound, replayed, place, to, said):
    outcome = replayed(sealed(changed(sound, *place, to=to)))
    assert outcome.code == 1, outcome.stdout
    assert said in outcome.stdout
    assert "does not follow from its own raw data" in outcome.error


def test_equal_images_have_equal_answers(sound, replayed):
    """Else images that are called the same would hide that answers are mixed up."""
    digests = sound["exports"][0]["golden"]["images"]
    outcome = replayed(sealed(changed(sound, *EXPORT, "golden", "images", to=[digests[0]] * 4)))
    assert outcome.code == 1
    assert "golden: images are the same whose answers are not" in outcome.stdout


def test_answers_in_another_order_are_mixed_up(sound, replayed):
    def swapped(text):
        answers = np.frombuffer(base64.b64decode(text), "<f4").reshape(4, 10)[[1, 0, 2, 3]]
        return base64.b64encode(answers.tobytes()).decode()

    outcome = replayed(sealed(changed(sound, *FP32, "answers", "output", "base64", to=swapped)))
    assert outcome.code == 1
    assert "passed: True is written, and False follows" in outcome.stdout


def test_a_layer_that_passes_against_its_figures_is_named(failed, replayed):
    names = [layer["name"] for layer in failed["exports"][0]["engines"][0]["layers"]]
    place = (*FP32, "layers", names.index("stage1.2"), "passed")
    outcome = replayed(sealed(changed(failed, *place, to=True)))
    assert outcome.code == 1
    assert "layer stage1.2: passed True is written, and False follows from its figures" in outcome.stdout


@pytest.mark.parametrize(
    ("to", "said"),
    [
        (lambda layers: [], "a layer is there twice, or an output is not among them"),
        (lambda layers: layers[:-1], "a layer is there twice, or an output is not among them"),
        (lambda layers: [*layers, layers[-1]], "a layer is there twice, or an output is not among them"),
        (lambda layers: [*layers[:-1], {**layers[-1], "non_finite": 1}], "1 outputs are not finite, and its error is"),
    ],
    ids=["none", "no output", "twice", "finite"],
)
def test_layers_that_cannot_be_are_named(failed, replayed, to, said):
    outcome = replayed(sealed(changed(failed, *FP32, "layers", to=to)))
    assert (outcome.code, said in outcome.stdout) == (1, True)


def test_without_a_gpu_no_engine_has_a_verdict(fashion_export, tmp_path, replayed):
    with written_receipt(fashion_export, tmp_path, with_gpu=False) as value:
        pass
    assert replayed(value).code == 0
    outcome = replayed(sealed(changed(value, *FP32, "passed", to=False)))
    assert (outcome.code, "figures or a verdict are written" in outcome.stdout) == (1, True)


def test_peaks_that_bind_nothing_and_are_not_those_known_here_are_said_to_be(sound, replayed):
    assert "RTX 3090, its peaks are known" in replayed(sound).stdout
    outcome = replayed(sealed(changed(sound, "card", "operations_per_second", "int8", to=1e15)))
    assert (outcome.code, "its peaks are others than those that are known here" in outcome.stdout) == (0, True)


def test_an_audit_is_of_a_graph_that_is_there(sound, replayed):
    audited = changed(sound, *EXPORT, "findings", 3, "passed", to=True)
    audited = {**audited, "verdict": "PASS: 12 of 12 checks hold, 1 not run"}
    assert replayed(sealed(audited)).code == 0
    (place,) = [n for n, file in enumerate(sound["exports"][0]["files"]) if file["name"] == "fashion.fp16.onnx"]
    other = changed(audited, *EXPORT, "files", place, "sha256", to="0" * 64)
    assert "fp16.engine: was compared with its graph, which is not among the files" in replayed(sealed(other)).stdout


@pytest.fixture
def receipt_of(fashion_export, tmp_path, monkeypatch, engines_command):
    """``receipt_of(harm)``: the receipt of an export that was changed after it was made, as a file."""

    def make(harm):
        pretended_machine(monkeypatch, tmp_path)
        harm(pretended_export(fashion_export, tmp_path / "fashion"))
        engines_command("receipt", "fashion", "--batch", "1", "--duration", "0.1")
        return json.loads((tmp_path / "receipt.json").read_text())

    return make


def built_again(folder):
    sidecar = folder / "fashion.fp16.engine.json"
    manifest = manifest_from_file(sidecar)
    content = engine_bytes((folder / "fashion.fp16.onnx").read_bytes(), "tensorrt", FULL[1], PROFILE, seconds=(0.2, 0))
    (folder / "fashion.fp16.engine").write_bytes(content)
    digests = {**manifest.sha256, "engine": hashlib.sha256(content).hexdigest()}
    sidecar.write_text(dataclasses.replace(manifest, sha256=digests).to_json())


def test_how_busy_the_machine_was_may_differ_between_exports(fashion_export, tmp_path, monkeypatch, replayed):
    """It does, since minutes lie between them; nothing else of the machine may."""
    pretended_machine(monkeypatch, tmp_path)
    loads = itertools.count(1)
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    folders = tuple(pretended_export(fashion_export, tmp_path / name) for name in "ab")
    value = receipt_from_folders(Request(folders, Options(batches=(1,), duration=0.1)))
    assert [export["throughput"]["machine"]["load"] for export in value["exports"]] == [1, 2]
    assert replayed(value).code == 0
    other = changed(value, "exports", 1, "throughput", "machine", "driver", to="1.0")
    assert "machine.driver: 1.0 is written, and 580.65.06 follows" in replayed(sealed(other)).stdout


def test_images_of_several_sizes_are_counted_in_that_which_is_measured(tmp_path, monkeypatch, replayed):
    """The graph alone does not say how large they are; its profile's optimum is the golden images'."""
    sizes = [(least, 1, side, side) for least, side in ((1, 28), (4, 32), (8, 40))]
    monkeypatch.setattr(pretended_receipts, "PROFILE", sizes)
    source = tmp_path / "source"
    exporter.export(EXAMPLES / "fashion.pt", source, onnx=True, trt=("fp16",), size="28:32:40")
    with written_receipt(source, tmp_path, batches=(1,), duration=0.1) as value:
        pass
    assert value["exports"][0]["works"].keys() == {"fashion.fp32.engine", "fashion.fp16.engine"}
    outcome = replayed(value)
    assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize("name", ["NVIDIA\n| <!-- /verified-on --> \x07 RTX/4090", "\u202eNVIDIA RTX A\u00a02000"])
def test_a_gpu_of_any_name_has_a_receipt_that_can_be_read(receipt_of, replayed, monkeypatch, name):
    value = receipt_of(lambda folder: monkeypatch.setitem(fake_nvml.NAMES, 0, name))
    assert (value["card"], value["machine"]["gpu"].isprintable()) == (None, True)
    assert replayed(value).code == 0


def test_an_engine_that_was_built_again_is_not_as_listed_and_need_not_be(receipt_of, replayed):
    value = receipt_of(built_again)
    assert value["passed"] is True
    assert replayed(value).code == 0
    (place,) = [n for n, file in enumerate(value["exports"][0]["files"]) if file["name"] == "fashion.fp16.onnx"]
    outcome = replayed(sealed(changed(value, *EXPORT, "files", place, "listed", "sha256", to="0" * 64)))
    for name in ("fashion.fp16.engine", "fashion.fp16.engine.json", "fashion.fp16.onnx"):
        assert f"{name}: not as listed, and no finding says so" in outcome.stdout


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: (path / "no.engine").mkdir(), "no.engine: no such engine"),
        (lambda path: (path / "no.onnx").mkdir(), "no.onnx: "),
        (lambda path: (path / "golden.npz").write_bytes(b"PK"), "golden.npz: "),
        (lambda path: (path / "fashion.fp16.onnx").unlink(), "fashion.fp16.onnx: missing"),
        (lambda path: (path / "report.json").write_text("{}"), "report.json: "),
        (
            lambda path: (path / "fashion.fp16.engine.json").write_text("{}", encoding="utf-16"),
            "fashion.fp16.engine.json: not JSON",
        ),
    ],
    ids=["engine", "graph", "golden", "missing", "report", "sidecar"],
)
def test_a_receipt_of_a_damaged_export_is_consistent_and_says_what_is_wrong(receipt_of, replayed, harm, said):
    value = receipt_of(harm)
    assert value["passed"] is False
    outcome = replayed(value)
    assert outcome.code == 0, outcome.stderr
    (files,) = [line for line in outcome.stdout.splitlines() if line.startswith("ok   export, files: ")]
    assert said in files.partition("; it is said that ")[2]


def test_a_sidecar_that_names_other_golden_vectors_is_judged_by_those_that_are_told(receipt_of, replayed):
    def harm(folder):
        shutil.copy(folder / "golden.npz", folder / "other.npz")
        golden_of(folder, name="other.npz", outputs=lambda array: array[::-1])
        sidecar = folder / "fashion.fp16.engine.json"
        sidecar.write_text(said_to_be("golden", "other.npz")(sidecar.read_text()))

    assert replayed(receipt_of(harm)).code == 0


def test_a_warning_that_is_left_out_is_named(sound, replayed):
    """Every second slice takes a tenth longer: the latencies vary, and that must be said."""

    def slower(text):
        times = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u8").copy()
        times[::2] += times[::2] // np.uint64(10)
        return base64.b64encode(zlib.compress(times.tobytes())).decode()

    value = changed(sound, *ROW, "raw", "parts", "compute", to=slower)
    outcome = replayed(sealed(value))
    assert outcome.code == 1
    assert "warnings: it is not said that fashion.fp32.engine, batch 1, CUDA graph, compute alone" in outcome.stdout


# --- what cannot be read


def bomb(_):
    return base64.b64encode(zlib.compress(bytes(1 << 26))).decode()


@pytest.mark.parametrize(
    ("place", "to", "said"),
    [
        (("schema",), 2, "schema: expected 1"),
        (("schema",), 1.0, "schema: expected a whole number"),
        (("date",), "yesterday", "date: expected a time in UTC"),
        (("exports",), [], "exports: expected one or more exports"),
        (("host",), "mine", "host: not a name that belongs here"),
        ((*FP32, "answers", "output", "base64"), lambda text: text[:-4], "answers.output.base64: expected base64"),
        ((*FP32, "answers", "output", "base64"), "*" * 216, "answers.output.base64: expected base64"),
        ((*FP32, "answers", "output", "shape"), [5, 10], "answers.output.base64: expected base64 of 200 bytes"),
        ((*FP32, "answers", "output", "shape"), [1 << 30, 10], "shape: expected a shape of at most"),
        ((*FP32, "sidecar"), said_to_be("precision", "fp8"), "sidecar.precision: expected one of fp32, fp16, int8"),
        ((*FP32, "sidecar"), said_to_be("tolerance", 0), "sidecar.tolerance: expected"),
        ((*FP32, "sidecar"), None, "sidecar: expected its text, since the engine was run"),
        ((*FP32, "sidecar"), {}, "sidecar: expected the text of a sidecar"),
        ((*FP32, "sidecar"), "[" * 100_000, "sidecar: not JSON"),
        ((*FP32, "sidecar"), "\ud800", "sidecar: 'utf-8' codec can't encode"),
        ((*FP32, "sidecar"), "{}", "sidecar.schema: missing"),
        ((*FP32, "non_finite"), -1, "non_finite: expected a whole number"),
        ((*EXPORT, "engines"), [], "engines: expected one or more engines"),
        ((*EXPORT, "files", 0, "name"), "../x", "name: expected a plain file name"),
        ((*EXPORT, "golden", "outputs", "output", "base64"), other_numbers("<f8", np.nan), "expected finite numbers"),
        ((*EXPORT, "golden", "images"), ["0" * 64], "expected finite numbers for each of 1 images"),
        ((*EXPORT, "works", "fashion.fp32.engine", 0, "dtype"), "fp8", "dtype: expected one of"),
        ((*ROW, "raw", "latencies"), bomb, "latencies: expected"),
        ((*ROW, "raw", "latencies"), "AAAA", "latencies: expected"),
        ((*ROW, "raw", "latencies"), 7, "latencies: expected"),
        ((*ROW, "raw", "parts"), {"compute": "AAAA"}, "raw.parts.compute: expected"),
        ((*ROW, "raw", "rounds"), [1], "walls: expected a list of 1"),
        ((*ROW, "raw", "rounds", 0), 1 << 24, "queries in rounds, more than the 16777216 that are made again"),
        ((*ROW, "raw", "rounds", 0), 1 << 31, "rounds[0]: expected a whole number"),
        ((*ROW, "raw", "rounds_per_window"), 2, "rounds: expected queries of each round"),
        ((*ROW, "raw", "walls", 0), -1.0, "walls: expected seconds"),
        ((*ROW, "raw", "walls", 0), 1e300, "walls: expected seconds"),
        ((*ROW, "raw"), None, "raw: expected an object"),
        ((*ROW, "file"), "other.engine", "rows: expected one or more rows of the files"),
        ((*ROW, "way"), "launches, compute alone", "rows: expected one or more rows of the files"),
        ((*ROW, "telemetry"), [[]], "telemetry: expected an object"),
        ((*ROW, "telemetry"), {}, "telemetry.seconds: missing"),
        ((*ROW, "telemetry", "seconds"), None, "telemetry.seconds: expected a number"),
        (("date",), "2026-19-39T29:59:59Z", "date: expected a time in UTC"),
        (("machine",), lambda machine: {**machine, "host": "mine"}, "machine.host: not a name that belongs here"),
        ((*ROW, "telemetry", "throttled"), 1.0, "throttled: expected a list"),
        ((*EXPORT, "throughput", "rows"), [], "rows: expected one or more rows"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_is_damaged_is_one_line(sound, replayed, place, to, said):
    outcome = replayed(sealed(changed_or_added(sound, place, to)))
    assert outcome.code == 3, outcome.stdout
    assert said in outcome.error
    assert outcome.stdout == ""


def changed_or_added(value, place, to):
    return {**value, place[0]: to} if place[0] not in value else changed(value, *place, to=to)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"[]", "expected an object"),
        (b'{"schema": NaN}', "NaN is no JSON number"),
        (b'{"schema": 1, "schema": 1}', "stands there twice"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
    ],
    ids=["empty", "list", "nan", "twice", "deep", "binary"],
)
def test_what_is_no_receipt_is_one_line(engines_command, tmp_path, content, said):
    (tmp_path / "receipt.json").write_bytes(content)
    outcome = engines_command("replay", "receipt.json")
    assert (outcome.code, said in outcome.error) == (3, True), outcome.stderr


def test_a_file_that_is_not_there_is_one_line(engines_command):
    assert "cannot be read" in engines_command("replay", "nothing.json").error


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_anything_at_any_place_is_a_finding_or_one_line(sound, folder, data):
    """No value whatever, put anywhere, ends in another error."""
    place = data.draw(st.sampled_from(list(everywhere(sound))))
    to = data.draw(
        st.none()
        | st.booleans()
        | st.integers()
        | st.just(10**400)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=3)
        | st.lists(st.none(), max_size=2)
        | st.dictionaries(st.text(max_size=2), st.none(), max_size=1)
    )
    value = changed(sound, *place, to=to)
    (folder / "any.json").write_text(json.dumps(sealed(value)))
    said = []
    try:
        for check in checks_of_receipt(receipt_from_file(folder / "any.json")):
            said += check.problems
    except (InputRejected, Malformed) as error:
        said.append(str(error))
    assert [line for line in said if "\n" in line] == []


def everywhere(value, path=()):
    if path:
        yield path
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from everywhere(inner, (*path, name))


@pytest.mark.parametrize(
    ("written", "again", "said"),
    [
        (1, 1.0, []),
        (1.0, 1.0 + 1e-12, []),
        (1.0, 1.001, ["x: 1.0 is written, and 1.001 follows from the raw data"]),
        (True, 1, ["x: True is written, and 1 follows from the raw data"]),
        (None, 1.0, ["x: null is written, and 1.0 follows from the raw data"]),
        (10**400, 1.0, ["x: 1000"]),
        ([1], [1, 2], ["x: something else is written"]),
        ({"a": 1}, {"b": 1}, ["x.b: is missing", "x.a: does not belong here"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["x.a[1]: 2 is written"]),
    ],
)
def test_differences_are_named_by_their_place(written, again, said):
    found = list(differences(written, again, "x"))
    assert len(found) == len(said)
    assert all(one.startswith(beginning) for one, beginning in zip(found, said, strict=True))


@pytest.mark.parametrize("surplus", [0, 1])
def test_no_more_rows_are_made_again_than_a_benchmark_has(sound, replayed, monkeypatch, surplus):
    rows = sound["exports"][0]["throughput"]["rows"]
    monkeypatch.setattr(replay_throughput, "MOST_ROWS", len(rows) - surplus)
    outcome = replayed(sound)
    assert outcome.code == (3 if surplus else 0)
    assert (f"{len(rows)} rows, more than the {len(rows) - 1} that are made again" in outcome.stderr) is bool(surplus)


@pytest.mark.parametrize("surplus", [0, 1])
def test_queries_are_counted_over_all_exports_before_any_is_unpacked(sound, replayed, monkeypatch, surplus):
    rows = sound["exports"][0]["throughput"]["rows"]
    queries = 2 * sum(sum(row["raw"]["rounds"]) for row in rows)
    monkeypatch.setattr(replay_throughput, "MOST_QUERIES", queries - surplus)
    twice = {**sound, "exports": sound["exports"] * 2}
    damaged = changed(twice, "exports", 0, "throughput", "rows", 0, "raw", "latencies", to="damaged")
    outcome = replayed(sealed(damaged))
    assert outcome.code == 3
    said = f"{queries} queries in rounds, more than" if surplus else "latencies: expected"
    assert said in outcome.error


@pytest.mark.parametrize("surplus", [0, 1])
def test_a_file_of_more_values_than_any_receipt_is_refused_before_they_are_objects(
    sound, tmp_path, engines_command, monkeypatch, surplus
):
    text = json.dumps(sound)
    (tmp_path / "receipt.json").write_text(text)
    monkeypatch.setattr(received, "MOST_VALUES", text.count(",") - surplus)
    outcome = engines_command("replay", "receipt.json")
    assert outcome.code == (3 if surplus else 0)
    assert ("larger than any receipt" in outcome.stderr) is bool(surplus)


# --- against an export that is here


def test_an_export_that_is_here_is_compared(sound, folder, replayed):
    outcome = replayed(sound, "--against", folder / "fashion")
    assert outcome.code == 0, outcome.stderr
    assert "ok   against fashion, files: 10 files are the same" in outcome.stdout
    assert "ok   against fashion, golden: 4 images and their answers are the same" in outcome.stdout


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            lambda path: (path / "fashion.onnx").write_bytes(b"x"),
            "fashion.onnx: its SHA-256 is not that in the receipt",
        ),
        (lambda path: (path / "fashion.fp32.engine").unlink(), "fashion.fp32.engine: missing"),
        (lambda path: golden_of(path, images=lambda array: array[::-1]), "the images are others"),
        (lambda path: golden_of(path, outputs=lambda array: array * 1.5), "the reference is another"),
    ],
    ids=["file", "missing", "images", "reference"],
)
def test_another_export_is_told_from_it(sound, folder, replayed, tmp_path, harm, said):
    here = shutil.copytree(folder / "fashion", tmp_path / "here")
    harm(here)
    outcome = replayed(sound, "--against", here)
    assert outcome.code == 1
    assert said in outcome.stdout


def golden_of(path, name="golden.npz", images=lambda array: array, outputs=lambda array: array):
    with np.load(path / name) as archive:
        arrays = dict(archive)
    np.savez(path / name, input=images(arrays["input"]), output=outputs(arrays["output"]))


def test_of_two_exports_with_files_of_one_name_it_is_the_one_that_is_here(sound, folder, replayed):
    other = changed(sound, *EXPORT, "files", 6, "sha256", to="0" * 64)
    two = {**sound, "exports": [other["exports"][0], sound["exports"][0]]}
    outcome = replayed(sealed(two), "--against", folder / "fashion")
    assert "ok   against fashion, files: 10 files are the same" in outcome.stdout
    assert "FAIL against" not in outcome.stdout


def test_another_export_is_not_said_to_be_a_contradiction_in_the_receipt(sound, folder, replayed, tmp_path):
    here = shutil.copytree(folder / "fashion", tmp_path / "here")
    (here / "fashion.onnx").write_bytes(b"another")
    other = replayed(sound, "--against", here)
    assert f"is of something else than {here}: against here, files: fashion.onnx: its SHA-256" in other.error
    altered = replayed(changed(sound, "tool", to="0"), "--against", here)
    assert "does not follow from its own raw data: digest:" in altered.error
    assert "fashion.onnx" not in altered.error


def test_a_directory_of_something_else_is_one_line(sound, replayed, tmp_path, fashion_export):
    (tmp_path / "other").mkdir()
    shutil.copy(fashion_export / "golden.npz", tmp_path / "other")
    outcome = replayed(sound, "--against", "other")
    assert (outcome.code, "holds none of the engines" in outcome.error) == (3, True)
    assert replayed(sound, "--against", "nowhere").code == 3
