"""repvgg_bench: the printed figures are what the stub's clock was told, and what the queries add up to."""

from __future__ import annotations

import json
import re

import pytest

from tests.engines.cpp.programs import (
    CHANNELS,
    CLASSES,
    SIZE,
    Network,
    assert_refused_in_a_line_or_right,
    run,
    write_engine,
)

NANOSECONDS = 500_000  # of computation per image, as the stub's engines say
BYTES_IN, BYTES_OUT = 4 * CHANNELS * SIZE * SIZE, 4 * CLASSES  # per image; the stub copies a byte in a nanosecond


@pytest.fixture
def bench(programs, tmp_path):
    """``bench(network, *arguments)`` on an engine, for a short time."""

    def call(network=None, *arguments, sdk="tensorrt_rtx", folder=None):
        engine = write_engine(tmp_path, network, sdk=sdk)
        return run((folder or programs) / "repvgg_bench", engine, "--duration", "0.05", *arguments)

    return call


def record_of(done):
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("arguments", [(), ("--no-graph",), ("--threads", "2")])
@pytest.mark.parametrize("batch", [None, 1, 4, 9])
def test_figures(bench, tmp_path, arguments, batch):
    record = record_of(bench(Network(), "--json", *(["--batch", batch] if batch else []), *arguments))
    rows = batch or 3  # the profile's usual one
    computed = {1: 2, 9: 10}.get(rows, rows)  # padded to 2; in parts of 4, 4 and 2
    assert {name: record[name] for name in ("schema", "batch", "precision", "sdk", "sdk_version", "device")} == {
        "schema": 1,
        "batch": rows,
        "precision": "fp16",
        "sdk": "tensorrt_rtx",
        "sdk_version": "1.7.1.116",
        "device": 0,
    }
    assert record["engine"] == str(tmp_path / "small.fp16.engine")
    assert record["graph"] is ("--no-graph" not in arguments)
    assert record["threads"] == (2 if "--threads" in arguments else 1)
    assert record["transfers"] is True
    assert record["parts_ms"] == pytest.approx(
        {
            "h2d": computed * BYTES_IN / 1e6,
            "compute": computed * NANOSECONDS / 1e6,
            "d2h": computed * BYTES_OUT / 1e6,
        },
        rel=1e-4,
    )
    assert record["queries_per_second"] == pytest.approx(record["queries"] / record["seconds"], rel=1e-6)
    assert record["images_per_second"] == pytest.approx(rows * record["queries_per_second"], rel=1e-6)
    assert record["seconds"] >= 0.05
    assert record["variation"] == pytest.approx(0, abs=1e-4)
    assert record["warnings"] == []
    latency = record["latency_ms"]
    assert (latency["p99"] is None) is (record["queries"] < 100)
    assert 0 < latency["p50"] <= latency["p90"] <= (latency["p99"] or latency["p90"])
    assert latency["p50"] * record["queries"] <= 2 * 1000 * record["seconds"] * record["threads"]


def test_text(bench, tmp_path):
    done = bench()
    assert done.returncode == 0
    first, *lines = done.stdout.splitlines()
    engine = tmp_path / "small.fp16.engine"
    assert first == (f"{engine}: fp16, tensorrt_rtx 1.7.1.116, batch 3, threads 1, CUDA graph, with transfers")
    patterns = (
        r"  first query     \d+\.\d{3} ms",
        r"  throughput      \d+\.\d images/s, \d+\.\d queries/s \(\d+ queries in 0\.05 s\)",
        r"  latency         p50 \S+ ms, p90 \S+ ms, p99 (\S+ ms|too few queries) \(host clock, arrays to arrays\)",
        r"  on the GPU      host to device 0\.001 ms, compute 1\.500 ms, device to host 0\.000 ms \(medians, events\)",
    )
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    assert bench(None, "--no-graph").stdout.splitlines()[0].endswith("launches, with transfers")


