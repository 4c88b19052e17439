"""Ranges of codes: the error that a histogram predicts is the one that codes make, and the range chosen is the best."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporter.quantization.form import levels
from exporter.quantization.histogram import BINS, Histogram
from exporter.quantization.ranges import METHODS, expected_error, range_from_histogram

BITS = (4, 6, 8)
COUNT = 100_000


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def normal() -> Tensor:
    return torch.randn(COUNT, generator=_generator())


def exponential() -> Tensor:
    return torch.empty(COUNT).exponential_(generator=_generator())


DISTRIBUTIONS: dict[str, Callable[[], Tensor]] = {
    "normal": normal,
    "behind a relu": lambda: normal().relu(),
    "exponential": exponential,
    "uniform": lambda: torch.rand(COUNT, generator=_generator()),
    "heavy tail": lambda: exponential() ** 3,
    "one outlier": lambda: torch.cat([normal(), torch.tensor([60.0])]),
}
each_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)
each_width = pytest.mark.parametrize("bits", BITS)


def histogram_of(values: Tensor) -> Histogram:
    result = Histogram()
    result.add(values)
    return result


def measured_error(values: Tensor, t: float, largest_code: int) -> float:
    """By rounding every value."""
    x, scale = values.double(), t / largest_code
    return float(((x / scale).round().clamp(-largest_code, largest_code) * scale - x).square().mean())


@each_distribution
@each_width
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.77, 1.0])
def test_the_expected_error_is_that_of_the_values(name: str, bits: int, fraction: float) -> None:
    values = DISTRIBUTIONS[name]()
    t, near = fraction * float(values.abs().max()), 0.06 if name == "heavy tail" else 0.03
    expected = expected_error(histogram_of(values), t, levels(bits))
    assert expected == pytest.approx(measured_error(values, t, levels(bits)), rel=near)
    assert expected != pytest.approx(measured_error(values, t / 4, levels(bits)), rel=near)


@given(st.integers(1, 127), st.floats(0.05, 3.0), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_the_expected_error_is_exact_for_values_that_fill_their_bins(largest_code: int, t: float, bins: int) -> None:
    """A sum over midpoints converges to the integral with the square of their distance, also across a step."""
    width, each = 2.0**-11, 2000
    midpoints = (torch.arange(bins * each, dtype=torch.float64) + 0.5) * (width / each)
    one = histogram_of(torch.cat([(torch.arange(bins) + 0.5) * width, torch.tensor([1.0])]))
    assert one.width == width
    only_t = (t / largest_code * min(largest_code, round(largest_code / t)) - 1.0) ** 2
    last = float(measured_error(1.0 - midpoints[:each], t, largest_code))
    total = measured_error(midpoints, t, largest_code) * bins + last
    assert expected_error(one, t, largest_code) * one.count == pytest.approx(total, rel=1e-3, abs=1e-12 + 1e-9 * only_t)


def test_zeros_cost_nothing() -> None:
    values = normal()
    with_zeros = torch.cat([values, torch.zeros(3 * COUNT)])
    alone, among = (expected_error(histogram_of(part), 3.0, 7) for part in (values, with_zeros))
    assert among == pytest.approx(alone / 4, rel=1e-12)


@each_distribution
@each_width
def test_no_other_range_has_a_smaller_error_than_that_of_mse(name: str, bits: int) -> None:
    values = DISTRIBUTIONS[name]()
    largest, count = float(values.abs().max()), levels(bits)
    chosen = range_from_histogram(histogram_of(values), "mse", count)
    grid = largest * torch.logspace(-2.5, 0, 150, dtype=torch.float64)
    best = min(measured_error(values, float(t), count) for t in grid)
    assert measured_error(values, chosen, count) <= 1.003 * best
    assert measured_error(values, chosen * 1.5, count) > 1.003 * best
    assert 0 < chosen <= largest


@pytest.mark.parametrize(
    ("largest_code", "step", "error"), [(1, 1.224, 0.1902), (2, 0.8430, 0.08218), (3, 0.6508, 0.04686)]
)
def test_mse_finds_the_uniform_quantizers_of_max_1960(largest_code: int, step: float, error: float) -> None:
    """Quantizing for Minimum Distortion: the best equal steps for a normal distribution, of 3, 5 and 7 levels."""
    one = histogram_of(torch.randn(2_000_000, generator=_generator()))
    t = range_from_histogram(one, "mse", largest_code)
    assert t == pytest.approx(step * largest_code, rel=0.03)
    assert expected_error(one, t, largest_code) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-40, 3, 20])
def test_a_range_scales_with_the_values(method: str, exponent: int) -> None:
    values = exponential()
    once = range_from_histogram(histogram_of(values), method, 127)
    scaled = range_from_histogram(histogram_of(values * 2.0**exponent), method, 127)
    assert scaled == pytest.approx(once * 2.0**exponent, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_do_not_change_a_range(method: str) -> None:
    values = exponential()
    among = torch.cat([values, torch.zeros(5 * COUNT)])
    assert range_from_histogram(histogram_of(among), method, 127) == range_from_histogram(
        histogram_of(values), method, 127
    )


@each_distribution
def test_max_clips_nothing(name: str) -> None:
    values = DISTRIBUTIONS[name]()
    assert range_from_histogram(histogram_of(values), "max", 127) == float(values.abs().max())


def naive_divergences(one: Histogram, largest_code: int) -> dict[int, float]:
    """By number of bins, loop by loop."""
    counts, groups = one.counts.tolist(), largest_code + 1
    used = max(index for index, count in enumerate(counts) if count) + 1
    result = {}
    for kept in range(groups, used + 1):
        p = [float(count) for count in counts[:kept]]
        p[-1] += sum(counts[kept:])
        q = [0.0] * kept
        for group in range(groups):
            members = [j for j in range(group * kept // groups, kept) if j * groups // kept == group]
            filled = [j for j in members if p[j]]
            for j in filled:
                q[j] = sum(counts[k] for k in members) / len(filled)
        n, m = sum(p), sum(q)
        impossible = any(pj and not qj for pj, qj in zip(p, q, strict=True))
        result[kept] = (
            math.inf
            if impossible
            else sum(pj / n * math.log((pj / n) / (qj / m)) for pj, qj in zip(p, q, strict=True) if pj)
        )
    return result


@pytest.mark.parametrize("largest_code", [7, 31, 127])
@pytest.mark.parametrize("seed", range(3))
def test_kl_is_the_least_divergence(largest_code: int, seed: int) -> None:
    """On sparse histograms with gaps, of fewer bins so that loops take no time."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(400, generator=generator) ** 2 * 12
    one = Histogram()
    one.width, one.largest = 1.0, float(values.max())
    one.counts = torch.bincount(values.long().clamp(max=255), minlength=BINS)
    one.largest = float(one.counts.nonzero().max()) + 1
    divergences = naive_divergences(one, largest_code)
    if not divergences:
        pytest.fail("no candidates: the test would show nothing")
    chosen = range_from_histogram(one, "kl", largest_code)
    assert divergences[int(chosen)] == pytest.approx(min(divergences.values()), abs=1e-12)
    assert max(divergences.values()) > 10 * min(divergences.values())


