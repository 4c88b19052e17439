"""``python -m engines verify``: a sound export passes, and each planted fault fails in the right check, by name."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines import backends, verification
from engines.backends import BackendEntry
from engines.backends.onnx_runtime import OnnxRuntime
from engines.errors import DeviceFailed, SdkMissing
from engines.files import sha256_of
from engines.manifest import sidecar_path
from engines.runner import load

ENGINE, FP16, FP32 = "fashion.fp16.engine", "fashion.fp16.onnx", "fashion.onnx"


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(verification, "gpu_compute_capability", lambda _: None)


class Card:
    """Stands in for a GPU: computes an engine's typed graph in ONNX Runtime, then does ``harm`` to the answers."""

    def __init__(self, path, harm):
        self._inner, self._harm = OnnxRuntime(path.with_suffix(".onnx")), harm
        self.inputs, self.outputs, self.batch = self._inner.inputs, self._inner.outputs, (1, 32)

    def run(self, feeds):
        return {"output": self._harm(self._inner.run(feeds)["output"])}

    def close(self):
        self._inner.close()


@pytest.fixture
def gpu(monkeypatch):
    """``gpu(harm)``: from now on there is a card that runs engines of TensorRT for RTX."""

    def plug_in(harm=lambda outputs: outputs):
        def open_source(source):
            assert source.manifest is not None
            return Card(source.path, harm)

        entries = [entry for entry in backends.BACKENDS if entry.kind != "tensorrt_rtx"]
        monkeypatch.setattr(
            backends, "BACKENDS", (*entries, BackendEntry("tensorrt_rtx", "Card", "engines", open_source))
        )
        monkeypatch.setattr(verification, "gpu_compute_capability", lambda _: 86)

    return plug_in


def lines_of(outcome):
    """(mark, stage) to the rest of each line."""
    found = {}
    for line in outcome.stdout.splitlines()[:-1]:
        stage, _, detail = line[5:].partition(": ")
        found[line[:4].strip(), stage] = detail
    return found


SOUND = [
    ("ok", "report.json, listed"),
    ("ok", "golden.npz, golden"),
    ("ok", f"{ENGINE}, integrity"),
    ("ok", f"{ENGINE}, audit"),
    ("skip", f"{ENGINE}, run"),
    ("ok", f"{FP16}, run"),
    ("ok", f"{FP32}, run"),
]


def test_a_sound_export_passes_its_static_part(engines_command, fashion):
    outcome = engines_command("verify", fashion, "--static")
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = lines_of(outcome)
    assert list(lines) == SOUND
    assert outcome.stdout.splitlines()[-1] == "PASS: 6 of 6 checks hold, 1 not run"
    assert lines["ok", f"{ENGINE}, audit"] == (
        "11 of 11 convs in FP16, Conv+ReLU in one kernel each, all 12 weights bit-equal"
    )
    assert lines["ok", f"{ENGINE}, integrity"].startswith("SHA-256, tensorrt_rtx 1.7.1.116, sm80, sm86")
    assert "gate 5.0e-03" in lines["ok", f"{FP16}, run"]
    assert "gate 5.0e-06" in lines["ok", f"{FP32}, run"]


def test_with_no_gpu_the_engine_is_skipped_and_that_is_no_pass(engines_command, fashion):
    outcome = engines_command("verify", fashion)
    assert outcome.code == 4
    assert lines_of(outcome)["skip", f"{ENGINE}, run"] == "no GPU answers here"
    assert outcome.error == (
        f"{fashion}: nothing failed, but {ENGINE} was not run: no GPU answers here; "
        f"--static is content with what needs no GPU"
    )


def test_with_a_gpu_everything_is_run(engines_command, fashion, gpu):
    gpu()
    outcome = engines_command("verify", fashion, "--require", "trt")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.splitlines()[-1] == "PASS: 7 of 7 checks hold"
    assert "gate 5.0e-03" in lines_of(outcome)["ok", f"{ENGINE}, run"]


