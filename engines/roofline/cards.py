"""What GPUs can do at most, by their makers' figures: ``cards.json`` beside this module.

A peak is that of dense numbers, without sparsity: of the tensor cores for fp16 and int8, of the ordinary cores for fp32
(TF32 is off), in additions and multiplications a second. fp16 is with sums in float32, which GeForce cards do at half
the rate of sums in half. A number that is not known is null there and None here; none is guessed.

``sources`` names the documents that state the figures. They were taken from copies of those, not from the documents
themselves; the tests hold each to the card's multiprocessors, their rate and its clock.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
from collections.abc import Mapping, Sequence

from engines.errors import InputRejected, UsageError, first_line
from engines.json_value import Malformed, Value, value_from_bytes

FILE_NAME = "cards.json"
SCHEMA = 1
PRECISIONS = ("fp32", "fp16", "int8")
TERA, GIGA = 10**12, 10**9


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        key: what people type, as in "l4".
        title: what people read.
        device_names: what NVML and CUDA call it.
        compute_capability: 89 for 8.9.
        operations_per_second: the peak by precision; None where it is not known.
        bytes_per_second: of its memory.
        sources: the documents that state it.
        notes: what must be known beside them; may be empty.
    """

    key: str
    title: str
    device_names: tuple[str, ...]
    compute_capability: int
    operations_per_second: Mapping[str, float | None]
    bytes_per_second: float
    sources: tuple[str, ...]
    notes: str


def cards_from_json(content: bytes | str, where: str = FILE_NAME) -> tuple[Card, ...]:
    """Reads cards; ``where`` names the file in errors.

    Raises:
        InputRejected: something is missing, of another type, not a possible number, or stands there twice.
    """
    try:
        root = value_from_bytes(content).fields("schema", "cards")
        if root["schema"].whole_number() != SCHEMA:
            raise root["schema"].wrong(f"{SCHEMA}, the only schema that this version reads")
        entries = root["cards"].entries()
        cards = tuple(_card(entry) for entry in entries)
        _check_unique("key", [(card.key,) for card in cards], entries)
        _check_unique("device_names", [card.device_names for card in cards], entries)
    except Malformed as error:
        raise InputRejected(f"{where}: {first_line(error)}; this file is damaged: install the package again") from error
    return cards


def _check_unique(field: str, names: Sequence[tuple[str, ...]], entries: Sequence[Value]) -> None:
    seen: set[str] = set()
    for several, entry in zip(names, entries, strict=True):
        if len(set(several)) < len(several) or not seen.isdisjoint(several):
            raise entry.field(field).wrong("names that no other card has")
        seen.update(several)


def _card(entry: Value) -> Card:
    fields = entry.fields(
        "key", "title", "device_names", "compute_capability", "tera_operations_per_second", "gigabytes_per_second",
        "sources", "notes",
    )  # fmt: skip
    names, sources = (tuple(value.text() for value in fields[name].entries()) for name in ("device_names", "sources"))
    if not names or not sources:
        raise fields["sources" if names else "device_names"].wrong("a list of one or more texts")
    peaks = fields["tera_operations_per_second"].fields(*PRECISIONS)
    return Card(
        key=fields["key"].text(),
        title=fields["title"].text(),
        device_names=names,
        compute_capability=fields["compute_capability"].whole_number(least=10),
        operations_per_second={name: _peak(peaks[name]) for name in PRECISIONS},
        bytes_per_second=fields["gigabytes_per_second"].number(above=0) * GIGA,
        sources=sources,
        notes="" if fields["notes"].value == "" else fields["notes"].text(),
    )


def _peak(value: Value) -> float | None:
    return None if value.value is None else value.number(above=0) * TERA


CARDS = cards_from_json(importlib.resources.files("engines.roofline").joinpath(FILE_NAME).read_bytes())


def card_from_key(key: str) -> Card:
    """The card that people mean by ``key``, whatever its case, spaces, dashes and underscores.

    Raises:
        UsageError: there is none; the message has the nearest and all keys.
    """
    by_name = {_plain(name): card for card in CARDS for name in (*card.device_names, card.title, card.key)}
    plain = _plain(key)
    if plain in by_name:
        return by_name[plain]
    near = difflib.get_close_matches(plain, by_name, n=1, cutoff=0.0)
    known = ", ".join(card.key for card in CARDS)
    raise UsageError(f"--gpu {key}: unknown; did you mean {by_name[near[0]].key}? Known: {known}")


def card_of_device(name: str) -> Card | None:
    """The card that NVML or CUDA calls ``name``, exactly; None for one that is not in the file."""
    return next((card for card in CARDS if name in card.device_names), None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
