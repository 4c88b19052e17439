"""Files side by side through ONNX Runtime, on a clock that only they move: what is told, and when nothing is."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.bench import Options, bench, lines_from_record, rounds, workload
from engines.bench.comparison import names_of
from engines.bench.contenders import ON_HOST
from engines.errors import DeviceFailed, InputRejected, SdkMissing, UsageError
from engines.files import sha256_of
from tests.engines.bench_files import FREE, folder_with, images, onnx_bytes, save_golden, timed_sessions

WAY = ON_HOST[0].title
SHORT = 0.05


@pytest.fixture
def sessions(monkeypatch):
    made = timed_sessions(monkeypatch)
    yield made
    assert sorted(made.closed) == sorted(made.opened)


@pytest.fixture
def measure(sessions):
    """Measures on the virtual clock, at batch 1 unless told otherwise."""

    def run(*paths, **options):
        return bench(paths, Options(**{"batches": (1,), "duration": SHORT, **options}), clock=sessions.clock)

    return run


@pytest.fixture
def a(tmp_path):
    return folder_with(tmp_path, "a")


@pytest.fixture
def b(tmp_path):
    return folder_with(tmp_path, "b")


# --- figures


def test_the_figures_of_a_row_are_those_of_the_clock(sessions, measure, a):
    sessions.seconds["a.onnx"] = lambda rows: 0.002 + 0.001 * rows
    sessions.first, sessions.opening = 3.0, 0.25
    record = measure(a, batches=(1, 8))
    assert [(row.file, row.batch, row.way) for row in record.rows] == [("a.onnx", 1, WAY), ("a.onnx", 8, WAY)]
    for row, seconds in zip(record.rows, (0.003, 0.010), strict=True):
        for estimate in (row.queries_per_second, row.latency_ms[50]):
            assert estimate.low == pytest.approx(estimate.value) == pytest.approx(estimate.high)
        assert row.queries_per_second.value == pytest.approx(1 / seconds)
        assert row.images_per_second.value == pytest.approx(row.batch / seconds)
        assert row.windows == pytest.approx([row.batch / seconds] * 3)
        assert row.latency_ms[50].value == pytest.approx(1000 * seconds)
        assert row.queries == 9 * round(0.05 / seconds)
        assert (row.settled, row.parts_ms, row.bound, row.telemetry) == (True, {}, None, None)
        assert row.variation == pytest.approx(0, abs=1e-9)
    assert record.rows[0].latency_ms[99].value == pytest.approx(3)
    assert record.rows[1].latency_ms[95].value == pytest.approx(10)
    assert record.rows[1].latency_ms[99] is None
    assert record.files[0].load_seconds == pytest.approx(0.25)
    assert [row.first_seconds for row in record.rows] == pytest.approx([3.003, 0.010])


def test_a_file_is_named_by_what_it_is(measure, a):
    (file,) = measure(a).files
    assert (file.file, file.kind, file.precision) == ("a.onnx", "onnx", "fp32")
    assert (file.sha256, file.bytes) == (sha256_of(a), a.stat().st_size)
    convolution, matrix = 2 * 4 * 3 * 9 * 64, 2 * 4 * 5
    assert file.operations_per_image == convolution + matrix


def test_a_file_that_takes_half_the_time_is_twice_as_fast(sessions, measure, a, b):
    sessions.seconds |= {"a.onnx": 0.020, "b.onnx": 0.010}
    first, second = measure(a, b).rows
    assert (first.speedup, first.no_speedup) == (None, None)
    assert second.speedup.value == pytest.approx(2)
    assert (second.speedup.low, second.speedup.high) == (pytest.approx(2), pytest.approx(2))
    assert (second.against, second.no_speedup) == ("a.onnx", None)
    assert measure(b, a).rows[1].speedup.value == pytest.approx(0.5)


def test_noise_of_the_machine_does_not_blur_a_speed_up(sessions, measure, a, b):
    """Everything takes up to twice as long, and then as long as before, again and again."""

    def seconds(factor):
        return lambda rows: factor * 0.010 * (1.5 + 0.5 * np.sin(sessions.clock.now))

    sessions.seconds |= {"a.onnx": seconds(2), "b.onnx": seconds(1)}
    (first, second) = measure(a, b, duration=3).rows
    assert first.images_per_second.high > 1.1 * first.images_per_second.low
    assert second.speedup.value == pytest.approx(2, rel=0.01)
    assert second.speedup.high < 1.02 * second.speedup.low
    assert second.variation > 0.2


def test_two_files_that_are_alike_are_not_told_apart(sessions, measure, a, b):
    noise = np.random.default_rng(0)
    sessions.seconds |= dict.fromkeys(("a.onnx", "b.onnx"), lambda rows: 0.004 + 0.0005 * noise.random())
    _, second = measure(a, b).rows
    assert second.speedup is None
    assert second.no_speedup.endswith("cannot be told from 1")
    assert second.no_speedup.startswith(("0.99x (0.9", "1.00x (0.9"))


def test_files_that_take_exactly_as_long_are_not_told_apart(measure, a, b):
    _, second = measure(a, b, batches=(8,)).rows
    assert second.speedup is None
    assert second.no_speedup == "1.00x (1.00 to 1.00) cannot be told from 1"


@pytest.mark.parametrize(
    ("slower", "told"),
    [(0.9960, None), (0.9946, "0.99x (0.99 to 0.99)"), (1.0049, None), (1.0051, "1.01x (1.01 to 1.01)")],
)
def test_a_speed_up_whose_digits_are_those_of_1_is_not_told(sessions, measure, a, b, slower, told):
    """However narrow the interval: a table that says 1.00x (1.00 to 1.00) tells no speed-up."""
    sessions.seconds |= {"a.onnx": 0.010 * slower, "b.onnx": 0.010}
    record = measure(a, b)
    _, second = record.rows
    assert (second.speedup is None) == (told is None)
    if told is None:
        assert second.no_speedup == "1.00x (1.00 to 1.00) cannot be told from 1"
    else:
        assert any(line.endswith(f"  {told}") for line in lines_from_record(record))


def test_every_file_has_begun_before_any_is_measured(sessions, measure, a, b):
    sessions.first = 3.0
    record = measure(a, b)
    told = [name for name, _ in sessions.batches]
    assert told[:2] == ["a.onnx", "b.onnx"]
    assert told[-4:] == ["a.onnx"] * 2 + ["b.onnx"] * 2
    assert told.count("a.onnx") == told.count("b.onnx")
    assert max(row.latency_ms[50].high for row in record.rows) < 11


# --- answers


def last_rows_swapped(output):
    return output if len(output) < 8 else np.concatenate([output[:-2], output[-1:], output[-2:-1]])


def shifted(output):
    return np.roll(output, 1, axis=0)


def with_nan(output):
    changed = output.copy()
    changed[-1, 2] = np.nan
    return changed


def constant(output):
    return np.broadcast_to(output[:1], output.shape).copy()


FAULTS = {
    "swapped at batch 8": (last_rows_swapped, (1, 8), "relative error"),
    "swapped": (shifted, (8,), "relative error"),
    "nan": (with_nan, (1,), "outputs are NaN or infinite"),
    "nan at batch 8": (lambda output: with_nan(output) if len(output) == 8 else output, (1, 8), "are NaN"),
    "constant": (constant, (1,), "relative error"),
    "wrong alone": (lambda output: output + (len(output) == 1), (1,), "relative error"),
    "a column short": (lambda output: output[:, :-1], (1,), "output is 4 for each image, and 5 in the golden"),
    "a row short": (lambda output: output[:-1] if len(output) > 1 else output, (8,), "cannot be compared"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", [0, 1])
def test_a_file_that_computes_something_else_fails_and_has_no_speed_up(sessions, measure, a, b, fault, place):
    wrong, right = ("a.onnx", "b.onnx") if place == 0 else ("b.onnx", "a.onnx")
    sessions.harm[wrong], batches, said = FAULTS[fault]
    sessions.seconds |= {"a.onnx": 0.020, "b.onnx": 0.010}
    record = measure(a, b, batches=batches)
    parities = {file.file: file.parity for file in record.files}
    assert parities[wrong].passed is False
    assert said in parities[wrong].detail
    assert parities[right].passed is True
    assert record.failures == [f"{wrong}: {parities[wrong].detail}"]
    assert record.verdict.startswith("FAIL: 1 of 2 files")
    seconds = [row for row in record.rows if row.file == "b.onnx"]
    assert len(seconds) == len(batches)
    assert all((row.speedup, row.no_speedup) == (None, f"{wrong}: parity failed") for row in seconds)


def test_the_same_files_without_a_fault_pass(sessions, measure, a, b):
    sessions.seconds |= {"a.onnx": 0.020, "b.onnx": 0.010}
    record = measure(a, b, batches=(1, 8))
    assert [file.parity.passed for file in record.files] == [True, True]
    assert record.failures == []
    assert record.verdict == "PASS: 2 of 2 files computed their golden vectors, also in the timed batches"


def test_one_changed_weight_fails(measure, a, tmp_path):
    changed = folder_with(tmp_path, "changed", onnx_bytes(changed=1e-3))
    record = measure(a, changed)
    assert [file.parity.passed for file in record.files] == [True, False]
    assert "exceeds 5.0e-06" in record.files[1].parity.detail
    assert record.rows[1].no_speedup == "changed.onnx: parity failed"


def test_what_is_judged_is_what_was_timed(sessions, measure, a):
    """From the end of the timing on, the file answers correctly: too late."""
    slices = []

    def harm(output):
        slices.append(len(output))
        return output if len(output) in (1, 3) else np.zeros_like(output)

    sessions.harm["a.onnx"] = harm
    assert measure(a, batches=(1,)).files[0].parity.passed is True
    assert measure(a, batches=(1, 5)).files[0].parity.passed is False
    assert slices[-2:] == [1, 3]


def test_answers_that_go_wrong_while_it_is_timed_are_seen(sessions, measure, a):
    """After a first inference and a warm-up that were right."""
    computed = []

    def harm(output):
        computed.append(len(output))
        return with_nan(output) if computed.count(2) > 30 and len(output) == 2 else output

    sessions.harm["a.onnx"] = harm
    parity = measure(a, batches=(2,)).files[0].parity
    assert (parity.passed, computed[-2:]) == (False, [1, 3])
    assert "1 outputs are NaN or infinite" in parity.detail


def test_every_golden_image_is_computed_even_where_a_batch_holds_but_one(sessions, measure, a):
    """Only the third image is answered wrongly, which a batch of one never holds."""
    sessions.harm["a.onnx"] = lambda output: output + np.array([[0], [1], [0]]) if len(output) == 3 else output
    assert measure(a, batches=(1,)).files[0].parity.passed is False


def test_golden_images_fill_a_batch_over_and_over(sessions, measure, a):
    fed = []
    sessions.harm["a.onnx"] = lambda output: fed.append(output) or output
    record = measure(a, batches=(6,))
    whole = next(output for output in fed if len(output) == 6)
    np.testing.assert_allclose(whole[4:], whole[:2], rtol=1e-5)
    assert abs(whole[0] - whole[1]).max() > 0.1
    assert "top-1 agrees on 4 of 4" in record.files[0].parity.detail


def test_a_small_answer_is_not_held_to_a_stricter_gate_when_it_is_alone(sessions, measure, tmp_path):
    """Errors are relative to the largest golden answer, in a batch of one as in ``engines verify``."""
    path = folder_with(tmp_path, "a", golden=False)
    feeds = images() * np.float32([0.01, 1, 1, 1])[:, None, None, None]
    save_golden(path.parent, feeds)
    with np.load(path.parent / "golden.npz") as archive:
        outputs = archive["output"]
    allowed = 4e-6 * np.abs(outputs).max()
    assert allowed > 5e-6 * np.abs(outputs[0]).max()
    sessions.harm["a.onnx"] = lambda output: output + np.float32(allowed)
    assert measure(path, batches=(1,)).files[0].parity.passed is True
    assert measure(path, batches=(4,)).files[0].parity.passed is True
    sessions.harm["a.onnx"] = lambda output: output + np.float32(2 * allowed)
    assert measure(path, batches=(1,)).files[0].parity.passed is False


# --- nothing to judge by


def without_golden(path):
    (path.parent / "golden.npz").unlink()
    return path


def of_no_precision(path):
    path.write_bytes(onnx_bytes(precision=None))
    return path


@pytest.mark.parametrize(
    ("unmade", "said"),
    [
        (without_golden, "there is no golden.npz beside it"),
        (of_no_precision, "there is no gate for its precision, unnamed"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_file_that_cannot_be_judged_is_measured_and_has_no_speed_up(sessions, measure, a, b, unmade, said, place):
    sessions.seconds |= {"a.onnx": 0.020, "b.onnx": 0.010}
    paths = [a, b]
    unmade(paths[place])
    record = measure(a, b)
    parity = record.files[place].parity
    assert parity.passed is None
    assert parity.detail.startswith(said)
    assert record.files[1 - place].parity.passed is True
    assert record.rows[1].speedup is None
    assert record.rows[1].no_speedup == f"{paths[place].name}: parity was not checked"
    assert record.rows[1].images_per_second.value == pytest.approx(100)
    assert record.failures == []
    assert record.verdict.endswith(
        "1 of 1 files computed their golden vectors, also in the timed batches, 1 not checked"
    )


def damaged(path):
    path.write_bytes(path.read_bytes()[:300])


def empty(path):
    path.write_bytes(b"")


def untelling(path):
    save_golden(path.parent, images(2), output=np.ones((2, 5)))


def of_integers(path):
    np.savez(path, input=images(2), output=np.ones((2, 5), int))


def a_directory(path):
    path.unlink()
    path.mkdir()


def leading_nowhere(path):
    path.unlink()
    path.symlink_to("gone.npz")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("harmed", "said"),
    [
        (damaged, "not an .npz of input and outputs"),
        (empty, "not an .npz of input and outputs"),
        (untelling, "two answers or all values are the same"),
        (of_integers, "output is int64 (2, 5)"),
        (a_directory, "not an .npz of input and outputs"),
        (leading_nowhere, "no such file, so there is nothing to compare with"),
    ],
)
def test_golden_vectors_that_tell_nothing_are_an_error_before_anything_is_measured(
    sessions, measure, a, b, harmed, said, place
):
    golden = (a, b)[place].parent / "golden.npz"
    harmed(golden)
    with pytest.raises(InputRejected) as caught:
        measure(a, b)
    assert str(caught.value).startswith(f"{golden}: {said}")
    assert sessions.batches == []
    assert sorted(sessions.closed) == sorted(sessions.opened)


def test_where_nothing_was_checked_nothing_is_said_to_have_passed(measure, a):
    without_golden(a)
    record = measure(a)
    assert record.verdict == "NOT CHECKED: none of 1 files was held to golden vectors"
    assert record.failures == []


def test_how_busy_the_machine_was_is_asked_before_it_is_busy_measuring(sessions, measure, tmp_path, monkeypatch):
    path = folder_with(tmp_path, "a", onnx_bytes(FREE))
    monkeypatch.setattr(os, "getloadavg", lambda: (float(len(sessions.batches)), 0.0, 0.0))
    assert measure(path).machine["load"] == 0
    assert os.getloadavg()[0] > 0


def test_the_gate_is_that_of_the_report_beside_it(sessions, measure, fashion_export, tmp_path):
    folder = shutil.copytree(fashion_export, tmp_path / "f")
    path, report = folder / "fashion.onnx", folder / "report.json"
    sessions.harm["fashion.onnx"] = lambda output: output + 1e-5 * np.abs(output).max()
    assert measure(path).files[0].parity.passed is False
    value = json.loads(report.read_text())
    value["gates"]["fp32"] = 1e-4
    report.write_text(json.dumps(value))
    (file,) = measure(path).files
    assert file.parity.passed is True
    assert "gate 1.0e-04" in file.parity.detail
    report.write_text("{")
    with pytest.raises(InputRejected, match=r"report\.json: "):
        measure(path)
    report.unlink()
    assert "gate 5.0e-06" in measure(path).files[0].parity.detail


# --- batches and sizes


def fixed(batch, size=8):
    return onnx_bytes((batch, 3, size, size))


def test_a_file_of_one_batch_is_measured_at_it(measure, tmp_path):
    path = folder_with(tmp_path, "eight", fixed(8))
    record = measure(path, batches=None)
    assert [row.batch for row in record.rows] == [8]
    assert record.files[0].parity.passed is True
    assert ("batch", "8", "default") in {(one.name, one.value, one.source) for one in record.settings}


def test_the_usual_batches_are_those_that_all_files_take(measure, a, tmp_path):
    assert [row.batch for row in measure(a, batches=None).rows] == [1, 8, 32]
    eight = folder_with(tmp_path, "eight", fixed(8))
    assert [(row.file, row.batch) for row in measure(a, eight, batches=None).rows] == [("a.onnx", 8), ("eight.onnx", 8)]


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ((8, 4), "--batch 8: {path} takes batches of 5"),
        ((5, 4), "--batch 4: {path} takes batches of 5"),
        (None, "no usual batch fits all files (a.onnx 1 or more; five.onnx 5); give --batch"),
    ],
)
def test_a_batch_that_a_file_does_not_take_is_refused(measure, a, tmp_path, batches, said):
    path = folder_with(tmp_path, "five", fixed(5))
    with pytest.raises(UsageError) as caught:
        measure(a, path, batches=batches)
    assert str(caught.value) == said.format(path=path)


def test_an_odd_batch_of_a_fixed_file_is_measured_when_asked_for(measure, tmp_path):
    path = folder_with(tmp_path, "five", fixed(5))
    record = measure(path, batches=(5,))
    assert (record.rows[0].batch, record.files[0].parity.passed) == (5, True)


@pytest.fixture
def free(tmp_path):
    return folder_with(tmp_path, "free", onnx_bytes(FREE), golden=False)


def test_free_sizes_are_those_of_the_golden_images(measure, free):
    save_golden(free.parent, images(size=(8, 12)))
    record = measure(free)
    assert record.files[0].parity.passed is True
    assert record.files[0].operations_per_image == 2 * 4 * 3 * 9 * 8 * 12 + 2 * 4 * 5


def test_free_sizes_can_be_given(measure, free):
    record = measure(free, size=(6, 10))
    assert record.files[0].operations_per_image == 2 * 4 * 3 * 9 * 6 * 10 + 2 * 4 * 5
    assert record.files[0].parity.passed is None
    assert ("size", "6x10", "--size") in {(one.name, one.value, one.source) for one in record.settings}


def test_the_size_is_told_where_nobody_gave_it_and_that_files_have_another(measure, free, a, tmp_path):
    save_golden(free.parent, images(size=(12, 10)))
    other = folder_with(tmp_path, "other")
    record = measure(a, other, free)
    assert ("size", "8x8, 12x10", "file, else golden.npz") in {
        (one.name, one.value, one.source) for one in record.settings
    }
    assert [warning for warning in record.warnings if "images of" in warning] == [
        "free.onnx: computes images of 12x10, and a.onnx of 8x8: speed-ups are not at equal work"
    ]
    alike = measure(a, other)
    assert ("size", "8x8") in {(one.name, one.value) for one in alike.settings}
    assert not [warning for warning in alike.warnings if "images of" in warning]


def test_golden_images_that_the_file_does_not_take_are_named_as_such(measure, a):
    save_golden(a.parent, images(size=(9, 8)))
    parity = measure(a).files[0].parity
    assert parity.passed is False
    assert parity.detail.startswith("the images of its golden.npz do not fit: input: float32 (1, 3, 9, 8); expected")


def test_free_sizes_that_nothing_tells_are_asked_for(measure, free):
    with pytest.raises(UsageError) as caught:
        measure(free)
    assert str(caught.value) == f"--size: {free} takes images of any size, and has no golden.npz; say which"


def test_at_another_size_than_the_golden_images_nothing_that_was_timed_is_judged(sessions, measure, free, tmp_path):
    """The golden images may well pass: they are not what was timed."""
    save_golden(free.parent, images())
    other = folder_with(tmp_path, "other", onnx_bytes(FREE))
    sessions.seconds |= {"free.onnx": 0.020, "other.onnx": 0.010}
    record = measure(free, other, size=(12, 12))
    assert [file.parity.passed for file in record.files] == [None, None]
    assert "images of another size" in record.files[0].parity.detail
    assert record.rows[1].no_speedup == "other.onnx: parity was not checked"
    assert [file.parity.passed for file in measure(free, other, size=(8, 8)).files] == [True, True]


def test_a_wrong_answer_is_a_failure_also_where_another_size_is_timed(sessions, measure, free):
    save_golden(free.parent, images())
    sessions.harm["free.onnx"] = lambda output: output + 1
    assert measure(free, size=(12, 12)).files[0].parity.passed is False


def test_a_size_that_a_file_does_not_take_is_refused(measure, a):
    with pytest.raises(UsageError) as caught:
        measure(a, size=(8, 9))
    assert str(caught.value) == f"--size: {a} takes images of 8x8 alone"
    assert measure(a, size=(8, 8)).files[0].parity.passed is True


def test_a_size_is_held_to_the_extents_that_are_fixed(measure, tmp_path):
    path = folder_with(tmp_path, "wide", onnx_bytes(("N", 3, "height", 8)), golden=False)
    with pytest.raises(UsageError, match=r"^--size.*wide\.onnx"):
        measure(path, size=(12, 12))
    assert measure(path, size=(12, 8)).rows[0].queries > 0
    save_golden(path.parent, images(size=(12, 8)))
    assert measure(path).files[0].parity.passed is True


# --- files that are none


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (onnx_bytes(second_input=True), "takes input float32 (N, 3, 8, 8), more float32 (N, 5); expected one input"),
        (onnx_bytes(dtype=TensorProto.UINT8), "its input is uint8; expected float32"),
        (onnx_bytes(("N", "channels", 8, 8)), "takes input float32 (N, ?, 8, 8); expected one input of images"),
    ],
)
def test_what_takes_no_images_is_refused(measure, a, tmp_path, content, said):
    path = folder_with(tmp_path, "odd", content, golden=False)
    with pytest.raises(InputRejected) as caught:
        measure(a, path)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_a_file_of_rows_instead_of_images_is_refused(measure, a, tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Relu", ["input"], ["output"])],
        "rows",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ("N", 5))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ("N", 5))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    path = folder_with(tmp_path, "rows", model.SerializeToString(), golden=False)
    with pytest.raises(InputRejected) as caught:
        measure(a, path)
    assert str(caught.value) == f"{path}: takes input float32 (N, 5); expected one input of images (N, C, H, W)"


def test_a_missing_file_is_refused_and_the_others_are_closed(sessions, measure, a, tmp_path):
    with pytest.raises(InputRejected, match=r"none\.onnx: no such file"):
        measure(a, tmp_path / "none.onnx")
    assert sessions.closed == ["a.onnx"]


def test_no_file_and_the_same_file_twice_are_refused(measure, a, b):
    with pytest.raises(UsageError, match=r"^give at least one file$"):
        measure()
    with pytest.raises(UsageError) as caught:
        measure(a, b, a)
    assert str(caught.value) == f"{a} is given twice"


def test_files_of_one_name_are_told_by_their_directories(sessions, measure, a, tmp_path):
    other = shutil.copytree(a.parent, tmp_path / "copy") / "a.onnx"
    record = measure(a, other)
    names = [file.file for file in record.files]
    assert len(set(names)) == 2
    assert [row.file for row in record.rows] == names
    assert names == names_of([a, other])
    assert all(name.endswith("a.onnx") for name in names)
    assert str(tmp_path.parent) not in record.to_json(raw=True)


def test_a_file_that_is_gone_or_replaced_meanwhile_is_told_as_it_was_opened(sessions, measure, a):
    size, digest = a.stat().st_size, sha256_of(a)
    sessions.fails["a.onnx"] = lambda _: a.unlink(missing_ok=True)
    (file,) = measure(a).files
    assert not a.exists()
    assert (file.bytes, file.sha256) == (size, digest)


def test_a_name_is_one_line_whatever_is_in_it(measure, a, tmp_path):
    odd = [tmp_path / "x\nPASS: \x1b[31m.onnx", tmp_path / "x\\nPASS: \\x1b[31m.onnx"]
    for path in odd:
        shutil.copy(a, path)
    record = measure(*odd)
    assert [file.file for file in record.files] == [
        r"x\nPASS: \x1b[31m.onnx",
        r"x\\nPASS: \\x1b[31m.onnx",
    ]
    assert all(text.isprintable() for text in (*record.warnings, *lines_from_record(record)))


# --- failures on the way


def failing_at(rows, error, after=0):
    """Fails at this batch from then on, when it was computed ``after`` times."""
    counts = []

    def fails(batch):
        if batch != rows:
            return None
        counts.append(batch)
        return error if len(counts) > after else None

    return fails


@pytest.mark.parametrize("after", [0, 1, 40])
@pytest.mark.parametrize(
    "error", [InputRejected("b.onnx: does not compute"), DeviceFailed("cudaLaunch: failed"), KeyboardInterrupt()]
)
def test_a_failure_while_it_is_measured_is_told_and_everything_is_closed(sessions, measure, a, b, error, after):
    sessions.fails["b.onnx"] = failing_at(8, error, after)
    with pytest.raises(type(error)) as caught:
        measure(a, b, batches=(1, 8))
    assert caught.value is error
    assert sorted(sessions.closed) == ["a.onnx", "b.onnx"]


def test_a_failure_to_compute_the_golden_images_is_a_failure_of_the_file(sessions, measure, a, b):
    error = InputRejected(f"{b}: ONNX Runtime failed (out of spells)")
    sessions.fails["b.onnx"] = failing_at(3, error)
    record = measure(a, b, batches=(8,))
    assert [file.parity.passed for file in record.files] == [True, False]
    assert record.files[1].parity.detail == "ONNX Runtime failed (out of spells)"


def test_a_provider_that_is_not_here_is_told(measure, a):
    with pytest.raises(SdkMissing, match="provider cuda: this ONNX Runtime has"):
        measure(a, provider="cuda")


# --- settings and cautions


def test_threads_and_provider_reach_the_session_and_are_told(sessions, measure, a):
    record = measure(a, threads=1, provider="cpu")
    assert [(source.threads, source.provider, source.spinning) for source in sessions.sources] == [(1, "cpu", False)]
    told = {one.name: (one.value, one.source) for one in record.settings}
    assert told["threads"] == ("1", "--threads")
    assert told["provider"] == ("cpu", "--provider")
    assert told["spinning threads"] == ("not between calls, so that files leave each other the processor", "bench")
    assert told["batch"] == ("1", "--batch")
    assert told["duration"] == ("0.05 s", "--duration")
    left_alone = {one.name: (one.value, one.source) for one in measure(a, duration=3.0).settings}
    assert left_alone["threads"] == ("its own choice", "ONNX Runtime")
    assert left_alone["provider"] == ("cpu", "default")
    assert left_alone["duration"] == ("3 s", "default")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batches": ()}, "--batch: give whole numbers from 1 to 65536, with commas"),
        ({"batches": (0,)}, "--batch: give whole numbers from 1 to 65536, with commas"),
        ({"batches": (1, 65537)}, "--batch: give whole numbers from 1 to 65536, with commas"),
        ({"batches": (1, 8, 1)}, "--batch: a batch is given twice"),
        ({"threads": 0}, "--threads 0: give"),
        ({"threads": 1, "provider": "cuda"}, "--threads is for ONNX Runtime on the CPU, and --provider is cuda"),
        ({"provider": "gpu"}, "provider 'gpu': unknown; choose from cpu, cuda, tensorrt"),
        ({"duration": 0.0}, "--duration 0: give seconds, above 0 and up to 3600"),
        ({"duration": float("nan")}, "--duration nan: give seconds, above 0 and up to 3600"),
        ({"duration": 3601.0}, "--duration 3601: give seconds, above 0 and up to 3600"),
        ({"size": (0, 8)}, "--size 0x8: give N or HxW, from 1 to 4096"),
        ({"size": (8, 4097)}, "--size 8x4097: give N or HxW, from 1 to 4096"),
        ({"device": -1}, "--device -1: GPUs are counted from 0"),
        ({"device": 1 << 70}, f"--device {1 << 70}: GPUs are counted from 0"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_opened(sessions, measure, a, options, said):
    with pytest.raises(UsageError) as caught:
        measure(a, **options)
    assert str(caught.value).startswith(said)
    assert sessions.opened == []


def warnings_of(record, word):
    return [warning for warning in record.warnings if word in warning]


def test_what_did_not_settle_or_is_noisy_is_said(sessions, measure, a, b):
    slower = iter(range(10**6))
    sessions.seconds |= {"a.onnx": lambda rows: 0.010 * 1.02 ** next(slower), "b.onnx": 0.010}
    record = measure(a, b)
    assert [row.settled for row in record.rows] == [False, True]
    assert len(record.rows[0].windows) == len(record.rows[1].windows) == 9
    assert warnings_of(record, "settle") == [
        f"a.onnx, batch 1, {WAY}: did not settle: the last 3 of 9 windows differ by more than 5%"
    ]
    (noisy,) = warnings_of(record, "vary")
    assert noisy.startswith(f"a.onnx, batch 1, {WAY}: latencies vary by ")
    assert noisy.endswith("%, more than 2.5%; stop what else runs on this machine")
    assert "not settled" in "\n".join(lines_from_record(record))


def test_of_a_steady_file_nothing_is_said(measure, a):
    assert measure(a).warnings == ()


def test_that_a_cpu_computes_float16_in_float32_is_said(measure, a, b):
    b.write_bytes(onnx_bytes(precision="fp16"))
    (warning,) = measure(a, b).warnings
    assert warning.startswith("b.onnx: ONNX Runtime computes float16 in float32 on a CPU")


def test_that_weights_stand_in_another_file_is_said(measure, tmp_path):
    whole, split = tmp_path / "whole.onnx", tmp_path / "split.onnx"
    weight = helper.make_tensor("w", TensorProto.FLOAT, (8, 3, 9, 9), np.ones(1944, "<f4").tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input", "w"], ["output"])],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 9, 9])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 8, 1, 1])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, whole)
    onnx.save(model, split, save_as_external_data=True, location="split.bin", size_threshold=0)
    assert measure(whole, split).warnings == (
        "split.onnx: its weights stand in a file beside it, which is in neither its size nor its SHA-256",
    )


def test_a_graph_whose_work_cannot_be_counted_is_measured_all_the_same(monkeypatch, measure, a):
    def refused(path, size):
        raise InputRejected(f"{path}: has a Loop \x1b[2J, whose work nobody knows")

    monkeypatch.setattr(workload, "works_of_file", refused)
    record = measure(a)
    assert record.warnings == ("a.onnx: no bound is known: has a Loop \\x1b[2J, whose work nobody knows",)
    assert record.files[0].operations_per_image is None
    assert record.rows[0].bytes_per_image is None
    assert record.files[0].parity.passed is True


# --- on the real clock


def test_on_the_real_clock_a_larger_file_takes_longer(tmp_path, monkeypatch):
    """Sixty-four times the pixels, side by side: whatever else this machine does, hits both."""
    monkeypatch.setattr(rounds, "WARM_UP", 0.02)
    monkeypatch.setattr(rounds, "SLICE", 0.01)
    small = folder_with(tmp_path, "small")
    large = folder_with(tmp_path, "large", fixed("N", 64), golden=False)
    save_golden(large.parent, images(size=(64, 64)))
    record = bench([large, small], Options(batches=(4,), duration=SHORT, threads=1))
    assert [file.parity.passed for file in record.files] == [True, True]
    slow, fast = record.rows
    assert fast.speedup.low > 1
    assert fast.latency_ms[50].value < slow.latency_ms[50].value
    assert slow.first_seconds > 0
    assert record.files[0].load_seconds > 0
