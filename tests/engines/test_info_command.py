"""``python -m engines info``: what it says of every kind of file, and that it says so when something does not hold."""

from __future__ import annotations

import json
import re
import shutil
import struct

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from engines.errors import InputRejected
from engines.files import sha256_of
from engines.inspection import facts_of_file
from tests.conftest import run_process

AUDITED = "11 of 11 convs in FP16, Conv+ReLU in one kernel each, all 12 weights bit-equal"


def facts_in(text):
    """Key to text (its lines joined) of what was printed; checks that the values stand in one column."""
    first, *lines = text.rstrip("\n").splitlines()
    column = re.match(r"  (\w+( \w+)*)  +", lines[0]).end()
    found, key = {"": first}, ""
    for line in lines:
        head, value = line[:column].strip(), line[column:]
        assert line.startswith("  ")
        key = head or key
        found[key] = f"{found[key]} | {value}" if not head else value
    return found


@pytest.fixture
def info(engines_command):
    """The facts that the command prints of a file, and the outcome."""

    def run(path):
        done = engines_command("info", path)
        return (facts_in(done.stdout) if done.stdout else {}), done

    return run


def with_bytes(path, position, content):
    data = bytearray(path.read_bytes())
    data[position : position + len(content)] = content
    path.write_bytes(data)


# --- what is said


def test_of_an_engine(info, fashion):
    engine = fashion / "fashion.fp16.engine"
    found, done = info(engine)
    assert (done.code, done.stderr) == (0, "")
    assert found == {
        "": f"{engine}: TensorRT engine",
        "size": f"{engine.stat().st_size:,} bytes",
        "sha256": sha256_of(engine),
        "sdk": "tensorrt_rtx 1.7.1.116",
        "cards": "sm80, sm86, sm89, sm120, sm121 and newer",
        "sidecar": "fashion.fp16.engine.json: agrees on SHA-256, SDK, version and cards",
        "precision": "fp16",
        "profile": "input (1, 1, 28, 28) : (8, 1, 28, 28) : (32, 1, 28, 28)",
        "inputs": "input float32 (N, 1, 28, 28)",
        "outputs": "output float32 (N, 10)",
        "preprocessing": "(pixel / 255 - mean) / std, mean 0.5, std 0.5, at 28x28",
        "assumptions": found["assumptions"],
        "tolerance": "relative error 5.0e-03 against golden.npz",
        "made from": found["made from"],
        "kernels": "14: 11 convolutions float16 x float16 -> float16, "
        "1 matrix products float16 x float16 -> float32, 2 other kernels",
        "audit": f"against fashion.fp16.onnx: {AUDITED}",
    }
    assert set(found["assumptions"].split(" | ")) >= {"strides 2,2,2,2,2", "eps 1e-05", "size 28x28", "mean 0.5"}
    assert found["made from"].endswith(f"onnx {sha256_of(fashion / 'fashion.fp16.onnx')}")


def test_of_an_onnx_file(info, fashion):
    found, done = info(fashion / "fashion.fp16.onnx")
    assert done.code == 0
    weights = sum(
        2 * int(np.prod(tensor.dims)) for tensor in onnx.load(fashion / "fashion.fp16.onnx").graph.initializer
    )
    metadata = found.pop("metadata").split(" | ")
    assert found == {
        "": f"{fashion / 'fashion.fp16.onnx'}: ONNX file",
        "size": f"{(fashion / 'fashion.fp16.onnx').stat().st_size:,} bytes",
        "sha256": sha256_of(fashion / "fashion.fp16.onnx"),
        "producer": "repvgg-exporter",
        "opsets": "ai.onnx 17",
        "inputs": "input float32 (?, 1, 28, 28)",
        "outputs": "output float32 (?, 10)",
        "operations": "2 Cast, 11 Conv, 1 Flatten, 1 Gemm, 1 GlobalAveragePool, 11 Relu",
        "weights": f"24 float16 ({weights:,} bytes)",
    }
    assert {"precision fp16", "lineage official"} <= set(metadata)


def test_of_golden_vectors(info, fashion):
    found, done = info(fashion / "golden.npz")
    assert done.code == 0
    assert found[""].endswith(": golden vectors")
    assert found["vectors"] == "input float32 (4, 1, 28, 28) | output float64 (4, 10)"
    outputs = np.load(fashion / "golden.npz")["output"]
    nearest = min(np.abs(a - b).max() for i, a in enumerate(outputs) for b in outputs[:i]) / np.abs(outputs).max()
    assert found["contrast"] == f"{nearest:.1e} between the two most alike answers"


