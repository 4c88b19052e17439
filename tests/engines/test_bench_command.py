"""``python -m engines bench``: the table, the JSON and its schema, what is refused, and a report written whole."""

from __future__ import annotations

import base64
import copy
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import sys
import tracemalloc
import zlib

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engines.bench
from engines.bench.record import packed, unpacked
from engines.bench.rounds import Measurement
from engines.bench.statistics import Slices
from tests.conftest import ROOT
from tests.engines import fake_nvml
from tests.engines.bench_files import folder_with, images, onnx_bytes, save_golden, timed_sessions
from tests.engines.bench_records import ROW, record_of
from tests.engines.fake_machine import ONNX, answers, fake_machine
from tests.engines.fake_machine import images as machine_images
from tests.engines.fake_nvml import Phase

SCHEMA = json.loads((ROOT / "engines" / "bench" / "bench.schema.json").read_text(encoding="utf-8"))
SHORT = ("--duration", "0.05")
REPORT_FILES = ("bench.json", "bench.svg", "report.md")


VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def problems(document):
    return [error.message for error in VALIDATOR.iter_errors(document)]


@pytest.fixture
def sessions(monkeypatch):
    made = timed_sessions(monkeypatch)
    monkeypatch.setattr(engines.bench, "bench", functools.partial(engines.bench.bench, clock=made.clock))
    yield made
    assert sorted(made.closed) == sorted(made.opened)


@pytest.fixture
def a(tmp_path):
    return folder_with(tmp_path, "a")


@pytest.fixture
def b(tmp_path):
    return folder_with(tmp_path, "b")


@pytest.fixture
def bench(sessions, engines_command):
    """Runs the command on the virtual clock, on which b.onnx takes half as long as a.onnx."""
    sessions.seconds |= {"a.onnx": 0.004, "b.onnx": 0.002}
    return lambda *arguments: engines_command("bench", *SHORT, *arguments)


def table_of(outcome, batch):
    """The cells of a batch's table, by column, for each row."""
    lines = outcome.stdout.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"batch {batch}: "))
    table = [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 : start + 4] if line.startswith("  ")]
    return [dict(zip(table[0], cells, strict=True)) for cells in table[1:]]


# --- for a person


def test_the_table_has_the_figures_side_by_side(bench, a, b):
    outcome = bench(a, b, "--batch", "1,8")
    assert (outcome.code, outcome.stderr) == (0, "")
    first, second = table_of(outcome, 8)
    assert list(first) == [
        "file", "way", "images/s (95 %)", "queries/s", "p50 ms", "p90", "p95", "p99", "first ms", "speed-up",
    ]  # fmt: skip
    assert first == {
        "file": "a.onnx",
        "way": "numpy to numpy",
        "images/s (95 %)": "2000 (2000 to 2000)",
        "queries/s": "250",
        **dict.fromkeys(("p50 ms", "p90", "p95", "p99", "first ms"), "4.00"),
        "speed-up": "-",
    }
    assert (second["queries/s"], second["speed-up"]) == ("500", "2.00x (2.00 to 2.00)")
    lines = outcome.stdout.splitlines()
    assert lines[0] == "measured batch 1: 2 rows, 333 queries that count"
    assert lines[-1] == "PASS: 2 of 2 files computed their golden vectors, also in the timed batches"
    assert "batch 8: 3 windows, the last 3 agree" in lines
    assert not [line for line in lines if line.startswith("warning")]


def test_columns_in_which_nothing_stands_are_left_out(bench, sessions, a):
    sessions.seconds["a.onnx"] = 0.4
    (row,) = table_of(bench(a, "--batch", "1"), 1)
    assert list(row) == ["file", "way", "images/s (95 %)", "queries/s", "p50 ms", "first ms"]
    assert row["images/s (95 %)"] == "2.50 (2.50 to 2.50)"


