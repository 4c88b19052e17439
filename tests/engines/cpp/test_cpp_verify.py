"""repvgg_verify: an engine that still computes its network passes, and every other fails, with the right exit code."""

from __future__ import annotations

import hashlib
import re
import struct

import numpy as np
import pytest

from engines.errors import InputRejected
from engines.golden_file import GoldenFile, golden_file_from_bytes
from engines.parity import GATES, compare
from tests.engines.cpp.programs import (
    BATCH,
    IMAGES,
    WEIGHTS,
    Network,
    assert_refused_in_a_line_or_right,
    golden_file,
    run,
    write_engine,
)

LAUNCHES, GRAPH = "answers, by launches", "answers, by CUDA graph"


def lines_of(done):
    """Marks and details by the check's name, and the verdict."""
    *lines, verdict = done.stdout.splitlines()
    found = [re.fullmatch("(ok  |FAIL|skip) ([^:]+): (.+)", line) for line in lines]
    assert all(found), done.stdout
    return {line[2]: (line[1].strip(), line[3]) for line in found}, verdict


@pytest.mark.parametrize("batch", [BATCH, (1, 1, 1), (1, 8, 32), (4, 4, 4)])
@pytest.mark.parametrize("features", [False, True])
def test_a_right_engine_passes(verify, batch, features):
    done = verify(Network(batch=batch, features=features))
    assert (done.returncode, done.stderr) == (0, "")
    checks, verdict = lines_of(done)
    assert verdict == "PASS: 4 of 4 checks hold"
    assert list(checks) == ["integrity", "golden vectors", LAUNCHES, GRAPH]
    assert {mark for mark, _ in checks.values()} == {"ok"}
    assert checks["integrity"][1] == "SHA-256, tensorrt_rtx 1.7.1.116, sm80, sm86, sm89, sm120, sm121"
    assert ("top-1 agrees on 4 of 4" in checks[GRAPH][1]) is not features


def assert_fails(done, said, name=LAUNCHES):
    assert done.returncode == 1, done.stdout + done.stderr
    checks, verdict = lines_of(done)
    mark, detail = checks[name]
    assert (mark, said in detail) == ("FAIL", True), detail
    assert verdict.startswith("FAIL: ")
    assert done.stderr == f"error: {name}: {detail}\n"


def test_a_nan(verify):
    assert_fails(
        verify(Network(lines=("fault nan output",))), "1 outputs are NaN or infinite; nothing else can be told"
    )


def test_rows_in_another_order(verify):
    assert_fails(verify(Network(lines=("fault swap output",))), "exceeds 5.0e-03")


@pytest.mark.parametrize("features", [False, True])
def test_rows_in_another_order_within_a_wide_gate(verify, features):
    """All answers are near to each other, as a network's are on noise; the gate alone would let them pass."""
    network = Network(features=features, lines=("fault swap output", *(["fault swap features"] if features else [])))
    images = (5 + 1e-4 * IMAGES).astype(np.float32)
    assert_fails(verify(network, images=images), "is nearer to that of another image: rows are mixed up, or all alike")


@pytest.mark.parametrize(("factor", "passes"), [(1.002, True), (1.02, False), (0.0, False), (-1.0, False)])
def test_weights_that_are_off(verify, factor, passes):
    done = verify(Network(weights=WEIGHTS * np.float32(factor)))
    if passes:
        assert (done.returncode, done.stderr) == (0, "")
        assert "relative error 2.0e-03 (gate 5.0e-03), SQNR 54.0 dB" in done.stdout
    else:
        assert_fails(done, f"relative error {abs(factor - 1):.2e} exceeds 5.0e-03")


def test_one_output_of_several_that_is_off_in_its_own_scale(verify):
    """The features are a thousand times as large as the scores, whose error would drown in them."""
    network = Network(features=True, weights=WEIGHTS * np.float32(1.02))
    assert_fails(verify(network), "relative error 2.0")


def test_figures_are_pythons(verify):
    weights = WEIGHTS + np.random.default_rng(1).normal(size=WEIGHTS.shape).astype(np.float32) * np.float32(1e-3)
    network = Network(weights=weights)
    mean = IMAGES.astype(np.float64).mean(axis=(2, 3))
    expected = compare(golden_file(network).outputs["output"], mean @ weights.astype(np.float64).T)
    detail = lines_of(verify(network))[0][LAUNCHES][1]
    assert f"relative error {expected.relative_error:.1e} (gate 5.0e-03), SQNR {expected.sqnr_db:.1f} dB, " in detail