@pytest.mark.parametrize(("jitter", "warned"), [(0.01, False), (0.1, True)])
def test_a_warning_where_the_times_vary(bench, jitter, warned):
    record = record_of(bench(Network(lines=(f"jitter {jitter}",)), "--json"))
    assert record["variation"] == pytest.approx(jitter, rel=0.05)
    assert len(record["warnings"]) == warned
    assert all("varies by 10.0 % of its mean, more than 2.5 %" in warning for warning in record["warnings"])


def test_a_warning_where_no_graph_can_be_recorded(bench):
    record = record_of(bench(Network(lines=("uncapturable",)), "--json"))
    assert record["graph"] is False
    assert record["warnings"] == [
        "launched without a CUDA graph: this engine's work cannot be recorded as a CUDA graph"
    ]
    assert record_of(bench(Network(lines=("uncapturable",)), "--json", "--no-graph"))["warnings"] == []
    assert "\nwarning: launched without a CUDA graph: " in bench(Network(lines=("uncapturable",))).stdout


def test_no_figure_for_answers_that_are_not_finite(bench):
    done = bench(Network(lines=("fault nan output",)), "--batch", 4)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("error: [^\n]+: its answers are NaN or infinite, so no figure is given; [^\n]+\n", done.stderr)


def test_threads_under_the_sanitizer_of_threads(bench, threaded):
    record = record_of(bench(Network(features=True), "--json", "--threads", 3, sdk="tensorrt", folder=threaded))
    assert (record["threads"], record["sdk"]) == (3, "tensorrt")


@pytest.mark.parametrize("call", [1, 6, 12, 15, 17, 20, 24, 30])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_that_fails(programs, tmp_path, call, threads):
    engine = write_engine(tmp_path)
    command = (programs / "repvgg_bench", engine, "--duration", "0.01", "--threads", threads)
    done = run(*command, STUB_FAIL_CALL=call)
    assert_refused_in_a_line_or_right(done)


def test_a_name_that_json_escapes(programs, tmp_path):
    folder = tmp_path / 'a "b"\\\té'
    folder.mkdir()
    engine = write_engine(folder)
    record = record_of(run(programs / "repvgg_bench", engine, "--duration", "0.01", "--json"))
    assert record["engine"] == str(engine)


def test_a_name_that_is_not_utf_8(programs, tmp_path):
    (folder := tmp_path / "a\udcff\udcc3é").mkdir()
    engine = write_engine(folder)
    record = record_of(run(programs / "repvgg_bench", engine, "--duration", "0.01", "--json"))
    assert record["engine"] == str(tmp_path / "a??é" / engine.name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one engine"),
        (["one", "two"], "give one engine"),
        (["one", "--fast"], "--fast: no such option"),
        (["one", "--batch"], "--batch : give a whole number from 1 to 65536"),
        (["one", "--batch", "0"], "--batch 0: give a whole number from 1 to 65536"),
        (["one", "--threads", "65"], "--threads 65: give a whole number from 1 to 64"),
        (["one", "--device", "-1"], "--device -1: give a whole number from 0"),
        (["one", "--duration", "0"], "--duration 0: give seconds, more than 0 and at most 3600"),
        (["one", "--duration", "nan"], "--duration nan: give seconds"),
        (["one", "--duration", "1e9"], "--duration 1e9: give seconds"),
        (["one", "--duration", "."], "--duration .: give seconds"),
    ],
)
def test_usage(programs, arguments, said):
    done = run(programs / "repvgg_bench", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}"), done.stderr


def test_files_and_machines_that_cannot_be_used(programs, tmp_path):
    assert run(programs / "repvgg_bench", tmp_path / "none.engine").returncode == 3
    done = run(programs / "repvgg_bench", write_engine(tmp_path), STUB_DEVICES=0)
    assert (done.returncode, "no GPU answers here" in done.stderr) == (4, True)
