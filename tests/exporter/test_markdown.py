"""The report as a job's summary: its tables say what the report has, and nothing in a name or message is markup."""

from __future__ import annotations

import dataclasses
import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.markdown_text import LARGEST_CELL, code, escaped
from engines.parity import Flip
from exporter.report import Check, markdown_from_report
from exporter.report.markdown import LARGEST_SIZE, LEDGER_COLUMNS, flips_in_words, section
from tests.reports import DIGEST, PASSING, REPORT, reports

STEP_LIMIT = 1024 * 1024


def cells(line):
    """The cells of a table's row, as GitHub splits them: at every pipe without a backslash."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [cell.strip(" ") for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]]


def shown(cell):
    """What a reader sees of a cell of plain text."""
    return html.unescape(re.sub(r"\\([^\w\s]|_)", r"\1", cell))


def tables(text):
    """Each section's rows below its header, by its title."""
    found = {}
    for part in text.split("\n## ")[1:]:
        title, *lines = part.splitlines()
        rows = [line for line in lines if line.startswith("|")]
        if not rows:
            continue
        assert len({len(cells(row)) for row in rows}) == 1, title
        found[title] = [cells(row) for row in rows]
    return found


def test_the_sections_stand_in_order_with_the_verdict_first():
    text = markdown_from_report(REPORT)
    assert text.startswith(
        "# model.pt: FAIL: 1 of 2 checks hold, 1 not run\n\nRepVGG-A0, official naming, training form."
    )
    assert f"`{DIGEST}`" in text
    assert list(tables(text)) == [
        "Checks",
        "Ledger",
        "Layers",
        "Headroom in half",
        "INT8",
        "INT8, layers of model.int8.onnx",
        "Not in INT8 in model.int8.onnx",
        "Accuracy",
        "Batch norms",
        "Branches of a block against each other",
        "Assumptions",
        "Engines",
        "Fusion, block by block",
        "Files",
        "Versions",
    ]


def test_each_result_has_its_word():
    assert [row[1] for row in tables(markdown_from_report(REPORT))["Checks"][2:]] == ["pass", "**FAIL**", "not run"]


def test_the_ledger_has_every_figure_of_every_stage():
    header, _, first, second = tables(markdown_from_report(REPORT))["Ledger"]
    assert header == list(LEDGER_COLUMNS)
    figures = ["2.5e-01", "6.2e-02", "1.5e-03", "61.2", "0.999999871", "3 of 4"]
    flips = "1 (margins 5.0e-01), 1 beyond the error's reach"
    assert first == ["fused, float64", *figures, flips, "0", "1.0e-15", "4"]
    assert second == ["fp16", *figures, flips, "0", "1.5e-03", "1, 3, 32"]


def test_the_headroom_of_each_convolution_stands_before_and_after_with_what_was_done():
    _, _, first, second = tables(markdown_from_report(REPORT))["Headroom in half"]
    scaled = "2 channels scaled by 2^-4..2^1"
    assert first == ["stage0.0/Conv", "1.31e+05", "2", "0.5", "-1.0", scaled, "8", "3.0"]
    assert second == ["stage1.0/se/expand/Conv", "2", "0", "3.28e+04", "15.0", "a Sigmoid", "3.28e+04", "15.0"]


def test_only_the_convolutions_with_the_least_headroom_are_shown():
    row = REPORT.headroom[1]
    rows = [
        dataclasses.replace(row, convolution=f"conv{n}", before=dataclasses.replace(row.before, factor=float(n)))
        for n in (9, 2, 7, 1, 8, 3, 6)
    ]
    text = markdown_from_report(dataclasses.replace(REPORT, headroom=tuple(rows)))
    assert [cells[0] for cells in tables(text)["Headroom in half"][2:]] == ["conv1", "conv2", "conv3", "conv6", "conv7"]
    assert (
        "Peaks on seeded noise (no --calib given); the least of 7 convolutions, all of which are in report.json."
        in text
    )
    assert "Headroom" not in markdown_from_report(dataclasses.replace(REPORT, headroom=()))


@pytest.mark.parametrize(
    ("flips", "decided", "words"),
    [
        ((), 0, "0"),
        ((0.5,), 0, "1 (margins 5.0e-01)"),
        ((0.1,) * 9, 2, f"9 (margins {', '.join(['1.0e-01'] * 6)} and 3 more), 2 beyond the error's reach"),
    ],
)
def test_flips_are_told_with_their_margins(flips, decided, words):
    comparison = dataclasses.replace(
        REPORT.ledger[0].comparison, flips=tuple(Flip(0, margin) for margin in flips), decided_flips=decided
    )
    assert flips_in_words(dataclasses.replace(REPORT.ledger[0], comparison=comparison)) == words


def test_layers_have_a_column_per_stage_and_name_the_first_that_departs():
    text = markdown_from_report(REPORT)
    assert tables(text)["Layers"] == [
        ["layer", "fused, float64", "fp16"],
        ["---", "---", "---"],
        ["stage0.0", "1.0e-16", "2.0e-03"],
        ["output", "", "nan"],
    ]
    assert "Relative errors of each layer's output. The first that departs is **stage0.0 in fp16**.\n" in text
    assert "None departs." in markdown_from_report(dataclasses.replace(REPORT, first_departing_layer=None))
    assert "## Layers" not in markdown_from_report(dataclasses.replace(REPORT, layers=()))


