"""Calibrations: what was written comes back bit for bit, nothing damaged is taken, and nothing stale goes unseen."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.errors import InputRejected
from exporter.quantization.calibration_file import (
    LARGEST_FILE,
    SCHEMA,
    Binding,
    CalibrationFile,
    FormCalibration,
    calibration_from_file,
    calibration_from_json,
    difference,
)
from exporter.quantization.form import FORMS
from exporter.quantization.ranges import METHODS
from tests.reports import CALIBRATED, DIGEST

TEXT = CALIBRATED.to_json()
DOCUMENT = json.loads(TEXT)
BINDING = CALIBRATED.binding
OTHER_DIGEST = "f" * 64


def changed(path, value):
    """The text of the calibration with one value replaced, or added."""
    document = json.loads(TEXT)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(document)


def refusal(content):
    with pytest.raises(InputRejected) as caught:
        calibration_from_json(content, "net.json")
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in message
    assert message.startswith("net.json: ")
    assert message.endswith("; this calibration is damaged or was edited: remove it, and calibrate again")
    return message.removeprefix("net.json: ")


# --- what was written comes back


def test_a_calibration_comes_back_as_it_was(tmp_path):
    path = tmp_path / "model.int8.calib.json"
    path.write_text(TEXT)
    found = calibration_from_file(path)
    assert found == CALIBRATED
    assert found.to_json() == TEXT
    assert found.forms[0].weight_scales["head/Gemm"] == (1 / 3, 5e-324, 1.0)


def test_the_text_has_one_order_whatever_the_order_in_memory():
    def turned(value):
        return types.MappingProxyType(dict(reversed(value.items()))) if isinstance(value, dict) else value

    def every_field_of(record):
        fields = {field.name: turned(getattr(record, field.name)) for field in dataclasses.fields(record)}
        return dataclasses.replace(record, **fields)

    other = CalibrationFile(SCHEMA, every_field_of(BINDING), tuple(map(every_field_of, CALIBRATED.forms)))
    assert list(other.binding.network) != list(BINDING.network)
    assert other.to_json() == TEXT
    assert list(DOCUMENT) == ["schema", "binding", "forms"]
    assert list(DOCUMENT["binding"]["preprocessing"]) == sorted(BINDING.preprocessing)
    assert list(DOCUMENT["forms"][0]["ranges"]) == ["head/Gemm", "stage0.0/Conv"]


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
settings_by_name = st.dictionaries(texts, texts, max_size=3)
bindings = st.builds(
    Binding, digests, digests, st.integers(1, 2**31 - 1), settings_by_name, settings_by_name, settings_by_name
)


@st.composite
def form_calibrations(draw, form):
    scales = st.lists(positive, min_size=1, max_size=3 if form.per_channel else 1).map(tuple)
    layers = draw(st.lists(texts, max_size=3, unique=True))
    equalized = draw(st.booleans())
    return FormCalibration(
        form=form.name,
        equalized=equalized,
        factors=draw(st.dictionaries(texts, st.lists(positive, min_size=1).map(tuple), max_size=2 if equalized else 0)),
        ranges={layer: draw(positive) for layer in layers},
        methods={layer: draw(st.sampled_from(METHODS)) for layer in layers},
        weight_scales={layer: draw(scales) for layer in layers},
        sqnr_db=draw(st.floats(allow_nan=False, allow_infinity=False) | st.just(math.inf)),
    )


calibrations = st.builds(
    lambda binding, *forms: CalibrationFile(SCHEMA, binding, forms), bindings, *map(form_calibrations, FORMS)
)


@settings(max_examples=80, deadline=None)
@given(calibrations)
def test_any_calibration_comes_back_bit_for_bit(calibration):
    found = calibration_from_json(calibration.to_json().encode(), "a file")
    assert found == calibration
    assert found.to_json() == calibration.to_json()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_sqnr_that_is_no_number_is_not_written(value):
    """Infinity is: that of a network which INT8 does not change."""
    form = dataclasses.replace(CALIBRATED.forms[0], sqnr_db=value)
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        dataclasses.replace(CALIBRATED, forms=(form,)).to_json()


# --- what is refused


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CalibrationFile)])
def test_a_missing_field_is_named(field):
    assert refusal(json.dumps({n: v for n, v in DOCUMENT.items() if n != field})).startswith(f"{field}: missing")


@pytest.mark.parametrize(
    ("record", "path"), [(Binding, ("binding",)), (FormCalibration, ("forms", 1))], ids=["binding", "form"]
)
def test_every_field_of_a_part_must_be_there_alone_and_of_its_type(record, path):
    place = "binding" if len(path) == 1 else "forms[1]"
    part = DOCUMENT["binding"] if len(path) == 1 else DOCUMENT["forms"][1]
    for field in dataclasses.fields(record):
        rest = {name: value for name, value in part.items() if name != field.name}
        assert refusal(changed(path, rest)).startswith(f"{place}.{field.name}: missing")
        for value in ([["?"]], -1, "?", {"": 1}):
            if not (field.name == "sqnr_db" and value == -1):
                assert refusal(changed((*path, field.name), value)).startswith(f"{place}.{field.name}")
    assert refusal(changed((*path, "more"), 1)).startswith(f"{place}.more: not a name that belongs here")


CONV, GEMM = "stage0.0/Conv", "head/Gemm"
WRONG = {
    "another schema": (("schema",), 2, "schema: expected 1, the only schema that this version reads, found 2"),
    "true for 1": (("schema",), True, "schema: expected 1"),
    "another field": (("note",), "x", "note: not a name that belongs here"),
    "a short hash": (("binding", "checkpoint"), DIGEST[1:], "binding.checkpoint: expected 64 hexadecimal digits"),
    "a hash in capitals": (("binding", "data"), DIGEST.upper(), "binding.data: expected 64 hexadecimal digits"),
    "no images": (("binding", "images"), 0, "binding.images: expected a whole number of at least 1"),
    "half an image": (("binding", "images"), 0.5, "binding.images: expected a whole number"),
    "true images": (("binding", "images"), True, "binding.images: expected a whole number"),
    "a number for a text": (("binding", "network", "eps"), 1e-5, "binding.network.eps: expected a text"),
    "an empty text": (("binding", "method", "effort"), "", "binding.method.effort: expected a text"),
    "a name of none": (("binding", "network", ""), "x", "binding.network, a name: expected a text"),
    "a name that turns a terminal": (("forms", 0, "ranges", "a\x1b[2J"), 1.0, "ranges, a name: expected a text"),
    "half a character": (("binding", "method", "\ud800"), "x", "binding.method, a name: expected a text"),
    "no forms": (("forms",), [], "forms: expected one or more forms, each once"),
    "a form twice": (("forms",), [DOCUMENT["forms"][0]] * 2, "forms: expected one or more forms, each once"),
    "an unknown form": (("forms", 0, "form"), "int4", "forms[0].form: expected one of int8, int8.rtx"),
    "a form that is a list": (("forms", 0, "form"), [], "forms[0].form: expected one of int8, int8.rtx"),
    "1 for true": (("forms", 0, "equalized"), 1, "forms[0].equalized: expected true or false"),
    "factors of nothing": (("forms", 0, "equalized"), False, "factors: expected none, since equalized is f"),
    "a factor of 0": (("forms", 0, "factors", CONV, 0), 0, f"forms[0].factors.{CONV}[0]: expected a number above 0"),
    "a negative range": (("forms", 0, "ranges", CONV), -2.75, f"forms[0].ranges.{CONV}: expected a number above 0"),
    "a range of minus nothing": (("forms", 0, "ranges", CONV), -0.0, f"ranges.{CONV}: expected a number above 0"),
    "a range beyond numbers": (("forms", 0, "ranges", CONV), 10**400, f"forms[0].ranges.{CONV}: expected a finite"),
    "a range in words": (("forms", 0, "ranges", CONV), "2.75", f"forms[0].ranges.{CONV}: expected a number"),
    "an unknown method": (("forms", 0, "methods", CONV), "entropy", "expected one of mse, kl, max"),
    "no scale": (("forms", 0, "weight_scales", GEMM), [], "weight_scales.head/Gemm: expected one or more numbers"),
    "a scale that is null": (("forms", 0, "weight_scales", GEMM, 2), None, "scales.head/Gemm[2]: expected a number"),
    "a layer without a range": (("forms", 0, "methods", "x"), "mse", "forms[0].methods: expected the layers of ranges"),
    "a range without scales": (("forms", 1, "weight_scales"), {}, "weight_scales: expected the layers of ranges"),
    "two scales for one": (("forms", 1, "weight_scales", GEMM), [1, 2], "expected one number for each layer, as int8"),
    "decibels in words": (("forms", 0, "sqnr_db"), "33", "forms[0].sqnr_db: expected a number"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_named_by_its_place(path, value, said):
    assert said in refusal(changed(path, value))


BROKEN = {
    "nothing": (b"", "not JSON"),
    "not UTF-8": (b'{"schema": "\xff"}', "not JSON"),
    "UTF-16": (TEXT.encode("utf-16"), "not JSON"),
    "half of it": (TEXT[: len(TEXT) // 2], "not JSON"),
    "two of it": (TEXT * 2, "not JSON"),
    "a list": (b"[]", "the file: expected an object, found []"),
    "too deep": (b"[" * 100_000, "not JSON"),
    "too deep inside": (TEXT.replace("33.4375", "[" * 300 + "]" * 300), "expected a number, found "),
    "NaN": (TEXT.replace("33.4375", "NaN"), "NaN is no JSON number"),
    "infinity": (TEXT.replace("2.75", "Infinity"), "Infinity is no JSON number"),
    "a number beyond float64": (TEXT.replace("2.75", "1e400"), "ranges.stage0.0/Conv: expected a number above 0"),
    "a number that vanishes": (TEXT.replace("2.75", "1e-400"), "ranges.stage0.0/Conv: expected a number above 0"),
    "a number of many digits": (TEXT.replace("2.75", "9" * 5000), "not JSON"),
    "a layer twice": (TEXT.replace('"head/Gemm": 7.5', '"head/Gemm": 7.5, "head/Gemm": 1.0'), "stands there twice"),
    "a field twice": (TEXT.replace('"schema": 1', '"schema": 1, "schema": 1'), '"schema" stands there twice'),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_calibration_is_one_line(content, said):
    assert content != TEXT
    assert said in refusal(content)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(
        InputRejected, match=r"none\.json: cannot be read \(No such file or directory\); check the path"
    ):
        calibration_from_file(tmp_path / "none.json")
    with pytest.raises(InputRejected, match="cannot be read"):
        calibration_from_file(tmp_path)


def test_a_file_larger_than_any_is_not_parsed(tmp_path):
    path = tmp_path / "large.json"
    path.write_text(TEXT + " " * (LARGEST_FILE - len(TEXT)))
    assert calibration_from_file(path) == CALIBRATED
    path.write_text(TEXT + " " * (LARGEST_FILE - len(TEXT) + 1))
    with pytest.raises(
        InputRejected, match=r"large\.json: larger than any calibration; remove it, and calibrate again$"
    ):
        calibration_from_file(path)


def test_a_network_of_very_many_channels_fits():
    channels = tuple(1 / (3 + channel) for channel in range(100_000))
    form = dataclasses.replace(CALIBRATED.forms[0], weight_scales={CONV: channels, GEMM: (1.0,)})
    text = dataclasses.replace(CALIBRATED, forms=(form,)).to_json()
    assert len(text) < LARGEST_FILE / 4
    assert calibration_from_json(text, "a file").forms[0].weight_scales[CONV] == channels


def outcome(content):
    """What ``content`` says, or None where it is refused, in one line that a terminal can show."""
    try:
        return calibration_from_json(content, "x")
    except InputRejected as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 400
        message.encode()
        return None


def same_numbers(value):
    """``value`` with every number as a float, so that 1 and 1.0 are one."""
    if isinstance(value, dict):
        return {name: same_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return list(map(same_numbers, value))
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80) | st.text(max_size=80))
def test_arbitrary_bytes_are_no_calibration(content):
    assert outcome(content) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([DIGEST, "int8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["schema", "form", "a"]), inner),
    max_leaves=8,
)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_value_put_anywhere_keeps_its_meaning_or_is_refused(data):
    document = json.loads(TEXT)
    inner, key = document, data.draw(st.sampled_from(sorted(document)))
    while isinstance(inner[key], dict | list) and inner[key] and data.draw(st.booleans()):
        inner = inner[key]
        key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
    if data.draw(st.booleans()):
        inner[key] = data.draw(json_values)
    elif isinstance(inner, dict):
        inner[data.draw(st.text(max_size=5))] = inner.pop(key)
    else:
        inner.append(inner[key])
    found = outcome(json.dumps(document))
    if found is not None:
        assert same_numbers(json.loads(found.to_json())) == same_numbers(document)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.integers(0, 3), st.binary(max_size=3))
def test_changed_bytes_keep_their_meaning_or_are_refused(start, removed, added):
    content = TEXT.encode()
    content = content[:start] + added + content[start + removed :]
    found = outcome(content)
    if found is not None:
        assert same_numbers(json.loads(found.to_json())) == same_numbers(json.loads(content))


# --- what is stale

STALE = {
    "checkpoint": (
        {"checkpoint": OTHER_DIGEST},
        "made from another checkpoint (sha256 01234567..., this one is ffffffff...)",
    ),
    "data": ({"data": OTHER_DIGEST}, "made with other images (sha256 fedcba98..., these are ffffffff...)"),
    "images": ({"images": 400}, "made with 512 images, not 400"),
    "preprocessing": ({"preprocessing": {**BINDING.preprocessing, "resize": "232"}}, "made with --resize 256, not 232"),
    "network": ({"network": {**BINDING.network, "eps": "0.001"}}, "made with --eps 1e-05, not 0.001"),
    "method": ({"method": {**BINDING.method, "effort": "default"}}, "made with --int8-effort high, not default"),
}


def test_every_field_of_the_binding_has_its_twin():
    assert set(STALE) == {field.name for field in dataclasses.fields(Binding)}


@pytest.mark.parametrize(("change", "said"), STALE.values(), ids=STALE)
def test_a_calibration_of_anything_else_is_stale(change, said):
    assert difference(BINDING, dataclasses.replace(BINDING, **change)) == said


@pytest.mark.parametrize("field", ["preprocessing", "network", "method"])
def test_every_name_of_the_binding_counts(field):
    was = getattr(BINDING, field)
    for name in was:
        now = {key: value for key, value in was.items() if key != name}
        other = dataclasses.replace(BINDING, **{field: now})
        title = {"effort": "--int8-effort"}.get(name) or (name.replace("_", " ") if field == "method" else f"--{name}")
        assert difference(BINDING, other) == f"made with {title} {was[name]}, and this run has none"
        assert difference(other, BINDING) == f"made without {title}, and this run has {was[name]}"
        now = dataclasses.replace(BINDING, **{field: {**was, name: was[name] + "0"}})
        assert difference(BINDING, now) == f"made with {title} {was[name]}, not {was[name]}0"


def test_the_first_difference_is_named_and_equal_bindings_have_none():
    everything = [change for change, _ in STALE.values()]
    other, said = BINDING, [said for _, said in STALE.values()]
    for change, first in zip(reversed(everything), reversed(said), strict=True):
        other = dataclasses.replace(other, **change)
        assert difference(BINDING, other) == first
    assert difference(BINDING, BINDING) is None
    copied = calibration_from_json(TEXT, "a file").binding
    assert copied is not BINDING
    assert difference(copied, BINDING) is None


few = st.dictionaries(st.sampled_from(["eps", "a b"]), st.sampled_from(["1", "\u202e", "x" * 99]), max_size=2)
few_digests = st.sampled_from([DIGEST, OTHER_DIGEST])
near_bindings = st.builds(Binding, few_digests, few_digests, st.integers(1, 2), few, few, few)


@settings(max_examples=150, deadline=None)
@given(near_bindings, st.sampled_from(dataclasses.fields(Binding)), near_bindings)
def test_bindings_differ_exactly_where_something_does(one, field, another):
    other = dataclasses.replace(one, **{field.name: getattr(another, field.name)})
    for first, second in ((one, other), (other, one), (one, another)):
        said = difference(first, second)
        assert (said is None) == (first == second)
        assert said is None or (said.isprintable() and len(said) < 200)
    assert difference(one, dataclasses.replace(one, network=dict(reversed(one.network.items())))) is None


def test_a_text_from_a_file_is_shown_bounded_and_cannot_turn_the_line():
    was = dataclasses.replace(BINDING, network={"eps": "\u202e" + "9" * 10_000})
    now = dataclasses.replace(BINDING, network={"eps": "1"})
    assert difference(was, now) == f'made with --eps "\\u202e{"9" * 56}...", not 1'
