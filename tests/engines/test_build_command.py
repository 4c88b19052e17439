"""``python -m engines build``: what it makes, says and refuses, with the real compiler."""

from __future__ import annotations

import dataclasses
import shutil

import onnx
import pytest

from engines.arguments import LARGEST_BATCH, batch_from_text, cards_from_text, check_batch
from engines.commands import build as command
from engines.compilation import CompilerProcess
from engines.delivery import Build
from engines.errors import UsageError
from engines.integrity import checked_engine
from engines.plan import header_from_file
from tests.conftest import run_process
from tests.networks import Shape

PLAIN = Shape(classes=8)
AUDITED = "7 of 7 convs in FP16, Conv+ReLU in one kernel each, all 8 weights bit-equal"


@pytest.fixture
def typed(compiled, tmp_path):
    """A typed ONNX file in a directory of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    return shutil.copy(compiled(PLAIN).onnx, folder / "net.fp16.onnx")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_puts_an_audited_engine_with_its_sidecar_beside_the_onnx_file(engines_command, typed):
    (typed.parent / "golden.npz").write_bytes(b"")
    done = engines_command("build", typed)
    assert (done.code, done.stderr) == (0, "")
    how, audit, written = done.stdout.splitlines()
    assert how.startswith("compiled with tensorrt_rtx 1.7.1.116 for sm80, sm86, sm89, sm120, sm121, batch 1:8:32, in ")
    assert audit == f"ok   fp16, engine audit: {AUDITED}"
    assert written == f"written to {typed.parent}/: net.fp16.engine, net.fp16.engine.json"
    assert names(typed.parent) == ["golden.npz", "net.fp16.engine", "net.fp16.engine.json", "net.fp16.onnx"]
    header, manifest = checked_engine(typed.with_suffix(".engine"))
    assert (header.compute_capabilities, manifest.profile["input"][2][0]) == ((80, 86, 89, 120, 121), 32)


def test_every_choice_reaches_the_engine(engines_command, typed, tmp_path):
    done = engines_command(
        *("build", typed, "--out", "other.engine", "--batch", "2:4:16", "--gpu", "sm89,sm86"),
        *("--sdk", "tensorrt_rtx", "--workspace", "4096", "--optimization-level", "3"),
    )
    assert done.code == 0, done.stderr
    assert "for sm86, sm89, batch 2:4:16, in " in done.stdout
    assert done.stdout.splitlines()[-1] == (
        "note golden.npz is not in ./: copy it along, verify compares the engine with it"
    )
    header, manifest = checked_engine(tmp_path / "other.engine")
    assert (manifest.name, header.compute_capabilities) == ("other.engine", (86, 89))
    assert [shape[0] for shape in manifest.profile["input"]] == [2, 4, 16]
    assert names(typed.parent) == ["net.fp16.onnx"]


@pytest.fixture
def asked(monkeypatch):
    """Notes what the compiler processes are asked for, and lets them work."""
    requests = []
    submit = CompilerProcess.submit

    def noted(process, request):
        requests.append(request)
        submit(process, request)

    monkeypatch.setattr(CompilerProcess, "submit", noted)
    return requests


def test_options_reach_the_compiler_and_are_left_to_it_where_none_is_given(engines_command, typed, asked):
    assert engines_command("build", typed, "--workspace", "512", "--optimization-level", "0").code == 0
    assert engines_command("build", typed).code == 0
    given, left = (dataclasses.asdict(request.options) for request in asked)
    nothing = {
        "workspace": None,
        "timing_cache": None,
        "version_compatible": False,
        "hardware_compatibility": None,
        "optimization_level": None,
    }
    assert (given, left) == (nothing | {"workspace": 512, "optimization_level": 0}, nothing)


def test_the_same_file_gives_the_same_engine_again(engines_command, typed):
    assert engines_command("build", typed).code == 0
    first = typed.with_suffix(".engine").read_bytes()
    assert engines_command("build", typed).code == 0
    assert typed.with_suffix(".engine").read_bytes() == first


def test_without_a_gpu_sdk_or_torch_around_it_works_as_a_process(typed, tmp_path):
    done = run_process(["-X", "importtime", "-m", "engines", "build", typed, "--out", "net.engine"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"ok   fp16, engine audit: {AUDITED}" in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "engines" in loaded
    assert not loaded & {"torch", "exporter", "onnx", "onnxruntime", "tensorrt_rtx"}


# --- what goes wrong


def test_an_engine_of_other_weights_fails_and_is_kept_as_rejected(engines_command, compiled, typed, monkeypatch):
    other = compiled(PLAIN, seed=2).onnx
    submit = CompilerProcess.submit
    swap = lambda process, request: submit(process, dataclasses.replace(request, onnx=str(other)))  # noqa: E731
    monkeypatch.setattr(CompilerProcess, "submit", swap)
    done = engines_command("build", typed)
    assert done.code == 1
    target = typed.with_suffix(".engine")
    assert done.error.startswith(f"{target}: engine audit: stage0.0/Conv: its weights do not stand in the engine")
    assert done.stdout == f"FAIL {done.error}\n"
    assert names(typed.parent) == ["net.fp16.engine.rejected", "net.fp16.onnx"]
    assert header_from_file(typed.parent / "net.fp16.engine.rejected").compute_capabilities == (80, 86, 89, 120, 121)


def without_metadata(path):
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "the following arguments are required: ONNX"),
        (["missing.onnx"], 3, "missing.onnx: no such ONNX file"),
        (["NET", "--batch", "8:4:2"], 2, "--batch: 8:4:2 is not MIN:OPT:MAX"),
        (["NET", "--batch", "1:2"], 2, "--batch: '1:2' is not MIN:OPT:MAX"),
        (["NET", "--gpu", "ampere"], 2, "--gpu: 'ampere' is not a compute capability"),
        (["NET", "--gpu", "sm90"], 4, "TensorRT for RTX has no such target"),
        (["NET", "--gpu", "sm75,sm86"], 2, "sm75 must have an engine of its own"),
        (["NET", "--sdk", "onnxruntime"], 2, "--sdk onnxruntime: unknown"),
        (["NET", "--workspace", "much"], 2, "argument --workspace: invalid int value: 'much'"),
        (["NET", "--workspace", "0"], 2, "--workspace: 0 MiB is outside"),
        (["NET", "--workspace", "1"], 4, "or give a larger --workspace"),
        (["NET", "--optimization-level", "6"], 2, "--optimization-level: 6 is outside 0 to 5"),
        (["NET", "--timing-cache", "t.cache"], 2, "--timing-cache: not for TensorRT for RTX: it has none"),
        (["NET", "--version-compatible"], 2, "--version-compatible: not for TensorRT for RTX"),
        (["NET", "--hardware-compatibility", "ampere_plus"], 2, "--hardware-compatibility: not for TensorRT for RTX"),
        (["NET", "--hardware-compatibility", "all"], 2, "choose from ampere_plus, same_compute_capability"),
        (["NET", "--out", "NET"], 2, "--out would take the place of the ONNX file"),
        (["NET", "--out", "missing/net.engine"], 5, "missing/net.engine: cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_refusal_is_one_line_with_its_exit_code_and_leaves_nothing(engines_command, typed, arguments, code, said):
    done = engines_command("build", *(typed if argument == "NET" else argument for argument in arguments))
    assert done.code == code, done.stderr
    assert said in done.error
    assert done.stdout == ""
    assert names(typed.parent) == ["net.fp16.onnx"]


def test_a_graph_without_the_exporters_metadata_is_refused(engines_command, typed):
    without_metadata(typed)
    done = engines_command("build", typed)
    assert done.code == 3
    assert "its metadata has no precision, checkpoint_sha256, assumptions" in done.error
    assert names(typed.parent) == ["net.fp16.onnx"]


# --- engines that cannot be audited here


def test_an_engine_that_cannot_be_audited_is_not_called_ok(compiled):
    from engines.audit import audit_of_file
    from engines.manifest import manifest_from_file

    network = compiled(PLAIN)
    data = bytearray(network.bytes)
    data[:4] = b"ftrt"
    foreign = network.engine.with_name("foreign.engine")
    foreign.write_bytes(data)
    audit = audit_of_file(foreign, network.convolutions, network.matrices)
    manifest = dataclasses.replace(manifest_from_file(network.sidecar), compute_capabilities=())
    made = Build(foreign, network.sidecar, manifest, audit, 1.5, ("a warning\nof two lines",))
    how, note, audited, *_ = command.lines_from_build(made)
    assert how.endswith(" for the cards that it says itself, batch 1:8:32, in 1.5 s")
    assert note == "note the compiler says: a warning of two lines"
    assert audited.startswith("skip fp16, engine audit: not audited: plans of tensorrt ")


# --- arguments that the exporter shares


@pytest.mark.parametrize(
    ("text", "values"), [("1:8:32", (1, 8, 32)), ("4", (4, 4, 4)), (" 1 : 2 : 3 ", (1, 2, 3)), ("9:1:0", (9, 1, 0))]
)
def test_a_batch_is_read(text, values):
    assert batch_from_text(text) == values


@pytest.mark.parametrize("batch", [(0, 1, 1), (2, 1, 2), (1, 3, 2), (1, 1, LARGEST_BATCH + 1)])
def test_a_batch_that_no_engine_could_have_is_a_usage_error(batch):
    check_batch((1, 1, LARGEST_BATCH))
    with pytest.raises(UsageError, match=f"--batch: {':'.join(map(str, batch))} is not MIN:OPT:MAX"):
        check_batch(batch)


def test_cards_are_read_in_any_spelling():
    assert cards_from_text("sm89, SM_86,120,sm86") == (86, 89, 120)


def test_the_exporter_takes_the_same_words():
    from exporter import request

    assert request.batch_from_text is batch_from_text
    assert request.cards_from_text is cards_from_text