def test_a_batch_of_one_and_a_batch_of_the_others_are_run_and_again_as_graphs(engines_command, fashion, gpu):
    batches = []
    gpu(lambda outputs: batches.append(len(outputs)) or outputs)
    assert engines_command("verify", fashion).code == 0
    assert batches == [1, 3, 1, 3]


def test_an_engine_that_is_right_the_first_time_alone_fails(engines_command, fashion, gpu):
    runs = []
    gpu(lambda outputs: runs.append(0) or (outputs if len(runs) < 4 else outputs[::-1].copy()))
    done = engines_command("verify", fashion)
    assert done.code == 1
    assert "FAIL fashion.fp16.engine, run: when run again: relative error" in done.stdout


def test_the_sdk_is_asked_for_before_the_gpu(engines_command, fashion, monkeypatch):
    monkeypatch.setattr("engines.integrity.is_installed", lambda _: False)
    outcome = engines_command("verify", fashion)
    assert outcome.code == 4
    detail = lines_of(outcome)["skip", f"{ENGINE}, run"]
    assert detail.startswith("needs TensorRT for RTX 1.7.1.116, which is not installed here; pip install")


def test_json_says_what_the_lines_say(engines_command, fashion):
    printed = json.loads(engines_command("verify", fashion, "--static", "--json").stdout)
    assert (printed["schema"], printed["passed"]) == (1, True)
    marks = {True: "ok", None: "skip"}
    assert [(marks[c["passed"]], f"{c['file']}, {c['check']}") for c in printed["checks"]] == SOUND
    assert 0 < printed["checks"][-1]["value"] < printed["checks"][-1]["gate"] == 5e-6


def test_quiet_prints_nothing_but_the_error(engines_command, fashion):
    assert engines_command("verify", fashion, "--static", "--quiet").stdout == ""
    outcome = engines_command("verify", fashion, "--quiet")
    assert (outcome.code, outcome.stdout) == (4, "")


@pytest.mark.parametrize("name", [FP32, FP16])
def test_one_onnx_file_is_verified_with_what_lies_beside_it(engines_command, fashion, name):
    outcome = engines_command("verify", fashion / name)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert [stage for _, stage in lines_of(outcome)] == ["report.json, listed", "golden.npz, golden", f"{name}, run"]


def test_one_engine_is_verified_with_what_lies_beside_it(engines_command, fashion, gpu):
    gpu()
    for name in ("report.json", FP32):
        (fashion / name).unlink()
    outcome = engines_command("verify", fashion / ENGINE)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert list(lines_of(outcome)) == [
        ("ok", "golden.npz, golden"),
        ("ok", f"{ENGINE}, integrity"),
        ("ok", f"{ENGINE}, audit"),
        ("ok", f"{ENGINE}, run"),
    ]


# --- planted faults


def listed_again(folder):
    """Makes report.json and the sidecar agree with the files as they are: a fault that only running can find."""
    sidecar = sidecar_path(folder / ENGINE)
    fields = json.loads(sidecar.read_text())
    fields["sha256"] |= {"onnx": sha256_of(folder / FP16), "engine": sha256_of(folder / ENGINE)}
    sidecar.write_text(json.dumps(fields))
    report = json.loads((folder / "report.json").read_text())
    for file in report["files"]:
        path = folder / file["name"]
        file |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / "report.json").write_text(json.dumps(report))


def in_golden(**changes):
    def plant(folder):
        with np.load(folder / "golden.npz") as archive:
            arrays = dict(archive)
        np.savez(
            folder / "golden.npz", **{name: changes.get(name, lambda a: a)(array) for name, array in arrays.items()}
        )
        listed_again(folder)

    return plant


def in_weights(name, change):
    """Changes the largest weight of an ONNX file."""

    def plant(folder):
        model = onnx.load(folder / name)
        tensor = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
        onnx.save(model, folder / name)
        listed_again(folder)

    return plant


