"""What a file is and what is in it, found without a GPU and without any SDK: engines, ONNX files, and what lies beside.

A finding is a ``Fact``: a key for JSON, a value, and the same in words. What contradicts itself is a fact like the
others, and the reason why the file is refused once everything has been said (``Facts.refusal``).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import struct
from typing import Any

from engines.audit import audit_of_file, expected_from_onnx
from engines.backends.backend import TensorDescription
from engines.errors import InputRejected, ReportedError, VerificationFailed
from engines.files import sha256_of
from engines.golden import INPUT, golden_from_file
from engines.integrity import cards_text, checked_engine
from engines.kind import ONNX, graph_of_engine, graphs_beside, kind_of_file
from engines.manifest import Manifest, manifest_from_file, sidecar_path
from engines.onnx_file import OnnxFile, onnx_file_from_path
from engines.plan import SDK_TAGS, Plan, PlanRejected, header_from_file, mapped, plan_from_file
from engines.report_file import REPORT_NAME, report_from_file
from engines.traffic import prediction_of_file

ZIP_TAG, JSON_TAG = b"PK\x03\x04", b"{"
LARGEST_PREFIX = 1 << 20


@dataclasses.dataclass(frozen=True)
class Fact:
    """``text`` may have several lines; ``value`` is for JSON."""

    key: str
    text: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Facts:
    """What ``kind`` of file it is, in words, and what is known of it; ``refusal`` says why it must not be used."""

    kind: str
    facts: tuple[Fact, ...]
    refusal: ReportedError | None = None


def facts_of_file(path: pathlib.Path) -> Facts:
    """Everything that can be said of the file.

    Raises:
        InputRejected: it is missing, unreadable, or nothing that this project writes or reads.
    """
    if not path.is_file():
        raise InputRejected(f"{path}: no such file; check the path")
    data = mapped(path)
    _reject_foreign_prefix(path, data)
    if data[: len(ZIP_TAG)] == ZIP_TAG:
        return _golden_facts(path)
    if bytes(data[:64]).lstrip().startswith(JSON_TAG):
        return _report_facts(path) if path.name.startswith(REPORT_NAME) else _sidecar_facts(path)
    if kind_of_file(path) == ONNX:
        return _onnx_facts(path)
    return _engine_facts(path)


def _reject_foreign_prefix(path: pathlib.Path, data: Any) -> None:
    """Ultralytics puts the length of some JSON, four bytes, and that JSON before the plan."""
    if len(data) < 5 or data[4:5] != JSON_TAG:
        return
    (length,) = struct.unpack_from("<I", data, 0)
    if length <= LARGEST_PREFIX and data[4 + length : 8 + length] in SDK_TAGS:
        raise InputRejected(
            f"{path}: {4 + length} bytes of another exporter (Ultralytics) stand before the engine, a length and "
            f"metadata as JSON; tail -c +{5 + length} {path.name} > plan.engine takes them off"
        )


def _engine_facts(path: pathlib.Path) -> Facts:
    header, sidecar = header_from_file(path), sidecar_path(path)
    newer = " and newer" if header.newer_cards else ""
    manifest, integrity, refusal = _checked(path)
    facts = [
        *_size_and_digest(path),
        Fact("sdk", f"{header.sdk} {header.version_text}", {"name": header.sdk, "version": header.version_text}),
        Fact("cards", cards_text(header.compute_capabilities) + newer, header.compute_capabilities),
        Fact("sidecar", f"{sidecar.name}: {integrity}", {"name": sidecar.name, "finding": integrity}),
        *(_manifest_facts(manifest) if manifest is not None else []),
    ]
    try:
        facts.append(_kernels_fact(plan_from_file(path)))
    except PlanRejected as error:
        facts.append(Fact("kernels", f"not readable: {_reason(error, path)}", None))
    facts += _traffic_facts(path, manifest)
    audit, failure = _audit_fact(path, manifest)
    return Facts("TensorRT engine", (*facts, audit), refusal or failure)


def _checked(path: pathlib.Path) -> tuple[Manifest | None, str, ReportedError | None]:
    """The sidecar as far as it can be read, what came of checking it, and the refusal if it does not hold."""
    if not sidecar_path(path).exists():
        return None, "missing, so that engines.load refuses the engine", None
    try:
        return checked_engine(path)[1], "agrees on SHA-256, SDK, version and cards", None
    except InputRejected as error:
        try:
            return manifest_from_file(sidecar_path(path)), f"DOES NOT HOLD: {_reason(error, path)}", error
        except InputRejected:
            return None, f"DOES NOT HOLD: {_reason(error, sidecar_path(path))}", error


def _reason(error: ReportedError, path: pathlib.Path) -> str:
    """The message without the path that it begins with."""
    return str(error).removeprefix(f"{path}: ")


def _manifest_facts(manifest: Manifest) -> list[Fact]:
    preprocessing = manifest.preprocessing
    mean, std = (", ".join(f"{number:g}" for number in preprocessing[key]) for key in ("mean", "std"))
    height, width = preprocessing["size"]
    shapes = [f"{name} {' : '.join(map(str, shapes))}" for name, shapes in manifest.profile.items()]
    tolerance = f"relative error {manifest.tolerance:.1e} against {manifest.golden}"
    return [
        Fact("precision", manifest.precision, manifest.precision),
        Fact("profile", "\n".join(shapes), manifest.profile),
        *(
            Fact(
                key,
                "\n".join(f"{t['name']} {t['dtype']} ({', '.join(map(str, t['shape']))})" for t in tensors),
                tensors,
            )
            for key, tensors in (("inputs", manifest.inputs), ("outputs", manifest.outputs))
        ),
        Fact(
            "preprocessing", f"(pixel / 255 - mean) / std, mean {mean}, std {std}, at {height}x{width}", preprocessing
        ),
        Fact("assumptions", _pairs(manifest.assumptions), manifest.assumptions),
        Fact("tolerance", tolerance, manifest.tolerance),
        Fact("made from", _pairs({k: v for k, v in manifest.sha256.items() if k != "engine"}), manifest.sha256),
    ]


def _kernels_fact(plan: Plan) -> Fact:
    counts = collections.Counter(
        f"convolutions {kernel.input_dtype} x {kernel.weight_dtype} -> {kernel.output_dtype}"
        for kernel in plan.convolutions
    )
    counts.update(
        f"matrix products {kernel.input_dtype} x {kernel.weight_dtype} -> {kernel.output_dtype}"
        for kernel in plan.matrices
    )
    counts["other kernels"] = len(plan.functions)
    lines = [f"{count} {kind}" for kind, count in counts.items() if count]
    return Fact("kernels", f"{plan.kernels}: {', '.join(lines)}", dict(counts))


def _traffic_facts(path: pathlib.Path, manifest: Manifest | None) -> list[Fact]:
    """What an INT8 engine moves beside FP16, for the profile's optimum."""
    if manifest is None or len(manifest.profile) != 1:
        return []
    (_, (batch, _, *size), _) = next(iter(manifest.profile.values()))
    line = prediction_of_file(path, batch, (size[0], size[1]))
    return [] if line is None else [Fact("traffic", line, line)]


