"""The plot of a bench record: what is drawn where, in which words, and that nothing else gets into it."""

from __future__ import annotations

import itertools
import math
import re
import sys
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.bench.curves import Curve, Point, latency_curves, plain_line, short_names, throughput_curves
from engines.bench.plot import svg_from_record
from engines.errors import SdkMissing
from engines.json_value import Malformed

SVG = "{http://www.w3.org/2000/svg}"
FOUR_WAYS = (
    "launches, with transfers",
    "launches, compute alone",
    "CUDA graph, with transfers",
    "CUDA graph, compute alone",
)


def estimate(value, part=0.02):
    return {"value": value, "low": value * (1 - part), "high": value * (1 + part)}


def row(file, batch, rate, way="numpy to numpy", percentiles=("p50", "p90", "p95", "p99")):
    latency = 1000 * batch / rate
    return {
        "file": file,
        "batch": batch,
        "way": way,
        "images_per_second": estimate(rate),
        "latency_ms": {
            name: estimate(latency) if name in percentiles else None for name in ("p50", "p90", "p95", "p99")
        },
    }


def record_of(rows, **machine):
    return {"schema": 1, "machine": {"host": "SECRETHOST", "cpu": "Some CPU", "gpu": None, **machine}, "rows": rows}


RATES = {"a.onnx": {1: 30.0, 8: 40.0, 32: 45.0}, "b.onnx": {1: 60.0, 8: 75.0, 32: 90.0}}
RECORD = record_of([row(file, batch, rate) for file, rates in RATES.items() for batch, rate in rates.items()])


def texts(svg):
    return ["".join(node.itertext()).strip() for node in ET.fromstring(svg).iter(f"{SVG}text")]


def markers(svg, identity):
    """(x, y) of each point of a curve."""
    (group,) = (node for node in ET.fromstring(svg).iter(f"{SVG}g") if node.get("id") == identity)
    return [(float(use.get("x")), float(use.get("y"))) for use in group.iter(f"{SVG}use")]


def identities(svg):
    found = [node.get("id") or "" for node in ET.fromstring(svg).iter(f"{SVG}g")]
    return [name for name in found if re.fullmatch(r"(images|latency)-\d+", name)]


def test_throughput_stands_at_its_place_on_an_axis_that_begins_at_zero():
    svg = svg_from_record(RECORD)
    places = {file: markers(svg, f"images-{index}") for index, file in enumerate(RATES)}
    heights = [
        (rate, y) for file, rates in RATES.items() for (_, y), rate in zip(places[file], rates.values(), strict=True)
    ]
    scales = [(y1 - y0) / (v1 - v0) for (v0, y0), (v1, y1) in itertools.pairwise(heights)]
    assert scales == pytest.approx([scales[0]] * len(scales), rel=1e-3)
    assert scales[0] < 0  # SVG counts from the top
    zero = heights[0][1] - heights[0][0] * scales[0]
    (axis,) = {y for text, y in tick_labels(svg) if text == "0"}
    assert axis == pytest.approx(zero, abs=5)


def tick_labels(svg):
    """Text and the y that it is moved to, where it is moved."""
    for node in ET.fromstring(svg).iter(f"{SVG}text"):
        moved = re.search(r"translate\([-\d.]+ ([-\d.]+)\)", node.get("transform") or "")
        y = float(moved[1]) if moved else float(node.get("y", "nan"))
        yield "".join(node.itertext()).strip(), y


@pytest.mark.parametrize("panel", ["images", "latency"])
def test_batches_stand_where_their_logarithms_are(panel):
    xs = [x for x, _ in markers(svg_from_record(RECORD), f"{panel}-0")]
    assert (xs[1] - xs[0]) / (xs[2] - xs[1]) == pytest.approx(math.log2(8) / math.log2(4), rel=1e-3)