def test_kl_keeps_a_uniform_distribution_whole() -> None:
    values = DISTRIBUTIONS["uniform"]()
    assert range_from_histogram(histogram_of(values), "kl", 127) > 0.98 * float(values.max())


def test_kl_and_mse_clip_an_outlier_that_max_keeps() -> None:
    one = histogram_of(DISTRIBUTIONS["one outlier"]())
    chosen = {method: range_from_histogram(one, method, 127) for method in METHODS}
    assert chosen["max"] == 60
    assert 2 < chosen["kl"] < 8
    assert chosen["kl"] < chosen["mse"] < 50


@pytest.mark.parametrize("method", ["mse", "kl"])
@pytest.mark.parametrize("name", ["normal", "exponential", "heavy tail"])
def test_fewer_bits_clip_more(method: str, name: str) -> None:
    one = histogram_of(DISTRIBUTIONS[name]())
    ranges = [range_from_histogram(one, method, levels(bits)) for bits in BITS]
    assert ranges[0] < min(ranges[1:])
    assert max(ranges) <= one.largest


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [-3.0, 1e-42, 3e38])
def test_a_single_value_is_its_own_range(method: str, value: float) -> None:
    t = range_from_histogram(histogram_of(torch.full((5,), value)), method, 127)
    assert t == pytest.approx(abs(value), rel=0.04)
    assert t > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [0, 4])
def test_nothing_but_zeros_has_no_range(method: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"all {count} values are 0"):
        range_from_histogram(histogram_of(torch.zeros(count)), method, 127)


def test_mistakes_of_the_caller() -> None:
    one = histogram_of(torch.ones(1))
    with pytest.raises(ValueError, match="'entropy': one of mse, kl, max"):
        range_from_histogram(one, "entropy", 127)
    with pytest.raises(ValueError, match="no error of 0 values"):
        expected_error(Histogram(), 1.0, 127)
    with pytest.raises(ValueError, match="range of 0"):
        expected_error(one, 0.0, 127)