def _audit_fact(path: pathlib.Path, manifest: Manifest | None) -> tuple[Fact, ReportedError | None]:
    """The engine held against the typed ONNX file beside it, if that is the one it was made from."""
    there = [graph.name for graph in graphs_beside(path) if graph.is_file()]
    if not there:
        return Fact("audit", f"not made: {graphs_beside(path)[0].name} is not beside it", None), None
    onnx = graph_of_engine(path, None if manifest is None else manifest.sha256["onnx"])
    if onnx is None:
        return Fact("audit", f"not made: {' or '.join(there)} is not the file that the sidecar names", None), None
    try:
        audit = audit_of_file(path, *expected_from_onnx(onnx_file_from_path(onnx)))
    except InputRejected as error:
        return Fact("audit", f"not made: {error}", None), None
    if not audit.problems:
        return Fact("audit", f"against {onnx.name}: {audit.line}", audit.record), None
    found = "; ".join(audit.problems)
    failure = VerificationFailed(f"{path}: not what {onnx.name} says: {audit.problems[0]}; do not use it")
    return Fact("audit", f"against {onnx.name}: FAIL {found}", audit.record), failure


def _onnx_facts(path: pathlib.Path) -> Facts:
    onnx = onnx_file_from_path(path)
    operations = collections.Counter(node.op_type for node in onnx.nodes)
    opsets = {domain or "ai.onnx": version for domain, version in onnx.opsets.items()}
    facts = [
        *_size_and_digest(path),
        Fact("producer", onnx.producer or "not said", onnx.producer),
        Fact("opsets", _pairs(opsets), opsets),
        Fact("inputs", _tensors(onnx.inputs), [dataclasses.asdict(value) for value in onnx.inputs]),
        Fact("outputs", _tensors(onnx.outputs), [dataclasses.asdict(value) for value in onnx.outputs]),
        Fact("operations", ", ".join(f"{count} {name}" for name, count in sorted(operations.items())), operations),
        _weights_fact(onnx),
        Fact("metadata", _pairs(onnx.metadata) or "none", onnx.metadata),
    ]
    return Facts("ONNX file", tuple(facts))


