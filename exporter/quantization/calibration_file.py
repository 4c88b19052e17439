"""``<stem>.int8.calib.json``: what calibration found, and what it was made from, so that nothing stale is ever used.

The numbers of a calibration are right for one float32 network, seen through one set of images by one method, and
wrong for any other without a sign of it. So the file says what it was made from (``Binding``), files by their SHA-256,
and ``difference`` names the first thing in which that is not what a run has before it.

It is read as strictly as it is written: every field is there, has its type and agrees with the others, or the file is
refused. Numbers come back bit for bit: JSON has the shortest decimal that a float64 is rounded from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from engines.json_value import Malformed, Value, value_from_bytes
from exporter.errors import InputRejected, first_line
from exporter.quantization.form import FORMS
from exporter.quantization.ranges import METHODS

SCHEMA = 1
LARGEST_FILE = 1 << 24
"""In bytes: a hundred thousand channels have a tenth of it."""

_FORMS = {form.name: form for form in FORMS}
_PLAIN_FLAGS = ("resize", "size", "mean", "std", "strides", "eps", "weights", "features", "arch")
_FLAGS = {name: f"--{name}" for name in _PLAIN_FLAGS} | {"effort": "--int8-effort", "budget": "--int8-budget"}
"""What a command calls a name of ``Binding``."""
_SHOWN_DIGITS, _SHOWN_CHARACTERS = 8, 60

_Read = TypeVar("_Read")


@dataclasses.dataclass(frozen=True)
class Binding:
    """What a calibration was made from.

    Attributes:
        checkpoint: SHA-256 of the file, hexadecimal.
        data: SHA-256 of the calibration images, hexadecimal.
        images: how many of them there are.
        preprocessing: how images became inputs: ``resize``, ``size``, ``mean``, ``std``, as the flags have them.
        network: every assumption that changes the float32 network: ``strides``, ``eps``, ``weights``, ``features``.
        method: how it was made: effort, bits, fitted images, version of the algorithm.
    """

    checkpoint: str
    data: str
    images: int
    preprocessing: Mapping[str, str]
    network: Mapping[str, str]
    method: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class FormCalibration:
    """What was found for one form of the graph; layers and convolutions by the names of their nodes.

    Attributes:
        form: its name, of FORMS.
        equalized: whether channels were rescaled first.
        factors: by convolution, what the channels (C,) of its output are multiplied by; empty if not equalized.
        ranges: by layer, the largest absolute value that the codes of its input stand for.
        methods: by layer, how that was chosen, of METHODS.
        weight_scales: by layer, one for each output channel (C,), or one alone (1,) where the form has one for all.
        sqnr_db: of the network's output against float32, over all images; infinite where they are equal.
    """

    form: str
    equalized: bool
    factors: Mapping[str, tuple[float, ...]]
    ranges: Mapping[str, float]
    methods: Mapping[str, str]
    weight_scales: Mapping[str, tuple[float, ...]]
    sqnr_db: float


@dataclasses.dataclass(frozen=True)
class CalibrationFile:
    """The whole file: one or more forms of one network, all from the same images by the same method."""

    schema: int
    binding: Binding
    forms: tuple[FormCalibration, ...]

    def to_json(self) -> str:
        """The file's text: the same for equal contents, in whatever order their names were put in.

        Raises:
            ValueError: a number is NaN, or one other than an SQNR is infinite.
        """
        fields = _ordered(self)
        for form in fields["forms"]:
            if form["sqnr_db"] == math.inf:
                form["sqnr_db"] = None
        return json.dumps(fields, indent=2, allow_nan=False) + "\n"


def calibration_from_file(path: pathlib.Path) -> CalibrationFile:
    """Reads and checks a calibration.

    Raises:
        InputRejected: it cannot be read, or a field is missing, wrong, unknown, or contradicts another.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if len(content) > LARGEST_FILE:
        raise InputRejected(f"{path}: larger than any calibration; remove it, and calibrate again")
    return calibration_from_json(content, str(path))


def calibration_from_json(content: bytes | str, where: str) -> CalibrationFile:
    """Checks a calibration's text; ``where`` names it in errors.

    Raises:
        InputRejected: as ``calibration_from_file``.
    """
    try:
        return _calibration(value_from_bytes(content))
    except Malformed as error:
        raise InputRejected(
            f"{where}: {first_line(error)}; this calibration is damaged or was edited: remove it, and calibrate again"
        ) from error


