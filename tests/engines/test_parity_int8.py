"""The gate of INT8: wide for a single number, and strict on the noise over all of them; wherever a gate is used."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import verification
from engines.build import build
from engines.errors import SdkMissing
from engines.files import sha256_of
from engines.golden import Golden
from engines.inspection import facts_of_file
from engines.integrity import check_card, checked_engine
from engines.kind import engine_beside, graph_of_engine, graphs_beside
from engines.manifest import manifest_from_file, sidecar_path
from engines.onnx_file import onnx_file_from_path
from engines.outputs import layout_from_outputs
from engines.parity import GATES, Gate, compare
from engines.report_file import ListedFile, ReportFile
from engines.runner import load
from engines.sidecar import origin_from_onnx
from tests.engines.quantized_graphs import PORTABLE, RTX, Block, QuantizedGraph

INT8 = GATES["int8"]
BLOCKS = (Block("stage0.0", 16, stride=2), Block("stage1.0", 16), Block("stage2.0", 16))
STEM = "net.int8"
GRAPHS = {f"{STEM}.onnx": PORTABLE, f"{STEM}.rtx.onnx": RTX}
ENGINE = f"{STEM}.engine"


def with_noise(reference, sqnr_db, seed=0):
    """The reference with normal noise that is exactly so far below it."""
    noise = np.random.default_rng(seed).normal(size=reference.shape)
    return reference + noise * math.sqrt((reference**2).sum() / (noise**2).sum()) * 10 ** (-sqnr_db / 20)


def answers(rows=4, classes=10, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, classes)) * 3


@pytest.mark.parametrize(("sqnr_db", "failure"), [(20.1, None), (19.9, "SQNR 19.9 dB is below 20 dB")])
def test_the_gate_is_the_least_sqnr_that_passes(sqnr_db, failure):
    reference = answers(64)
    assert INT8.failure(compare(reference, with_noise(reference, sqnr_db))) == failure


def test_the_worst_number_has_a_gate_of_its_own():
    reference = answers(64)
    candidate = reference.copy()
    candidate[5, 5] += 0.26 * np.abs(reference).max()
    comparison = compare(reference, candidate)
    assert comparison.sqnr_db > 20
    assert INT8.failure(comparison) == "relative error 2.60e-01 exceeds 2.5e-01"


def test_a_decided_flip_is_no_failure_in_int8_and_one_in_fp16():
    reference = np.array([[1.0, 0.9, -8.0], [2.0, 7.0, 1.0]])
    candidate = np.array([[0.96, 0.98, -8.0], [2.0, 7.0, 1.0]])
    comparison = compare(reference, candidate)
    assert comparison.decided_flips == 1
    assert INT8.failure(comparison) is None
    assert dataclasses.replace(INT8, top1=True).failure(comparison) is not None


def test_a_sqnr_that_is_nan_passes_no_gate_that_asks_for_one():
    comparison = dataclasses.replace(compare(answers(), answers()), sqnr_db=math.nan)
    assert INT8.failure(comparison) == "SQNR nan dB is below 20 dB"
    assert GATES["fp16"].failure(comparison) is None


def test_only_int8_asks_for_a_sqnr():
    assert {name: gate.min_sqnr_db for name, gate in GATES.items()} == {"fp32": None, "fp16": None, "int8": 20.0}
    assert Gate(0.1, top1=True).min_sqnr_db is None


@given(sqnr_db=st.floats(5, 60), gate=st.floats(5, 60), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_a_gate_passes_exactly_what_is_no_noisier(sqnr_db, gate, seed):
    reference = answers(seed=seed)
    comparison = compare(reference, with_noise(reference, sqnr_db, seed))
    assert comparison.sqnr_db == pytest.approx(sqnr_db, abs=1e-9)
    assert (Gate(1e9, top1=False, min_sqnr_db=gate).failure(comparison) is None) == (comparison.sqnr_db >= gate)


def test_figures_name_what_is_asked_for():
    comparison = compare(answers(), with_noise(answers(), 31.25))
    assert INT8.figures(comparison).endswith("(gate 2.5e-01), SQNR 31.2 dB (gate 20 dB)")
    assert GATES["fp16"].figures(comparison).endswith("(gate 5.0e-03), SQNR 31.2 dB")


def test_feature_maps_keep_the_sqnr_of_the_gate():
    layout = layout_from_outputs({"stage1": np.ones((2, 3, 4, 4)), "stage2": np.ones((2, 5, 2, 2))})
    assert not layout.ranked
    assert layout.gate(dataclasses.replace(INT8, top1=True)) == INT8


def golden(outputs):
    return Golden(np.zeros((len(outputs), 1, 2, 2), np.float32), outputs, layout_from_outputs({"output": outputs}))


def test_a_constant_answer_that_the_worst_number_lets_pass_is_told_by_its_noise():
    """All answers are within 0.2 of the scale of one another, and 17 dB of noise apart."""
    outputs = np.ones((4, 10)) + 0.2 * np.array([[1], [-1], [1], [-1]]) * np.sign(answers(1))
    assert not golden(outputs).tells_apart(dataclasses.replace(INT8, min_sqnr_db=None))
    assert golden(outputs).tells_apart(INT8)
    constant = np.broadcast_to(outputs.mean(axis=0), outputs.shape)
    assert INT8.failure(compare(outputs, constant)).startswith("SQNR 1")


def test_answers_that_are_too_much_alike_for_int8_are_said_to_be():
    outputs = np.ones((4, 10)) + 0.02 * answers()
    assert not golden(outputs).tells_apart(INT8)
    assert golden(outputs).tells_apart(GATES["fp16"])


@given(sqnr_db=st.floats(20, 45), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_answers_apart_are_never_called_mixed_up_by_noise_and_always_when_they_are(sqnr_db, seed):
    outputs = answers(seed=seed)
    images = np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1)
    vectors = Golden(images, outputs, layout_from_outputs({"output": outputs}))
    assert vectors.mixed_up(with_noise(outputs, sqnr_db, seed)) == []
    assert vectors.mixed_up(with_noise(outputs, sqnr_db, seed)[[1, 0, 2, 3]]) == [0, 1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Both graphs of one network's size, an engine of the second, and golden vectors of their own answers."""
    folder = tmp_path_factory.mktemp("int8")
    for name, form in GRAPHS.items():
        onnx.save(QuantizedGraph(form).blocks(*BLOCKS).head(10).model(), folder / name)
    build(folder / f"{STEM}.rtx.onnx", folder / ENGINE, sdk="tensorrt_rtx", gpu=(86,))
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def write_golden(folder, graph, sqnr_db):
    """Vectors that the graph itself answers with so much noise, at a right angle to its answers."""
    images = np.random.default_rng(1).normal(size=(4, 3, 32, 32)).astype(np.float32)
    images *= np.array([0.2, 1, 3, 9], np.float32)[:, None, None, None]
    with load(folder / graph) as runner:
        outputs = runner.run({"input": images})["output"].astype(np.float64)
    noise = np.random.default_rng(2).normal(size=outputs.shape)
    noise -= outputs * (outputs * noise).sum() / (outputs**2).sum()
    noise *= math.sqrt((outputs**2).sum() / (noise**2).sum() / (10 ** (sqnr_db / 10) - 1))
    np.savez(folder / "golden.npz", input=images, output=outputs + noise)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_within_the_gate_passes_verify(engines_command, folder, graph):
    write_golden(folder, graph, 26)
    outcome = engines_command("verify", folder / graph)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert f"ok   {graph}, run: relative error " in outcome.stdout
    assert "(gate 2.5e-01), SQNR 26.0 dB (gate 20 dB), top-1 agrees on " in outcome.stdout


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_beyond_the_gate_fails_verify(engines_command, folder, graph):
    write_golden(folder, graph, 19)
    outcome = engines_command("verify", folder / graph)
    assert outcome.code == 1
    assert f"FAIL {graph}, run: SQNR 19.0 dB is below 20 dB; relative error " in outcome.stdout


