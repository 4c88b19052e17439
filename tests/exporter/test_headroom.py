"""Headroom in half: which figures it has, and how it is put in words."""

from __future__ import annotations

import math

import numpy as np
import pytest

from exporter.architecture import Architecture, Block
from exporter.onnx_graph import Graph, structure_from_architecture
from exporter.precisions.headroom import headroom_of_graph
from exporter.report import Headroom, HeadroomRow, line_from_headroom, rescaled_in_words

BLOCKS = (Block("stage0.0", 3, 4, 2, 1, ("fused",), 2), Block("stage1.0", 4, 4, 1, 1, ("fused",), None))
NETWORK = Architecture(BLOCKS, 5, 1e-5, "official", None, (2, 2), (False, False))
PEAKS = {
    "stage0.0/conv": np.array([1.0, 2.0, 131008.0, 3.0]),
    "stage0.0/se": np.array([0.5, 4.0, 65504.0, 1.0]),
    "stage0.0": np.array([0.5, 4.0, 65504.0, 0.0]),
    "stage0.0/se/reduced": np.array([16.0, 8.0]),
    "stage0.0/se/expanded": np.array([0.0, 0.0, 0.0, 0.0]),
    "stage1.0": np.array([1.0, math.nan, math.inf, 2.0]),
}


def graph():
    structure = structure_from_architecture(NETWORK, (8, 8))
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in structure.graph.input
    }
    return Graph(structure, {name: np.ones(shape, np.float32) for name, shape in shapes.items() if name != "input"})


def test_each_convolution_has_the_largest_value_in_any_of_its_tensors_and_its_channel():
    rows = {row.convolution: row for row in headroom_of_graph(graph(), PEAKS, {})}
    assert list(rows) == ["stage0.0/Conv", "stage0.0/se/reduce/Conv", "stage0.0/se/expand/Conv", "stage1.0/Conv"]
    assert rows["stage0.0/Conv"].before == Headroom(peak=131008.0, channel=2, factor=0.5, bits=-1.0)
    assert rows["stage0.0/se/reduce/Conv"].before == Headroom(peak=16.0, channel=0, factor=4094.0, bits=math.log2(4094))
    assert rows["stage0.0/se/expand/Conv"].before == Headroom(peak=0.0, channel=0, factor=math.inf, bits=math.inf)
    assert rows["stage1.0/Conv"].before == Headroom(peak=2.0, channel=3, factor=32752.0, bits=math.log2(32752))
    assert all(row.after == row.before and row.exponents == () for row in rows.values())
    assert [row.convolution for row in rows.values() if row.fixed] == ["stage0.0/se/expand/Conv"]
    assert rows["stage0.0/se/expand/Conv"].fixed == "stage0.0/se/Sigmoid reads stage0.0/se/expanded"


def test_afterwards_another_channel_can_be_the_largest():
    exponents = {"stage0.0/Conv": np.array([0, 0, -16, 0])}
    row = headroom_of_graph(graph(), PEAKS, exponents)[0]
    assert row.before == Headroom(peak=131008.0, channel=2, factor=0.5, bits=-1.0)
    assert row.after == Headroom(peak=4.0, channel=1, factor=16376.0, bits=math.log2(16376))
    assert row.exponents == (0, 0, -16, 0)


def test_convolutions_that_nothing_was_seen_of_have_no_row():
    assert headroom_of_graph(graph(), {}, {}) == ()
    assert [row.convolution for row in headroom_of_graph(graph(), {"stage0.0/se/reduced": np.ones(2)}, {})] == [
        "stage0.0/se/reduce/Conv"
    ]


def row(convolution="stage2.1/Conv", factor=8.0, after=None, exponents=()):
    before, then = (Headroom(65504 / f, 0, f, math.log2(f)) for f in (factor, after or factor))
    return HeadroomRow(convolution, before, then, exponents, None)


@pytest.mark.parametrize(
    ("exponents", "words"),
    [
        ((0, -2, -5, 0, -3), "stage2.1: 3 channels scaled by 2^-5..2^-2"),
        ((-4, 0), "stage2.1: 1 channel scaled by 2^-4"),
        ((-4, -4), "stage2.1: 2 channels scaled by 2^-4"),
        ((1, -1, 0), "stage2.1: 2 channels scaled by 2^-1..2^1"),
    ],
)
def test_rescaled_channels_are_counted_with_their_powers(exponents, words):
    assert rescaled_in_words(row(exponents=exponents)) == words


def test_the_line_names_the_least_headroom_and_the_images_it_was_seen_on():
    rows = [row("a/Conv", 31.25), row("b/Conv", 2.5), row("c/Conv", 1000.0)]
    assert line_from_headroom(rows, "seeded noise (no --calib given)") == (
        "2.5 (1.3 bits) in b/Conv, on seeded noise (no --calib given)"
    )
    rows[1] = row("b/Conv", 2.5, 40.0, (0, -4))
    assert line_from_headroom(rows, "the first 4 images of calib.npz") == (
        "2.5 (1.3 bits) in b/Conv; rescaled, 31.2 (5.0 bits) in a/Conv, on the first 4 images of calib.npz"
    )
