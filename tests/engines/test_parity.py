"""The figures of a comparison against numbers worked out by hand, and every wrong output that a gate must stop."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.parity import Comparison, Gate, compare, margins

REFERENCE = np.array([[4.0, 1.0, -8.0], [0.0, 2.0, 1.0]])
TIGHT = Gate(max_relative_error=1e-3, top1=True)
LOOSE = Gate(max_relative_error=10.0, top1=True)


def outputs(rows=4, classes=10, seed=0):
    """Logits without any near ties: the rows are shuffles of well separated values."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(np.linspace(-3, 3, classes)) for _ in range(rows)])


def test_every_figure_is_the_one_worked_out_by_hand():
    """Errors 1, 0, 2 and 0, 0, 3; 86 is the sum of the squares of the reference and 14 that of the errors."""
    candidate = np.array([[5.0, 1.0, -6.0], [0.0, 2.0, 4.0]])
    comparison = compare(REFERENCE, candidate)
    assert dataclasses.asdict(comparison) == {
        "relative_error": 3 / 8,
        "max_abs_error": 3.0,
        "mean_abs_error": 1.0,
        "sqnr_db": pytest.approx(10 * math.log10(86 / 14), abs=1e-12),
        "cosine": pytest.approx((20 + 1 + 48 + 4 + 4) / math.sqrt(86 * (25 + 1 + 36 + 4 + 16)), abs=1e-12),
        "top1_agreement": 0.5,
        "flips": ({"row": 1, "margin": 1.0},),
        "decided_flips": 0,  # row 1 turns over, but its margin of 1 is less than its error of 3
        "non_finite": 0,
        "rows": 2,
    }


def test_equal_outputs_have_no_error_and_pass_a_gate_of_zero():
    comparison = compare(REFERENCE, REFERENCE.copy())
    assert comparison == Comparison(0.0, 0.0, 0.0, math.inf, 1.0, 1.0, (), 0, 0, 2)
    assert Gate(max_relative_error=0.0, top1=True).failure(comparison) is None


@pytest.mark.parametrize(("error", "passes"), [(0.9e-3, True), (1.0e-3, True), (1.1e-3, False)])
def test_the_gate_is_the_largest_error_that_passes(error, passes):
    comparison = dataclasses.replace(compare(REFERENCE, REFERENCE), relative_error=error)
    failure = TIGHT.failure(comparison)
    assert (failure is None) == passes
    if not passes:
        assert failure == "relative error 1.10e-03 exceeds 1.0e-03"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["reference", "candidate", "both"])
@pytest.mark.parametrize("gate", [TIGHT, LOOSE, Gate(math.inf, top1=False)], ids=["tight", "loose", "none at all"])
def test_a_value_that_is_not_finite_passes_no_gate(value, where, gate):
    reference, candidate = REFERENCE.copy(), REFERENCE.copy()
    for name, array in (("reference", reference), ("candidate", candidate)):
        if where in (name, "both"):
            array[0, 1] = value
    comparison = compare(reference, candidate)
    assert comparison.non_finite == (2 if where == "both" else 1)
    assert gate.failure(comparison) == f"{comparison.non_finite} outputs are NaN or infinite"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_all_not_finite_are_counted(value):
    everywhere = np.full_like(REFERENCE, value)
    assert compare(REFERENCE, everywhere).non_finite == 6
    assert compare(everywhere, everywhere).non_finite == 12
    assert LOOSE.failure(compare(everywhere, everywhere)) == "12 outputs are NaN or infinite"


def test_a_relative_error_that_is_nan_does_not_pass():
    comparison = dataclasses.replace(compare(REFERENCE, REFERENCE), relative_error=math.nan)
    assert "relative error nan exceeds" in LOOSE.failure(comparison)


@pytest.mark.parametrize(
    "planted",
    [
        pytest.param(np.zeros_like, id="all zero"),
        pytest.param(lambda y: np.full_like(y, 3.0), id="constant"),
        pytest.param(lambda y: np.broadcast_to(y.mean(axis=0), y.shape), id="the same row always"),
        pytest.param(lambda y: y[:, [1, 0, *range(2, 10)]], id="two classes swapped"),
        pytest.param(lambda y: y[::-1], id="batch the other way round"),
        pytest.param(lambda y: y[[1, 0, 2, 3]], id="two rows swapped"),
        pytest.param(lambda y: np.roll(y, 1, axis=0), id="batch shifted"),
        pytest.param(lambda y: np.roll(y, 1, axis=1), id="classes shifted"),
        pytest.param(lambda y: -y, id="sign"),
        pytest.param(lambda y: 1.01 * y, id="scaled by a hundredth"),
        pytest.param(lambda y: y + 0.01, id="shifted by a hundredth"),
        pytest.param(lambda y: np.where(np.arange(4)[:, None] == 3, 0, y), id="last row not written"),
    ],
)
def test_wrong_outputs_do_not_pass(planted):
    reference = outputs()
    right, wrong = compare(reference, reference + 1e-4), compare(reference, np.array(planted(reference)))
    assert TIGHT.failure(right) is None
    assert TIGHT.failure(wrong).startswith("relative error")
    assert wrong.sqnr_db < 50 < right.sqnr_db