def test_of_a_sidecar(info, fashion):
    engine = fashion / "fashion.fp16.engine"
    found, done = info(fashion / f"{engine.name}.json")
    assert done.code == 0
    assert found[""].endswith(": sidecar of an engine")
    assert found["engine"] == f"{engine.name}, SHA-256 {sha256_of(engine)}, is beside it"
    assert found["audit"] == AUDITED
    engine.unlink()
    assert info(fashion / f"{engine.name}.json")[0]["engine"].endswith(", is not beside it")


def test_of_a_report(info, fashion):
    found, done = info(fashion / "report.json")
    assert done.code == 0
    assert found["verdict"].startswith("PASS: ")
    assert set(found["files"].split(", ")) >= {"fashion.fp16.engine", "fashion.onnx", "golden.npz"}


@pytest.mark.parametrize(
    ("name", "kind", "key", "value"),
    [
        ("fashion.fp16.engine", "TensorRT engine", "cards", [80, 86, 89, 120, 121]),
        ("fashion.fp16.engine", "TensorRT engine", "sdk", {"name": "tensorrt_rtx", "version": "1.7.1.116"}),
        (
            "fashion.fp16.engine",
            "TensorRT engine",
            "kernels",
            {
                "convolutions float16 x float16 -> float16": 11,
                "matrix products float16 x float16 -> float32": 1,
                "other kernels": 2,
            },
        ),
        (
            "fashion.fp16.onnx",
            "ONNX file",
            "inputs",
            [{"name": "input", "dtype": "float32", "shape": [None, 1, 28, 28]}],
        ),
        (
            "golden.npz",
            "golden vectors",
            "vectors",
            {
                "input": {"dtype": "float32", "shape": [4, 1, 28, 28]},
                "output": {"dtype": "float64", "shape": [4, 10]},
            },
        ),
        ("fashion.fp16.engine.json", "sidecar of an engine", "engine", "fashion.fp16.engine"),
    ],
)
def test_json_says_the_same_in_values(engines_command, fashion, name, kind, key, value):
    done = engines_command("info", fashion / name, "--json")
    assert done.code == 0
    told = json.loads(done.stdout)
    assert (told["file"], told["kind"], told["refusal"]) == (str(fashion / name), kind, None)
    assert (told["size"], told["sha256"]) == ((fashion / name).stat().st_size, sha256_of(fashion / name))
    assert told[key] == value
    text = facts_in(engines_command("info", fashion / name).stdout)
    assert {label.replace(" ", "_") for label in text if label} == told.keys() - {"file", "kind", "refusal"}


def test_it_needs_no_sdk_no_onnx_and_no_torch(fashion, tmp_path):
    done = run_process(["-X", "importtime", "-m", "engines", "info", fashion / "fashion.fp16.engine"], tmp_path)
    assert done.returncode == 0
    assert f"against fashion.fp16.onnx: {AUDITED}" in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "numpy" in loaded
    assert not loaded & {"torch", "exporter", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}


# --- engines that do not hold, or cannot be read


def test_an_engine_without_its_sidecar_is_described_and_said_to_be_refused(info, fashion):
    (fashion / "fashion.fp16.engine.json").unlink()
    found, done = info(fashion / "fashion.fp16.engine")
    assert done.code == 0
    assert found["sidecar"] == "fashion.fp16.engine.json: missing, so that engines.load refuses the engine"
    assert found["audit"] == f"against fashion.fp16.onnx: {AUDITED}"
    assert "precision" not in found


def test_a_changed_engine_is_described_and_refused(info, fashion):
    engine = fashion / "fashion.fp16.engine"
    with_bytes(engine, engine.stat().st_size - 300, b"\x00\x01\x02\x03")
    found, done = info(engine)
    assert done.code == 3
    assert "its SHA-256 is" in done.error
    assert found["sidecar"].startswith("fashion.fp16.engine.json: DOES NOT HOLD: its SHA-256 is ")
    assert found["precision"] == "fp16"


def test_a_damaged_sidecar_is_said_and_refused(info, fashion):
    sidecar = fashion / "fashion.fp16.engine.json"
    sidecar.write_text(sidecar.read_text().replace('"precision": "fp16"', '"precision": 16'))
    found, done = info(fashion / "fashion.fp16.engine")
    assert done.code == 3
    assert "precision" in done.error
    assert found["sidecar"].startswith("fashion.fp16.engine.json: DOES NOT HOLD: precision")
    assert found["kernels"].startswith("14: ")


