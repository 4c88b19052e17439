"""The throughput section of report.md: every figure in its cell, and put into the report without harm to the rest."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.bench.markdown import BEGIN, END, figure, markdown_from_record, report_with_section
from engines.errors import InputRejected
from engines.json_value import Malformed
from engines.markdown_text import LARGEST_CELL, Markup, code, escaped, table

HEAD = ["file", "batch", "way", "images/s", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "first ms", "speed-up"]


def estimate(value, low, high):
    return {"value": value, "low": low, "high": high}


ROW = {
    "file": "a.onnx",
    "batch": 8,
    "way": "numpy to numpy",
    "first_seconds": 0.25,
    "queries": 150,
    "images_per_second": estimate(33.46, 33.1, 33.94),
    "queries_per_second": estimate(4.18, 4.1, 4.2),
    "latency_ms": {"p50": estimate(239.1, 238, 240), "p90": estimate(250, 249, 252), "p95": None, "p99": None},
    "parts_ms": {},
    "variation": 0.01,
    "windows": [33.0, 33.5, 33.9],
    "settled": True,
    "speedup": None,
    "no_speedup": None,
    "bound": None,
    "telemetry": None,
}
FASTER = {**ROW, "file": "b.onnx", "speedup": {**estimate(1.4231, 1.3849, 1.45), "against": "a.onnx"}}
FILE = {
    "file": "a.onnx",
    "sha256": "0" * 64,
    "bytes": 10,
    "precision": "fp32",
    "kind": "onnx",
    "load_seconds": 0.1234,
    "parity": {"passed": True, "detail": "relative error 3.1e-07"},
    "operations_per_image": 2717908992,
}
RECORD = {
    "schema": 1,
    "machine": {"host": "SECRETHOST", "cpu": "Some CPU", "cores": 2, "load": 0.5, "gpu": None, "driver": None},
    "versions": {"python": "3.11.7", "onnxruntime": "1.31.1"},
    "settings": [{"name": "batch", "value": "8", "source": "--batch"}],
    "files": [FILE, {**FILE, "file": "b.onnx"}],
    "rows": [ROW, FASTER],
    "warnings": [],
    "verdict": "PASS: 2 of 2 files",
}


def changed(**fields):
    return {**copy.deepcopy(RECORD), **fields}


def second(**fields):
    """The record whose second row has other values."""
    return changed(rows=[ROW, {**FASTER, **fields}])


def tables(text):
    """Each table's lines as cells."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line[1:-1].split(" | ")])
        elif found[-1]:
            found.append([])
    return [lines for lines in found if lines]


def cells(record, plot="bench.svg", line=-1):
    """The cells of a row by its column."""
    columns, _, *rows = tables(markdown_from_record(record, plot))[0]
    return dict(zip(columns, rows[line], strict=True))


def test_every_figure_stands_in_its_cell():
    measured, files, setting, versions = tables(markdown_from_record(RECORD, "bench.svg"))
    assert measured[0] == HEAD
    latencies = ["239 (238 to 240)", "250 (249 to 252)", "-", "-"]
    assert measured[2] == ["a.onnx", "8", "numpy to numpy", "33.5 (33.1 to 33.9)", *latencies, "250", "1"]
    assert measured[3][-1] == "1.42x (1.38 to 1.45)"
    assert files[2] == ["a.onnx", "fp32", "pass", "relative error 3.1e-07", "0.123", "2,717,908,992"]
    assert setting[2] == ["batch", "8", "--batch"]
    assert versions[2:] == [["python", "3.11.7"], ["onnxruntime", "1.31.1"]]


def test_what_stands_around_the_tables():
    text = markdown_from_record(RECORD, "bench.svg")
    assert text.startswith("## Throughput\n\nPASS: 2 of 2 files. Measured on Some CPU, load 0.5, 2 cores.\n")
    assert "![Images per second and latency against batch](bench.svg)" in text
    assert "Speed-ups are against a.onnx." in text
    assert "Warning" not in text
    assert "SECRET" not in text
    assert "![" not in markdown_from_record(RECORD, None)


@pytest.mark.parametrize(
    ("passed", "shown"), [(True, "pass"), (False, "**FAIL**"), (None, "not checked")]
)  # fmt: skip
def test_a_failed_parity_is_shown_and_gives_no_speed_up(passed, shown):
    other = {**FILE, "file": "b.onnx", "parity": {"passed": passed, "detail": "found"}}
    reason = None if passed else "b.onnx: parity failed"
    rows = [ROW, {**FASTER, **({} if passed else {"speedup": None, "no_speedup": reason})}]
    text = markdown_from_record(changed(files=[FILE, other], rows=rows), None)
    assert tables(text)[1][-1][2] == shown
    assert ("1.42x" in text) == (passed is True)
    assert ("none: b.onnx: parity failed" in text) == (passed is not True)


def test_a_row_that_did_not_settle_says_so():
    assert cells(second(settled=False))["images/s"] == "33.5 (33.1 to 33.9), not settled"