def test_latency_is_logarithmic_and_the_slower_file_stands_higher():
    svg = svg_from_record(RECORD)
    first, second = markers(svg, "latency-0"), markers(svg, "latency-1")
    assert all(slow < fast for (_, slow), (_, fast) in zip(first, second, strict=True))
    latencies = [batch / rate for batch, rate in RATES["a.onnx"].items()]
    scales = [
        (first[k + 1][1] - first[k][1]) / math.log(latencies[k + 1] / latencies[k]) for k in range(len(latencies) - 1)
    ]
    assert scales[0] == pytest.approx(scales[1], rel=1e-3)


def test_the_axes_and_the_legend_say_what_is_shown():
    shown = texts(svg_from_record(RECORD))
    assert {"images/s", "p99 latency, ms, logarithmic", "batch", "a.onnx", "b.onnx", "1", "8", "32"} <= set(shown)
    assert "Throughput and latency on Some CPU, numpy to numpy; bars are 95 % intervals" in shown


@pytest.mark.parametrize(
    ("missing", "label"),
    [
        ({}, "p99 latency, ms, logarithmic"),
        ({("a.onnx", 32): ("p50", "p90", "p95")}, "p95 latency, ms (too few queries for p99), logarithmic"),
        ({("a.onnx", 32): ("p50",)}, "p50 latency, ms (too few queries for p99), logarithmic"),
        (
            {("a.onnx", 1): ("p50", "p99"), ("b.onnx", 8): ("p90", "p50")},
            "p50 latency, ms (too few queries for p99), logarithmic",
        ),
        ({("b.onnx", 1): ()}, "latency: too few queries"),
    ],
)  # fmt: skip
def test_the_percentile_is_the_highest_that_every_row_has(missing, label):
    rows = [
        row(file, batch, rate, percentiles=missing.get((file, batch), ("p50", "p90", "p95", "p99")))
        for file, rates in RATES.items()
        for batch, rate in rates.items()
    ]
    svg = svg_from_record(record_of(rows))
    assert label in texts(svg)
    assert len(identities(svg)) == (2 if label.startswith("latency") else 4)


@pytest.mark.parametrize("gpu", [None, "NVIDIA L4"])
def test_one_batch_is_drawn_as_a_line_for_each_file_with_its_figure(gpu):
    rows = [row(file, 8, rates[8]) for file, rates in RATES.items()]
    svg = svg_from_record(record_of(rows, gpu=gpu))
    shown = texts(svg)
    on = "Some CPU and NVIDIA L4" if gpu else "Some CPU"
    assert f"Throughput and latency on {on}, batch 8, numpy to numpy; bars are 95 % intervals" in shown
    assert {"a.onnx", "b.onnx", "40", "75", "200", "107", "images/s", "p99 latency, ms"} <= set(shown)
    (first,), (second,) = (markers(svg, f"images-{index}") for index in range(2))
    assert first[0] < second[0]  # 40 images/s before 75
    assert first[1] < second[1]  # the first file on top


def test_ways_differ_in_their_dashes_and_files_in_colour_and_marker():
    rows = [
        row(file, batch, 10.0 + place, way)
        for place, (way, file, batch) in enumerate(itertools.product(FOUR_WAYS, ("a.engine", "b.engine"), (1, 8)))
    ]
    svg = svg_from_record(record_of(rows))
    assert set(FOUR_WAYS) <= set(texts(svg))
    curves = {
        (way, file): next(node for node in ET.fromstring(svg).iter(f"{SVG}g") if node.get("id") == f"images-{index}")
        for index, (way, file) in enumerate(itertools.product(FOUR_WAYS, ("a.engine", "b.engine")))
    }
    looks = {key: next(group.iter(f"{SVG}path")).get("style") for key, group in curves.items()}
    dashes = {key: re.search(r"stroke-dasharray: ([^;]*)", look or "") for key, look in looks.items()}
    colours = {key: re.search(r"stroke: (#[0-9a-f]{6})", look or "")[1] for key, look in looks.items()}
    for file in ("a.engine", "b.engine"):
        assert len({dashes[way, file] and dashes[way, file][1] for way in FOUR_WAYS}) == 4
        assert len({colours[way, file] for way in FOUR_WAYS}) == 1
    assert colours[FOUR_WAYS[0], "a.engine"] != colours[FOUR_WAYS[0], "b.engine"]


