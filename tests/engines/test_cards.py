"""Peaks of cards: those of their multiprocessors, clocks and memories; damaged files and unknown names are refused."""

from __future__ import annotations

import importlib.resources
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import InputRejected, UsageError
from engines.roofline.cards import CARDS, FILE_NAME, GIGA, TERA, card_from_key, card_of_device, cards_from_json

CONTENT = importlib.resources.files("engines.roofline").joinpath(FILE_NAME).read_text(encoding="utf-8")
BY_KEY = {card.key: card for card in CARDS}
EACH = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.key)

# Multiply-accumulates of a multiprocessor in a clock: ordinary cores in fp32, tensor cores in fp16 with sums in
# float32, and in int8. GeForce cards sum in float32 at half the rate of the professional cards of the same chip.
TURING, PROFESSIONAL, GEFORCE = (64, 512, 1024), (128, 512, 1024), (128, 256, 1024)
DATA_CENTRE, HOPPER, PASCAL = (64, 1024, 2048), (128, 2048, 4096), (128, 128, 512)

MADE_OF = {
    "t4": (TURING, 40, 1.59, 256, 10.0),
    "l4": (PROFESSIONAL, 58, 2.04, 192, 12.5),
    "l40s": (PROFESSIONAL, 142, 2.52, 384, 18.0),
    "a10": (PROFESSIONAL, 72, 1.695, 384, 12.5),
    "a30": (DATA_CENTRE, 56, 1.44, 3072, 2.43),
    "a100": (DATA_CENTRE, 108, 1.41, 5120, 3.186),
    "a100-40gb": (DATA_CENTRE, 108, 1.41, 5120, 2.43),
    "a100-pcie": (DATA_CENTRE, 108, 1.41, 5120, 3.024),
    "a100-pcie-40gb": (DATA_CENTRE, 108, 1.41, 5120, 2.43),
    "h100": (HOPPER, 132, 1.83, 5120, 5.234),
    "h100-pcie": (HOPPER, 114, 1.62, 5120, 3.125),
    "rtx3060": (GEFORCE, 28, 1.777, 192, 15.0),
    "rtx3090": (GEFORCE, 82, 1.695, 384, 19.5),
    "rtx4070": (GEFORCE, 46, 2.475, 192, 21.0),
    "rtx4090": (GEFORCE, 128, 2.52, 384, 21.0),
    "rtx5090": (GEFORCE, 170, 2.407, 512, 28.0),
    "rtx6000ada": (PROFESSIONAL, 142, 2.505, 384, 20.0),
    "rtxa6000": (PROFESSIONAL, 84, 1.8, 384, 16.0),
    "gtx1080ti": (PASCAL, 28, 1.582, 352, 11.0),
}
"""Rates, multiprocessors, boost clock in GHz, width of the memory's bus in bits, and GHz of its data."""

FP32_CLOCK = {"h100": 1.98, "h100-pcie": 1.755}
"""The H100's ordinary cores have a clock of their own."""


@EACH
def test_peaks_are_those_of_the_multiprocessors_at_their_boost_clock(card):
    rates, processors, clock, _, _ = MADE_OF[card.key]
    for name, rate in zip(("fp32", "fp16", "int8"), rates, strict=True):
        ghz = FP32_CLOCK.get(card.key, clock) if name == "fp32" else clock
        assert card.operations_per_second[name] == pytest.approx(2e9 * rate * processors * ghz, rel=0.006)


@EACH
def test_bandwidths_are_those_of_the_memory(card):
    *_, bits, ghz = MADE_OF[card.key]
    assert card.bytes_per_second == pytest.approx(bits / 8 * ghz * GIGA, rel=0.002)


def test_every_card_is_made_of_something():
    assert list(MADE_OF) == list(BY_KEY)
    assert {"t4", "l4", "l40s", "a10", "a30", "a100", "h100", "rtx4090"} <= set(BY_KEY)


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_a_peak_with_sparsity_would_be_seen(name):
    rates, processors, clock, _, _ = MADE_OF["l4"]
    rate = dict(zip(("fp32", "fp16", "int8"), rates, strict=True))[name]
    assert 2 * BY_KEY["l4"].operations_per_second[name] != pytest.approx(2e9 * rate * processors * clock, rel=0.006)


@EACH
def test_a_card_has_sources_and_a_name_that_its_maker_gives_it(card):
    assert all(source.startswith("NVIDIA, ") for source in card.sources)
    assert card.device_names[0].startswith(("NVIDIA ", "Tesla T4"))
    assert 60 <= card.compute_capability <= 121
    assert re.fullmatch("[a-z0-9-]+", card.key)


def test_figures_are_in_operations_and_bytes_a_second():
    assert BY_KEY["l4"].operations_per_second == {"fp32": 30.3 * TERA, "fp16": 121 * TERA, "int8": 242.5 * TERA}
    assert BY_KEY["l4"].bytes_per_second == 300 * GIGA


# --- names


@pytest.mark.parametrize(("written", "key"), [
    ("l4", "l4"), ("L4", "l4"), ("NVIDIA L4", "l4"), (" a100 ", "a100"), ("RTX-4090", "rtx4090"), ("tesla t4", "t4"),
    ("NVIDIA GeForce RTX 3090", "rtx3090"), ("a100_pcie_40gb", "a100-pcie-40gb"), ("H100 PCIe", "h100-pcie"),
])  # fmt: skip
def test_a_card_by_any_usual_spelling(written, key):
    assert card_from_key(written).key == key