@pytest.mark.parametrize(
    ("seconds", "rate", "latency"),
    [(2.0, "0.5", "2000"), (0.0999999, "10", "100"), (0.0123, "81.3", "12.3"), (2**-14, "16384", "0.0610")],
)
def test_figures_of_any_size_are_plain_numbers(bench, sessions, a, seconds, rate, latency):
    sessions.seconds["a.onnx"] = seconds
    (row,) = table_of(bench(a, "--batch", "1"), 1)
    assert row["p50 ms"] == latency
    assert float(row["queries/s"]) == pytest.approx(float(rate), rel=1e-3)
    assert re.fullmatch(r"[0-9]+(\.[0-9]+)?", row["queries/s"])


def test_where_no_speed_up_is_told_a_line_says_why(bench, sessions, a, b):
    (a.parent / "golden.npz").unlink()
    outcome = bench(a, b, "--batch", "1")
    assert outcome.code == 0
    (header,) = [line for line in outcome.stdout.splitlines() if line.startswith("  file ")]
    assert "speed-up" not in header
    assert "no speed-up b.onnx, batch 1, numpy to numpy: a.onnx: parity was not checked" in outcome.stdout


def test_settings_are_told_with_their_sources(bench, a, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    outcome = bench(a, "--batch", "8", "--threads", "1")
    (line,) = [line for line in outcome.stdout.splitlines() if line.startswith("settings: ")]
    for told in ("batch 8 (--batch)", "duration 0.05 s (--duration)", "provider cpu (default)"):
        assert told in line
    assert "threads 1 (--threads)" in line
    assert "OMP_NUM_THREADS 2 (environment)" in line


def test_a_file_that_computes_something_else_ends_with_code_1(bench, a, b):
    b.write_bytes(onnx_bytes(changed=1e-3))
    outcome = bench(a, b, "--batch", "1")
    assert outcome.code == 1
    assert outcome.error.startswith("b.onnx: relative error")
    assert outcome.stdout.splitlines()[-1].startswith("FAIL: 1 of 2 files")
    assert "2.00x" not in outcome.stdout
    assert "no speed-up b.onnx, batch 1, numpy to numpy: b.onnx: parity failed" in outcome.stdout


def test_golden_vectors_that_cannot_be_read_end_with_code_3(bench, sessions, a, b, tmp_path):
    golden = b.parent / "golden.npz"
    golden.write_bytes(golden.read_bytes()[:-1])
    outcome = bench(a, b, "--batch", "1", "--report", tmp_path)
    assert (outcome.code, outcome.stdout, sessions.batches) == (3, "", [])
    assert outcome.error.startswith(f"{golden}: not an .npz of input and outputs")
    assert not (tmp_path / "bench.json").exists()
    golden.unlink()
    outcome = bench(a, b, "--batch", "1")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.endswith("also in the timed batches, 1 not checked\n")


# --- for a program


@pytest.fixture
def document(bench, a, b):
    """What ``--json`` prints."""
    outcome = bench(a, b, "--batch", "1,8", "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    return json.loads(outcome.stdout, parse_constant=pytest.fail)


def test_json_is_all_that_is_printed_and_follows_its_schema(document):
    assert problems(document) == []
    assert [(row["file"], row["batch"]) for row in document["rows"]] == [
        ("a.onnx", 1), ("b.onnx", 1), ("a.onnx", 8), ("b.onnx", 8),
    ]  # fmt: skip
    assert document["rows"][3]["speedup"] == pytest.approx({"value": 2, "low": 2, "high": 2, "against": "a.onnx"})
    assert not any("raw" in row for row in document["rows"])


def test_json_is_printed_also_where_a_file_fails(bench, a, b):
    b.write_bytes(onnx_bytes(changed=1e-3))
    outcome = bench(a, b, "--batch", "1", "--json")
    assert outcome.code == 1
    assert outcome.error.startswith("b.onnx: relative error")
    found = json.loads(outcome.stdout)
    assert problems(found) == []
    assert found["files"][1]["parity"]["passed"] is False
    assert found["rows"][1]["speedup"] is None
    assert found["verdict"].startswith("FAIL: ")


def test_json_of_a_file_that_nobody_checked_follows_the_schema(bench, a):
    (a.parent / "golden.npz").unlink()
    a.write_bytes(onnx_bytes(precision=None))
    outcome = bench(a, "--batch", "1", "--json")
    found = json.loads(outcome.stdout)
    assert outcome.code == 0
    assert problems(found) == []
    assert found["files"][0]["parity"] == {"passed": None, "detail": "there is no golden.npz beside it"}
    assert found["files"][0]["precision"] == ""


@pytest.fixture(scope="module")
def gpu_document(tmp_path_factory):
    """Of an engine on a pretended card, with every latency."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = fake_machine(monkeypatch, folder)
        monkeypatch.setitem(fake_nvml.NAMES, 0, "NVIDIA L4")
        machine.nvml.phases = (Phase(sm_mhz=2040, memory_mhz=6251, celsius=61, watts=70.0),)
        engine = machine.engine(seconds=(20e-3, 1e-3))
        engine.with_suffix(".onnx").write_bytes(ONNX)
        golden = machine_images(4)
        outputs = {name: array.astype(np.float64) for name, array in answers(golden).items()}
        np.savez(folder / "golden.npz", input=golden, **outputs)
        options = engines.bench.Options(batches=(2,), duration=0.1)
        record = engines.bench.bench([engine], options, clock=machine.cuda.clock)
        machine.assert_nothing_left()
    return json.loads(record.to_json(raw=True))


def test_json_of_an_engine_follows_the_schema(gpu_document):
    assert problems(gpu_document) == []
    row = gpu_document["rows"][0]
    assert set(row["parts_ms"]) == set(row["raw"]["parts"]) == {"h2d", "compute", "d2h"}
    assert None not in (row["bound"], row["telemetry"], gpu_document["machine"]["card"])


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    with pytest.raises(jsonschema.SchemaError):
        jsonschema.Draft202012Validator.check_schema({**SCHEMA, "required": "everything"})


def objects(node):
    """Every subschema that lists its fields."""
    if isinstance(node, dict):
        if isinstance(node.get("properties"), dict) and "additionalProperties" in node:
            yield node
        for inner in node.values():
            yield from objects(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from objects(inner)


def test_every_field_is_described_and_no_other_is_let_in():
    found = list(objects(SCHEMA))
    assert len(found) >= 12
    optional = {"Row": {"raw"}, "Parts": {"h2d", "compute", "d2h"}}
    for node in found:
        assert node["additionalProperties"] is False, node["title"]
        fields = set(node["properties"]) - optional.get(node["title"], set())
        assert set(node.get("required", ())) == fields, node["title"]
        for name, field in node["properties"].items():
            target = {**SCHEMA["$defs"].get(field.get("$ref", "").rpartition("/")[2], {}), **field}
            assert target["title"], name
            assert target["description"].endswith("."), name


def places(value, path=()):
    """The path of every field inside a document; of a list, its first item stands for all."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*path, name)
            yield from places(inner, (*path, name))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def parent_of(document, path):
    for key in path[:-1]:
        document = document[key]
    return document


def test_a_field_that_is_missing_or_added_or_of_another_type_is_seen(gpu_document):
    paths, changed = list(places(gpu_document)), copy.deepcopy(gpu_document)
    assert len(paths) > 80
    for path in paths:
        optional = path[0] == "versions" or path[-2:-1] in (("parts_ms",), ("parts",)) or path[-1] == "raw"
        parent, name = parent_of(changed, path), path[-1]
        value = parent.pop(name)
        assert optional or not VALIDATOR.is_valid(changed), path
        parent[name] = {"nested": [value]}
        assert not VALIDATOR.is_valid(changed), path
        parent[name] = value
        parent[f"{name}s"] = value
        assert path[0] == "versions" or not VALIDATOR.is_valid(changed), path
        del parent[f"{name}s"]
    assert changed == gpu_document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 2),
        (("verdict",), "PASS"),
        (("verdict",), "fine: all of it"),
        (("files",), []),
        (("files", 0, "sha256"), "AB" * 32),
        (("files", 0, "kind"), "openvino"),
        (("files", 0, "parity", "passed"), "yes"),
        (("files", 0, "parity", "detail"), "two\nlines"),
        (("rows",), []),
        (("rows", 0, "way"), "somehow"),
        (("rows", 0, "queries"), 8),
        (("rows", 0, "queries"), 9.5),
        (("rows", 0, "latency_ms", "p50"), None),
        (("rows", 0, "images_per_second"), None),
        (("rows", 0, "windows"), [1.0, 2.0]),
        (("rows", 0, "windows"), [1.0] * 10),
        (("rows", 0, "parts_ms", "idle"), 0.1),
        (("rows", 0, "bound", "binds"), "patience"),
        (("rows", 0, "speedup"), 2.0),
        (("rows", 0, "raw", "rounds"), [0] * 9),
        (("rows", 0, "raw", "latencies"), "not base64!"),
        (("settings", 0, "source"), ""),
        (("machine", "host"), "mine"),
    ],
)
def test_the_schema_stops_what_the_harness_never_writes(gpu_document, path, value):
    changed = copy.deepcopy(gpu_document)
    parent_of(changed, path)[path[-1]] = value
    assert problems(changed)