def test_what_binds_and_how_much_of_it_was_reached():
    bound = {"card": "NVIDIA L4", "milliseconds": 1.234, "binds": "memory", "percent": 61.7}
    found = cells(second(bound=bound))
    assert found["bound"] == "62 % of NVIDIA L4 (1.23 ms), memory binds"
    assert cells(second(bound=bound), line=0)["bound"] == "-"
    assert "bound" not in cells(RECORD)


def test_parts_and_what_the_card_said_of_itself():
    telemetry = {
        "sm_clock_mhz": 2040.2, "memory_clock_mhz": None, "temperature_c": 61, "power_w": 71.6,
        "joules_per_image": 0.012345, "throttled": ["power cap", "heat"],
    }  # fmt: skip
    found = cells(second(parts_ms={"d2h": 0.01, "h2d": 0.5, "compute": 1.25}, telemetry=telemetry))
    assert found["parts ms"] == "h2d 0.500, compute 1.25, d2h 0.0100"
    assert found["card"] == "2040 MHz, 61 C, 72 W, 0.0123 J an image, held back by power cap, heat"
    assert cells(second(telemetry={"power_w": None, "throttled": []}))["card"] == "-"


def test_warnings_are_a_list():
    text = markdown_from_record(changed(warnings=["first_one", "<!-- /throughput -->"]), None)
    assert "- Warning: first_one\n- Warning: &lt;!-- /throughput --&gt;\n" in text
    assert END not in text


def test_names_from_outside_are_escaped_and_have_no_directories():
    names = ["/home/SECRET/a|b*.onnx", "/other/SECRET/a|b*.onnx"]
    rows = [{**ROW, "file": name} for name in names]
    text = markdown_from_record(changed(files=[{**FILE, "file": name} for name in names], rows=rows), "a) (b.svg")
    assert "SECRET" not in text
    assert "| a\\|b\\*.onnx (1) | 8 |" in text
    assert "| a\\|b\\*.onnx (2) | 8 |" in text
    assert "](a%29%20%28b.svg)" in text


@pytest.mark.parametrize(
    ("record", "place"),
    [
        (changed(rows=[{**ROW, "file": "other.onnx"}]), "one of the record's files"),
        (changed(rows=[ROW], files=[{**FILE, "parity": {"passed": 1, "detail": ""}}]), r"files\[0\]\.parity\.passed"),
        (second(settled=None), r"rows\[1\]\.settled"),
        ({name: value for name, value in RECORD.items() if name != "verdict"}, "verdict: missing"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused_with_its_place(record, place):
    with pytest.raises(Malformed, match=place):
        markdown_from_record(record, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (1.0, "1.00"), (99.94, "99.9"), (100.4, "100"), (12345.6, "12,346"), (0, "0.00")],
)
def test_figures_have_three_digits_or_more(value, text):
    assert figure(value) == text


# --- into the report

REPORT = "# RepVGG: PASS\n\n| a |\n| --- |\n| b |\n"


def test_the_section_goes_to_the_end_between_markers():
    assert report_with_section(REPORT, "## Throughput\n\nx\n") == f"{REPORT}\n{BEGIN}\n## Throughput\n\nx\n{END}\n"
    assert report_with_section("", "x") == f"{BEGIN}\nx\n{END}\n"


def test_a_second_run_replaces_the_first_and_nothing_else():
    once = report_with_section(REPORT, "first\n") + "\nwritten below by hand\n"
    twice = report_with_section(once, "second\n")
    assert twice == once.replace("first", "second")
    assert report_with_section(twice, "second\n") == twice


@pytest.mark.parametrize(
    "report",
    [
        BEGIN,
        END,
        f"{END}\n{BEGIN}\n",
        f"{BEGIN}\n{BEGIN}\n{END}\n",
        f"{BEGIN}\n{END}\n{END}\n",
        f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n",
    ],
)
def test_markers_that_do_not_belong_together_are_refused(report):
    with pytest.raises(InputRejected, match=r"report\.md: .* do not stand there once each"):
        report_with_section(f"{REPORT}{report}", "x")


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text())
def test_replacing_is_the_same_as_writing_at_once(before, section):
    if BEGIN in before or END in before:
        return
    section = section.replace(BEGIN, "").replace(END, "")
    assert report_with_section(report_with_section(before, "earlier"), section) == report_with_section(before, section)


# --- text as Markdown


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_no_text_ends_a_cell_or_holds_a_tag_or_a_line_break(text):
    cell = table(("a",), [(text,)]).splitlines()[2]
    inner = cell.removeprefix("| ").removesuffix(" |")
    assert cell.count("\n") == 0
    for mark in "|*`[]":
        assert inner.replace("\\\\", "").count(mark) == inner.replace("\\\\", "").count(f"\\{mark}")
    assert "<" not in inner
    assert ">" not in inner
    assert len(inner) <= 11 * LARGEST_CELL


def test_markup_is_left_as_it_is_and_code_holds_any_text():
    assert table(("a",), [(Markup("**x**"),)]).endswith("| **x** |")
    assert code("a`b|c") == "`` a`b\\|c ``"
    assert escaped("a_b _c_ <x>") == "a_b \\_c\\_ &lt;x&gt;"
    assert table(("a",), []) == ""