def one_less(weight):
    weight.flat[weight.size // 2] -= 1
    return weight


def negated(weight):
    return -weight


def a_nan(weight):
    weight.flat[0] = np.nan
    return weight


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut_short(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def flip_a_byte(name):
    def plant(folder):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return plant


def in_sidecar(**fields):
    def plant(folder):
        sidecar = sidecar_path(folder / ENGINE)
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **fields}))

    return plant


def in_report(**fields):
    def plant(folder):
        report = json.loads((folder / "report.json").read_text())
        (folder / "report.json").write_text(json.dumps({**report, **fields}))

    return plant


def graph_of_another_precision(folder):
    shutil.copy(folder / FP32, folder / FP16)


def constant(outputs):
    return np.broadcast_to(np.arange(10.0), outputs.shape)


FAULTS = {
    "an engine cut short": (cut_short(ENGINE), {"report.json, listed", f"{ENGINE}, integrity"}),
    "a flipped byte in an engine": (flip_a_byte(ENGINE), {"report.json, listed", f"{ENGINE}, integrity"}),
    "a missing engine": (remove(ENGINE), {"report.json, listed"}),
    "a missing sidecar": (remove(f"{ENGINE}.json"), {"report.json, listed", f"{ENGINE}, integrity"}),
    "a wider tolerance in the sidecar": (in_sidecar(tolerance=0.5), {"report.json, listed"}),
    "a sidecar without sense": (in_sidecar(tolerance=5), {"report.json, listed", f"{ENGINE}, integrity"}),
    "a flipped byte in a graph": (flip_a_byte(FP32), {"report.json, listed"}),
    "a graph cut short": (cut_short(FP32), {"report.json, listed", f"{FP32}, run"}),
    "another graph beside the engine": (graph_of_another_precision, {"report.json, listed", f"{ENGINE}, audit"}),
    "a wrong weight, listed": (in_weights(FP32, one_less), {f"{FP32}, run"}),
    "a NaN weight, listed": (in_weights(FP32, a_nan), {f"{FP32}, run"}),
    "a wrong weight in the typed graph, listed": (in_weights(FP16, negated), {f"{FP16}, run", f"{ENGINE}, audit"}),
    "missing golden vectors": (
        remove("golden.npz"),
        {"report.json, listed", "golden.npz, golden", f"{FP16}, run", f"{FP32}, run"},
    ),
    "a NaN in the golden vectors": (
        in_golden(output=lambda a: np.where(a == a.max(), np.nan, a)),
        {"golden.npz, golden", f"{FP16}, run", f"{FP32}, run"},
    ),
    "constant golden vectors": (
        in_golden(output=constant),
        {"golden.npz, golden", f"{FP16}, run", f"{FP32}, run"},
    ),
    "golden vectors in another order": (in_golden(output=lambda a: a[::-1]), {f"{FP16}, run", f"{FP32}, run"}),
    "golden vectors of other classes": (in_golden(output=lambda a: a[:, :9]), {f"{FP16}, run", f"{FP32}, run"}),
    "golden vectors of another size": (in_golden(input=lambda a: a[..., :27]), {f"{FP16}, run", f"{FP32}, run"}),
    "a report of a failed export": (in_report(passed=False), {"report.json, listed"}),
    "a report without files": (in_report(files=[]), {"report.json, listed"}),
    "a report with a gate that all passes": (in_report(gates={"fp32": 1.5}), {"report.json, listed"}),
    "a report that lists a file elsewhere": (
        in_report(files=[{"name": "../x", "bytes": 1, "sha256": "0" * 64}]),
        {"report.json, listed"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_in_the_right_check(engines_command, fashion, fault):
    plant, failed = FAULTS[fault]
    plant(fashion)
    outcome = engines_command("verify", fashion, "--static")
    assert outcome.code == 1
    assert {stage for mark, stage in lines_of(outcome) if mark == "FAIL"} == failed
    assert outcome.stdout.splitlines()[-1].startswith("FAIL: ")
    for stage in failed:
        assert f"{stage}: " in outcome.error


HARMS = {
    "a batch mix-up": lambda outputs: outputs[::-1],
    "one answer for all": lambda outputs: np.repeat(outputs[:1], len(outputs), axis=0),
    "two classes swapped": lambda outputs: outputs[:, [1, 0, *range(2, 10)]],
    "a NaN": lambda outputs: np.where(outputs == outputs.max(), np.float32(np.nan), outputs),
    "zeros": np.zeros_like,
    "a little more than the tolerance": lambda outputs: outputs + np.float32(0.006 * np.abs(outputs).max()),
    "a class too few": lambda outputs: outputs[:, :9],
}


@pytest.mark.parametrize("harm", HARMS)
def test_an_engine_that_computes_something_else_on_its_card_fails(engines_command, fashion, gpu, harm):
    gpu(HARMS[harm])
    outcome = engines_command("verify", fashion)
    assert outcome.code == 1
    assert [stage for mark, stage in lines_of(outcome) if mark == "FAIL"] == [f"{ENGINE}, run"]


@pytest.fixture
def alike(fashion):
    """The export with golden images that hardly differ: their answers are within the gate of half precision."""
    noise = np.random.default_rng(26).standard_normal((5, 1, 28, 28))
    images = (noise[:1] + 0.0025 * noise[1:]).astype(np.float32)
    with load(fashion / FP32) as runner:
        outputs = runner.run({"input": images})["output"].astype(np.float64)
    np.savez(fashion / "golden.npz", input=images, output=outputs)
    listed_again(fashion)
    assert np.abs(outputs - outputs[::-1]).max() / np.abs(outputs).max() < 5e-3
    return fashion


@pytest.mark.parametrize(("harm", "row"), [("a batch mix-up", 1), ("one answer for all", 2)])
def test_alike_images_hide_no_mix_up(engines_command, alike, gpu, harm, row):
    gpu()
    assert engines_command("verify", alike).code == 0
    gpu(HARMS[harm])
    outcome = engines_command("verify", alike)
    assert outcome.code == 1
    detail = lines_of(outcome)["FAIL", f"{ENGINE}, run"]
    assert detail.startswith(f"answer {row} is nearer to that of another image: rows are mixed up, or all alike; rel")


def test_an_error_within_the_tolerance_passes(engines_command, fashion, gpu):
    gpu(lambda outputs: outputs + np.float32(0.002 * np.abs(outputs).max()))
    assert engines_command("verify", fashion).code == 0


def test_the_sidecars_tolerance_is_the_engines_gate(engines_command, fashion, gpu):
    gpu(lambda outputs: outputs + np.float32(0.002 * np.abs(outputs).max()))
    in_sidecar(tolerance=0.001)(fashion)
    listed_again(fashion)
    outcome = engines_command("verify", fashion)
    assert outcome.code == 1
    assert "exceeds 1.0e-03" in lines_of(outcome)["FAIL", f"{ENGINE}, run"]


def test_the_reports_gate_is_the_graphs(engines_command, fashion):
    in_report(gates={"fp32": 1e-9, "fp16": 0.005})(fashion)
    outcome = engines_command("verify", fashion, "--static")
    assert [stage for mark, stage in lines_of(outcome) if mark == "FAIL"] == [f"{FP32}, run"]
    assert "exceeds 1.0e-09" in outcome.error


@pytest.mark.parametrize(
    ("error", "code", "mark"),
    [(SdkMissing("another version is installed"), 4, "skip"), (DeviceFailed("cudaMalloc failed"), 1, "FAIL")],
)
def test_a_missing_sdk_is_a_skip_and_a_failing_gpu_a_failure(engines_command, fashion, gpu, error, code, mark):
    def fail(_):
        raise error

    gpu(fail)
    outcome = engines_command("verify", fashion)
    assert outcome.code == code
    assert lines_of(outcome)[mark, f"{ENGINE}, run"] == str(error)


# --- what is asked for and not there


def test_required_engines_must_be_there_and_run(engines_command, fashion):
    assert engines_command("verify", fashion, "--require", "trt").code == 4
    outcome = engines_command("verify", fashion / FP32, "--require", "trt")
    assert outcome.code == 1
    assert outcome.error == f"{fashion / FP32}: --require trt: there is no engine; export with --trt"
    outcome = engines_command("verify", fashion, "--require", "trt", "--static")
    assert (outcome.code, outcome.stdout) == (2, "")


def test_without_onnx_runtime_its_part_is_not_run(engines_command, fashion, gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = engines_command("verify", fashion, "--static")
    assert outcome.code == 0
    assert "pip install" in lines_of(outcome)["skip", f"{FP32}, run"]
    outcome = engines_command("verify", fashion / FP32)
    assert outcome.code == 4
    assert f"{FP32} was not run: ONNX Runtime is not installed here" in outcome.error
    outcome = engines_command("verify", fashion, "--static", "--provider", "cpu")
    assert outcome.code == 4
    assert outcome.error.startswith("ONNX Runtime is not installed here")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["none"], 3, "none: no such file or directory; check the path"),
        (["."], 3, ".: has no report.json, so no export wrote it; give its directory, or a file"),
        (["fashion/report.md"], 3, "fashion/report.md: neither an ONNX file nor a TensorRT engine; export it again"),
        (["fashion", "--device", -1], 2, "--device -1: GPUs are counted from 0"),
        (["fashion", "--provider", "gpu"], 2, "provider 'gpu': unknown; choose from cpu, cuda, tensorrt"),
    ],
)
def test_what_cannot_be_verified_is_refused(engines_command, fashion, arguments, code, said):
    outcome = engines_command("verify", *arguments)
    assert (outcome.code, outcome.error) == (code, said)


def test_a_foreign_graph_in_the_directory_is_left_alone_but_not_verified(engines_command, fashion):
    model = onnx.load(fashion / FP32)
    del model.metadata_props[:]
    onnx.save(model, fashion / "foreign.onnx")
    outcome = engines_command("verify", fashion, "--static")
    assert outcome.code == 0
    assert lines_of(outcome)["skip", "foreign.onnx, run"] == "not of an export: its metadata name no precision"
    outcome = engines_command("verify", fashion / "foreign.onnx")
    assert outcome.code == 1
    assert "there is no gate for its precision, unnamed" in outcome.error


def test_without_the_typed_graph_there_is_no_audit_and_it_says_so(engines_command, fashion):
    (fashion / FP16).unlink()
    outcome = engines_command("verify", fashion / ENGINE, "--static")
    assert lines_of(outcome)["skip", f"{ENGINE}, audit"] == f"its typed graph {FP16} is not beside it"


def test_a_graph_that_was_written_again_is_not_the_one_that_was_compiled(engines_command, fashion):
    """Every weight is the same; only its metadata differ."""
    model = onnx.load(fashion / FP16)
    model.doc_string = "touched"
    onnx.save(model, fashion / FP16)
    outcome = engines_command("verify", fashion / ENGINE, "--static")
    assert outcome.code == 1
    assert lines_of(outcome)["FAIL", f"{ENGINE}, audit"] == (
        f"{FP16} beside it is not the graph that it was compiled from"
    )


def test_an_engine_that_was_built_again_from_the_listed_graph_is_no_failure(engines_command, fashion):
    assert engines_command("build", fashion / FP16, "--gpu", "sm86").code == 0
    outcome = engines_command("verify", fashion, "--static")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert f"built again since, from the listed graph: {ENGINE}" in lines_of(outcome)["ok", "report.json, listed"]


@pytest.mark.parametrize(
    "plant",
    [in_sidecar(tolerance=0.5), in_weights(FP16, negated), cut_short(ENGINE)],
    ids=["tolerance", "graph", "cut"],
)
def test_an_engine_that_was_built_again_and_changed_fails(engines_command, fashion, plant, monkeypatch):
    assert engines_command("build", fashion / FP16, "--gpu", "sm86").code == 0
    monkeypatch.setattr(f"{__name__}.listed_again", lambda folder: None)
    plant(fashion)
    outcome = engines_command("verify", fashion, "--static")
    assert outcome.code == 1
    assert any(mark == "FAIL" for mark, _ in lines_of(outcome))
