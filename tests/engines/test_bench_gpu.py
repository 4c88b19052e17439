"""The GPU branch of the benchmark on a pretended machine: every figure is what the fakes were told."""

from __future__ import annotations

import dataclasses

import numpy as np
import pynvml
import pytest

from engines.backends import tensorrt as backend_module
from engines.bench import Options, bench, lines_from_record
from engines.errors import InputRejected, SdkMissing
from engines.roofline import bound_of, bytes_per_image, operations_per_image, works_of_file
from engines.roofline.cards import card_from_key
from tests.engines import fake_nvml
from tests.engines.fake_machine import ONNX, answers, fake_machine, images
from tests.engines.fake_nvml import Phase
from tests.engines.sdk_bindings import RTX, VERSIONS

TO_DEVICE, TO_HOST = 2e-6, 4e-6  # seconds a byte
BATCH_SECONDS, IMAGE_SECONDS = 20e-3, 1e-3
LAUNCHES, GRAPH_LAUNCH = 4e-3, 0.5e-3
JIT = 0.7
IMAGE_BYTES, ANSWER_BYTES = 4 * 3 * 8 * 8, 4 * (5 + 4)
WATTS = 70.0
WAYS = (
    "launches, with transfers", "launches, compute alone", "CUDA graph, with transfers", "CUDA graph, compute alone",
)  # fmt: skip


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A card called NVIDIA L4, whose work takes known times, with golden vectors of the engines' network."""
    made = fake_machine(monkeypatch, tmp_path)
    monkeypatch.setitem(fake_nvml.NAMES, 0, "NVIDIA L4")
    made.cuda.costs = dataclasses.replace(
        made.cuda.costs,
        to_device=TO_DEVICE,
        to_host=TO_HOST,
        launches=LAUNCHES,
        graph_launch=GRAPH_LAUNCH,
        calls={"deserialize_cuda_engine": JIT},
    )
    made.nvml.phases = (Phase(sm_mhz=2040, memory_mhz=6251, celsius=61, watts=WATTS),)
    golden = images(4)
    np.savez(tmp_path / "golden.npz", input=golden, **{k: v.astype(np.float64) for k, v in answers(golden).items()})
    return made


def engine(machine, name="a", times=1.0, **options):
    """An engine that takes so many times as long as the usual one."""
    made = machine.engine(f"{name}.fp16.engine", seconds=(BATCH_SECONDS * times, IMAGE_SECONDS * times), **options)
    made.with_suffix(".onnx").write_bytes(ONNX)
    return made


def measure(machine, *engines, batches=(2,), duration=0.3):
    record = bench(engines, Options(batches=batches, duration=duration), clock=machine.cuda.clock)
    machine.assert_nothing_left()
    return record


def computing(batch, way):
    """What the engine takes for a batch, in seconds."""
    return BATCH_SECONDS + batch * IMAGE_SECONDS + (GRAPH_LAUNCH if way.startswith("CUDA graph") else LAUNCHES)


def copying(batch, way):
    """What the copies there and back take, in seconds."""
    return (batch * IMAGE_BYTES * TO_DEVICE, batch * ANSWER_BYTES * TO_HOST) if "with" in way else (0.0, 0.0)


def test_every_figure_is_what_the_card_was_told_to_take(machine):
    record = measure(machine, engine(machine), batches=(2, 5))
    assert [(row.batch, row.way) for row in record.rows] == [(batch, way) for batch in (2, 5) for way in WAYS]
    for row in record.rows:
        there, back = copying(row.batch, row.way)
        compute = computing(row.batch, row.way)
        latency = there + compute + back
        parts = {"h2d": there, "compute": compute, "d2h": back} if there else {"compute": compute}
        assert row.parts_ms == pytest.approx({name: 1e3 * part for name, part in parts.items()}, rel=1e-4)
        for percentile, estimate in row.latency_ms.items():
            told = row.queries >= {50: 1, 90: 10, 95: 20, 99: 100}[percentile]
            assert (estimate is not None) == told
            if told:
                assert dataclasses.astuple(estimate) == pytest.approx((1e3 * latency,) * 3, rel=1e-4)
        assert dataclasses.astuple(row.queries_per_second) == pytest.approx((1 / latency,) * 3, rel=1e-3)
        assert row.images_per_second.value == pytest.approx(row.batch / latency, rel=1e-3)
        assert row.settled
        assert row.variation == pytest.approx(0, abs=1e-4)
    assert record.verdict == "PASS: 1 of 1 files computed their golden vectors, also in the timed batches"
    assert record.warnings == ()