def test_a_speed_up_and_a_reason_for_none_exclude_each_other(gpu_document):
    changed = copy.deepcopy(gpu_document)
    row = changed["rows"][0]
    row["speedup"] = {"value": 2.0, "low": 1.9, "high": 2.1, "against": "other.engine"}
    assert problems(changed) == []
    row["no_speedup"] = "other.engine: parity failed"
    assert problems(changed)


# --- raw data


def test_every_figure_of_bench_json_follows_from_its_raw_data(bench, sessions, a, b, tmp_path):
    noise = np.random.default_rng(0)
    sessions.seconds |= {
        "a.onnx": lambda rows: 0.004 + 0.001 * noise.random(),
        "b.onnx": lambda rows: 0.002 + 0.0005 * noise.random(),
    }
    assert bench(a, b, "--batch", "8", "--report", tmp_path, "--json").code == 0
    document = json.loads((tmp_path / "bench.json").read_text())
    assert problems(document) == []
    rates = []
    for row in document["rows"]:
        raw = row["raw"]
        counts, walls, each = np.array(raw["rounds"]), np.array(raw["walls"]), raw["rounds_per_window"]
        latencies = unpacked(raw["latencies"], int(counts.sum()))
        assert len(counts) == len(walls) == each * len(row["windows"])
        windows = 8 * counts.reshape(-1, each).sum(axis=1) / walls.reshape(-1, each).sum(axis=1)
        assert row["windows"] == pytest.approx(windows.tolist(), rel=1e-12)
        assert row["queries"] == counts[-3 * each :].sum()
        counted = np.sort(latencies[-row["queries"] :])
        for percent in (50, 90, 95, 99):
            rank = next(rank for rank in range(1, len(counted) + 1) if 100 * rank >= percent * len(counted))
            told = row["latency_ms"][f"p{percent}"]
            assert (told is None) == (len(counted) < {50: 1, 90: 10, 95: 20, 99: 100}[percent])
            assert told is None or told["value"] == 1000 * counted[rank - 1]
        assert row["variation"] == pytest.approx(counted.std() / counted.mean())
        rates.append(row["queries"] / walls[-3 * each :].sum())
        assert row["queries_per_second"]["value"] == pytest.approx(rates[-1], rel=1e-12)
        assert latencies.sum() == pytest.approx(walls.sum(), rel=1e-6)
        assert len(set(latencies.tolist())) > 50
    assert document["rows"][1]["speedup"]["value"] == pytest.approx(rates[1] / rates[0], rel=1e-12)


