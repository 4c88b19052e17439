"""Every parser of the command line against a second, plainer reading of the same grammar; and Request's own checks."""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exporter.errors import UsageError
from exporter.precisions import PRECISIONS
from exporter.quantization import calibration, layerwise
from exporter.request import (
    EFFORTS,
    LARGEST_BATCH,
    LARGEST_SIZE,
    PRECISION_NAMES,
    WEIGHTS,
    Request,
    batch_from_text,
    cards_from_text,
    features_from_text,
    floats_from_text,
    size_text,
    sizes_from_text,
    strides_from_text,
)
from exporter.variants import VARIANTS

bounded = settings(max_examples=300, deadline=None)
DIGITS = "0123456789"
# Text near the grammar of all parsers, so that a good part of it is valid by chance, and text of any kind.
pieces = [*"0123458x:,.;-+ _eEsmSM\n\t", "\u0663", "²", "\u2003", "inf", "nan", "2,2", "sm86", "1:8", "0.5"]
near = st.lists(st.sampled_from(pieces), max_size=10).map("".join)
anything = near | st.text(max_size=12)


def whole_number(text):
    """The value of 1 to 9 ASCII digits, or None."""
    return int(text) if 1 <= len(text) <= 9 and all(character in DIGITS for character in text) else None


def numbers(text, separator, lengths):
    values = [whole_number(part.strip()) for part in text.split(separator)]
    return None if None in values or len(values) not in lengths else tuple(values)


def size_of(text):
    values = [whole_number(part) for part in text.split("x")]
    return None if None in values or len(values) > 2 else (values[0], values[-1])


def sizes_of(text):
    sizes = [size_of(part) for part in text.split(":")]
    if None in sizes or len(sizes) not in (1, 3):
        return None
    return (sizes[0], None) if len(sizes) == 1 else (sizes[1], (sizes[0], sizes[2]))


