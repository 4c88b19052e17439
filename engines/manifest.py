"""The sidecar of an engine: ``<engine>.json``, which says what the engine is and what it must answer.

It stands beside the engine and never inside it, so that every other tool can still read the engine. It is read as
strictly as it is written: every field is there, has its type and agrees with the others, or the sidecar is refused.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

from engines.errors import InputRejected, first_line
from engines.json_value import Malformed, Value, value_from_bytes
from engines.sizes import text_of_size

SCHEMA = 1
SDK_NAMES = ("tensorrt", "tensorrt_rtx")
TENSOR_DTYPES = ("float32", "float16", "int8", "int32", "int64")
LARGEST_SIDECAR = 1 << 24

_HASHED = ("checkpoint", "onnx", "engine")
_VERSION = re.compile(r"\d+(\.\w+)+", re.ASCII)
_SYMBOL = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a serving machine needs to know, and to check, before it loads an engine.

    ``profile`` holds the minimum, optimum and maximum shape of each input; ``preprocessing`` is in units of pixels
    scaled to 0..1, with ``resize`` only where one was given; ``tolerance`` is the largest relative error against
    ``golden`` (see ``engines.parity``).
    """

    name: str
    precision: str
    sha256: dict[str, str]
    sdk: dict[str, str]
    compute_capabilities: tuple[int, ...]
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    profile: dict[str, tuple[tuple[int, ...], ...]]
    preprocessing: dict[str, Any]
    assumptions: dict[str, str]
    tolerance: float
    audit: dict[str, Any]
    golden: str

    def to_json(self) -> str:
        """The sidecar's text, with its schema number."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=2) + "\n"


def sidecar_path(engine: pathlib.Path) -> pathlib.Path:
    """``model.fp16.engine`` to ``model.fp16.engine.json``."""
    return engine.with_name(engine.name + ".json")


def manifest_from_file(path: pathlib.Path) -> Manifest:
    """Reads and checks a sidecar.

    Args:
        path: of the sidecar, not of its engine; see ``sidecar_path``.

    Raises:
        InputRejected: it cannot be read, or a field is missing, wrong, unknown, or contradicts another.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_SIDECAR + 1)
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if len(content) > LARGEST_SIDECAR:
        raise InputRejected(f"{path}: larger than any sidecar; put the one back that was written with the engine")
    return manifest_from_json(content, str(path))


def manifest_from_json(content: bytes | str, where: str) -> Manifest:
    """Checks a sidecar's text; ``where`` names it in errors.

    Raises:
        InputRejected: as ``manifest_from_file``.
    """
    try:
        return manifest_from_value(value_from_bytes(content))
    except Malformed as error:
        raise InputRejected(
            f"{where}: {first_line(error)}; this sidecar is damaged or was edited: put the one back that was written "
            f"with the engine, or build the engine again"
        ) from error


def manifest_from_value(value: Value) -> Manifest:
    """Checks a sidecar that stands in another file.

    Raises:
        Malformed: a field is missing, wrong, unknown, or contradicts another.
    """
    schema = value.field("schema")
    if schema.whole_number() != SCHEMA:
        raise schema.wrong(f"{SCHEMA}, the only schema that this version reads")
    fields = value.fields("schema", *(field.name for field in dataclasses.fields(Manifest)))
    manifest = Manifest(
        name=fields["name"].file_name(),
        precision=fields["precision"].text(),
        sha256={name: digest.sha256() for name, digest in fields["sha256"].fields(*_HASHED).items()},
        sdk=_sdk(fields["sdk"]),
        compute_capabilities=_cards(fields["compute_capabilities"]),
        inputs=_tensors(fields["inputs"]),
        outputs=_tensors(fields["outputs"]),
        profile={name: _shapes(shapes) for name, shapes in fields["profile"].items().items()},
        preprocessing=_preprocessing(fields["preprocessing"]),
        assumptions={name: text.text() for name, text in fields["assumptions"].items().items()},
        tolerance=_tolerance(fields["tolerance"]),
        audit=_audit(fields["audit"]),
        golden=fields["golden"].file_name(),
    )
    _check_agreement(manifest, fields)
    return manifest


def _sdk(value: Value) -> dict[str, str]:
    fields = value.fields("name", "version")
    version = fields["version"].text()
    if not _VERSION.fullmatch(version):
        raise fields["version"].wrong("a version such as 1.7.1.116")
    return {"name": fields["name"].one_of(SDK_NAMES), "version": version}


def _cards(value: Value) -> tuple[int, ...]:
    cards = value.whole_numbers(least=10)
    if len(set(cards)) != len(cards) or any(card > 999 for card in cards):
        raise value.wrong("compute capabilities such as 86, each once")
    return cards


