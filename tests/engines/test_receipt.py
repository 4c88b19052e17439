"""``python -m engines receipt`` on a pretended machine: what is in it and what is not, also where something failed."""

from __future__ import annotations

import base64
import dataclasses
import getpass
import json
import os
import pathlib
import shutil
import socket
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engines.bench import Options
from engines.bench.options import settings_of
from engines.bench.record import Parity
from engines.errors import CompilerRefused, DeviceFailed
from engines.files import sha256_of
from engines.json_value import Malformed, Value
from engines.receipts import layer_by_layer, receipt
from engines.receipts import machine as machine_module
from engines.receipts.anonymous import directory_in, without_directories
from engines.receipts.packing import packed_array, unpacked_array
from tests.engines.pretended_receipts import (
    CAPABILITY,
    GPU,
    SECONDS,
    pretended_export,
    pretended_machine,
    scaled,
    written_receipt,
)

FAILED = Parity(passed=False, detail="planted")
ANSWERS = ("fashion.fp32", "fashion.fp16")


@pytest.fixture(scope="module")
def sound(fashion_export, tmp_path_factory):
    """A receipt without a fault, and the directory that it is of."""
    folder = tmp_path_factory.mktemp("sound")
    with written_receipt(fashion_export, folder) as value:
        return value, folder / "fashion"


@pytest.fixture
def export(fashion_export, tmp_path):
    """``export(harm)``: a directory for the pretended machine of this test."""

    def make(name="fashion", harm=None):
        return pretended_export(fashion_export, tmp_path / name, harm=harm)

    return make


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """``machine(harm)``: a GPU from now on."""
    return lambda harm=None: pretended_machine(monkeypatch, tmp_path, harm)


def written(path):
    return json.loads(path.read_text())


FAST = ("--batch", "1", "--duration", "0.1")

# --- what is in it


def test_the_first_field_says_that_a_gpu_ran(sound):
    value, _ = sound
    assert next(iter(value.items())) == ("ran_on_gpu", True)
    assert (value["passed"], value["verdict"]) == (True, "PASS: 11 of 11 checks hold, 2 not run")


def test_every_file_is_there_with_its_hash(sound):
    value, folder = sound
    (export,) = value["exports"]
    assert {file["name"]: (file["bytes"], file["sha256"]) for file in export["files"]} == {
        path.name: (path.stat().st_size, sha256_of(path)) for path in folder.iterdir()
    }
    listed = {file["name"] for file in export["files"] if file["listed"] is not None}
    assert listed == {path.name for path in folder.iterdir()} - {"report.json"}


def test_answers_and_reference_are_kept_bit_for_bit(sound):
    value, folder = sound
    (export,) = value["exports"]
    with np.load(folder / "golden.npz") as archive:
        golden = {name: archive[name] for name in archive.files}
    kept = export["golden"]["outputs"]["output"]
    reference = np.frombuffer(base64.b64decode(kept["base64"]), "<f8").reshape(kept["shape"])
    assert np.array_equal(reference, golden["output"])
    assert len(set(export["golden"]["images"])) == len(golden["input"])
    for engine, name in zip(export["engines"], ANSWERS, strict=True):
        session = onnx_session(folder / f"{name}.onnx")
        images = golden["input"]
        expected = np.concatenate([session.run(None, {"input": part})[0] for part in (images[:1], images[1:])])
        answers = np.frombuffer(base64.b64decode(engine["answers"]["output"]["base64"]), "<f4").reshape(-1, 10)
        assert np.allclose(answers, expected, rtol=0, atol=1e-5)
        error = np.abs(answers - reference).max() / np.abs(reference).max()
        assert engine["relative_error"] == pytest.approx(error, rel=1e-12)
        assert engine["layers"] is None


def onnx_session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_throughput_is_what_the_card_was_told_with_every_latency_and_the_bound(sound):
    value, _ = sound
    record = value["exports"][0]["throughput"]
    rows = [row for row in record["rows"] if row["way"] == "CUDA graph, compute alone"]
    assert [(row["file"], row["batch"]) for row in rows] == [(f"{name}.engine", n) for n in (1, 4) for name in ANSWERS]
    for row in rows:
        batch_seconds, image_seconds = SECONDS[row["file"].split(".")[1]]
        expected = row["batch"] / (batch_seconds + row["batch"] * image_seconds + 0.5e-3)
        assert row["images_per_second"]["value"] == pytest.approx(expected, rel=1e-3)
        assert sum(row["raw"]["rounds"]) >= row["queries"] > 0
        assert row["bound"]["card"] == GPU
        assert row["telemetry"]["power_w"] == pytest.approx(100)
    assert rows[1]["speedup"]["value"] == pytest.approx(210.5 / 105.5, rel=1e-2)
    assert {len(works) for works in value["exports"][0]["works"].values()} != {0}