def difference(binding: Binding, other: Binding) -> str | None:
    """The first thing in which a file's ``binding`` is not this run's ``other``, in words; None where they are equal.

    As in "made from another checkpoint (sha256 12ab34cd..., this one is 34cd12ab...)" or "made with --resize 256, not
    232".
    """
    if binding.checkpoint != other.checkpoint:
        return f"made from another checkpoint ({_digests(binding.checkpoint, 'this one is', other.checkpoint)})"
    if binding.data != other.data:
        return f"made with other images ({_digests(binding.data, 'these are', other.data)})"
    if binding.images != other.images:
        return f"made with {binding.images} images, not {other.images}"
    for field in ("preprocessing", "network", "method"):
        found = _difference(getattr(binding, field), getattr(other, field))
        if found is not None:
            return found
    return None


def misfit(found: CalibrationFile, channels: Mapping[str, int]) -> str | None:
    """What of a calibration cannot be of a network with layers of so many ``channels``, in words; None where all fits.

    A file whose hashes are right may have been edited.
    """
    for form in found.forms:
        for name, factors in form.factors.items():
            if channels.get(name) != len(factors):
                return f"its {len(factors)} factors of {_shown(name)} are not of this network"
        for name in form.ranges:
            if name not in channels:
                return f"it has a range of {_shown(name)}, which this network has not"
    return None


def _digests(was: str, this: str, now: str) -> str:
    return f"sha256 {was[:_SHOWN_DIGITS]}..., {this} {now[:_SHOWN_DIGITS]}..."


def _difference(was: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    for name in sorted({*was, *now}):
        title = _FLAGS.get(name) or _shown(name.replace("_", " "))
        if name not in now:
            return f"made with {title} {_shown(was[name])}, and this run has none"
        if name not in was:
            return f"made without {title}, and this run has {_shown(now[name])}"
        if was[name] != now[name]:
            return f"made with {title} {_shown(was[name])}, not {_shown(now[name])}"
    return None


def _shown(text: str) -> str:
    """A bounded text without characters that cannot be seen: it may stand in a file from anywhere."""
    short = text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
    return short if short.isprintable() else json.dumps(short)


def _ordered(value: Any) -> Any:
    """Dataclasses as objects of their fields; the names of every mapping sorted."""
    if dataclasses.is_dataclass(value):
        return {field.name: _ordered(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _ordered(value[name]) for name in sorted(value)}
    return [_ordered(inner) for inner in value] if isinstance(value, tuple) else value


def _calibration(value: Value) -> CalibrationFile:
    schema = value.field("schema")
    if schema.value != SCHEMA or isinstance(schema.value, bool):
        raise schema.wrong(f"{SCHEMA}, the only schema that this version reads")
    fields = value.fields(*(field.name for field in dataclasses.fields(CalibrationFile)))
    forms = tuple(map(_form, fields["forms"].entries()))
    if not forms or len({form.form for form in forms}) != len(forms):
        raise fields["forms"].wrong("one or more forms, each once")
    return CalibrationFile(schema.value, _binding(fields["binding"]), forms)


def _binding(value: Value) -> Binding:
    fields = value.fields(*(field.name for field in dataclasses.fields(Binding)))
    return Binding(
        checkpoint=fields["checkpoint"].sha256(),
        data=fields["data"].sha256(),
        images=fields["images"].whole_number(least=1),
        preprocessing=_by_name(fields["preprocessing"], Value.text),
        network=_by_name(fields["network"], Value.text),
        method=_by_name(fields["method"], Value.text),
    )


def _form(value: Value) -> FormCalibration:
    fields = value.fields(*(field.name for field in dataclasses.fields(FormCalibration)))
    found = FormCalibration(
        form=fields["form"].one_of(tuple(_FORMS)),
        equalized=fields["equalized"].boolean(),
        factors=_by_name(fields["factors"], _scales),
        ranges=_by_name(fields["ranges"], lambda item: item.number(above=0)),
        methods=_by_name(fields["methods"], lambda item: item.one_of(METHODS)),
        weight_scales=_by_name(fields["weight_scales"], _scales),
        sqnr_db=math.inf if fields["sqnr_db"].value is None else fields["sqnr_db"].number(),
    )
    if found.factors and not found.equalized:
        raise fields["factors"].wrong("none, since equalized is false")
    for name in ("methods", "weight_scales"):
        if getattr(found, name).keys() != found.ranges.keys():
            raise fields[name].wrong("the layers of ranges")
    if not _FORMS[found.form].per_channel and any(len(scales) != 1 for scales in found.weight_scales.values()):
        raise fields["weight_scales"].wrong(f"one number for each layer, as {found.form} has")
    return found


def _scales(value: Value) -> tuple[float, ...]:
    numbers = value.numbers(above=0)
    if not numbers:
        raise value.wrong("one or more numbers")
    return numbers


def _by_name(value: Value, read: Callable[[Value], _Read]) -> dict[str, _Read]:
    """An object whose names are free, but texts."""
    return {Value(name, f"{value.place}, a name").text(): read(item) for name, item in value.items().items()}