@pytest.mark.parametrize(
    ("factor", "said"), [(0.95, None), (0.85, "SQNR 16.5 dB is below 20 dB"), (0.7, "exceeds 2.5e-01")]
)
def test_int8_has_a_least_sqnr(verify, factor, said):
    done = verify(Network(weights=WEIGHTS * np.float32(factor)), precision="int8", tolerance=0.25)
    if said is None:
        assert done.returncode == 0
        assert "SQNR 26.0 dB (gate 20 dB)" in done.stdout
    else:
        assert_fails(done, said)


def test_the_sidecars_tolerance_only_narrows_the_gate(verify):
    network = Network(weights=WEIGHTS * np.float32(1.002))
    assert_fails(verify(network, tolerance=1e-3), "relative error 2.00e-03 exceeds 1.0e-03")
    assert_fails(verify(Network(weights=WEIGHTS * np.float32(1.02)), tolerance=0.5), "exceeds 5.0e-03")


def test_a_decided_flip(verify):
    """Both classes are off by less than the gate, and the reference's margin is more than that."""
    means = np.random.default_rng(3).normal(size=(40_000, 3)).astype(np.float32)
    scores = np.sort(means @ WEIGHTS.T, axis=1)
    near = means[np.argmin(scores[:, -1] - scores[:, -2])]
    images = IMAGES.copy()
    images[2] = near[:, None, None]
    vectors = golden_file(images=images)
    outputs = vectors.outputs["output"].copy()
    first, second = np.argsort(outputs[2])[-1:-3:-1]
    step = np.float32(0.004 * np.abs(outputs).max())
    outputs[2, second] += step
    passing = GoldenFile(images, {"output": outputs}, GATES).to_bytes()
    outputs[2, first] -= step
    failing = GoldenFile(images, {"output": outputs}, GATES).to_bytes()
    done = verify(golden=passing)
    assert (done.returncode, "top-1 agrees on 3 of 4" in done.stdout) == (0, True)
    assert_fails(verify(golden=failing), "top-1 differs in 1 of 4 rows beyond the error's reach")


def test_vectors_that_tell_nothing_or_little(verify):
    constant = golden_file()
    alike = GoldenFile(IMAGES, {"output": np.ones_like(constant.outputs["output"])}, GATES).to_bytes()
    assert_fails(verify(golden=alike), "two answers or all values are the same", "golden vectors")
    near = (5 + 1e-4 * IMAGES).astype(np.float32)
    done = verify(images=near)
    assert done.returncode == 0
    assert "a constant answer would pass, too: export with --calib" in done.stdout
    assert "a constant answer" not in verify().stdout


@pytest.mark.parametrize(
    ("vectors", "name", "said"),
    [
        (
            golden_file(images=np.ones((2, 3, 5, 4), np.float32)),
            "golden vectors",
            "its images are not what the engine takes",
        ),
        (golden_file(Network(features=True)), "golden vectors", "it has other outputs than the engine"),
        (
            GoldenFile(IMAGES, {"scores": golden_file().outputs["output"]}, GATES),
            "answers",
            "the engine has no output scores of the golden vectors' shape",
        ),
        (
            GoldenFile(IMAGES, {"output": golden_file().outputs["output"][:, :4]}, GATES),
            "answers",
            "the engine has no output output of the golden vectors' shape",
        ),
    ],
)
def test_vectors_of_another_network(verify, vectors, name, said):
    if name == "golden vectors" and "images" in said:
        vectors = GoldenFile(
            vectors.images * np.arange(2)[:, None, None, None].astype(np.float32), vectors.outputs, GATES
        )
    assert_fails(verify(golden=vectors.to_bytes()), said, name)


def test_images_of_another_size_within_the_profile(verify):
    network = Network(free=True, features=True)
    images = np.random.default_rng(8).normal(size=(5, 3, 7, 8)).astype(np.float32)
    done = verify(network, images=images)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_image_alone(verify):
    done = verify(images=IMAGES[:1])
    assert (done.returncode, done.stderr) == (0, "")


def test_where_no_graph_can_be_recorded(verify):
    done = verify(Network(lines=("uncapturable",)))
    checks, verdict = lines_of(done)
    assert (done.returncode, verdict) == (0, "PASS: 3 of 3 checks hold")
    assert checks[GRAPH] == ("skip", "this engine's work cannot be recorded as a CUDA graph")


@pytest.mark.parametrize("call", [34, 51])
def test_where_one_of_two_graphs_cannot_be_recorded_the_other_is_still_judged(verify, call):
    done = verify(environment={"STUB_FAIL_CALL": call})
    checks, verdict = lines_of(done)
    assert (done.returncode, verdict) == (0, "PASS: 4 of 4 checks hold")
    assert checks[GRAPH][0] == "ok"
    mark, detail = checks["a CUDA graph of every batch size"]
    assert (mark, "enqueueV3 into a CUDA graph failed" in detail) == ("skip", True)