def test_the_machine_and_its_software_are_named(sound):
    value, _ = sound
    assert (value["machine"]["gpu"], value["machine"]["compute_capability"]) == (GPU, CAPABILITY)
    assert value["machine"]["driver"] == "580.65.06"
    assert {"python", "numpy", "onnxruntime", "cuda-bindings", "nvidia-ml-py"} <= value["versions"].keys()
    assert value["card"]["title"] == GPU


def test_sidecars_are_there_to_the_byte(sound):
    """So that their SHA-256 is among those of the files; nothing in them says where they were."""
    value, folder = sound
    for engine in value["exports"][0]["engines"]:
        assert engine["sidecar"].encode() == (folder / f"{engine['file']}.json").read_bytes()
        assert directory_in(json.loads(engine["sidecar"]), [folder]) is None


@pytest.mark.parametrize(("status", "expected"), [(0, "12.8"), (35, None)])
def test_the_drivers_cuda_is_asked_of_the_driver(monkeypatch, status, expected):
    class Driver:
        def cuDriverGetVersion(self, place):
            place._obj.value = 12080
            return status

    monkeypatch.setattr(machine_module.ctypes, "CDLL", lambda name: Driver())
    assert machine_module.cuda_of_driver() == expected


def test_several_exports_are_in_one_receipt(export, machine, engines_command):
    machine()
    outcome = engines_command("receipt", export("a"), export("b"), *FAST)
    assert outcome.code == 0, outcome.stderr
    value = written(pathlib.Path("receipt.json"))
    assert [len(made["engines"]) for made in value["exports"]] == [2, 2]
    assert value["verdict"] == "PASS: 22 of 22 checks hold, 4 not run"


# --- failures are written


def test_an_engine_that_computes_something_else_is_told_layer_by_layer(export, machine, engines_command, tmp_path):
    harm = scaled("stage1.2.weight")
    machine(harm)
    outcome = engines_command("receipt", export(harm=harm), *FAST, "--out", "found.json")
    assert outcome.code == 1
    assert "FAIL: 9 of 11 checks hold" in outcome.error
    assert "found.json says what, send it all the same" in outcome.error
    first, second = written(tmp_path / "found.json")["exports"][0]["engines"]
    assert (first["passed"], second["passed"], second["layers"]) == (False, True, None)
    departed = [layer["name"] for layer in first["layers"] if not layer["passed"]]
    assert departed[0] == "stage1.2"
    assert first["layers"][0]["passed"]
    assert first["detail"].startswith("relative error 8.59e-03 exceeds 5.0e-06")


def test_answers_that_are_nan_are_kept_and_fail(export, machine, engines_command, tmp_path):
    harm = scaled("head.bias", np.nan)
    machine(harm)
    assert engines_command("receipt", export(harm=harm), *FAST).code == 1
    first = written(tmp_path / "receipt.json")["exports"][0]["engines"][0]
    assert (first["relative_error"], first["sqnr_db"], first["non_finite"]) == (None, None, 40)
    assert [layer["name"] for layer in first["layers"] if not layer["passed"]] == ["output"]


def test_where_the_layers_cannot_be_compiled_that_is_said(export, machine, engines_command, tmp_path, monkeypatch):
    harm = scaled("stage1.2.weight")
    machine(harm)

    def refuse(*_):
        raise CompilerRefused("TensorRT refused the graph: planted")

    monkeypatch.setattr(layer_by_layer, "compile_copy", refuse)
    assert engines_command("receipt", export(harm=harm), *FAST).code == 1
    first = written(tmp_path / "receipt.json")["exports"][0]["engines"][0]
    assert (first["layers"], first["layers_problem"]) == (None, "TensorRT refused the graph: planted")


