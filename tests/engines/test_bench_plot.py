"""The plot of a bench record: what is drawn where, in which words, and that nothing else gets into it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import sys
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.bench.curves import Curve, latency_curves, plain_line, short_names, throughput_curves
from engines.bench.plot import svg_from_record
from engines.bench.statistics import PERCENTILES, Estimate
from engines.errors import SdkMissing
from tests.engines.bench_records import ROW, record_of

SVG = "{http://www.w3.org/2000/svg}"
FOUR_WAYS = (
    "launches, with transfers",
    "launches, compute alone",
    "CUDA graph, with transfers",
    "CUDA graph, compute alone",
)


def estimate(value):
    return Estimate(value, value * 0.98, value * 1.02)


def row(file, batch, rate, way="numpy to numpy", percentiles=PERCENTILES):
    latency = 1000 * batch / rate
    return dataclasses.replace(
        ROW,
        file=file,
        batch=batch,
        way=way,
        images_per_second=estimate(rate),
        latency_ms={percent: estimate(latency) if percent in percentiles else None for percent in PERCENTILES},
    )


RATES = {"a.onnx": {1: 30.0, 8: 40.0, 32: 45.0}, "b.onnx": {1: 60.0, 8: 75.0, 32: 90.0}}
RECORD = record_of(*(row(file, batch, rate) for file, rates in RATES.items() for batch, rate in rates.items()))


@pytest.fixture(scope="module")
def svg():
    """Of RECORD."""
    return svg_from_record(RECORD)


def texts(svg):
    return ["".join(node.itertext()).strip() for node in ET.fromstring(svg).iter(f"{SVG}text")]


def markers(svg, identity):
    """(x, y) of each point of a curve."""
    (group,) = (node for node in ET.fromstring(svg).iter(f"{SVG}g") if node.get("id") == identity)
    return [(float(use.get("x")), float(use.get("y"))) for use in group.iter(f"{SVG}use")]


def identities(svg):
    found = [node.get("id") or "" for node in ET.fromstring(svg).iter(f"{SVG}g")]
    return [name for name in found if re.fullmatch(r"(images|latency)-\d+", name)]


def test_throughput_stands_at_its_place_on_an_axis_that_begins_at_zero(svg):
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
def test_batches_stand_where_their_logarithms_are(svg, panel):
    xs = [x for x, _ in markers(svg, f"{panel}-0")]
    assert (xs[1] - xs[0]) / (xs[2] - xs[1]) == pytest.approx(math.log2(8) / math.log2(4), rel=1e-3)


def test_latency_is_logarithmic_and_the_slower_file_stands_higher(svg):
    first, second = markers(svg, "latency-0"), markers(svg, "latency-1")
    assert all(slow < fast for (_, slow), (_, fast) in zip(first, second, strict=True))
    latencies = [batch / rate for batch, rate in RATES["a.onnx"].items()]
    scales = [
        (first[k + 1][1] - first[k][1]) / math.log(latencies[k + 1] / latencies[k]) for k in range(len(latencies) - 1)
    ]
    assert scales[0] == pytest.approx(scales[1], rel=1e-3)


@pytest.mark.parametrize(("batches", "axis"), [((8,), 0), ((1, 8), 1)])
def test_a_bar_reaches_from_the_lower_end_of_the_interval_to_the_upper(batches, axis):
    rows = [
        dataclasses.replace(row("a", batch, 40.0), images_per_second=Estimate(40.0, 30.0, 60.0)) for batch in batches
    ]
    svg = svg_from_record(record_of(*rows))
    (bars,) = (node for node in ET.fromstring(svg).iter(f"{SVG}g") if node.get("id") == "LineCollection_1")
    for point, bar in zip(markers(svg, "images-0"), bars.iter(f"{SVG}path"), strict=True):
        ends = [float(number) for number in re.findall(r"[-\d.]+", bar.get("d"))]
        low, high = ends[axis], ends[2 + axis]
        assert (high - point[axis]) / (point[axis] - low) == pytest.approx(20 / 10, rel=1e-3)


def test_the_axes_and_the_legend_say_what_is_shown(svg):
    shown = texts(svg)
    assert identities(svg) == ["images-0", "images-1", "latency-0", "latency-1"]
    assert {"images/s", "p99 latency, ms, logarithmic", "batch", "a.onnx", "b.onnx", "1", "8", "32"} <= set(shown)
    assert "Throughput and latency on Some CPU, numpy to numpy; bars are 95 % intervals" in shown


@pytest.mark.parametrize(
    ("missing", "label"),
    [
        ({("a.onnx", 32): (50, 90, 95)}, "p95 latency, ms (too few queries for p99), logarithmic"),
        ({("a.onnx", 32): (50,)}, "p50 latency, ms (too few queries for p99), logarithmic"),
        (
            {("a.onnx", 1): (50, 99), ("b.onnx", 8): (90, 50)},
            "p50 latency, ms (too few queries for p99), logarithmic",
        ),
        ({("b.onnx", 1): ()}, "latency: too few queries"),
    ],
)  # fmt: skip
def test_the_percentile_is_the_highest_that_every_row_has(missing, label):
    rows = [
        row(file, batch, rate, percentiles=missing.get((file, batch), PERCENTILES))
        for file, rates in RATES.items()
        for batch, rate in rates.items()
    ]
    svg = svg_from_record(record_of(*rows))
    assert label in texts(svg)
    assert len(identities(svg)) == (2 if label.startswith("latency") else 4)


@pytest.mark.parametrize("gpu", [None, "NVIDIA L4"])
def test_one_batch_is_drawn_as_a_line_for_each_file_with_its_figure(gpu):
    rows = [row(file, 8, rates[8]) for file, rates in RATES.items()]
    svg = svg_from_record(record_of(*rows, gpu=gpu))
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
    svg = svg_from_record(record_of(*rows))
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


def test_the_same_record_gives_the_same_bytes_whatever_matplotlib_is_set_to(svg):
    import matplotlib as mpl

    with mpl.rc_context({"axes.facecolor": "black", "font.size": 20, "svg.fonttype": "path", "svg.hashsalt": "other"}):
        assert svg_from_record(RECORD) == svg
        assert mpl.rcParams["font.size"] == 20  # and nothing of ours is left behind
    assert svg_from_record(record_of(*RECORD.rows[:-1], row("b.onnx", 32, 91.0))) != svg


def test_nothing_personal_and_no_date_gets_into_it_and_the_background_is_white():
    rows = [row("C:/Users/SECRET/a.onnx", 1, 30.0), row("/home/SECRET/b.onnx", 1, 30.0)]
    svg = svg_from_record(record_of(*rows)).decode()
    assert "SECRET" not in svg
    assert "<dc:date>" not in svg
    assert re.search(r'id="patch_1".*?fill: #ffffff', svg, re.DOTALL)
    assert {"a.onnx", "b.onnx"} <= set(texts(svg.encode()))


@pytest.mark.parametrize("name", ["$a_b$.onnx", "<x>&'\".onnx", "模型.onnx", "a\u202eb.onnx", "$a^b_{c}$.onnx"])
def test_any_file_name_is_drawn_as_it_is(name):
    svg = svg_from_record(record_of(row(name, 1, 30.0), row(name, 8, 40.0)))
    assert plain_line(name) in texts(svg)


def test_files_of_one_name_are_told_apart():
    assert short_names(["x/a.onnx", "b.onnx", "y/a.onnx", "a.onnx"]) == {
        "x/a.onnx": "a.onnx (1)", "b.onnx": "b.onnx", "y/a.onnx": "a.onnx (2)", "a.onnx": "a.onnx (3)",
    }  # fmt: skip
    assert short_names([r"x/a\x1b[31m.onnx"]) == {r"x/a\x1b[31m.onnx": r"a\x1b[31m.onnx"}


def test_of_long_names_the_middle_is_left_out_and_they_are_told_apart():
    files = [f"x/{'n' * 45}.onnx", f"x/{'n' * 46}.onnx", f"{'n' * 40}.onnx"]
    cut, whole = f"{'n' * 21}...{'n' * 16}.onnx", f"{'n' * 40}.onnx"
    assert list(short_names(files, 45).values()) == [f"{cut} (1)", f"{cut} (2)", whole]
    assert list(short_names(files).values()) == [f"{'n' * 45}.onnx", f"{'n' * 46}.onnx", whole]


def test_a_long_name_leaves_the_panels_room():
    """Without it matplotlib warns, which is an error here, and draws one panel over the other."""
    svg = svg_from_record(record_of(*(row(f"{'n' * 240}.onnx", 1, 30.0, way) for way in FOUR_WAYS)))
    patches = [node for node in ET.fromstring(svg).iter(f"{SVG}g") if (node.get("id") or "").startswith("patch_")]
    corners = [re.findall(r"[-\d.]+", next(patch.iter(f"{SVG}path")).get("d")) for patch in patches]
    whole, left, right = (float(found[2]) - float(found[0]) for found in corners if len(found) == 8)
    assert min(left, right) > whole / 5


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SdkMissing, match=r"pip install 'repvgg-exporter\[plot\]'"):
        svg_from_record(RECORD)


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
    curves = throughput_curves(rows)
    found = {(curve.file, curve.way, batch): figure for curve in curves for batch, figure in curve.estimates.items()}
    assert found == {key: estimate(rate) for key, rate in rates.items()}
    assert all(list(curve.estimates) == sorted(curve.estimates) for curve in curves)
    percent, latencies = latency_curves(rows)
    assert percent == 99
    assert [(curve.file, curve.way, [*curve.estimates]) for curve in latencies] == [
        (curve.file, curve.way, [*curve.estimates]) for curve in curves
    ]


def test_a_point_has_its_interval():
    assert throughput_curves([row("a", 2, 100.0)]) == (Curve("a", "numpy to numpy", {2: Estimate(100.0, 98.0, 102.0)}),)


def test_throughput_of_zero_and_a_record_without_rows_can_be_drawn():
    assert identities(svg_from_record(record_of())) == []
    latencies = {**dict.fromkeys(PERCENTILES), 50: estimate(0.0)}
    nothing = dataclasses.replace(row("a", 1, 1.0), images_per_second=estimate(0.0), latency_ms=latencies)
    for rows in ([nothing], [nothing, dataclasses.replace(nothing, batch=2)]):
        assert identities(svg_from_record(record_of(*rows))) == ["images-0", "latency-0"]