def test_raw_is_everything_that_was_measured_also_before_the_windows_that_count():
    latencies = np.arange(1, 11) / 100
    measurement = Measurement(Slices(np.full(5, 2), np.arange(5.0) + 1, latencies), {"compute": latencies / 2}, 1)
    raw = record_of(dataclasses.replace(ROW, measurement=measurement)).to_value(raw=True)["rows"][0]["raw"]
    assert (raw["rounds"], raw["walls"], raw["rounds_per_window"]) == ([2] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], 1)
    assert unpacked(raw["latencies"], 10).tolist() == latencies.tolist()
    assert unpacked(raw["parts"]["compute"], 10).tolist() == (latencies / 2).tolist()


NANOSECONDS = st.lists(st.integers(0, 2**50), max_size=30)


@settings(max_examples=50, deadline=None)
@given(NANOSECONDS)
def test_whole_nanoseconds_are_packed_and_unpacked_without_a_difference(nanoseconds):
    seconds = np.array(nanoseconds, np.float64) / 1e9
    assert unpacked(packed(seconds), len(seconds)).tolist() == seconds.tolist()


@pytest.mark.parametrize("count", [0, 2, 4, 10**6])
def test_another_number_of_latencies_is_seen(count):
    with pytest.raises(ValueError, match=f"not {count} numbers"):
        unpacked(packed(np.array([0.1, 0.2, 0.3])), count)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=40), st.binary(max_size=40).map(lambda data: data.hex())), st.integers(0, 10))