def test_a_benchmark_that_ends_in_an_error_is_a_failure_with_its_reason(
    export, machine, engines_command, tmp_path, monkeypatch
):
    machine()

    def fail(*_, **__):
        raise DeviceFailed(f"{tmp_path}/fashion/fashion.fp32.engine: cudaGraphLaunch failed: planted")

    monkeypatch.setattr(receipt, "bench", fail)
    assert engines_command("receipt", export(), *FAST).code == 1
    value = written(tmp_path / "receipt.json")
    assert value["verdict"] == "FAIL: 9 of 10 checks hold, 2 not run"
    assert value["exports"][0]["throughput_problem"] == "fashion.fp32.engine: cudaGraphLaunch failed: planted"


def test_answers_that_are_wrong_while_they_are_timed_fail_the_receipt(
    export, machine, engines_command, tmp_path, monkeypatch
):
    """In a batch of other images, or launched as a graph: nothing else computes that."""
    machine()
    measure = receipt.bench

    def wrong(*arguments, **options):
        record = measure(*arguments, **options)
        first, second = record.files
        return dataclasses.replace(record, files=(first, dataclasses.replace(second, parity=FAILED)))

    monkeypatch.setattr(receipt, "bench", wrong)
    outcome = engines_command("receipt", export(), *FAST)
    assert (outcome.code, "FAIL: 10 of 11 checks hold" in outcome.error) == (1, True), outcome.stderr
    value = written(tmp_path / "receipt.json")
    assert [engine["passed"] for engine in value["exports"][0]["engines"]] == [True, True]
    assert value["passed"] is False


def test_an_engine_that_was_tampered_with_is_neither_run_nor_measured(export, machine, engines_command, tmp_path):
    machine()
    folder = export()
    content = bytearray((folder / "fashion.fp32.engine").read_bytes())
    content[-1] ^= 1
    (folder / "fashion.fp32.engine").write_bytes(content)
    assert engines_command("receipt", folder, *FAST).code == 1
    made = written(tmp_path / "receipt.json")["exports"][0]
    by_name = {engine["file"]: engine for engine in made["engines"]}
    assert by_name["fashion.fp32.engine"]["answers"] is None
    assert "its SHA-256 is" in by_name["fashion.fp32.engine"]["detail"]
    assert by_name["fashion.fp16.engine"]["passed"]
    assert [file["file"] for file in made["throughput"]["files"]] == ["fashion.fp16.engine"]
    assert [finding["passed"] for finding in made["findings"] if finding["check"] == "listed"] == [False]


def test_without_golden_vectors_nothing_can_be_judged(export, machine, engines_command, tmp_path):
    machine()
    folder = export()
    (folder / "golden.npz").unlink()
    assert engines_command("receipt", folder, *FAST).code == 1
    made = written(tmp_path / "receipt.json")
    assert made["exports"][0]["golden"] is None
    assert (made["ran_on_gpu"], made["passed"]) == (False, False)
    assert made["verdict"].startswith("no GPU ran anything; FAIL")


# --- no GPU


def test_without_a_gpu_it_ends_at_once_and_writes_nothing(export, engines_command, tmp_path):
    outcome = engines_command("receipt", export(), *FAST)
    assert outcome.code == 4
    assert "no GPU answers here" in outcome.error
    assert "--allow-no-gpu" in outcome.error
    assert not (tmp_path / "receipt.json").exists()