def test_the_witness_has_its_line_and_a_row_for_each_batch_norm():
    text = markdown_from_report(REPORT)
    lines = "suspicious: the images depart in stage0.0.dense\n\nyour images fit --mean 0,0,0 far better"
    assert f"\n## Witness\n\n{lines}\n\n## Batch norms\n" in text
    found = tables(text)
    assert found["Batch norms"][0] == ["layer", "drift", "spread", "excess drift", "excess spread"]
    assert found["Batch norms"][2:] == [["stage0.0.dense", "0.250", "0.500", "0.240", "not finite"]]
    assert found["Branches of a block against each other"][2:] == [["stage1.1", "0.125"]]
    alone = {**REPORT.witness, "proposal": None, "layers": [], "agreements": []}
    text = markdown_from_report(dataclasses.replace(REPORT, witness=alone))
    assert "\n## Witness\n\nsuspicious: the images depart in stage0.0.dense\n\n## Assumptions\n" in text
    assert "## Witness" not in markdown_from_report(dataclasses.replace(REPORT, witness=None))


def test_accuracy_is_in_percent_and_points():
    assert tables(markdown_from_report(REPORT))["Accuracy"][2:] == [
        ["fp32", "2000", "93.00%", "+0.00 points (standard error 0.00)", "100.00%"],
        ["fp16", "2000", "92.50%", "+0.50 points (standard error 0.12)", "99.00%"],
    ]


def test_a_section_without_rows_is_left_out():
    bare = dataclasses.replace(
        PASSING,
        ledger=(),
        layers=(),
        headroom=(),
        quantization=(),
        accuracy=(),
        witness=None,
        engines=(),
        files=(),
        versions={},
    )
    assert list(tables(markdown_from_report(bare))) == ["Checks", "Assumptions", "Fusion, block by block"]


HOSTILE = {
    "a pipe": ("a|b", "a\\|b"),
    "a backslash before a pipe": ("a\\|b", "a\\\\\\|b"),
    "a line break": ("a\n\n# b", "a # b"),
    "a code span": ("a`b`", "a\\`b\\`"),
    "a comment that hides the rest": ("<!-- a", "&lt;!-- a"),
    "HTML": ("<details>&lt;", "&lt;details&gt;&amp;lt;"),
    "a link": ("[PASS](http://x)", "\\[PASS\\](http://x)"),
    "emphasis": ("**PASS** __b__ ~~c~~ $d$", "\\*\\*PASS\\*\\* \\_\\_b\\_\\_ \\~\\~c\\~\\~ \\$d\\$"),
    "an underscore inside a word stays": ("fashion_calibration.npz", "fashion_calibration.npz"),
    "a character that turns the text": ("a\u202eb\x00\x1b\ud800", "a\\\\u202eb\\\\x00\\\\x1b\\\\ud800"),
    "other scripts stay": ("Gewicht \u00fc \u91cd\u307f \U0001f600", "Gewicht \u00fc \u91cd\u307f \U0001f600"),
}


@pytest.mark.parametrize(("text", "markdown"), HOSTILE.values(), ids=HOSTILE)
def test_text_shows_as_it_is(text, markdown):
    assert escaped(text) == markdown
    report = dataclasses.replace(
        REPORT,
        checkpoint={**REPORT.checkpoint, "name": text},
        checks=(Check(text, passed=False, value=None, gate=None, detail=text),),
    )
    written = markdown_from_report(report)
    assert written.startswith(f"# {markdown}: FAIL")
    assert f"\n| {markdown} | **FAIL** | {markdown} |\n" in written


@pytest.mark.parametrize(
    ("text", "markdown"),
    [("a", "`a`"), ("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("a|b", "`a\\|b`"), ("<b>", "`<b>`"), ("a\nb", "`a b`")],
)
def test_a_code_span_holds_any_text(text, markdown):
    assert code(text) == markdown


def test_a_long_cell_is_cut():
    (line,) = section("T", ("c",), [("x" * 5000,)]).splitlines()[4:]
    assert cells(line) == ["x" * (LARGEST_CELL - 3) + "..."]


def test_a_report_beyond_a_summarys_limit_is_cut_at_a_row_and_says_so():
    wide = Check("stage", passed=True, value=None, gate=None, detail="\U0001f600" * 900)
    many = tuple(dataclasses.replace(wide, stage=f"stage {number}") for number in range(400))
    assert len(markdown_from_report(dataclasses.replace(REPORT, checks=many[:100])).encode()) < LARGEST_SIZE
    text = markdown_from_report(dataclasses.replace(REPORT, checks=many))
    assert LARGEST_SIZE - 5000 < len(text.encode()) < LARGEST_SIZE + 200 < STEP_LIMIT
    assert text.endswith(" |\n\nThe rest is left out: it is more than a job's summary takes.\n")
    assert text.startswith("# model.pt: PASS: 400 of 400 checks hold\n")


@settings(max_examples=80, deadline=None)
@given(reports)
def test_any_report_makes_tables_whose_cells_are_what_it_has(report):
    text = markdown_from_report(report)
    found = tables(text)
    text.encode()
    rows = found.get("Checks", [[], []])[2:]
    assert [row[1].strip("*") for row in rows] == [
        {True: "pass", False: "FAIL", None: "not run"}[check.passed] for check in report.checks
    ]
    for row, check in zip(rows, report.checks, strict=True):
        if check.detail.isprintable() and "\\" not in check.detail:
            assert shown(row[2]) == " ".join(check.detail.split())
    assert len(found.get("Ledger", [[], []])) - 2 == len(report.ledger)
    assert len(found.get("Versions", [[], []])) - 2 == len(report.versions)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters() | st.sampled_from("|`\\*_<>&[]\n\x00"), max_size=60))
def test_no_text_leaves_its_cell(text):
    (line,) = section("T", ("a", "b"), [(text, "end")]).splitlines()[4:]
    assert len(cells(line)) == 2
    assert cells(line)[1] == "end"
    for special in "`*[]<>~$":
        assert not re.search(rf"(?<!\\){re.escape(special)}", re.sub(r"\\\\", "", line))