def _tensors(value: Value) -> tuple[dict[str, Any], ...]:
    tensors = []
    for entry in value.entries():
        fields = entry.fields("name", "dtype", "shape")
        shape = [_extent(extent) for extent in fields["shape"].entries()]
        if not shape:
            raise fields["shape"].wrong("a shape that begins with the batch")
        tensors.append({"name": fields["name"].text(), "dtype": fields["dtype"].one_of(TENSOR_DTYPES), "shape": shape})
    names = [tensor["name"] for tensor in tensors]
    if not names or len(set(names)) != len(names):
        raise value.wrong("one or more tensors of different names")
    return tuple(tensors)


def _extent(value: Value) -> int | str:
    """A size, or the name of one that is free, such as the batch."""
    if isinstance(value.value, str) and _SYMBOL.fullmatch(value.value):
        return value.value
    return value.whole_number(least=1)


def _shapes(value: Value) -> tuple[tuple[int, ...], ...]:
    """Minimum, optimum and maximum of one input, in this order."""
    shapes = tuple(shape.whole_numbers(least=1) for shape in value.entries(3))
    if len({len(shape) for shape in shapes}) > 1 or any(
        not low <= best <= high for low, best, high in zip(*shapes, strict=False)
    ):
        raise value.wrong("three shapes, minimum <= optimum <= maximum")
    return shapes


def _preprocessing(value: Value) -> dict[str, Any]:
    given = ("resize",) if "resize" in value.items() else ()
    fields = value.fields("mean", "std", "size", "channels", *given)
    channels = fields["channels"].whole_number(least=1)
    size = fields["size"].whole_numbers(2, least=1)
    return {
        "mean": fields["mean"].numbers(channels),
        "std": fields["std"].numbers(channels, above=0),
        "size": size,
        "channels": channels,
        **{name: fields[name].whole_number(least=max(size)) for name in given},
    }


def _tolerance(value: Value) -> float:
    tolerance = value.number(above=0)
    if tolerance >= 1:
        raise value.wrong("a relative error below 1, since 1 is that of an output of zeros")
    return tolerance


def _audit(value: Value) -> dict[str, Any]:
    value.field("audited").boolean()
    value.field("line").text()
    if value.field("problems").entries():
        raise value.field("problems").wrong("none, since no engine with any is ever delivered")
    return {name: field.value for name, field in value.items().items()}


def _check_agreement(manifest: Manifest, fields: dict[str, Value]) -> None:
    """The profile is that of the inputs, and the preprocessing makes what the image input takes."""
    shapes = {tensor["name"]: tensor["shape"] for tensor in manifest.inputs}
    if manifest.profile.keys() != shapes.keys():
        raise fields["profile"].wrong(f"shapes of the inputs {', '.join(shapes)}")
    for name, profile in manifest.profile.items():
        fits = all(
            len(shape) == len(shapes[name])
            and all(
                isinstance(fixed, str) or fixed == extent for fixed, extent in zip(shapes[name], shape, strict=True)
            )
            for shape in profile
        )
        if not fits:
            raise fields["profile"].items()[name].wrong(f"shapes of the input's form {shapes[name]}")
    said = {"mean": _listed(manifest.preprocessing["mean"]), "std": _listed(manifest.preprocessing["std"])}
    for name, text in said.items():
        if manifest.assumptions.get(name, text) != text:
            raise fields["preprocessing"].field(name).wrong(f"{manifest.assumptions[name]}, as in assumptions.{name}")
    resize = manifest.preprocessing.get("resize")
    if manifest.assumptions.get("resize") != (None if resize is None else str(resize)):
        assumed = manifest.assumptions.get("resize", "none")
        raise fields["preprocessing"].wrong(f"a resize of {assumed}, as in assumptions.resize")
    for name, shape in shapes.items():
        if len(shape) == 4:
            _check_sizes(manifest, fields, name, shape)


def _check_sizes(manifest: Manifest, fields: dict[str, Value], name: str, shape: list[int | str]) -> None:
    """Images are prepared in the optimal size of the input ``name``; what is assumed is one size for all, or three."""
    texts = [text_of_size((height, width)) for _, _, height, width in manifest.profile[name]]
    assumed = manifest.assumptions.get("size", ":".join(texts))
    height, width = manifest.preprocessing["size"]
    best = assumed.split(":")[1 if ":" in assumed else 0]
    if "size" in manifest.assumptions and best != text_of_size((height, width)):
        raise fields["preprocessing"].field("size").wrong(f"{best}, as in assumptions.size")
    if manifest.profile[name][1][1:] != (manifest.preprocessing["channels"], height, width):
        raise fields["preprocessing"].wrong(f"images of the input's form {shape}, in its optimal size")
    if assumed not in (":".join(texts), *(texts[:1] if len(set(texts)) == 1 else ())):
        raise fields["profile"].items()[name].wrong(f"shapes of {assumed}, as in assumptions.size")


def _listed(numbers: tuple[float, ...]) -> str:
    shortest = (f"{number:g}" for number in numbers)
    return ",".join(
        short if float(short) == number else repr(number) for short, number in zip(shortest, numbers, strict=True)
    )