def test_a_receipt_without_a_gpu_says_so_first(export, engines_command, tmp_path):
    outcome = engines_command("receipt", export(), "--allow-no-gpu")
    assert outcome.code == 0, outcome.stderr
    value = written(tmp_path / "receipt.json")
    assert next(iter(value.items())) == ("ran_on_gpu", False)
    assert value["verdict"] == "no GPU ran anything; PASS: 7 of 7 checks hold, 4 not run"
    assert {engine["answers"] for engine in value["exports"][0]["engines"]} == {None}
    assert value["exports"][0]["throughput"] is None


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere"], 3, "nowhere: has no report.json"),
        (["empty"], 3, "empty: has no engine to be run"),
        (["fashion", "fashion"], 2, "a directory is given twice"),
        (["fashion", "--batch", "0"], 2, "--batch"),
        (["fashion", "--duration", "-1"], 2, "--duration"),
        (["fashion", "--duration", "3.1"], 2, "--duration 3.1: a receipt has every latency, so give up to 3"),
        (["fashion", "--device", "-1"], 2, "--device -1: GPUs are counted from 0"),
        (["fashion", "--out", "no/such/receipt.json"], 5, "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(export, machine, engines_command, tmp_path, arguments, code, said):
    machine()
    folder = export()
    (tmp_path / "empty").mkdir()
    shutil.copy(folder / "report.json", tmp_path / "empty")
    outcome = engines_command("receipt", *arguments, *(FAST if code == 5 else ()))
    assert (outcome.code, said in outcome.error) == (code, True), outcome.stderr
    assert not list(tmp_path.glob("*receipt.json*"))


@pytest.mark.parametrize(
    "out",
    [
        "no/such/receipt.json",
        "queue",
        "empty",
        "empty/x/../../..",
        "fashion/report.json",
        "fashion/fashion.fp32.engine",
    ],
)
def test_a_place_that_takes_no_receipt_is_refused_before_anything_runs(
    export, machine, engines_command, tmp_path, out, monkeypatch
):
    machine()
    export()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "queue")
    monkeypatch.setattr(receipt, "receipt_from_folders", lambda _: pytest.fail("it ran"))
    outcome = engines_command("receipt", "fashion", "--out", out)
    assert (outcome.code, outcome.stdout) == (5, "")
    assert f"{out}: cannot be written, " in outcome.error
    assert stat.S_ISFIFO((tmp_path / "queue").stat().st_mode)
    assert not list((tmp_path / "empty").iterdir())


def test_a_directory_that_takes_no_file_is_refused_before_anything_runs(
    export, machine, engines_command, tmp_path, monkeypatch
):
    machine()
    export()
    monkeypatch.setattr(receipt, "receipt_from_folders", lambda _: pytest.fail("it ran"))
    monkeypatch.setattr(os, "access", lambda path, mode: (pathlib.Path(path), mode) != (tmp_path, os.W_OK | os.X_OK))
    outcome = engines_command("receipt", "fashion", "--out", tmp_path / "receipt.json")
    assert (outcome.code, "is read-only" in outcome.error) == (5, True)


def test_beside_the_files_of_an_export_there_is_room_for_it(export, machine, engines_command):
    machine()
    folder = export()
    for _ in range(2):
        assert engines_command("receipt", folder, *FAST, "--out", folder / "receipt.json").code == 0


@pytest.mark.parametrize("name", ["a\nb.onnx", "a\\b.onnx", "a\u00a0b.engine", "a\udcff.engine"], ids=ascii)
def test_a_file_of_a_name_that_no_receipt_can_tell_is_refused_before_anything_runs(
    export, machine, engines_command, tmp_path, name
):
    machine()
    (export() / name).write_bytes(b"")
    outcome = engines_command("receipt", "fashion", *FAST)
    assert (outcome.code, "a receipt cannot tell of a file that is called 'a" in outcome.error) == (3, True)
    assert not (tmp_path / "receipt.json").exists()


# --- what is not in it


def test_a_sidecar_that_names_a_directory_of_this_machine_is_not_sent(export, machine, engines_command, tmp_path):
    """It is told whole, since its SHA-256 must be that of the file: nothing can be left out of it."""
    machine()
    sidecar = export() / "fashion.fp16.engine.json"
    manifest = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(manifest | {"assumptions": {**manifest["assumptions"], "from": f"{tmp_path}/x"}}))
    outcome = engines_command("receipt", "fashion", *FAST)
    assert outcome.code == 3
    assert f"fashion.fp16.engine.json: names {tmp_path}, and a receipt tells all of it" in outcome.error
    assert not (tmp_path / "receipt.json").exists()


@pytest.fixture
def told(export, machine, engines_command, tmp_path, monkeypatch):
    """The text of a receipt of a machine that has much to tell, with an error that names a directory."""
    monkeypatch.setenv("HOME", "/home/jane.roe")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    monkeypatch.setattr(socket, "gethostname", lambda: "janes-workstation")
    monkeypatch.setattr(getpass, "getuser", lambda: "jane.roe")

    def write():
        machine()
        folder = export("jane's exports")
        (folder / "fashion.fp32.engine.json").unlink()

        def fail(paths, *_, **__):
            raise DeviceFailed(f"{paths[0]}: planted; see '/home/jane.roe/.cache/x.log' and /var/lib/nvidia")

        monkeypatch.setattr(receipt, "bench", fail)
        assert engines_command("receipt", folder, *FAST).code == 1
        return (tmp_path / "receipt.json").read_text()

    return write