def batch_of(text):
    values = numbers(text, ":", (1, 3))
    return values if values is None else (values[0], values[len(values) // 2], values[-1])


def strides_of(text):
    return numbers(text, ",", (5,))


def features_of(text):
    return numbers(text, ",", range(1, 99))


def cards_of(text):
    cards = set()
    for part in text.lower().split(","):
        digits = part.strip().removeprefix("sm")
        digits = digits.removeprefix("_") if digits != part.strip() else digits
        if len(digits) not in (2, 3) or whole_number(digits) is None:
            return None
        cards.add(int(digits))
    return tuple(sorted(cards))


def is_decimal(text):
    """An optional sign, digits with at most one point, and an optional exponent, all of ASCII."""
    mantissa, *exponent = text.lower().split("e")
    mantissa, exponent = (part.removeprefix(sign_of(part)) for part in (mantissa, *(exponent or ["0"])))
    digits = mantissa.replace(".", "", 1)
    return all(part and all(character in DIGITS for character in part) for part in (digits, exponent))


def sign_of(text):
    return text[:1] if text[:1] in ("+", "-") else ""


def floats_of(text):
    parts = [part.strip() for part in text.split(",")]
    if not all(part.lower().count("e") <= 1 and is_decimal(part) for part in parts):
        return None
    values = tuple(float(part) for part in parts)
    return values if all(-1e6 < value < 1e6 for value in values) else None


PARSERS = [
    ("--size", sizes_from_text, sizes_of),
    ("--features", features_from_text, features_of),
    ("--batch", batch_from_text, batch_of),
    ("--strides", strides_from_text, strides_of),
    ("--gpu", cards_from_text, cards_of),
    ("--mean", lambda text: floats_from_text("--mean", text), floats_of),
]


@pytest.mark.parametrize(("flag", "parse", "expected"), PARSERS, ids=[flag for flag, _, _ in PARSERS])
@bounded
@given(text=anything)
@example(text="1_0")
@example(text="0.4_85,0.456,0.406")
@example(text="\u0663")
@example(text="\u0660.\u0665")
@example(text="1e400")
@example(text="-nan")
@example(text="infinity")
@example(text="1:8:32\n")
@example(text="1:8:32")
@example(text="20x30:28:44x52")
@example(text="160:224")
@example(text="224\n")
@example(text="sm86 , SM_89")
@example(text="9" * 5000)
def test_text_is_read_by_its_grammar_or_is_a_usage_error(flag, parse, expected, text):
    wanted = expected(text)
    if wanted is None:
        with pytest.raises(UsageError, match=flag):
            parse(text)
    else:
        assert parse(text) == wanted


@bounded
@given(height=st.integers(0, 999_999_999), width=st.integers(0, 999_999_999))
def test_a_size_is_read_back(height, width):
    assert sizes_from_text(f"{height}x{width}") == ((height, width), None)
    assert sizes_from_text(str(width)) == ((width, width), None)


@bounded
@given(sides=st.lists(st.integers(1, LARGEST_SIZE), min_size=6, max_size=6))
def test_a_range_of_sizes_is_read_back_from_its_own_text(sides):
    heights, widths = sorted(sides[:3]), sorted(sides[3:])
    smallest, usual, largest = zip(heights, widths, strict=True)
    made = request(size=usual, size_range=(smallest, largest))
    assert sizes_from_text(size_text(made)) == (usual, (smallest, largest))
    assert made.sizes == made.profile == (smallest, usual, largest)
    fixed = request(size=usual)
    assert sizes_from_text(size_text(fixed)) == (usual, None)
    assert (fixed.sizes, fixed.profile) == ((usual,), None)


@bounded
@given(values=st.tuples(*[st.integers(0, 999_999_999)] * 3))
def test_a_batch_is_read_back(values):
    assert batch_from_text(":".join(map(str, values))) == values
    assert batch_from_text(str(values[1])) == (values[1],) * 3


@bounded
@given(values=st.tuples(*[st.integers(0, 9)] * 5))
def test_strides_are_read_back(values):
    assert strides_from_text(",".join(map(str, values))) == values


@bounded
@given(values=st.lists(st.integers(10, 999), min_size=1, max_size=6), style=st.sampled_from(["{}", "sm{}", "SM_{}"]))
def test_cards_are_read_back_in_order_and_once(values, style):
    assert cards_from_text(",".join(style.format(value) for value in values)) == tuple(sorted(set(values)))


@bounded
@given(values=st.lists(st.floats(-999_999, 999_999), min_size=1, max_size=5))
def test_numbers_are_read_back(values):
    assert floats_from_text("--std", ",".join(repr(value) for value in values)) == tuple(values)


@bounded
@given(values=st.lists(st.floats(), min_size=1, max_size=4).filter(lambda v: not all(abs(x) < 1e6 for x in v)))
def test_numbers_that_are_not_finite_or_huge_are_refused(values):
    with pytest.raises(UsageError, match="--std"):
        floats_from_text("--std", ",".join(repr(value) for value in values))


# Request


def request(**fields):
    return Request(path=pathlib.Path("model.pt"), out=pathlib.Path("model"), **fields)


positive = st.floats(1e-3, 1e3)
valid_fields = st.fixed_dictionaries(
    {"calibration": st.just(pathlib.Path("images"))},  # which int8 does not go without
    optional={
        "onnx": st.booleans(),
        "trt": st.permutations(PRECISION_NAMES).flatmap(
            lambda names: st.integers(0, len(names)).map(lambda count: tuple(names[:count]))
        ),
        "size": st.tuples(*[st.integers(1, LARGEST_SIZE)] * 2),
        "batch": st.lists(st.integers(1, LARGEST_BATCH), min_size=3, max_size=3).map(lambda v: tuple(sorted(v))),
        "strides": st.none() | st.tuples(*[st.sampled_from([1, 2])] * 5),
        "eps": st.none() | st.floats(1e-12, 0.5),
        "arch": st.none() | st.sampled_from([variant.name for variant in VARIANTS]),
        "mean": st.none() | st.tuples(*[st.floats(-1e3, 1e3)] * 3),
        "std": st.none() | st.tuples(*[positive] * 3),
        "features": st.sets(st.integers(0, 9)).map(lambda stages: tuple(sorted(stages))),
        "weights": st.sampled_from([None, *WEIGHTS]),
    },
)
INVALID = [
    ("size", st.tuples(st.integers(max_value=0) | st.integers(LARGEST_SIZE + 1), st.integers(1, LARGEST_SIZE))),
    ("size", st.tuples(st.integers(1, LARGEST_SIZE), st.integers(max_value=0) | st.integers(LARGEST_SIZE + 1))),
    ("batch", st.tuples(*[st.integers(1, 99)] * 3).filter(lambda v: tuple(sorted(v)) != v)),
    ("batch", st.tuples(st.integers(max_value=0), st.just(8), st.just(32))),
    ("batch", st.tuples(st.just(1), st.just(8), st.integers(LARGEST_BATCH + 1))),
    ("strides", st.tuples(*[st.integers(-3, 5)] * 5).filter(lambda v: set(v) - {1, 2})),
    ("eps", st.floats(max_value=0) | st.floats(min_value=1) | st.just(float("nan"))),
    ("mean", st.tuples(st.just(0.5), st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.just(0.5))),
    ("std", st.tuples(positive, st.floats(max_value=0) | st.sampled_from([float("nan"), float("inf")]), positive)),
    ("trt", st.tuples(st.text(max_size=6).filter(lambda name: name not in PRECISION_NAMES))),
    ("trt", st.sampled_from(PRECISION_NAMES).map(lambda name: (name, name))),
    ("arch", st.text("ABCDseg0123456789", max_size=6).filter(lambda n: n.lower() not in NAMES)),
    ("features", st.lists(st.integers(0, 9), min_size=2).map(tuple).filter(lambda v: tuple(sorted(set(v))) != v)),
    ("features", st.tuples(st.integers(max_value=-1), st.integers(0, 9))),
    ("weights", st.text(max_size=4).filter(lambda name: name not in WEIGHTS)),
]
NAMES = {variant.name.lower() for variant in VARIANTS}


@bounded
@given(fields=valid_fields)
def test_a_request_within_the_limits_is_accepted(fields):
    made = request(**fields)
    assert all(getattr(made, name) == value for name, value in fields.items())


@pytest.mark.parametrize(("field", "values"), INVALID, ids=[f"{name}{i}" for i, (name, _) in enumerate(INVALID)])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), fields=valid_fields)
def test_one_value_beyond_its_limits_is_a_usage_error(field, values, data, fields):
    value = data.draw(values)
    with pytest.raises(UsageError, match=f"--{field}"):
        request(**{**fields, field: value})


