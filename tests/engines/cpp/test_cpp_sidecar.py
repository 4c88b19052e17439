"""engines/cpp reads a sidecar as strictly as Python does: the same damaged ones are refused, by one line each."""

from __future__ import annotations

import copy
import json
import os
import random

import pytest

from engines.errors import InputRejected
from engines.integrity import checked_engine
from engines.manifest import sidecar_path
from tests.engines.cpp.programs import Network, engine_content, manifest_of, write_engine

JUNK = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    2**31,
    1e300,
    "",
    "x",
    "N",
    "a\u0007b",
    "\u0085",
    "é",
    [],
    {},
    [1],
    [[1]],
    {"a": 1},
)
STRICTER = (
    "is not what its sidecar says",
    "one input, which is all that is run here",
    "inputs and outputs, its sidecar",
)
"""What only the C++ library has to refuse: the rest of these engines it could not run."""


@pytest.fixture
def judged(probe, tmp_path):
    """``judged(texts)``: for each sidecar's bytes whether Python takes it, and the C++ library's code and message."""

    def call(texts):
        first = write_engine(tmp_path, Network(features=True), name="first.engine")
        engines = []
        for number, text in enumerate(texts):
            engine = tmp_path / f"{number}.engine"
            os.link(first, engine)
            sidecar_path(engine).write_bytes(text)
            engines.append(engine)
        lines = [line.split(" ", 1) for line in probe("load", *engines).splitlines()]
        assert len(lines) == len(texts)
        return [(is_taken(engine), int(code), said) for engine, (code, said) in zip(engines, lines, strict=True)]

    return call


def is_taken(engine):
    try:
        checked_engine(engine)
    except InputRejected:
        return False
    return True


def sound(network=None):
    network = network or Network(features=True)
    return manifest_of(network, engine_content(network), "first.engine").to_json().encode()


def with_mean(text, mean, said):
    value = json.loads(text)
    value["preprocessing"]["mean"], value["assumptions"]["mean"] = mean, said
    return json.dumps(value).encode()


def assert_same(texts, found):
    assert len(found) == len(texts)
    for text, (taken, code, said) in zip(texts, found, strict=True):
        if code == 0:
            assert taken, text
        elif taken:
            assert any(reason in said for reason in STRICTER), (said, text)
        else:
            assert code == 3, (said, text)
            assert len(said) > 20


def places_of(value, place=()):
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places_of(inner, (*place, key))


def replaced(value, place, new):
    """``value`` with something else at ``place``, or without what is there, where ``new`` is this function."""
    value = copy.deepcopy(value)
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    if new is replaced:
        del parent[place[-1]]
    else:
        parent[place[-1]] = new
    return value


def test_a_field_that_is_missing_or_of_another_kind(judged):
    value = json.loads(sound())
    places = [place for place in places_of(value) if place]
    generator = random.Random(1)
    texts = [json.dumps(replaced(value, place, replaced)).encode() for place in places]
    for place in places:
        texts += [json.dumps(replaced(value, place, new)).encode() for new in generator.sample(JUNK, 7)]
    found = judged(texts)
    assert_same(texts, found)
    assert sum(code == 0 for _, code, _ in found) < len(found) / 10


