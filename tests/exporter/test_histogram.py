"""Histograms of magnitudes: what is left of values does not depend on how they came."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.quantization import histogram
from exporter.quantization.histogram import BINS, Histogram

numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2047.0, 2048.0, 2049.0, 2.0**-149, 2.0**127]),
)
parts = st.lists(st.lists(numbers, max_size=9), min_size=1, max_size=4)
many = settings(max_examples=150, deadline=None)


def histogram_of(*parts: Sequence[float]) -> Histogram:
    result = Histogram()
    for part in parts:
        result.add(torch.tensor(part, dtype=torch.float32))
    return result


def facts(one: Histogram) -> tuple[float, float, int, int, tuple[int, ...]]:
    return one.width, one.largest, one.count, one.zeros, tuple(one.counts.tolist())


def naive(values: Sequence[float]) -> tuple[float, float, int, int, tuple[int, ...]]:
    """One value after the other, in float64, which holds every quotient here."""
    largest, width = max((abs(value) for value in values), default=0.0), 2.0**-126
    while largest > BINS * width:
        width *= 2
    counts = [0] * BINS
    for value in values:
        if value:
            counts[math.ceil(abs(value) / width) - 1] += 1
    return width, largest, len(values), len(values) - sum(counts), tuple(counts)


@many
@given(parts)
def test_it_is_a_function_of_all_values_alone(values: list[list[float]]) -> None:
    together = [value for part in values for value in part]
    expected = naive(together)
    assert facts(histogram_of(together)) == expected
    assert facts(histogram_of(*values)) == expected
    assert facts(histogram_of(*reversed(values))) == expected
    assert facts(histogram_of(*([value] for value in together))) == expected


@many
@given(parts, parts, parts)
def test_merging_is_associative_and_equal_to_one_histogram_of_all(
    a: list[list[float]], b: list[list[float]], c: list[list[float]]
) -> None:
    one, two, three = histogram_of(*a), histogram_of(*b), histogram_of(*c)
    expected = facts(histogram_of(*a, *b, *c))
    assert facts(one.merged(two).merged(three)) == expected
    assert facts(one.merged(two.merged(three))) == expected
    assert facts(three.merged(two).merged(one)) == expected
    assert facts(one) == facts(histogram_of(*a)), "merging changed what was merged"


@pytest.mark.parametrize("width", [2.0**-20, 1.0, 4.0, 2.0**100])
def test_a_border_belongs_to_the_bin_below(width: float) -> None:
    """And with one more unit in the last place a value is in the next: nothing is off by one, or rounded."""
    border = torch.tensor(5 * width)
    above = torch.nextafter(border, torch.tensor(math.inf))
    result = histogram_of([BINS * width, float(border), float(above), float(above)])
    assert result.width == width
    assert result.counts.nonzero().reshape(-1).tolist() == [4, 5, BINS - 1]
    assert result.counts[[4, 5, BINS - 1]].tolist() == [1, 2, 1]


@pytest.mark.parametrize("largest", [1.0, 1.0000001, 1.9999999, 3.7, 2.0**-60, 6e4])
def test_the_width_is_the_smallest_that_holds_the_largest(largest: float) -> None:
    one = histogram_of([largest])
    assert BINS / 2 * one.width < one.largest <= BINS * one.width
    assert math.frexp(one.width)[0] == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:, ::2],
        lambda x: x.relu(),
        lambda x: -x.abs(),
        lambda x: x.requires_grad_(),
    ],
    ids=["signed", "channels last", "strided", "relu", "negative", "of a graph"],
)
def test_any_layout_and_any_piece(
    make: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = make(torch.randn(3, 4, 7, 5, generator=torch.Generator().manual_seed(1)))
    expected = naive(values.detach().reshape(-1).tolist())
    for piece in (1, 7, 100_000):
        monkeypatch.setattr(histogram, "PIECE", piece)
        one = Histogram()
        one.add(values)
        assert facts(one) == expected


def test_values_are_not_changed() -> None:
    values = torch.tensor([-1.0, 0.5, 3.0])
    Histogram().add(values)
    assert values.tolist() == [-1.0, 0.5, 3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("before", [[], [1.0, 0.0]], ids=["empty", "filled"])
def test_what_is_not_finite_is_refused_and_nothing_is_counted(bad: float, before: list[float]) -> None:
    one = histogram_of(before)
    with pytest.raises(ValueError, match="NaN or infinite"):
        one.add(torch.tensor([5.0, bad, 7.0]))
    assert facts(one) == facts(histogram_of(before))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_another_dtype_is_a_mistake_of_the_caller(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="float32"):
        Histogram().add(torch.ones(3, dtype=dtype))


def test_it_does_not_grow() -> None:
    one = Histogram()
    sizes = set()
    for exponent in range(-30, 30):
        one.add(torch.full((1000,), 2.0**exponent))
        sizes.add((one.counts.numel(), sys.getsizeof(one.__dict__)))
    assert len(sizes) == 1
    assert one.count == 60_000


def test_no_values_at_all() -> None:
    one = histogram_of([])
    assert (one.count, one.largest) == (0, 0.0)
    assert facts(one.merged(histogram_of([3.0]))) == facts(histogram_of([3.0]))
