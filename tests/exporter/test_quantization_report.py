"""What INT8 costs, as the report tells it: every figure in its place, the worst layer first, no name as markup."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.findings import Findings
from exporter.quantization.form import FORMS
from exporter.report import (
    QuantizationRecord,
    QuantizedLayerRow,
    junit_from_report,
    line_from_quantization,
    markdown_from_report,
)
from exporter.report.markdown import QUANTIZATION_COLUMNS, QUANTIZED_ROWS
from tests.conftest import ROOT
from tests.reports import REPORT, quantizations

SCHEMA = json.loads((ROOT / "exporter" / "report" / "report.schema.json").read_text(encoding="utf-8"))
(RECORD,) = REPORT.quantization
ROW = RECORD.layers[0]
RTX = dataclasses.replace(
    RECORD,
    form="int8.rtx",
    file="model.int8.rtx.onnx",
    effort="default",
    equalized=False,
    equalized_db=31.0,
    plain_db=31.5,
    agreement=None,
    kernels_db=None,
    budget_db=None,
    layers=(),
    kept={},
    traffic=None,
)


def with_quantization(*records):
    return dataclasses.replace(REPORT, quantization=records)


def written(*records):
    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(with_quantization(*records).to_json(), parse_constant=no_constant)


def problems(document):
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(document)]


def table(text, title):
    """The rows below the header of a section, as cells, and what stands behind the table."""
    lines = text.split(f"\n## {title}\n\n")[1].split("\n## ")[0].splitlines()
    rows = [line for line in lines if line.startswith("|")]
    return [row[2:-2].split(" | ") for row in rows[2:]], "\n".join(lines[len(rows) :]).strip()


# --- a line for a terminal


def test_the_line_says_how_near_and_what_was_done():
    assert line_from_quantization(RECORD) == (
        "int8 (a weight scale for each channel, effort high): 33.4 dB (misses the budget of 35 dB) over 512 images, "
        "top-1 agrees on 99.06%; equalized (33.6 dB against 31.9 dB without); 2 layers kept in float32: stage1.0/Conv "
        "(the budget of 35 dB), stage1.0/se/reduce/Conv (a part of SE); INT8 moves 1.4x the bytes of FP16"
    )
    assert line_from_quantization(RTX) == (
        "int8.rtx (one weight scale for each convolution): 33.4 dB over 512 images; not equalized (31.5 dB against "
        "31.0 dB with it)"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"equalized_db": None}, "; equalized; "),
        ({"equalized": False, "plain_db": None}, "; not equalized; "),
        ({"sqnr_db": math.inf}, ": inf dB "),
        ({"sqnr_db": math.nan}, ": nan dB (misses the budget of 35 dB) over "),
        ({"sqnr_db": 35.0}, ": 35.0 dB (meets the budget of 35 dB) over "),
        ({"weight_bits": 4}, "effort high, 4-bit weights): "),
        ({"activation_bits": 6, "effort": "default"}, "(a weight scale for each channel, 6-bit activations): "),
        ({"kept": {"head/Gemm": "why"}, "form": "int8.rtx"}, "; 1 layer kept in float16: head/Gemm (why); "),
        ({"kept": dict.fromkeys("abcdefghi", "SE")}, "; 9 layers kept in float32: a (SE), b (SE), c (SE) and 6 more; "),
    ],
)  # fmt: skip
def test_the_line_says_what_is_different(changes, said):
    assert said not in line_from_quantization(RECORD)
    assert said in line_from_quantization(dataclasses.replace(RECORD, **changes))


def test_findings_tell_each_file_once_and_hold_them_in_order():
    told = []
    found = Findings(told.append)
    for record in (RECORD, RTX):
        found.add_quantization(record)
    assert told == [line_from_quantization(RECORD), line_from_quantization(RTX)]
    assert found.quantization == [RECORD, RTX]
    assert found.checks == []


# --- Markdown


def test_each_file_has_one_line_of_figures():
    rows, behind = table(markdown_from_report(with_quantization(RECORD, RTX)), "INT8")
    assert rows == [
        [
            "model.int8.onnx", "a weight scale for each channel, effort high", "33.4", "512", "99.06%", "35.0",
            "equalized (33.6 dB against 31.9 dB without)", "64", "56.5", "41.1", "2.5",
        ],
        [
            "model.int8.rtx.onnx", "one weight scale for each convolution", "33.4", "512", "-", "-",
            "not equalized (31.5 dB against 31.0 dB with it)", "64", "56.5", "-", "2.5",
        ],
    ]  # fmt: skip
    assert {len(row) for row in rows} == {len(QUANTIZATION_COLUMNS)}
    assert behind == "SQNR and top-1 are of the network's output over all images, against float32."


def test_layers_stand_with_their_figures_and_what_is_kept_with_its_reason():
    text = markdown_from_report(with_quantization(RECORD))
    rows, behind = table(text, "INT8, layers of model.int8.onnx")
    assert rows == [
        ["head/Gemm", "7.5", "kl", "0%", "33.4", "46.0", "33.5"],
        ["stage0.0/Conv", "2.75", "mse", "0.125%", "41.5", "44.2", "34.0"],
    ]
    assert behind == "The worst of 2 layers, all of which are in report.json."
    rows, behind = table(text, "Not in INT8 in model.int8.onnx")
    assert rows == [["stage1.0/Conv", "the budget of 35 dB"], ["stage1.0/se/reduce/Conv", "a part of SE"]]
    assert behind == "Traffic of model.int8.onnx: INT8 moves 1.4x the bytes of FP16"
    plain = markdown_from_report(with_quantization(RTX))
    assert "## INT8\n" in plain
    for absent in ("layers of", "Not in INT8", "Traffic"):
        assert absent not in plain
    assert "INT8" not in markdown_from_report(with_quantization())


def test_without_sensitivity_its_columns_are_empty():
    row = dataclasses.replace(ROW, alone_db=None, without_db=None)
    text = markdown_from_report(with_quantization(dataclasses.replace(RECORD, layers=(row,))))
    rows, _ = table(text, "INT8, layers of model.int8.onnx")
    assert rows == [["stage0.0/Conv", "2.75", "mse", "0.125%", "41.5", "-", "-"]]


@pytest.mark.parametrize(
    "figures",
    [(40.0, 35.0, 50.0), (40.0, math.inf, 35.0), (math.nan, 1.0, -1.0), (math.inf, math.nan, -math.inf)],
    ids=str,
)
def test_the_worst_layers_stand_first_and_what_is_no_number_before_all(figures):
    layers = tuple(dataclasses.replace(ROW, layer=f"c{at}", sqnr_db=db) for at, db in enumerate(figures))
    text = markdown_from_report(with_quantization(dataclasses.replace(RECORD, layers=layers)))
    rows, _ = table(text, "INT8, layers of model.int8.onnx")
    expected = sorted(figures, key=lambda db: (not math.isnan(db), db))
    assert [row[4] for row in rows] == [f"{db:.1f}" for db in expected]


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(9)))
def test_only_the_worst_are_shown(order):
    layers = tuple(dataclasses.replace(ROW, layer=f"conv{db}", sqnr_db=float(db)) for db in order)
    text = markdown_from_report(with_quantization(dataclasses.replace(RECORD, layers=layers)))
    rows, behind = table(text, "INT8, layers of model.int8.onnx")
    assert [row[0] for row in rows] == [f"conv{db}" for db in range(QUANTIZED_ROWS)]
    assert behind == "The worst of 9 layers, all of which are in report.json."
    assert len(written(dataclasses.replace(RECORD, layers=layers))["quantization"][0]["layers"]) == 9


def test_no_name_or_reason_is_markup():
    hostile, shown = "<b>|`*_a_\n## T", r"&lt;b&gt;\|\`\*\_a\_ ## T"
    record = dataclasses.replace(
        RECORD,
        file=hostile,
        traffic=hostile,
        kept={hostile: hostile},
        layers=(dataclasses.replace(ROW, layer=hostile),),
    )
    text = markdown_from_report(with_quantization(record))
    assert hostile not in text
    assert f"\n## INT8, layers of {shown}\n" in text
    assert f"\n| {shown} | {shown} |\n" in text
    assert f"\n| {shown} | 2.75 | mse |" in text
    assert f"\nTraffic of {shown}: {shown}\n" in text
    assert f"\n| {shown} | a weight scale" in text


# --- JSON


def test_every_field_is_in_the_json():
    (document,) = written(RECORD)["quantization"]
    assert set(document) == {field.name for field in dataclasses.fields(QuantizationRecord)}
    assert set(document["layers"][0]) == {field.name for field in dataclasses.fields(QuantizedLayerRow)}
    assert document == json.loads(json.dumps(dataclasses.asdict(RECORD)))
    assert written()["quantization"] == []


DECIBELS = ("equalized_db", "plain_db", "sqnr_db", "simulation_db", "kernels_db", "budget_db")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("field", DECIBELS)
def test_decibels_without_a_number_become_null(field, value):
    document = written(dataclasses.replace(RECORD, **{field: value}))
    assert document["quantization"][0][field] is None
    assert problems(document) == []


@pytest.mark.parametrize("field", ["input_range", "sqnr_db", "alone_db", "without_db"])
def test_a_layers_figures_without_a_number_become_null(field):
    layer = dataclasses.replace(ROW, **{field: math.inf})
    document = written(dataclasses.replace(RECORD, layers=(layer,)))
    assert document["quantization"][0]["layers"][0][field] is None
    assert problems(document) == []


def test_the_names_of_the_forms_are_those_of_the_schema():
    for form in FORMS:
        assert problems(written(dataclasses.replace(RECORD, form=form.name))) == []
    document = written(RECORD)
    document["quantization"][0]["form"] = "int8.trt"
    assert problems(document) == ["'int8.trt' is not one of ['int8', 'int8.rtx']"]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(QuantizationRecord)])
def test_a_fault_in_any_field_is_seen_by_the_schema(field):
    document = written(RECORD)
    for fault in ({"?": ["?"]}, [["?"]]):
        planted = copy.deepcopy(document)
        planted["quantization"][0][field] = fault
        assert problems(planted)
    planted = copy.deepcopy(document)
    del planted["quantization"][0][field]
    assert problems(planted) == [f"'{field}' is a required property"]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(QuantizedLayerRow)])
def test_a_fault_in_any_field_of_a_layer_is_seen_by_the_schema(field):
    planted = written(RECORD)
    planted["quantization"][0]["layers"][1][field] = {}
    assert len(problems(planted)) == 1
    del planted["quantization"][0]["layers"][1][field]
    assert problems(planted) == [f"'{field}' is a required property"]


@settings(max_examples=60, deadline=None)
@given(st.lists(quantizations, max_size=3))
def test_any_records_make_a_valid_report_and_a_line_each(records):
    assert problems(written(*records)) == []
    text = markdown_from_report(with_quantization(*records))
    if records:
        assert len(table(text, "INT8")[0]) == len(records)
    for record in records:
        assert line_from_quantization(record).startswith(f"{record.form} (")


# --- JUnit


def test_figures_are_no_checks():
    """Only checks are tests; a figure that is too low must be a check of its own."""
    assert junit_from_report(with_quantization(RECORD, RTX)) == junit_from_report(with_quantization())
