"""The wire format of protocol buffers: as much as reading and writing an ONNX file by hand takes.

A message is a list of fields, each a tag (number and wire type) and a value. A value is a varint (seven bits a byte,
the lowest first), four or eight bytes, or a length and so many bytes, which are text, a message or packed numbers.
Reading copies nothing, and every length is held against what is there before it is believed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
MOST_FIELDS = 1 << 16
MOST_NUMBERS = 1 << 24
"""Of one message, and of one list in it: far more than any network has, and few enough for any machine."""

_FIXED_BYTES = {FIXED32: 4, FIXED64: 8}


class Field(NamedTuple):
    """One field: ``whole`` are its bytes with the tag, ``value`` those of its value, without a length."""

    number: int
    wire: int
    whole: memoryview
    value: memoryview


def fields(data: memoryview) -> Iterator[Field]:
    """The fields of a serialized message, in order.

    Raises:
        ValueError: the bytes are no message, or not a whole one.
    """
    position = 0
    while position < len(data):
        start = position
        tag, position = varint(data, position)
        wire = tag & 7
        if wire == VARINT:
            _, end = varint(data, position)
        elif wire == LENGTH:
            size, position = varint(data, position)
            end = position + size
        elif wire in _FIXED_BYTES:
            end = position + _FIXED_BYTES[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {start}")
        if end > len(data):
            raise ValueError("it is cut short")
        yield Field(tag >> 3, wire, data[start:end], data[position:end])
        position = end


def varint(data: memoryview, position: int) -> tuple[int, int]:
    """The number at ``position``, from 0 to 2^64 - 1, and where it ends.

    Raises:
        ValueError: the number does not end, or has more than 64 bits.
    """
    value = shift = 0
    while position < len(data):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            if value >> 64:
                break
            return value, position
        if shift > 63:
            break
    else:
        raise ValueError("it is cut short")
    raise ValueError("a number has more than 64 bits")


def prefix(number: int, size: int) -> bytes:
    """Tag and length of a field of ``size`` bytes, to be written before them."""
    encoded, value = bytearray([number << 3 | LENGTH]), size
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


class Message:
    """A message's fields by number. Several ``pieces`` of one message count as one, as the format says.

    Every method raises ``ValueError`` where a field has another wire type than it must have.
    """

    def __init__(self, *pieces: memoryview) -> None:
        self._fields: dict[int, list[Field]] = {}
        found = itertools.chain.from_iterable(fields(piece) for piece in pieces)
        for count, field in enumerate(found):
            if count == MOST_FIELDS:
                raise ValueError(f"a message has more than {MOST_FIELDS} fields")
            self._fields.setdefault(field.number, []).append(field)

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def blocks(self, number: int) -> list[memoryview]:
        """The bytes of each field ``number``."""
        found = self._fields.get(number, [])
        if any(field.wire != LENGTH for field in found):
            raise ValueError(f"field {number} is a number where bytes belong")
        return [field.value for field in found]

    def message(self, number: int) -> Message:
        """The message that field ``number`` is; an empty one where there is none."""
        return Message(*self.blocks(number))

    def messages(self, number: int) -> list[Message]:
        """One message for each field ``number``."""
        return [Message(block) for block in self.blocks(number)]

    def texts(self, number: int) -> list[str]:
        """The text of each field ``number``."""
        return [str(block, "utf-8") for block in self.blocks(number)]

    def text(self, number: int) -> str:
        """The text of field ``number``, the last one where there are several; empty where there is none."""
        return (self.texts(number) or [""])[-1]

    def integers(self, number: int) -> list[int]:
        """The numbers of each field ``number``, packed or not, from -2^63 to 2^63 - 1."""
        found = []
        for field in self._fields.get(number, []):
            if field.wire not in (VARINT, LENGTH):
                raise ValueError(f"field {number} is no whole number")
            position = 0
            while position < len(field.value):
                value, position = varint(field.value, position)
                found.append(value - (value >> 63 << 64))
                if len(found) > MOST_NUMBERS:
                    raise ValueError(f"field {number} has more than {MOST_NUMBERS} numbers")
        return found

    def integer(self, number: int, default: int = 0) -> int:
        """The number of field ``number``, the last one where there are several."""
        return (self.integers(number) or [default])[-1]

    def fixed(self, number: int, wire: int) -> memoryview:
        """The bytes of all the four- or eight-byte numbers of field ``number``, packed or not, in order."""
        found = self._fields.get(number, [])
        if any(field.wire not in (wire, LENGTH) for field in found):
            raise ValueError(f"field {number} has numbers of another size")
        if len(found) == 1:
            return found[0].value
        return memoryview(b"".join(field.value for field in found))