def test_a_report_with_a_narrower_gate_keeps_the_sqnr(engines_command, folder, monkeypatch):
    graph = f"{STEM}.onnx"
    report = ReportFile(verdict="passed", passed=True, files=(), gates={"int8": 0.2})
    monkeypatch.setattr(verification, "report_from_file", lambda path: report)
    (folder / "report.json").write_text("{}")
    for sqnr_db, code in ((26, 0), (19, 1)):
        write_golden(folder, graph, sqnr_db)
        outcome = engines_command("verify", folder / graph)
        assert outcome.code == code
        assert "(gate 2.0e-01)" in outcome.stdout
        assert ("SQNR 19.0 dB is below 20 dB" in outcome.stdout) == (code == 1)


def test_the_sidecar_says_int8_and_its_gate(folder):
    manifest = manifest_from_file(sidecar_path(folder / ENGINE))
    assert (manifest.precision, manifest.tolerance) == ("int8", 0.25)
    assert manifest.audit["int8_outputs"] == {"float16": 3}
    assert manifest.audit["requantize_kernels"] == 3
    assert origin_from_onnx(onnx_file_from_path(folder / f"{STEM}.rtx.onnx")).precision == "int8"


def test_an_engine_is_audited_against_the_graph_that_its_sidecar_names(engines_command, folder):
    """Two graphs lie beside it: without the right one there is nothing to audit, and with a changed one it fails."""
    write_golden(folder, f"{STEM}.onnx", 26)
    audit = f"ok   {ENGINE}, audit: 3 of 3 convs in INT8 (half out), Conv+ReLU in one kernel each, "
    assert audit in engines_command("verify", folder / ENGINE, "--static").stdout
    rtx = folder / f"{STEM}.rtx.onnx"
    changed = onnx.load(rtx)
    changed.producer_version = "2"
    onnx.save(changed, rtx)
    outcome = engines_command("verify", folder / ENGINE, "--static")
    assert outcome.code == 1
    assert f"{STEM}.onnx, {STEM}.rtx.onnx beside it are not the graph that it was compiled from" in outcome.stdout
    rtx.unlink()
    outcome = engines_command("verify", folder / ENGINE, "--static")
    assert f"{STEM}.onnx beside it is not the graph that it was compiled from" in outcome.stdout
    (folder / f"{STEM}.onnx").unlink()
    assert f"skip {ENGINE}, audit: its typed graph {STEM}.onnx is not beside it" in (
        engines_command("verify", folder / ENGINE, "--static").stdout
    )