@pytest.mark.parametrize("std", [(1e-60, 1.0, 1.0), (1e-40, 1.0, 1.0)])
def test_a_deviation_that_float32_cannot_divide_by_is_a_usage_error(std):
    with pytest.raises(UsageError, match="--std"):
        request(std=std)


WRONG_RANGES = {
    "usual height below the smallest": ((30, 40), ((31, 40), (50, 50))),
    "usual width below the smallest": ((30, 40), ((30, 41), (50, 50))),
    "usual height above the largest": ((30, 40), ((10, 10), (29, 50))),
    "usual width above the largest": ((30, 40), ((10, 10), (50, 39))),
    "a smallest of nothing": ((30, 40), ((0, 10), (50, 50))),
    "a largest beyond the limit": ((30, 40), ((10, 10), (50, LARGEST_SIZE + 1))),
}


@pytest.mark.parametrize(("size", "size_range"), WRONG_RANGES.values(), ids=WRONG_RANGES)
def test_sizes_that_are_in_no_order_or_beyond_the_limits_are_a_usage_error(size, size_range):
    with pytest.raises(UsageError, match="--size"):
        request(size=size, size_range=size_range)


def test_features_have_no_labels():
    with pytest.raises(UsageError, match="--labels: needs a classifier's outputs; leave --features out"):
        request(features=(1,), labels=pathlib.Path("labels.npz"))
    assert request(labels=pathlib.Path("labels.npz")).labels is not None


def test_int8_needs_images():
    with pytest.raises(UsageError, match="--trt int8: needs --calib with images"):
        request(trt=("int8",))
    assert request(trt=("int8",), calibration=pathlib.Path("images")).trt == ("int8",)


INT8_VALUES = {
    "int8_effort": ("high", ("", "low", "HIGH")),
    "int8_report": (True, ()),
    "int8_budget": (35.0, (0.0, -1.0, 120.5, float("nan"), float("inf"))),
}


@pytest.mark.parametrize(("field", "right", "wrong"), [(name, *values) for name, values in INT8_VALUES.items()])
def test_what_int8_is_asked_for_has_limits_and_needs_int8(field, right, wrong):
    flag = f"--{field.replace('_', '-')}"
    int8 = {"trt": ("fp16", "int8"), "calibration": pathlib.Path("images")}
    assert getattr(request(**int8, **{field: right}), field) == right
    for value in wrong:
        with pytest.raises(UsageError, match=flag):
            request(**int8, **{field: value})
    with pytest.raises(UsageError, match=f"{flag}: no INT8 is asked for; add --trt int8"):
        request(trt=("fp16",), calibration=pathlib.Path("images"), **{field: right})


def test_the_efforts_of_the_command_line_are_those_there_are():
    assert EFFORTS == layerwise.EFFORTS == tuple(calibration.WEIGHT_SHARE)


@bounded
@given(sides=st.tuples(*[st.integers(1, LARGEST_SIZE)] * 2), resize=st.integers(-5, LARGEST_SIZE + 5))
def test_images_are_scaled_to_what_covers_the_size(sides, resize):
    if max(sides) <= resize <= LARGEST_SIZE:
        assert request(size=sides, resize=resize).resize == resize
    else:
        with pytest.raises(UsageError, match=f"--resize {resize}: is outside {max(sides)} to {LARGEST_SIZE} pixels"):
            request(size=sides, resize=resize)


def test_every_error_is_one_line():
    for fields in ({"size": (0, 5)}, {"batch": (3, 2, 1)}, {"arch": "a\nb"}, {"trt": ("x\ny",)}, {"eps": 2.0}):
        with pytest.raises(UsageError) as caught:
            request(**fields)
        assert len(str(caught.value).splitlines()) == 1


def test_the_precisions_of_the_command_line_are_those_there_are():
    assert tuple(precision.name for precision in PRECISIONS) == PRECISION_NAMES