def _weights_fact(onnx: OnnxFile) -> Fact:
    bytes_by_dtype: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for array in onnx.weights.values():
        bytes_by_dtype[array.dtype.name] += array.nbytes
        counts[array.dtype.name] += 1
    words = [f"{count} {dtype} ({bytes_by_dtype[dtype]:,} bytes)" for dtype, count in sorted(counts.items())]
    value = {dtype: {"count": counts[dtype], "bytes": bytes_by_dtype[dtype]} for dtype in sorted(counts)}
    return Fact("weights", ", ".join(words) or "none", value)


def _golden_facts(path: pathlib.Path) -> Facts:
    golden = golden_from_file(path)
    count, wide = len(golden.images), golden.outputs.dtype.name
    vectors: dict[str, dict[str, Any]] = {INPUT: {"dtype": golden.images.dtype.name, "shape": golden.images.shape}}
    vectors |= {name: {"dtype": wide, "shape": (count, *shape)} for name, shape in golden.shapes.items()}
    words = "\n".join(f"{name} {vector['dtype']} {vector['shape']}" for name, vector in vectors.items())
    contrast = golden.contrast if math.isfinite(golden.contrast) else None
    told = "a single image" if contrast is None else f"{contrast:.1e} between the two most alike answers"
    return Facts(
        "golden vectors",
        (*_size_and_digest(path), Fact("vectors", words, vectors), Fact("contrast", told, contrast)),
    )


def _sidecar_facts(path: pathlib.Path) -> Facts:
    manifest = manifest_from_file(path)
    sdk = f"{manifest.sdk['name']} {manifest.sdk['version']}"
    there = "is beside it" if (path.parent / manifest.name).is_file() else "is not beside it"
    facts = [
        *_size_and_digest(path),
        Fact("engine", f"{manifest.name}, SHA-256 {manifest.sha256['engine']}, {there}", manifest.name),
        Fact("sdk", sdk, manifest.sdk),
        Fact("cards", cards_text(manifest.compute_capabilities), manifest.compute_capabilities),
        *_manifest_facts(manifest),
        Fact("audit", manifest.audit["line"], manifest.audit),
    ]
    return Facts("sidecar of an engine", tuple(facts))


def _report_facts(path: pathlib.Path) -> Facts:
    report = report_from_file(path)
    files = [file.name for file in report.files]
    return Facts(
        "report of an export",
        (
            *_size_and_digest(path),
            Fact("verdict", report.verdict, report.verdict),
            Fact("files", ", ".join(files), files),
        ),
    )


def _size_and_digest(path: pathlib.Path) -> list[Fact]:
    size, digest = path.stat().st_size, sha256_of(path)
    return [Fact("size", f"{size:,} bytes", size), Fact("sha256", digest, digest)]


def _tensors(values: tuple[TensorDescription, ...]) -> str:
    lines = []
    for value in values:
        shape = ", ".join("?" if extent is None else str(extent) for extent in value.shape)
        lines.append(f"{value.name} {value.dtype} ({shape})")
    return "\n".join(lines)


def _pairs(values: dict[str, Any]) -> str:
    """One pair a line."""
    return "\n".join(f"{key} {value}" for key, value in values.items())