def test_info_says_what_is_in_an_int8_engine(folder):
    facts = {fact.key: fact.text for fact in facts_of_file(folder / ENGINE).facts}
    assert facts["precision"] == "int8"
    assert facts["tolerance"] == "relative error 2.5e-01 against golden.npz"
    assert "3 convolutions int8 x int8 -> float16, 1 matrix products int8 x int8 -> float16" in facts["kernels"]
    assert facts["audit"].startswith(f"against {STEM}.rtx.onnx: 3 of 3 convs in INT8 (half out), ")
    assert facts["traffic"].startswith("INT8 moves ")
    (folder / f"{STEM}.rtx.onnx").unlink()
    facts = {fact.key: fact.text for fact in facts_of_file(folder / ENGINE).facts}
    assert facts["audit"] == f"not made: {STEM}.onnx is not the file that the sidecar names"


def test_info_reads_a_graph_of_codes_and_half(folder):
    facts = {fact.key: fact.value for fact in facts_of_file(folder / f"{STEM}.rtx.onnx").facts}
    assert facts["opsets"] == {"ai.onnx": 19}
    codes = 16 * 3 * 9 + 2 * 16 * 16 * 9 + 10 * 16
    zero_points = 8
    assert facts["weights"]["int8"] == {"count": 4 + 8, "bytes": codes + zero_points}
    assert facts["weights"]["float16"] == {"count": 4 + 8, "bytes": 2 * (3 * 16 + 10 + 8)}
    assert facts["metadata"]["precision"] == "int8"