def test_opening_and_the_first_inference_stand_apart(machine):
    machine.cuda.costs.calls["create_execution_context"] = 0.3
    record = measure(machine, engine(machine))
    assert record.files[0].load_seconds == pytest.approx(JIT + 0.3, rel=1e-3)
    for row in record.rows:
        first = 0.3 + computing(2, "launches") + sum(copying(2, "with transfers"))
        assert row.first_seconds == pytest.approx(first, rel=1e-3)


def test_the_card_is_named_and_its_clocks_and_energy_told(machine):
    record = measure(machine, engine(machine))
    assert record.machine["gpu"] == "NVIDIA L4"
    assert record.machine["card"] == "l4"
    assert record.machine["driver"] == "580.65.06"
    for row in record.rows:
        seconds = computing(2, row.way) + sum(copying(2, row.way))
        told = row.telemetry
        assert told["joules_per_image"] == pytest.approx(WATTS * seconds / 2, rel=0.02)
        assert (told["sm_clock_mhz"], told["memory_clock_mhz"], told["temperature_c"]) == (2040, 6251, 61)
        assert told["power_w"] == pytest.approx(WATTS, rel=0.02)
        assert told["throttled"] == []
        assert told["maximum_sm_clock_mhz"] == 2175


def test_a_card_that_counts_no_energy_is_told_without_it(machine):
    machine.nvml.refuse("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetTemperature")
    record = measure(machine, engine(machine))
    assert {(row.telemetry["joules_per_image"], row.telemetry["temperature_c"]) for row in record.rows} == {
        (None, None)
    }
    (header,) = {line for line in lines_from_record(record) if line.startswith("  file")}
    assert " W " in header
    assert "J/image" not in header
    assert " C " not in header


def test_a_card_that_holds_its_clocks_back_is_a_warning(machine):
    idle = pynvml.nvmlClocksEventReasonGpuIdle  # says nothing of a card that is at work
    machine.nvml.phases = (Phase(reasons=pynvml.nvmlClocksEventReasonSwPowerCap | idle),)
    record = measure(machine, engine(machine))
    assert record.warnings == tuple(
        f"a.fp16.engine, batch 2, {way}: the card held its clocks back: sw power cap" for way in WAYS
    )