SECRETS = ("jane", "/home", "/var", "GPU-8932", "PASSIVE", "/tmp", "pytest-of", "test_")


def test_names_and_directories_are_left_out(told, tmp_path):
    text = told()
    assert [secret for secret in (*SECRETS, str(tmp_path)) if secret in text] == []
    assert "fashion.fp16.engine: planted; see 'x.log' and nvidia" in text
    assert "its sidecar fashion.fp32.engine.json is missing" in text


def test_the_check_on_directories_would_see_them(told, tmp_path, monkeypatch):
    monkeypatch.setattr(receipt, "without_directories", lambda text, folders=(): text)
    text = told()
    assert {"jane", "/home", "/var"} <= {secret for secret in SECRETS if secret in text}


def test_the_environment_is_left_out_of_the_settings(export, machine, monkeypatch):
    """A benchmark alone tells it."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    machine()
    options = Options(batches=(1,), duration=0.1)
    record = receipt.receipt_from_folders(receipt.Request((export(),), options))["exports"][0]["throughput"]
    assert {"batch", "duration", "device"} <= {setting["name"] for setting in record["settings"]}
    assert "environment" not in {setting["source"] for setting in record["settings"]}
    told = settings_of(options, (1,), [(28, 28)], with_onnx=False, with_gpu=True)
    assert "OMP_WAIT_POLICY" in {setting.name for setting in told}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/x.onnx: bad", "x.onnx: bad"),
        ("see '/home/me/a b.json'", "see 'a b.json'"),
        ("python -m engines build /a/b/c.onnx --sdk x", "python -m engines build c.onnx --sdk x"),
        ("~/secret/a.txt", "a.txt"),
        ("12 images/s, 1/2, x / y, N:OPT/MAX", "12 images/s, 1/2, x / y, N:OPT/MAX"),
        ("exports/me/x.engine and exports/me", "x.engine and exports/me"),
        ("my folder/x.engine in {here}/my folder/deeper/y", "x.engine in y"),
        ("in {here}", "in ."),
        ("cc -I{here}/deeper/x.h", "cc -Ix.h"),
        ("PATH=/usr/bin/a:/home/me/bin/b:{here}/c", "PATH=a:b:c"),
        ("see https://developer.nvidia.com/cuda/x", "see https://developer.nvidia.com/cuda/x"),
        ("SHA-256, tensorrt_rtx 1.7.1.116, sm80", "SHA-256, tensorrt_rtx 1.7.1.116, sm80"),
    ],
)
def test_directories_are_taken_out_of_texts(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [pathlib.Path("exports/me"), pathlib.Path("my folder")]
    assert without_directories(text.format(here=tmp_path), folders) == expected


# --- arrays as text


@settings(max_examples=50, deadline=None)
@given(
    arrays.arrays(
        st.sampled_from([np.dtype("float32"), np.dtype("float64")]),
        arrays.array_shapes(max_dims=4, max_side=5),
        elements=st.floats(allow_nan=True, width=32),
    )
)
def test_arrays_come_back_bit_for_bit(array):
    value = json.loads(json.dumps(packed_array(array), allow_nan=False))
    again = unpacked_array(Value(value), array.dtype.name)
    assert (again.dtype, again.shape, again.tobytes()) == (array.dtype, array.shape, array.tobytes())


FOUR = packed_array(np.arange(4, dtype=np.float32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "float64"}, "dtype: expected one of float32"),
        ({"shape": []}, "shape: expected a shape"),
        ({"shape": [5]}, "base64: expected base64 of 20 bytes"),
        ({"shape": [3]}, "base64: expected base64 of 12 bytes"),
        ({"shape": [1 << 15, 1 << 15]}, "shape: expected a shape of at most"),
        ({"shape": [0]}, r"shape\[0\]: expected a whole number of at least 1"),
        ({"base64": FOUR["base64"][:-4]}, "base64: expected base64"),
        ({"base64": "!" + FOUR["base64"][1:]}, "base64: expected base64"),
        ({"base64": "é" + FOUR["base64"][1:]}, "base64: expected base64"),
        ({"base64": 7}, "base64: expected base64"),
        ({"more": 1}, "more: not a name that belongs here"),
    ],
    ids=str,
)
def test_damaged_arrays_are_refused(change, said):
    with pytest.raises(Malformed, match=said):
        unpacked_array(Value({**FOUR, **change}), "float32")