def test_a_top1_that_differs_beyond_the_errors_reach_fails_by_itself():
    """Row 0 has a margin of 1 and an error of 0.75: what the error did could not have turned a true copy over."""
    reference = np.array([[2.0, 1.0, 0.0], [100.0, 0.0, 0.0]])
    candidate = np.array([[1.25, 1.75, 0.0], [100.0, 0.0, 0.0]])
    comparison = compare(reference, candidate)
    assert (comparison.relative_error, comparison.top1_agreement, comparison.decided_flips) == (0.0075, 0.5, 1)
    gate = Gate(max_relative_error=0.01, top1=True)
    assert gate.failure(comparison) == "top-1 differs in 1 of 2 rows beyond the error's reach"
    assert dataclasses.replace(gate, top1=False).failure(comparison) is None


def test_a_top1_that_differs_within_the_errors_reach_is_no_failure():
    reference = np.array([[2.0, 1.9, 0.0], [100.0, 0.0, 0.0]])
    candidate = np.array([[1.9, 2.0, 0.0], [100.0, 0.0, 0.0]])
    comparison = compare(reference, candidate)
    assert (comparison.top1_agreement, comparison.decided_flips) == (0.5, 0)
    assert Gate(max_relative_error=0.01, top1=True).failure(comparison) is None


def test_every_row_is_judged_by_its_own_error():
    """The large error of row 1 does not excuse row 0."""
    reference = np.array([[2.0, 1.0, 0.0], [100.0, 0.0, 0.0]])
    candidate = np.array([[1.25, 1.75, 0.0], [130.0, 0.0, 0.0]])
    assert compare(reference, candidate).decided_flips == 1


def test_a_reference_of_zeros_has_an_infinite_error_unless_it_is_met():
    zeros = np.zeros((2, 3))
    assert compare(zeros, zeros).relative_error == 0
    assert compare(zeros, zeros + 1e-9).relative_error == math.inf
    assert LOOSE.failure(compare(zeros, zeros + 1e-9)) is not None


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        ((2, 3), (3, 2)),
        ((2, 3), (1, 3)),
        ((2, 3), (2, 4)),
        ((2, 3), (6,)),
        ((3,), (3,)),
        ((0, 3), (0, 3)),
        ((2, 3, 1),) * 2,
    ],
)
def test_shapes_that_differ_are_not_broadcast(reference, candidate):
    with pytest.raises(ValueError, match="outputs cannot be compared"):
        compare(np.ones(reference), np.ones(candidate))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_arithmetic_is_in_float64_whatever_comes_in(dtype):
    """In float16 the squares of 300 would overflow and 1e-4 would not be seen beside 300."""
    reference = np.array([[300.0, 1.0]])
    comparison = compare(reference, np.array([[300.0, 0.5]], dtype))
    assert comparison.max_abs_error == 0.5
    assert comparison.sqnr_db == pytest.approx(10 * math.log10(90001 / 0.25), abs=1e-9)


def test_margins_are_the_two_largest_apart():
    assert margins(np.array([[1.0, 5.0, 3.0], [-1.0, -4.0, -1.5], [2.0, 2.0, 0.0]])).tolist() == [2.0, 0.5, 0.0]
    assert margins(np.array([[1.0], [2.0]])).tolist() == [np.inf, np.inf]


def test_one_class_alone_never_turns_over():
    comparison = compare(np.array([[1.0], [2.0]]), np.array([[-1.0], [2.0]]))
    assert (comparison.decided_flips, comparison.relative_error) == (0, 1.0)


VALUES = st.floats(-1e3, 1e3, allow_subnormal=False)


@st.composite
def pairs(draw):
    rows, classes = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    flat = st.lists(VALUES, min_size=rows * classes, max_size=rows * classes)
    return tuple(np.array(draw(flat)).reshape(rows, classes) for _ in range(2))


@settings(max_examples=200, deadline=None)
@given(pair=pairs(), exponent=st.integers(-20, 20))
def test_the_relative_error_does_not_depend_on_the_unit(pair, exponent):
    reference, candidate = pair
    scale = 2.0**exponent
    one, other = compare(reference, candidate), compare(reference * scale, candidate * scale)
    assert other.relative_error == pytest.approx(one.relative_error, rel=1e-12)
    assert other.max_abs_error == pytest.approx(one.max_abs_error * scale, rel=1e-12)
    assert (other.top1_agreement, other.decided_flips) == (one.top1_agreement, one.decided_flips)


@settings(max_examples=200, deadline=None)
@given(pair=pairs(), factor=st.floats(0.0, 8.0))
def test_the_relative_error_grows_with_the_difference(pair, factor):
    reference, noise = pair
    once = compare(reference, reference + noise).max_abs_error
    assert compare(reference, reference + factor * noise).max_abs_error == pytest.approx(factor * once, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(pair=pairs(), random=st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter_as_long_as_it_is_the_same(pair, random):
    reference, candidate = pair
    order = random.sample(range(len(reference)), len(reference))
    one, other = compare(reference, candidate), compare(reference[order], candidate[order])
    figures, others = (
        {**dataclasses.asdict(found), "flips": sorted(flip.margin for flip in found.flips)} for found in (one, other)
    )
    assert figures.pop("flips") == others.pop("flips")
    assert figures == pytest.approx(others, rel=1e-12, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(pair=pairs())
def test_a_decided_flip_needs_both_a_flip_and_a_margin(pair):
    reference, candidate = pair
    comparison = compare(reference, candidate)
    flips = 0
    for r, y in zip(reference.tolist(), candidate.tolist(), strict=True):
        margin = math.inf if len(r) == 1 else sorted(r)[-1] - sorted(r)[-2]
        turned = r.index(max(r)) != y.index(max(y))
        flips += turned and margin > max(abs(a - b) for a, b in zip(r, y, strict=True))
    assert comparison.decided_flips == flips