def test_the_same_record_gives_the_same_bytes_whatever_matplotlib_is_set_to():
    import matplotlib as mpl

    plain = svg_from_record(RECORD)
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 20, "svg.fonttype": "path", "svg.hashsalt": "other"}):
        assert svg_from_record(RECORD) == plain
        assert mpl.rcParams["font.size"] == 20  # and nothing of ours is left behind
    changed = record_of([*RECORD["rows"][:-1], row("b.onnx", 32, 91.0)])
    assert svg_from_record(changed) != plain


def test_nothing_personal_and_no_date_gets_into_it_and_the_background_is_white():
    rows = [row(r"C:\Users\SECRET\a.onnx", 1, 30.0), row("/home/SECRET/b.onnx", 1, 30.0)]
    svg = svg_from_record(record_of(rows)).decode()
    assert "SECRET" not in svg
    assert "<dc:date>" not in svg
    assert re.search(r'id="patch_1".*?fill: #ffffff', svg, re.DOTALL)
    assert {"a.onnx", "b.onnx"} <= set(texts(svg.encode()))


@pytest.mark.parametrize("name", ["$a_b$.onnx", "<x>&'\".onnx", "模型.onnx", "a\u202eb.onnx", "$a^b_{c}$.onnx"])
def test_any_file_name_is_drawn_as_it_is(name):
    svg = svg_from_record(record_of([row(name, 1, 30.0), row(name, 8, 40.0)]))
    assert plain_line(name) in texts(svg)


def test_files_of_one_name_are_told_apart():
    assert short_names(["x/a.onnx", "b.onnx", "y/a.onnx", "a.onnx"]) == {
        "x/a.onnx": "a.onnx (1)", "b.onnx": "b.onnx", "y/a.onnx": "a.onnx (2)", "a.onnx": "a.onnx (3)",
    }  # fmt: skip


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SdkMissing, match=r"pip install 'repvgg-exporter\[plot\]'"):
        svg_from_record(RECORD)


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        ([{**RECORD["rows"][0], "batch": 0}], r"rows\[0\]\.batch"),
        ([{**RECORD["rows"][0], "file": ""}], r"rows\[0\]\.file"),
        ([{**RECORD["rows"][0], "images_per_second": {"value": 1.0, "low": 1.0}}], "high: missing"),
        ([{**RECORD["rows"][0], "images_per_second": estimate(float("inf"))}], "finite"),
        ([{**RECORD["rows"][0], "latency_ms": {"p99": {"value": "1", "low": 1, "high": 1}}}], r"p99\.value"),
    ],
)
def test_what_is_no_record_is_refused_with_its_place(rows, place):
    with pytest.raises(Malformed, match=place):
        svg_from_record(record_of(rows))


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["x", "y"]), st.integers(1, 512)),
        st.floats(0.01, 1e6),
        min_size=1,
        max_size=12,
    )
)
def test_every_row_is_one_point_of_one_curve(rates):
    rows = [row(file, batch, rate, way) for (file, way, batch), rate in rates.items()]
    curves = throughput_curves(record_of(rows))
    found = {(curve.file, curve.way, point.batch): point.value for curve in curves for point in curve.points}
    assert found == rates
    assert all([p.batch for p in c.points] == sorted(p.batch for p in c.points) for c in curves)
    name, latencies = latency_curves(record_of(rows))
    assert name == "p99"
    assert {(c.file, c.way) for c in latencies} == {(c.file, c.way) for c in curves}


def test_a_point_has_its_interval():
    (curve,) = throughput_curves(record_of([row("a", 2, 100.0)]))
    assert curve == Curve("a", "numpy to numpy", (Point(2, 100.0, 98.0, 102.0),))


def test_throughput_of_zero_and_a_record_without_rows_can_be_drawn():
    assert identities(svg_from_record(record_of([]))) == []
    nothing = {**row("a", 1, 1.0), "images_per_second": estimate(0.0), "latency_ms": {"p50": estimate(0.0)}}
    for rows in ([nothing], [nothing, {**nothing, "batch": 2}]):
        assert identities(svg_from_record(record_of(rows))) == ["images-0", "latency-0"]
