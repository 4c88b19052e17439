"""JSON that came from outside, taken apart one value at a time; whatever is wrong is said with the value's place.

    value = value_from_bytes(b'{"size": [28, 28]}')
    value.fields("size")["size"].whole_numbers(least=1)   # (28, 28), or Malformed: "size[1]: expected ..."

Stricter than ``json.loads``: a name that stands twice in one object, NaN and infinity are refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import unicodedata
from collections.abc import Sequence
from typing import Any


class Malformed(ValueError):
    """One line without an end mark: the place in the file, what belongs there, what is there."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A value and its ``place``, as in ``profile.input[0]``; empty for the whole file. Methods raise ``Malformed``."""

    value: Any
    place: str = ""

    def wrong(self, expected: str) -> Malformed:
        """The error that this value is not what is ``expected``."""
        try:
            shown = json.dumps(self.value)
        except RecursionError:
            shown = "something nested too deeply"
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return Malformed(f"{self.place or 'the file'}: expected {expected}, found {shown}")

    def items(self) -> dict[str, Value]:
        """An object's values by name."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return {name: Value(inner, self._inner(name)) for name, inner in self.value.items()}

    def fields(self, *names: str) -> dict[str, Value]:
        """An object with exactly these names."""
        items = self.items()
        for name in names:
            if name not in items:
                raise Malformed(f"{self._inner(name)}: missing")
        for name, item in items.items():
            if name not in names:
                raise Malformed(f"{item.place}: not a name that belongs here")
        return items

    def field(self, name: str) -> Value:
        """One value of an object that may hold others."""
        items = self.items()
        if name not in items:
            raise Malformed(f"{self._inner(name)}: missing")
        return items[name]

    def _inner(self, name: str) -> str:
        shown = name if _is_plain(name) else json.dumps(name)
        return f"{self.place}.{shown}" if self.place else shown

    def entries(self, length: int | None = None) -> list[Value]:
        """A list, of ``length`` values where that is given."""
        if not isinstance(self.value, list) or length not in (None, len(self.value)):
            raise self.wrong("a list" if length is None else f"a list of {length}")
        return [Value(inner, f"{self.place}[{index}]") for index, inner in enumerate(self.value)]

    def text(self) -> str:
        """A text that is not empty, without control characters."""
        if not isinstance(self.value, str) or not self.value or not _is_plain(self.value):
            raise self.wrong("a text")
        return self.value

    def one_of(self, choices: Sequence[str]) -> str:
        """One of these texts."""
        if self.value not in choices:
            raise self.wrong(f"one of {', '.join(choices)}")
        return self.text()

    def file_name(self) -> str:
        """A plain file name, which leads into no other directory."""
        name = self.text()
        if name in (".", "..") or "/" in name or "\\" in name:
            raise self.wrong("a plain file name")
        return name

    def sha256(self) -> str:
        """64 hexadecimal digits, in lower case."""
        digest = self.text()
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise self.wrong("64 hexadecimal digits")
        return digest

    def boolean(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def whole_number(self, least: int = 0) -> int:
        """An integer of at least ``least`` that fits 32 bits."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not least <= self.value < 2**31:
            raise self.wrong(f"a whole number of at least {least}")
        return self.value

    def whole_numbers(self, length: int | None = None, least: int = 0) -> tuple[int, ...]:
        """A list of integers."""
        return tuple(value.whole_number(least) for value in self.entries(length))

    def number(self, above: float | None = None) -> float:
        """A finite number, larger than ``above`` where that is given."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.wrong("a number")
        try:
            number = float(self.value)
        except OverflowError:
            raise self.wrong("a finite number") from None
        if not math.isfinite(number) or (above is not None and not number > above):
            raise self.wrong("a finite number" if above is None else f"a number above {above:g}")
        return number

    def numbers(self, length: int | None = None, above: float | None = None) -> tuple[float, ...]:
        """A list of finite numbers."""
        return tuple(value.number(above) for value in self.entries(length))


def _is_plain(text: str) -> bool:
    """No control characters, and none that no encoding has."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def value_from_bytes(content: bytes | str) -> Value:
    """Parses JSON in UTF-8.

    Raises:
        Malformed: it is not JSON, or says the same name twice.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        return Value(json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant))
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise Malformed(f"{json.dumps(name)} stands there twice")
        fields[name] = value
    return fields


def _no_constant(name: str) -> Any:
    raise Malformed(f"{name} is no JSON number")