@pytest.mark.parametrize(
    ("written", "near"), [("rtx4080", "rtx4090"), ("l40", "l40s"), ("a1000", "a100"), ("gtx1080", "gtx1080ti")]
)
def test_an_unknown_card_is_told_the_nearest_and_all(written, near):
    with pytest.raises(UsageError) as error:
        card_from_key(written)
    assert str(error.value) == f"--gpu {written}: unknown; did you mean {near}? Known: {', '.join(BY_KEY)}"


def test_no_spelling_means_two_cards():
    for card in CARDS:
        for name in (card.key, card.title, *card.device_names):
            assert card_from_key(name) == card


@EACH
def test_a_device_is_known_by_its_exact_name(card):
    for name in card.device_names:
        assert card_of_device(name) == card
        assert card_of_device(name.upper() + "!") is None


@pytest.mark.parametrize(
    "name",
    ["", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3060 Ti", "NVIDIA H100 NVL", "l4"],
)
def test_a_card_that_is_nearly_known_is_not(name):
    assert card_of_device(name) is None


# --- the file


def test_the_file_is_read_as_it_stands():
    assert cards_from_json(CONTENT) == CARDS


def changed(path, value):
    root = json.loads(CONTENT)
    *way, last = path
    inner = root
    for step in way:
        inner = inner[step]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(root)


FIRST = ("cards", 0)
PEAKS = (*FIRST, "tera_operations_per_second")
DAMAGED = {
    "no JSON": (CONTENT[:-9], "not JSON"),
    "another schema": (changed(["schema"], 2), "schema: expected 1, the only schema that this version reads, found 2"),
    "a schema that is true": (CONTENT.replace('"schema": 1', '"schema": true'), "schema: expected a whole number"),
    "no cards": (changed(["cards"], {}), r"cards: expected a list"),
    "more than there is": (changed(["more"], 1), "more: not a name that belongs here"),
    "no key": (changed([*FIRST, "key"], ...), r"cards\[0\]\.key: missing"),
    "no bandwidth": (changed([*FIRST, "gigabytes_per_second"], ...), r"cards\[0\]\.gigabytes_per_second: missing"),
    "a bandwidth of null": (changed([*FIRST, "gigabytes_per_second"], None), "expected a number, found null"),
    "a bandwidth of 0": (changed([*FIRST, "gigabytes_per_second"], 0), "expected a number above 0, found 0"),
    "a negative peak": (changed([*PEAKS, "fp16"], -65), r"\.fp16: expected a number above 0, found -65"),
    "a peak as text": (changed([*PEAKS, "fp16"], "65"), r"\.fp16: expected a number"),
    "a peak that is infinite": (
        changed([*PEAKS, "fp16"], 0).replace('"fp16": 0', '"fp16": 1e999'),
        r"\.fp16: expected",
    ),
    "a precision too few": (changed([*PEAKS, "int8"], ...), r"\.int8: missing"),
    "a precision too many": (changed([*PEAKS, "fp8"], 1), r"\.fp8: not a name that belongs here"),
    "a capability of text": (changed([*FIRST, "compute_capability"], "7.5"), "compute_capability: expected a whole"),
    "no sources": (changed([*FIRST, "sources"], []), r"sources: expected a list of one or more texts"),
    "no names": (changed([*FIRST, "device_names"], []), r"device_names: expected a list of one or more texts"),
    "a key twice": (changed([*FIRST, "key"], "l4"), r"cards\[1\]\.key: expected names that no other card has"),
    "a name twice": (
        changed([*FIRST, "device_names"], ["NVIDIA L4"]),
        r"cards\[1\]\.device_names: expected names that no other card has",
    ),
    "a name twice in a card": (
        changed([*FIRST, "device_names"], ["x", "x"]),
        r"cards\[0\]\.device_names: expected names that no other card has",
    ),
    "notes of null": (changed([*FIRST, "notes"], None), r"notes: expected a text"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_with_the_place(kind):
    content, said = DAMAGED[kind]
    with pytest.raises(
        InputRejected, match=rf"^cards\.json: .*{said}.*; this file is damaged: install the package again$"
    ):
        cards_from_json(content)


def test_a_number_that_is_null_is_not_known():
    (card, *_) = cards_from_json(changed([*PEAKS, "int8"], None))
    assert (card.operations_per_second["int8"], card.operations_per_second["fp16"]) == (None, 65 * TERA)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_read_or_refused_in_one_line(data):
    content = CONTENT.encode()
    start = data.draw(st.integers(0, len(content) - 1))
    damaged = content[:start] + data.draw(st.binary(max_size=6)) + content[start + data.draw(st.integers(0, 6)) :]
    refusal = None
    try:
        cards = cards_from_json(damaged)
    except InputRejected as error:
        cards, refusal = CARDS, str(error)
    assert refusal is None or re.fullmatch(r"cards\.json: .*; this file is damaged: install the package again", refusal)
    assert len(cards) == len(CARDS)
    assert all(card.bytes_per_second > 0 for card in cards)
