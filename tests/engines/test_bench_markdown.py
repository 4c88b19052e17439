"""The throughput section of report.md: every figure in its cell, and put into the report without harm to the rest."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.bench.markdown import BEGIN, END, markdown_from_record, report_with_section
from engines.bench.record import Bound, Parity
from engines.bench.statistics import Estimate
from engines.bench.text import figure
from engines.errors import InputRejected
from engines.markdown_text import LARGEST_CELL, Markup, code, escaped, table
from tests.engines.bench_records import FILE, ROW, record_of

HEAD = ["file", "batch", "way", "images/s", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "first ms", "speed-up"]
FASTER = dataclasses.replace(ROW, file="b.onnx", speedup=Estimate(1.4231, 1.3849, 1.45), against="a.onnx")
FILES = (FILE, dataclasses.replace(FILE, file="b.onnx"))
RECORD = record_of(ROW, FASTER, files=FILES)
TELEMETRY = {
    "sm_clock_mhz": 2040.2, "memory_clock_mhz": None, "temperature_c": 61, "power_w": 71.6,
    "joules_per_image": 0.012345, "throttled": ["power cap", "heat"],
}  # fmt: skip


def second(**fields):
    """The record whose second row has other values."""
    return record_of(ROW, dataclasses.replace(FASTER, **fields), files=FILES)


def tables(text):
    """Each table's lines as cells."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line[1:-1].split(" | ")])
        elif found[-1]:
            found.append([])
    return [lines for lines in found if lines]


def cells(record, line=-1):
    """The cells of a row by its column."""
    columns, _, *rows = tables(markdown_from_record(record))[0]
    return dict(zip(columns, rows[line], strict=True))


def test_every_figure_stands_in_its_cell():
    measured, files, setting, versions = tables(markdown_from_record(RECORD))
    assert measured[0] == HEAD
    latencies = ["239 (238 to 240)", "250 (249 to 252)", "-", "-"]
    assert measured[2] == ["a.onnx", "8", "numpy to numpy", "33.5 (33.1 to 33.9)", *latencies, "250", "1"]
    assert measured[3][-1] == "1.42x (1.38 to 1.45)"
    assert files[2] == ["a.onnx", "fp32", "pass", "relative error 3.1e-07", "0.123", "2,717,908,992"]
    assert setting[2] == ["batch", "8", "--batch"]
    assert versions[2:] == [["python", "3.11.7"], ["onnxruntime", "1.31.1"]]


def test_what_a_file_does_not_tell_is_a_dash():
    file = dataclasses.replace(FILE, precision="", operations_per_image=None)
    assert tables(markdown_from_record(record_of(ROW, files=(file,))))[1][2] == [
        "a.onnx", "-", "pass", "relative error 3.1e-07", "0.123", "-",
    ]  # fmt: skip


def test_what_stands_around_the_tables():
    text = markdown_from_record(RECORD)
    verdict = "PASS: 2 of 2 files computed their golden vectors, also in the timed batches"
    assert text.startswith(f"## Throughput\n\n{verdict}. Measured on Some CPU, load 0.5, 2 cores.\n")
    assert "![Images per second and latency against batch](bench.svg)" in text
    assert "Speed-ups are against a.onnx." in text
    assert "Speed-ups are" not in markdown_from_record(record_of(ROW))
    assert "Warning" not in text
    assert "SECRET" not in text


@pytest.mark.parametrize(
    ("machine", "shown"),
    [
        ({"gpu": "NVIDIA L4", "driver": "580.65"}, "NVIDIA L4, Some CPU, driver 580.65, load 0.5, 2 cores"),
        ({"gpu": "NVIDIA L4", "load": None}, "NVIDIA L4, Some CPU, 2 cores"),
        ({"cpu": "*odd* CPU", "cores": None, "load": 0.0}, "\\*odd\\* CPU, load 0.0"),
    ],
)
def test_the_machine_is_told_as_far_as_it_is_known(machine, shown):
    assert f"Measured on {shown}.\n" in markdown_from_record(record_of(ROW, **machine))


@pytest.mark.parametrize(
    ("passed", "shown"), [(True, "pass"), (False, "**FAIL**"), (None, "not checked")]
)  # fmt: skip
def test_a_failed_parity_is_shown_and_gives_no_speed_up(passed, shown):
    other = dataclasses.replace(FILES[1], parity=Parity(passed, "found"))
    reason = "b.onnx: parity failed"
    row = FASTER if passed else dataclasses.replace(FASTER, speedup=None, against=None, no_speedup=reason)
    text = markdown_from_record(record_of(ROW, row, files=(FILE, other)))
    assert tables(text)[1][-1][2] == shown
    assert ("1.42x" in text) == (passed is True)
    assert ("none: b.onnx: parity failed" in text) == (passed is not True)


def test_a_row_that_did_not_settle_says_so():
    assert cells(second(settled=False))["images/s"] == "33.5 (33.1 to 33.9), not settled"


def test_what_binds_and_how_much_of_it_was_reached():
    record = second(bound=Bound("NVIDIA L4", 1.234, "memory", 61.7))
    assert cells(record)["bound"] == "62 % of NVIDIA L4 (1.23 ms), memory binds"
    assert cells(record, line=0)["bound"] == "-"
    assert "bound" not in cells(RECORD)


def test_parts_and_what_the_card_said_of_itself():
    record = second(parts_ms={"d2h": 0.01, "h2d": 0.5, "compute": 1.25}, telemetry=TELEMETRY)
    found = cells(record)
    assert found["parts ms"] == "h2d 0.500, compute 1.25, d2h 0.0100"
    assert found["card"] == "2040 MHz, 61 C, 72 W, 0.0123 J an image, held back by power cap, heat"
    first = cells(record, line=0)
    assert (first["parts ms"], first["card"]) == ("-", "-")
    assert cells(second(telemetry={**dict.fromkeys(TELEMETRY), "throttled": []}))["card"] == "-"


def test_warnings_are_a_list():
    text = markdown_from_record(record_of(ROW, warnings=("first_one", "<!-- /throughput -->")))
    assert "- Warning: first_one\n- Warning: &lt;!-- /throughput --&gt;\n" in text
    assert END not in text


def test_names_from_outside_are_escaped_and_have_no_directories():
    names = ["/home/SECRET/a|b*.onnx", "/other/SECRET/a|b*.onnx"]
    rows = [dataclasses.replace(ROW, file=name) for name in names]
    text = markdown_from_record(record_of(*rows, files=tuple(dataclasses.replace(FILE, file=name) for name in names)))
    assert "SECRET" not in text
    assert "| a\\|b\\*.onnx (1) | 8 |" in text
    assert "| a\\|b\\*.onnx (2) | 8 |" in text


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