@pytest.mark.parametrize(("tolerance", "code"), [(0.25, 0), (0.26, 1)])
def test_an_engine_built_again_may_allow_no_more_than_the_export_did(
    engines_command, folder, monkeypatch, tolerance, code
):
    write_golden(folder, f"{STEM}.onnx", 26)
    listed = [ListedFile(name, (folder / name).stat().st_size, sha256_of(folder / name)) for name in GRAPHS]
    earlier = [ListedFile(name, 1, "0" * 64) for name in (ENGINE, f"{ENGINE}.json")]
    report = ReportFile(verdict="", passed=True, files=(*listed, *earlier), gates={"int8": 0.25})
    monkeypatch.setattr(verification, "report_from_file", lambda path: report)
    (folder / "report.json").write_text("{}")
    manifest = manifest_from_file(sidecar_path(folder / ENGINE))
    sidecar_path(folder / ENGINE).write_text(dataclasses.replace(manifest, tolerance=tolerance).to_json())
    outcome = engines_command("verify", folder / ENGINE, "--static")
    assert outcome.code == code
    assert (f"built again since, from the listed graph: {ENGINE}" in outcome.stdout) == (code == 0)
    assert (f"FAIL report.json, listed: {ENGINE}: " in outcome.stdout) == (code == 1)


@pytest.mark.parametrize(
    ("graph", "engine"),
    [
        ("model.int8.rtx.onnx", "model.int8.engine"),
        ("model.int8.onnx", "model.int8.engine"),
        ("model.fp16.onnx", "model.fp16.engine"),
        ("v1.rtx.onnx.onnx", "v1.rtx.onnx.engine"),
        ("graph", "graph.engine"),
    ],
)
def test_the_engine_of_a_graph_has_its_name_without_the_sdks(tmp_path, graph, engine):
    assert engine_beside(tmp_path / graph) == tmp_path / engine


def test_the_graph_of_an_engine_is_found_by_its_hash(folder):
    engine = folder / ENGINE
    assert [path.name for path in graphs_beside(engine)] == list(GRAPHS)
    for path in graphs_beside(engine):
        assert graph_of_engine(engine, sha256_of(path)) == path
    assert graph_of_engine(engine, "0" * 64) is None
    assert graph_of_engine(engine, None) == folder / f"{STEM}.onnx"


def test_build_gives_the_engine_of_either_graph_one_name(engines_command, folder):
    (folder / ENGINE).unlink()
    outcome = engines_command("build", folder / f"{STEM}.rtx.onnx", "--sdk", "tensorrt_rtx", "--gpu", "sm86")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert (folder / ENGINE).is_file()
    said = [line for line in outcome.stdout.splitlines() if "bytes of FP16" in line]
    assert len(said) == 1
    assert said[0].startswith("note INT8 moves ")
    assert said[0].endswith("(predicted from the file, not measured)")


def test_advice_for_another_sdk_names_the_graph_for_it(folder):
    header, manifest = checked_engine(folder / ENGINE)
    with pytest.raises(SdkMissing) as raised:
        check_card(folder / ENGINE, header, manifest, 90)
    assert f"python -m engines build {folder / STEM}.onnx --sdk tensorrt" in str(raised.value)
    with pytest.raises(SdkMissing) as raised:
        check_card(folder / ENGINE, header, manifest, 89)
    assert f"python -m engines build {folder / STEM}.rtx.onnx --sdk tensorrt_rtx --gpu sm89" in str(raised.value)