def test_an_engine_of_another_network_than_the_one_beside_it_fails(info, fashion, compiled):
    (fashion / "fashion.fp16.engine.json").unlink()
    shutil.copy(compiled().engine, fashion / "fashion.fp16.engine")
    found, done = info(fashion / "fashion.fp16.engine")
    assert done.code == 1
    assert re.search(r"fashion\.fp16\.engine: not what fashion\.fp16\.onnx says: .*; do not use it", done.error)
    assert found["audit"].startswith("against fashion.fp16.onnx: FAIL stage")


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ("nothing", "not made: fashion.fp16.onnx is not beside it"),
        ("another", "not made: fashion.fp16.onnx is not the file that the sidecar names"),
    ],
)
def test_without_its_own_onnx_file_an_engine_is_not_audited(info, fashion, beside, said):
    (fashion / "fashion.fp16.onnx").unlink()
    if beside == "another":
        shutil.copy(fashion / "fashion.onnx", fashion / "fashion.fp16.onnx")
    found, done = info(fashion / "fashion.fp16.engine")
    assert (done.code, found["audit"]) == (0, said)


@pytest.mark.parametrize(
    ("position", "content", "sdk"),
    [(24, bytes([1, 8, 0, 7]), "tensorrt_rtx 1.8.0.7"), (0, b"ftrt", "tensorrt 1.7.1.116")],
    ids=["another version", "full TensorRT"],
)
def test_a_plan_of_an_unknown_layout_is_described_as_far_as_its_header(info, fashion, position, content, sdk):
    (fashion / "fashion.fp16.engine.json").unlink()
    with_bytes(fashion / "fashion.fp16.engine", position, content)
    found, done = info(fashion / "fashion.fp16.engine")
    assert done.code == 0
    assert found["sdk"] == sdk
    assert found["kernels"] == f"not readable: not audited: the layout of {sdk} plans is not known"
    assert found["audit"].startswith(f"against fashion.fp16.onnx: not audited: plans of {sdk} cannot be read")


def test_another_exporters_prefix_is_explained_and_can_be_taken_off(info, fashion):
    engine, metadata = fashion / "fashion.fp16.engine", json.dumps({"task": "classify", "stride": 32}).encode()
    plan = engine.read_bytes()
    engine.write_bytes(struct.pack("<I", len(metadata)) + metadata + plan)
    found, done = info(engine)
    assert (done.code, found) == (3, {})
    skipped = 4 + len(metadata)
    assert done.error.startswith(f"{engine}: {skipped} bytes of another exporter (Ultralytics) stand before the engine")
    (first,) = re.findall(r"tail -c \+(\d+) fashion\.fp16\.engine > plan\.engine takes them off", done.error)
    assert engine.read_bytes()[int(first) - 1 :] == plan


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (struct.pack("<I", 12) + b'{"a": 1}' + bytes(4) + b"more", 3),  # no plan behind it
        (struct.pack("<I", 2**31) + b"{" + b"vtrt", 3),  # a length beyond the file
        (b"", 3),
        (b"text", 3),
        (b"PK\x03\x04 no archive", 3),
        (b'{"schema": 7}', 3),
        (b"vtrt", 3),
    ],
)
def test_what_is_nothing_of_ours_is_refused_in_one_line(info, tmp_path, content, code):
    path = tmp_path / "odd.bin"
    path.write_bytes(content)
    found, done = info(path)
    assert (done.code, found) == (code, {})
    assert done.error.startswith(f"{path}: ")
    assert "Ultralytics" not in done.error


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_what_is_not_there_is_refused(info, tmp_path, kind):
    path = tmp_path / "missing" if kind == "missing" else tmp_path
    assert info(path)[1].error == f"{path}: no such file; check the path"


def test_control_characters_of_a_file_do_not_reach_the_terminal(info, tmp_path):
    image = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([], "g", [image], [image]), producer_name="\x1b[2Jgone")
    helper.set_model_props(model, {"author": "a\x07\x9b31mb"})
    onnx.save(model, tmp_path / "odd.onnx")
    found, done = info(tmp_path / "odd.onnx")
    assert done.code == 0
    assert found["producer"] == "\\x1b[2Jgone"
    assert found["metadata"] == "author a\\x07\\x9b31mb"


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_an_engine_with_a_damaged_head_is_described_or_refused(fashion_export, position, content):
    path = fashion_export.parent / "damaged.engine"
    shutil.copy(fashion_export / "fashion.fp16.engine", path)
    with_bytes(path, position, content)
    try:
        said = facts_of_file(path).kind
    except InputRejected as error:
        said = str(error)
    assert said == "TensorRT engine" or said.startswith(f"{path}: ")