def test_what_was_never_packed_is_refused_with_an_error_of_value(text, count):
    with pytest.raises(ValueError, match=r"."):
        unpacked(text, count)


def test_no_more_is_inflated_than_was_asked_for():
    bomb = base64.b64encode(zlib.compress(bytes(1 << 26))).decode()
    tracemalloc.start()
    with pytest.raises(ValueError, match="not 3 numbers"):
        unpacked(bomb, 3)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


# --- a report


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "out"
    made.mkdir()
    return made


def test_a_report_is_written_into_a_directory_without_one(bench, a, b, folder):
    outcome = bench(a, b, "--batch", "1,8", "--report", folder)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.splitlines()[-3:] == [f"written to {folder / name}" for name in REPORT_FILES]
    found = contents(folder)
    assert sorted(found) == sorted(REPORT_FILES)
    assert b"<svg" in found["bench.svg"][:1000]
    text = found["report.md"].decode()
    assert text.startswith("<!-- throughput -->\n## Throughput\n")
    assert "bench.svg" in text
    assert "2.00x" in text
    document = json.loads(found["bench.json"])
    assert all("raw" in row for row in document["rows"])


def test_a_file_of_any_name_gets_its_report(bench, a, folder):
    odd = a.with_name("x\n# \x1b[31m|<b>.onnx")
    shutil.copy(a, odd)
    outcome = bench(odd, "--batch", "1", "--report", folder)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "\x1b" not in outcome.stdout
    (file,) = json.loads((folder / "bench.json").read_text())["files"]
    assert file["file"] == r"x\n# \x1b[31m|<b>.onnx"
    assert "\n# " not in (folder / "report.md").read_text()


def test_a_report_that_is_there_keeps_all_else_that_it_says(bench, a, folder):
    before = "# Report\r\n\r\nWhat was exported, Überschrift.\r\n"
    (folder / "report.md").write_bytes(before.encode())
    (folder / "report.json").write_bytes(b"{}")
    assert bench(a, "--batch", "1", "--report", folder).code == 0
    first = (folder / "report.md").read_bytes().decode()
    assert first.startswith(before.rstrip())
    assert first.count("## Throughput") == 1
    assert bench(a, "--batch", "8", "--report", folder).code == 0
    second = (folder / "report.md").read_bytes().decode()
    assert second.startswith(before.rstrip())
    assert second.count("## Throughput") == 1
    assert second != first
    assert (folder / "report.json").read_bytes() == b"{}"


def test_the_report_of_a_file_that_fails_is_written_and_says_so(bench, a, folder):
    a.write_bytes(onnx_bytes(changed=1e-3))
    outcome = bench(a, "--batch", "1", "--report", folder)
    assert outcome.code == 1
    assert outcome.error.startswith("a.onnx: relative error")
    assert "FAIL" in (folder / "report.md").read_text()


def test_with_json_what_was_written_is_not_told_on_stdout(bench, a, folder):
    outcome = bench(a, "--batch", "1", "--report", folder, "--json")
    assert problems(json.loads(outcome.stdout)) == []
    assert sorted(contents(folder)) == sorted(REPORT_FILES)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("step", range(6))