def test_without_nvml_times_are_measured_and_bounds_are_not_told(machine, monkeypatch):
    machine.nvml.refuse("nvmlInit", error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    record = measure(machine, engine(machine))
    assert {(row.bound, row.telemetry) for row in record.rows} == {(None, None)}
    assert record.machine["gpu"] is None
    assert record.warnings == ("no bounds, clocks or energy: NVML does not answer: Driver Not Loaded",)


def test_an_unknown_card_has_no_bound(machine, monkeypatch):
    monkeypatch.setitem(fake_nvml.NAMES, 0, "NVIDIA Imaginary 9")
    record = measure(machine, engine(machine))
    assert {row.bound for row in record.rows} == {None}
    assert record.warnings == ("no bounds: the peaks of NVIDIA Imaginary 9 are not known",)


def test_golden_vectors_of_an_engine_that_cannot_be_read_are_an_error_before_it_computes(machine):
    made = engine(machine)
    golden = made.with_name("golden.npz")
    golden.write_bytes(golden.read_bytes()[:-1])
    with pytest.raises(InputRejected) as caught:
        measure(machine, made)
    assert str(caught.value).startswith(f"{golden}: not an .npz of input and outputs")
    assert not any(name.startswith(("execute", "enqueue")) for name in machine.names)
    machine.assert_nothing_left()
    golden.unlink()
    assert measure(machine, made).verdict.startswith("NOT CHECKED: ")
    assert any(name.startswith("execute") for name in machine.names)


def test_each_row_ends_with_its_part_of_the_bound(machine):
    made = engine(machine)
    record = measure(machine, made)
    works = works_of_file(made)
    least = bound_of(works, card_from_key("l4"), 2)
    assert record.files[0].operations_per_image == operations_per_image(works)
    for row in record.rows:
        assert row.bytes_per_image == bytes_per_image(works, 2)
        assert row.bound.milliseconds == pytest.approx(1e3 * least.seconds)
        assert row.bound.percent == pytest.approx(100 * least.seconds * row.queries_per_second.value)
        assert (row.bound.card, row.bound.binds) == ("NVIDIA L4", least.binds)
    rows = [line for line in lines_from_record(record) if line.startswith("  a.fp16.engine")]
    assert len(rows) == len(WAYS)
    assert all(line.endswith(f"0 % ({row.bound.binds})") for line, row in zip(rows, record.rows, strict=True))


def test_copies_that_take_longer_than_the_engine_bind(machine):
    machine.cuda.costs.to_device = 1e-4
    record = measure(machine, engine(machine))
    assert {row.way: row.bound.binds for row in record.rows} == {
        way: "transfers" if "with" in way else "memory" for way in WAYS
    }
    assert [warning for warning in record.warnings if "copying" in warning] == [
        f"a.fp16.engine, batch 2, {way}: copying (h2d) takes longer than computing" for way in WAYS if "with" in way
    ]


def test_half_the_time_is_twice_the_speed(machine):
    record = measure(machine, engine(machine, "a", 1.0), engine(machine, "b", 0.5))
    for first, second in zip(record.rows[:4], record.rows[4:], strict=True):
        assert (first.way, first.speedup) == (second.way, None)
        assert second.speedup.value == pytest.approx(
            second.queries_per_second.value / first.queries_per_second.value, rel=1e-6
        )
        assert second.against == "a.fp16.engine"
    alone = record.rows[7]
    work = BATCH_SECONDS + 2 * IMAGE_SECONDS
    assert alone.speedup.value == pytest.approx((work + GRAPH_LAUNCH) / (work / 2 + GRAPH_LAUNCH), rel=1e-3)


def test_an_engine_with_wrong_answers_is_not_called_faster(machine, monkeypatch):
    slow, fast = engine(machine, "a"), engine(machine, "b", 0.5)
    golden = dict(np.load(slow.with_name("golden.npz")))
    other = slow.parent / "other"
    other.mkdir()
    for path in (fast, fast.with_name(f"{fast.name}.json"), fast.with_suffix(".onnx")):
        path.rename(other / path.name)
    golden["output"] = golden["output"] * 1.5
    np.savez(other / "golden.npz", **golden)
    record = measure(machine, slow, other / fast.name)
    assert [file.parity.passed for file in record.files] == [True, False]
    assert {row.speedup for row in record.rows} == {None}
    assert {row.no_speedup for row in record.rows[4:]} == {"b.fp16.engine: parity failed"}
    assert record.verdict.startswith("FAIL: 1 of 2 files")


def test_where_no_graph_can_be_recorded_its_rows_are_left_out_and_said_to_be(machine):
    machine.journal.fail_names.add("cudaStreamBeginCapture")
    record = measure(machine, engine(machine))
    assert [row.way for row in record.rows] == list(WAYS[:2])
    assert record.warnings == (
        f"a.fp16.engine, batch 2: left out, no CUDA graph could be recorded: {'; '.join(WAYS[2:])}",
    )


@pytest.mark.parametrize("version", [version for version in VERSIONS if version != RTX])
def test_full_tensorrt_is_measured_the_same_way(monkeypatch, tmp_path, version):
    machine = fake_machine(monkeypatch, tmp_path, version)
    machine.cuda.costs = dataclasses.replace(machine.cuda.costs, launches=LAUNCHES, graph_launch=GRAPH_LAUNCH)
    record = measure(machine, engine(machine, cards=(86,)))
    assert [row.parts_ms["compute"] for row in record.rows] == pytest.approx(
        [1e3 * computing(2, way) for way in WAYS], rel=1e-4
    )


def test_a_card_that_gets_slower_does_not_settle(machine):
    made = engine(machine)
    spent = machine.cuda.spend

    def heating(name):
        machine.cuda.costs.launches = LAUNCHES + machine.cuda.time / 50
        spent(name)

    machine.cuda.spend = heating
    record = measure(machine, made)
    slow = [row for row in record.rows if row.way.startswith("launches")]
    assert [row.settled for row in slow] == [False, False]
    assert [len(row.windows) for row in record.rows] == [9] * 4
    assert record.warnings[0] == (
        f"a.fp16.engine, batch 2, {WAYS[0]}: did not settle: the last 3 of 9 windows differ by more than 5%"
    )


def test_without_a_gpu_an_engine_cannot_be_measured(machine, monkeypatch):
    made = engine(machine)
    monkeypatch.setattr(backend_module, "gpu_compute_capability", lambda: None)
    with pytest.raises(SdkMissing, match="no GPU answers here, and an engine runs on nothing else"):
        bench([made], Options(batches=(2,)))