def test_bytes_that_are_changed_added_and_lost(judged):
    content = sound()
    generator = random.Random(2)
    texts = []
    for _ in range(500):
        text = bytearray(content)
        for _ in range(generator.choice((1, 1, 1, 3))):
            place = generator.randrange(len(text))
            what = generator.choice(("set", "set", "flip", "add", "drop", "cut", "twice"))
            if what == "set":
                text[place] = generator.choice(b'{}[]",:0123456789.eE+-\\ntfu \x00\x80\xff')
            elif what == "flip":
                text[place] ^= 1 << generator.randrange(8)
            elif what == "add":
                text[place:place] = bytes([generator.randrange(256)])
            elif what == "drop":
                del text[place]
            elif what == "cut":
                del text[place : place + generator.randrange(40)]
            else:
                text[place:place] = text[place : place + generator.randrange(80)]
        texts.append(bytes(text))
    found = judged(texts)
    assert_same(texts, found)
    assert sum(taken for taken, _, _ in found) > 20  # some bytes mean nothing, such as those of the checkpoint's hash


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text + b"x",
        lambda text: text + b"\0",
        lambda text: text.replace(b"}", b"},", 1),
        lambda text: text.replace(b'"schema": 1', b'"schema": 2'),
        lambda text: text.replace(b'"schema": 1', b'"schema": true'),
        lambda text: text.replace(b'"schema": 1', b'"schema": 01'),
        lambda text: text.replace(b'"schema": 1', b'"schema": 1, "schema": 1'),
        lambda text: text.replace(b'"schema": 1', b'"schema": 1, "more": 1'),
        lambda text: text.replace(b"0.005", b"NaN"),
        lambda text: text.replace(b"0.005", b"Infinity"),
        lambda text: text.replace(b"0.005", b"1e400"),
        lambda text: text.replace(b"0.005", b"1"),
        lambda text: text.replace(b"0.005", b"0"),
        lambda text: text.replace(b"0.005", b".005"),
        lambda text: text.replace(b"0.005", b"0.005."),
        lambda text: text.replace(b'"fp16"', b'"\\ud800"'),
        lambda text: text.replace(b'"fp16"', b'"\xed\xa0\x80"'),
        lambda text: text.replace(b'"fp16"', b'"\xc0\xaf"'),
        lambda text: text.replace(b'"fp16"', b'"fp\n16"'),
        lambda text: text.replace(b"[\n    80", b"[\n    86"),
        lambda text: text.replace(b'"golden.npz"', b'"../golden.npz"'),
        lambda text: text.replace(b'"0.5,0.5,0.5"', b'"0.5,0.5,0.25"'),
        lambda text: text.replace(b'"0.5,0.5,0.5"', b'"0.5,0.5"'),
        lambda text: text.replace(b'"0.5,0.5,0.5"', b'"0.5,0.50,0.5"'),
        lambda text: text.replace(b'"0.5,0.5,0.5"', b'"0.5, 0.5,0.5"'),
        lambda text: text.replace(b'"0.5,0.5,0.5"', b'"5e-1,0.5,0.5"'),
        lambda text: text.replace(b'"size": "4x4"', b'"size": "5x4"'),
        lambda text: text.replace(b'"problems": []', b'"problems": ["one"]'),
        lambda _: b"[" * 200_000,
        lambda _: b'{"a":' * 200_000,
        lambda _: b"[" * 5000 + b"]" * 5000,
        lambda _: b"",
    ],
)
def test_what_is_not_json_or_not_a_sidecar(judged, change):
    changed = change(sound())
    assert changed != sound()
    ((taken, code, said),) = judged([changed])
    assert (taken, code) == (False, 3)
    assert "this sidecar is damaged or was edited" in said


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"0.005", b"5e-3"),
        lambda text: text.replace(b"0.005", b"0.5E-0002"),
        lambda text: text.replace(b'"fp16"', b'"\\u0066p16"'),
        lambda text: text.replace(b'"fp16"', '"\\ud83d\\ude00é"'.encode()),
        lambda text: json.dumps(json.loads(text)).encode(),
        lambda text: json.dumps(json.loads(text), indent="\t", sort_keys=True).encode() + b"\r\n ",
        lambda text: text.replace(b'"line": "not audited"', b'"line": "x", "more": [{"deep": [null, 1e9, {}]}]'),
        lambda text: text.replace(b'"0.5,0.5,0.5"', b'"0.5,\\u0030.5,0.5"'),
        lambda text: with_mean(text, [0.485, 0.1234567, 0.1 + 0.2], "0.485,0.1234567,0.30000000000000004"),
        lambda text: with_mean(text, [1e6, -1e-7, 0], "1e+06,-1e-07,0"),
    ],
)
def test_what_is_written_otherwise_is_the_same(judged, change):
    assert judged([change(sound())]) == [(True, 0, "")]


def test_images_of_any_size_and_a_resize(judged, probe, tmp_path):
    network = Network(free=True, features=True)
    engine = write_engine(tmp_path, network, name="free.engine")
    manifest = json.loads(sidecar_path(engine).read_text())
    assert probe("load", engine) == "0 \n"
    manifest["preprocessing"]["resize"] = 9
    sidecar_path(engine).write_text(json.dumps(manifest))
    assert probe("load", engine).startswith(
        f"3 {sidecar_path(engine)}: preprocessing: expected a resize as in assumptions"
    )
    manifest["assumptions"]["resize"] = "9"
    sidecar_path(engine).write_text(json.dumps(manifest))
    assert probe("load", engine) == "0 \n"
    manifest["assumptions"]["size"] = "3x2:4x4:9x8"
    sidecar_path(engine).write_text(json.dumps(manifest))
    assert "profile: expected shapes of 3x2:4x4:9x8" in probe("load", engine)
    assert not is_taken(engine)


def test_numbers_are_read_whatever_the_locale(probe, tmp_path):
    assert probe("load", write_engine(tmp_path), PROBE_COMMA=1) == "0 \n"