def test_a_precision_without_a_gate(verify):
    done = verify(precision="fp8")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.endswith("golden.bin: has no gate for fp8\n")


@pytest.mark.parametrize("kept", [0, 7, 8, 20, 39, 40, 100, 400, -33, -32, -1])
def test_golden_vectors_that_are_cut_short(verify, kept):
    done = verify(golden=golden_file().to_bytes()[:kept])
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(r"error: \S+golden\.bin: [^\n]+; copy the file again, or [^\n]+golden\n", done.stderr)


def test_golden_vectors_that_are_damaged_and_hashed_again(programs, tmp_path):
    """What Python's reader refuses is refused, and what it reads is run; nothing is read that is not there."""
    engine, path = write_engine(tmp_path), tmp_path / "golden.bin"
    content = golden_file().to_bytes()[:-32]
    generator = np.random.default_rng(4)
    for place in [*range(8, 36, 2), *generator.integers(36, 280, 20)]:
        changed = bytearray(content)
        changed[place] = generator.choice([0, 1, 2, 255, changed[place] ^ 4])
        damaged = bytes(changed) + hashlib.sha256(changed).digest()
        path.write_bytes(damaged)
        done = run(programs / "repvgg_verify", engine, path)
        try:
            golden_file_from_bytes(damaged, "golden.bin")
        except InputRejected:
            assert done.returncode == 3, done.stdout + done.stderr
        else:
            assert done.returncode in (0, 1, 3), done.stderr
            assert done.returncode != 3 or "has no gate" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("changed", "said"),
    [(b"fp16", "something is in it twice"), (b"\xff\xff16", "it holds a text that is not UTF-8")],
)
def test_a_gate_twice_and_a_text_that_is_none(verify, changed, said):
    content = golden_file().to_bytes()[:-32].replace(b"fp32", changed, 1)
    golden = content + hashlib.sha256(content).digest()
    with pytest.raises(InputRejected):
        golden_file_from_bytes(golden, "golden.bin")
    done = verify(golden=golden)
    assert (done.returncode, said in done.stderr) == (3, True), done.stderr


def test_a_shape_whose_size_overflows(programs, tmp_path):
    engine, path = write_engine(tmp_path), tmp_path / "golden.bin"
    content = golden_file().to_bytes()
    shape = struct.pack("<4I", *IMAGES.shape)
    place = content.index(shape)
    for extents in [(4, 65536, 65536, 65536), (4, 65536, 65536, 16384), (4, 65535, 1, 1), (4, *[65536] * 4)]:
        changed = content[: place - 4] + struct.pack(f"<{1 + len(extents)}I", len(extents), *extents)
        changed += content[place + 16 : -32]
        changed = changed[:12] + struct.pack("<Q", len(changed) + 32) + changed[20:]
        path.write_bytes(changed + hashlib.sha256(changed).digest())
        done = run(programs / "repvgg_verify", engine, path)
        assert (done.returncode, "it ends too early" in done.stderr) == (3, True)


@pytest.mark.parametrize("call", [1, 2, 3, 5, 7, 8, 9, 11, 14, 18, 22, 27, 33, 36, 40, 44, 50, 60, 70, 80])
def test_a_call_that_fails_in_the_whole_program(verify, call):
    done = verify(environment={"STUB_FAIL_CALL": call})
    assert_refused_in_a_line_or_right(done)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give an engine and a golden.bin"),
        (["one"], "give an engine and a golden.bin"),
        (["one", "two", "three"], "give an engine and a golden.bin"),
        (["one", "two", "--gate", "1"], "--gate: no such option"),
        (["one", "two", "--allow-unverified"], "--allow-unverified: no such option"),
        (["one", "two", "--device"], "--device : give a whole number from 0 to 9999"),
        (["one", "two", "--device", "-1"], "--device -1: give a whole number from 0"),
        (["one", "two", "--device", "1x"], "--device 1x: give a whole number from 0"),
    ],
)
def test_usage(programs, arguments, said):
    done = run(programs / "repvgg_verify", *arguments)
    assert (done.returncode, done.stdout, said in done.stderr) == (2, "", True)


def test_help(programs):
    done = run(programs / "repvgg_verify", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: repvgg_verify ENGINE GOLDEN [--device N] [--runtime-cache FILE]\n")


def test_a_full_disk_on_standard_output(programs, tmp_path):
    engine = write_engine(tmp_path)
    (tmp_path / "golden.bin").write_bytes(golden_file().to_bytes())
    done = run("sh", "-c", f"{programs / 'repvgg_verify'} {engine} {tmp_path / 'golden.bin'} > /dev/full")
    assert (done.returncode, done.stderr) == (5, "error: standard output: cannot be written\n")