def test_a_write_that_fails_leaves_everything_as_it_was(bench, a, folder, monkeypatch, kept, step):
    """The disk is full at each of the three writes and each of the three renames in turn."""
    monkeypatch.setattr("engines.bench.plot.svg_from_record", lambda record: b"<svg/>")  # to draw takes the longest
    if kept:
        for name in REPORT_FILES:
            (folder / name).write_text(f"the {name} of before")
    before = contents(folder)
    steps, fsync, replace = [], os.fsync, pathlib.Path.replace

    def counted(inner, *arguments):
        steps.append(inner)
        if len(steps) == step + 1:
            raise OSError(28, "No space left on device")
        return inner(*arguments)

    monkeypatch.setattr(os, "fsync", functools.partial(counted, fsync))
    monkeypatch.setattr(pathlib.Path, "replace", lambda *arguments: counted(replace, *arguments))
    outcome = bench(a, "--batch", "1", "--report", folder)
    monkeypatch.undo()
    assert len(steps) > step
    assert outcome.code == 5
    assert "cannot be written (No space left on device)" in outcome.error
    assert "--report" in outcome.error
    assert "--out" not in outcome.error
    assert contents(folder) == before
    assert [path for path in folder.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("name", REPORT_FILES)
def test_a_directory_in_the_place_of_a_file_is_refused_before_anything_is_measured(bench, sessions, a, folder, name):
    (folder / name).mkdir()
    outcome = bench(a, "--batch", "1", "--report", folder)
    assert outcome.code == 5
    assert outcome.error.startswith(f"{folder / name}: is a directory in the place of a file")
    assert [path.name for path in folder.iterdir()] == [name]
    assert sessions.opened == []


def test_a_directory_that_cannot_be_written_to_is_told_before_anything_is_measured(
    bench, sessions, a, folder, monkeypatch
):
    def refused(*_arguments, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refused)
    outcome = bench(a, "--batch", "1", "--report", folder)
    monkeypatch.undo()
    assert outcome.code == 5
    assert outcome.error.startswith(f"{folder}: cannot be written (Permission denied); give --report ")
    assert (sessions.opened, contents(folder)) == ([], {})


@pytest.mark.parametrize("content", [b"# Report \xff\xfe", b"# Report\n<!-- throughput -->\nwithout an end\n"])
def test_a_report_that_cannot_take_a_section_is_refused_before_anything_is_measured(
    bench, sessions, a, folder, content
):
    (folder / "report.md").write_bytes(content)
    outcome = bench(a, "--batch", "1", "--report", folder)
    assert outcome.code == 3
    assert "report.md" in outcome.error
    assert contents(folder) == {"report.md": content}
    assert sessions.opened == []


def test_a_report_without_anything_to_draw_with_is_refused_before_anything_is_measured(
    bench, sessions, a, folder, monkeypatch
):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    outcome = bench(a, "--batch", "1", "--report", folder)
    assert outcome.code == 4
    assert outcome.error.startswith("a plot needs matplotlib, which is not installed here or does not start (")
    assert outcome.error.endswith("; pip install 'repvgg-exporter[plot]'")
    assert contents(folder) == {}
    assert sessions.opened == []


def test_the_directory_of_the_report_must_be_there_before_anything_is_measured(bench, sessions, a, tmp_path):
    outcome = bench(a, "--report", tmp_path / "none")
    assert outcome.code == 2
    assert outcome.error.startswith(f"--report {tmp_path / 'none'}: is no directory")
    assert sessions.opened == []


# --- what is refused


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch", ""], "--batch"),
        (["--batch", "one"], "--batch: 'one' is not whole numbers separated by ','"),
        (["--batch", "1,,8"], "--batch: '1,,8' is not whole numbers"),
        (["--batch", "-1"], "--batch"),
        (["--batch", "0"], "--batch: give whole numbers from 1 to 65536, with commas"),
        (["--batch", "65537"], "--batch: give whole numbers from 1 to 65536, with commas"),
        (["--batch", "8,1,8"], "--batch: a batch is given twice"),
        (["--provider", "gpu"], "provider 'gpu': unknown"),
        (["--threads", "0"], "--threads 0: give"),
        (["--threads", "-1"], "--threads"),
        (["--threads", "1.5"], "argument --threads: invalid int value: '1.5'"),
        (["--threads", "3000000000"], "--threads 3000000000: give"),
        (["--threads", "2", "--provider", "cuda"], "--threads is for ONNX Runtime on the CPU"),
        (["--duration", "0"], "--duration 0: give seconds"),
        (["--duration", "nan"], "--duration nan: give seconds"),
        (["--duration", "1e9"], "--duration 1e+09: give seconds"),
        (["--duration", "long"], "argument --duration: invalid float value: 'long'"),
        (["--size", ""], "--size"),
        (["--size", "0"], "--size 0x0: give N or HxW"),
        (["--size", "8:8:9"], "--size: '8:8:9' is not one size, N or HxW"),
        (["--size", "big"], "--size: 'big' is not"),
        (["--size", "9"], "--size: "),
        (["--device", "-1"], "--device -1: GPUs are counted from 0"),
        (["--device", "1"], "--device 1 is a GPU, and nothing here runs on one; leave it out"),
        (["--device", "first"], "argument --device: invalid int value: 'first'"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--dur", "3"], "unrecognized arguments: --dur 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_one_line_and_code_2(sessions, engines_command, a, flags, said):
    outcome = engines_command("bench", a, *flags)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.error.startswith(said)


def test_no_file_at_all_is_code_2(engines_command):
    outcome = engines_command("bench")
    assert outcome.code == 2
    assert outcome.error.startswith("the following arguments are required: FILE")


@pytest.mark.parametrize("flags", [["--provider", "cpu"], ["--threads", "1"]])
def test_settings_of_onnx_runtime_are_refused_where_only_engines_are_measured(engines_command, fashion_export, flags):
    """They would be left out in silence."""
    outcome = engines_command("bench", fashion_export / "fashion.fp16.engine", *flags)
    assert outcome.code == 2
    assert outcome.error.startswith(flags[0])


def test_the_same_file_twice_is_code_2_and_a_missing_one_code_3(bench, a, tmp_path):
    assert (bench(a, a).code, bench(a, a).error) == (2, f"{a} is given twice")
    outcome = bench(a, tmp_path / "none.onnx")
    assert outcome.code == 3
    assert outcome.error == f"{tmp_path / 'none.onnx'}: no such file; check the path"
    assert bench(tmp_path).error == f"{tmp_path}: is a directory; give a file in it"


def test_what_is_no_model_is_code_3(bench, a, tmp_path):
    outcome = bench(a, a.parent / "golden.npz")
    assert outcome.code == 3
    assert "neither an ONNX file nor a TensorRT engine" in outcome.error


def test_an_engine_without_a_gpu_is_code_4_and_nothing_is_measured(sessions, engines_command, fashion_export):
    outcome = engines_command("bench", fashion_export / "fashion.onnx", fashion_export / "fashion.fp16.engine")
    assert (outcome.code, outcome.stdout) == (4, "")
    assert "fashion.fp16.engine: no GPU answers here" in outcome.error
    assert sessions.batches == []


def test_a_provider_that_is_not_here_is_code_4(engines_command, a):
    outcome = engines_command("bench", a, "--provider", "cuda")
    assert (outcome.code, outcome.stdout) == (4, "")
    assert outcome.error.startswith("provider cuda: this ONNX Runtime has")


def test_an_interrupt_is_code_130_and_writes_nothing(bench, sessions, a, folder):
    counted = []
    sessions.fails["a.onnx"] = lambda rows: counted.append(rows) or (KeyboardInterrupt() if len(counted) > 50 else None)
    outcome = bench(a, "--batch", "1", "--report", folder)
    assert outcome.code == 130
    assert outcome.error == "interrupted; nothing was written"
    assert contents(folder) == {}


def test_a_size_is_that_of_free_images(bench, tmp_path):
    path = folder_with(tmp_path, "free", onnx_bytes(("N", 3, "height", "width")), golden=False)
    assert bench(path, "--batch", "1").error.startswith(f"--size: {path} takes images of any size")
    save_golden(path.parent, images(size=(6, 10)))
    outcome = bench(path, "--batch", "1", "--size", "6x10")
    assert outcome.code == 0
    assert "size 6x10 (--size)" in outcome.stdout
    assert "PASS: 1 of 1" in outcome.stdout
