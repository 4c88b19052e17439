"""The wire format by hand, held against protobuf's own, and what is damaged or crafted."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, StringStringEntryProto, TensorProto

from engines import protobuf
from engines.protobuf import FIXED32, FIXED64, LENGTH, VARINT, Message, fields, prefix, varint

bounded = settings(max_examples=300, deadline=None)
DIMS, DATA_TYPE, FLOAT_DATA, INT64_DATA, NAME, RAW_DATA, DOUBLE_DATA = 1, 2, 4, 7, 8, 9, 10


def message(proto):
    return Message(memoryview(proto.SerializeToString()))


def encoded(value):
    """A varint by the book."""
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


# --- as protobuf has it


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**21, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_varint_is_read_to_its_end(value):
    data = memoryview(b"\xff" + encoded(value) + b"\x01")
    assert varint(data, 1) == (value, len(data) - 1)


def test_each_field_has_its_number_its_type_and_its_bytes():
    data = b"\x08\x96\x01" + b"\x15abcd" + b"\x19abcdefgh" + b"\x22\x03xyz"
    found = [(field.number, field.wire, bytes(field.whole), bytes(field.value)) for field in fields(memoryview(data))]
    assert found == [
        (1, VARINT, b"\x08\x96\x01", b"\x96\x01"),
        (2, FIXED32, b"\x15abcd", b"abcd"),
        (3, FIXED64, b"\x19abcdefgh", b"abcdefgh"),
        (4, LENGTH, b"\x22\x03xyz", b"xyz"),
    ]


@given(st.integers(1, 15), st.integers(0, 2**40))
@bounded
def test_a_prefix_is_read_back(number, size):
    content = prefix(number, size)
    assert content[0] == number << 3 | LENGTH
    assert varint(memoryview(content), 1) == (size, len(content))


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), max_size=5),
    st.text(max_size=9),
    st.binary(max_size=9),
)
@bounded
def test_a_message_of_protobufs_own_is_read_as_it_was_written(dims, numbers, floats, name, raw):
    found = message(
        TensorProto(dims=dims, int64_data=numbers, float_data=floats, double_data=floats, name=name, raw_data=raw)
    )
    assert found.integers(DIMS) == dims  # each a field of its own
    assert found.integers(INT64_DATA) == numbers  # packed
    assert bytes(found.fixed(FLOAT_DATA, FIXED32)) == struct.pack(f"<{len(floats)}f", *floats)
    assert bytes(found.fixed(DOUBLE_DATA, FIXED64)) == struct.pack(f"<{len(floats)}d", *floats)
    assert found.text(NAME) == name
    assert [bytes(block) for block in found.blocks(RAW_DATA)] == [raw]


def test_what_is_not_there_is_empty_or_the_default():
    found = message(TensorProto())
    assert (found.integers(1), found.integer(2), found.integer(2, 9), found.text(8), found.blocks(9)) == (
        [],
        0,
        9,
        "",
        [],
    )
    assert (found.messages(5), found.message(5).texts(1), bytes(found.fixed(4, FIXED32))) == ([], [], b"")
    assert 8 not in found
    assert 8 in message(TensorProto(name=""))


def test_pieces_of_one_message_are_merged_as_protobuf_merges_them():
    first = TensorProto(dims=[1], name="first", float_data=[1.0])
    second = TensorProto(dims=[2, 3], name="second", float_data=[2.0])
    pieces = [proto.SerializeToString() for proto in (first, second)]
    found = Message(*map(memoryview, pieces))
    merged = TensorProto.FromString(b"".join(pieces))
    assert found.integers(DIMS) == list(merged.dims) == [1, 2, 3]
    assert found.text(NAME) == merged.name == "second"
    assert bytes(found.fixed(FLOAT_DATA, FIXED32)) == struct.pack("<2f", *merged.float_data)


def test_messages_inside_a_message():
    entries = [StringStringEntryProto(key=key, value=key * 2) for key in "ab"]
    found = message(ModelProto(metadata_props=entries))
    assert [(entry.text(1), entry.text(2)) for entry in found.messages(14)] == [("a", "aa"), ("b", "bb")]


# --- damaged and crafted


@pytest.mark.parametrize(
    ("data", "said"),
    [
        pytest.param(b"\x80", "cut short", id="a tag without an end"),
        pytest.param(b"\x08", "cut short", id="no number"),
        pytest.param(b"\x08\xff\xff", "cut short", id="a number without an end"),
        pytest.param(b"\x08" + b"\xff" * 10 + b"\x01", "more than 64 bits", id="a number of 77 bits"),
        pytest.param(b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits", id="a number of 65 bits"),
        pytest.param(b"\x15abc", "cut short", id="three bytes of four"),
        pytest.param(b"\x19abcdefg", "cut short", id="seven bytes of eight"),
        pytest.param(b"\x22\x04abc", "cut short", id="a block without its end"),
        pytest.param(b"\x22" + encoded(2**62) + b"abc", "cut short", id="a block of four exabytes"),
        pytest.param(b"\x22" + encoded(2**64 - 1) + b"abc", "cut short", id="a length that would wrap around"),
        pytest.param(b"\x0b", "wire type 3 at byte 0", id="a group"),
        pytest.param(b"\x08\x01\x0e", "wire type 6 at byte 2", id="no wire type"),
    ],
)
def test_what_is_no_message_is_refused(data, said):
    with pytest.raises(ValueError, match=said):
        list(fields(memoryview(data)))


@pytest.mark.parametrize(
    ("read", "data"),
    [
        (lambda found: found.blocks(1), b"\x08\x01"),
        (lambda found: found.text(1), b"\x08\x01"),
        (lambda found: found.message(1), b"\x08\x01"),
        (lambda found: found.integers(1), b"\x0dabcd"),
        (lambda found: found.integers(1), b"\x0a\x02\x01\x80"),
        (lambda found: found.fixed(1, FIXED32), b"\x08\x01"),
        (lambda found: found.fixed(1, FIXED32), b"\x09abcdefgh"),
        (lambda found: found.text(1), b"\x0a\x01\xff"),
        (lambda found: found.message(1), b"\x0a\x01\xff"),
    ],
)
def test_a_field_of_another_type_than_it_must_have_is_refused(read, data):
    found = Message(memoryview(data))
    with pytest.raises(ValueError, match=r"field 1|cut short|utf-8"):
        read(found)


def test_more_fields_or_numbers_than_any_network_has_are_refused(monkeypatch):
    monkeypatch.setattr(protobuf, "MOST_FIELDS", 4)
    monkeypatch.setattr(protobuf, "MOST_NUMBERS", 4)
    four, packed = Message(memoryview(b"\x08\x01" * 4)), Message(memoryview(b"\x0a\x04\x01\x01\x01\x01"))
    assert four.integers(1) == packed.integers(1) == [1] * 4
    with pytest.raises(ValueError, match="more than 4 fields"):
        Message(memoryview(b"\x08\x01" * 5))
    with pytest.raises(ValueError, match="more than 4 numbers"):
        Message(memoryview(b"\x0a\x05\x01\x01\x01\x01\x01")).integers(1)


@given(st.binary(max_size=200))
@bounded
def test_any_bytes_are_fields_to_the_last_one_or_refused(data):
    try:
        found = list(fields(memoryview(data)))
    except ValueError:
        return
    assert b"".join(field.whole for field in found) == data


def test_a_crafted_length_allocates_nothing():
    crafted = memoryview(b"".join(b"\x4a" + encoded(2**bits) for bits in (31, 40, 62)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="cut short"):
            Message(crafted)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
