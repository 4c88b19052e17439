"""Sizes of images as text: read as they were written, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import UsageError
from engines.sizes import (
    LARGEST_SIZE,
    check_sizes,
    is_ordered,
    size_and_range_from_text,
    sizes_from_text,
    text_of_size,
    text_of_sizes,
)

SIZE = st.tuples(st.integers(0, 5000), st.integers(0, 5000))


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("160:224:320", ((160, 160), (224, 224), (320, 320))),
        ("160x96:224:320x640", ((160, 96), (224, 224), (320, 640))),
        ("224", ((224, 224),) * 3),
        ("28x32", ((28, 32),) * 3),
    ],
)
def test_three_sizes_or_one_are_read(text, sizes):
    assert sizes_from_text(text) == sizes


@pytest.mark.parametrize(
    "text", ["", ":", "1:2", "1:2:3:4", "1x:2:3", "x1", "1x2x3", "-1:2:3", "1.5", "1 :2:3", "٣", "9" * 10]
)
def test_what_is_no_size_is_a_usage_error(text):
    with pytest.raises(UsageError) as raised:
        sizes_from_text(text)
    assert str(raised.value) == f"--size: {text!r} is not MIN:OPT:MAX, each a number or HxW, as in 160:224:320"


@given(st.tuples(SIZE, SIZE, SIZE))
def test_what_is_written_is_read_again_if_it_grows(sizes):
    assert sizes_from_text(text_of_sizes(sizes)) == sizes
    assert size_and_range_from_text(text_of_size(sizes[0])) == (sizes[0], None)
    if is_ordered(sizes):
        assert size_and_range_from_text(text_of_sizes(sizes)) == (sizes[1], sizes)
    else:
        with pytest.raises(ValueError, match="is not a minimum, optimum and maximum"):
            size_and_range_from_text(text_of_sizes(sizes))


@pytest.mark.parametrize("text", ["", "224", "1x2:3x4", "1x2:3:4x5", "1x1:1x1:1x1:1x1", "1x2 ", "axb"])
def test_an_assumed_size_has_height_and_width(text):
    with pytest.raises(ValueError, match=r"is no size|values to unpack"):
        size_and_range_from_text(text)


ORDERED = ((1, 1), (1, 1), (LARGEST_SIZE, LARGEST_SIZE))


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        (ORDERED, True),
        (((2, 3),) * 3, True),
        (((0, 1), (1, 1), (2, 2)), False),
        (((1, 0), (1, 1), (2, 2)), False),
        (((2, 1), (1, 1), (2, 2)), False),
        (((1, 2), (1, 1), (2, 2)), False),
        (((1, 1), (3, 1), (2, 2)), False),
        (((1, 1), (1, 3), (2, 2)), False),
        (((1, 1), (1, 1), (LARGEST_SIZE + 1, 1)), False),
        (((1, 1), (1, 1), (1, LARGEST_SIZE + 1)), False),
    ],
)
def test_sizes_grow_from_1_to_the_largest(sizes, fits):
    if fits:
        check_sizes(sizes)
        return
    with pytest.raises(UsageError) as raised:
        check_sizes(sizes)
    assert str(raised.value) == (
        f"--size: {text_of_sizes(sizes)} is not MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= {LARGEST_SIZE}"
    )
