"""What the owner of a GPU sends back: one JSON file from which every figure can be made again elsewhere.

    files       size and SHA-256 of everything an export lists, and of every engine and ONNX file in its directory
    findings    what needs no GPU: listed, golden, integrity, audit, and the ONNX files on this machine's CPU
    engines     their sidecars, whole, and their answers to the golden vectors, bit for bit, beside the reference;
                layer by layer where they fail
    throughput  a benchmark's record with every latency that counts; what each kernel computes and moves

A receipt of a failure is as good as any other: it is what one sends back. Where no GPU ran anything its first field
says so. Directories, hosts, users and the environment are left out. ``engines.receipts.replay`` reads it.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engines.bench import Options, bench
from engines.errors import InputRejected, ReportedError, SdkMissing
from engines.files import sha256_of
from engines.golden import GOLDEN_NAME, INPUT, golden_from_file
from engines.integrity import checked_engine
from engines.judgement import gate_of_engine, judgement, telling_golden
from engines.kind import ENGINE_SUFFIX, ONNX_SUFFIX
from engines.manifest import Manifest, manifest_from_file, sidecar_path
from engines.parity import GATES
from engines.receipts.anonymous import anonymous, directory_in, without_directories
from engines.receipts.figures import (
    DIGEST,
    FIGURES,
    SCHEMA,
    digest_of,
    figures_of_judgement,
    finite,
    ran_on_gpu,
    verdict_of,
)
from engines.receipts.layer_by_layer import layers_of_engine
from engines.receipts.machine import card_of, machine_of, versions_of
from engines.receipts.packing import packed_array
from engines.receipts.raw_rows import raw_from_measurement
from engines.report_file import REPORT_NAME, ListedFile, report_from_file
from engines.roofline import works_of_file
from engines.runner import load
from engines.sdk import gpu_compute_capability
from engines.verification import RUN, Verification, answers_to_golden
from engines.version import VERSION


@dataclasses.dataclass(frozen=True)
class Request:
    """Of which directories, and how: ``options`` are the benchmark's, and have the device.

    ``told`` is given a line when something is done.
    """

    folders: tuple[pathlib.Path, ...]
    options: Options
    allow_no_gpu: bool = False
    told: Callable[[str], None] = lambda line: None


def receipt_from_folders(request: Request) -> dict[str, Any]:
    """Checks, runs and measures everything, and returns it as plain values for JSON.

    Raises:
        InputRejected: a directory is not an export's, has no engine, or something that a receipt cannot tell.
        SdkMissing: no GPU answers, and that was not allowed.
    """
    for folder in request.folders:
        engines_of(folder)
        _check_names(folder)
    capability = gpu_compute_capability(request.options.device)
    if capability is None and not request.allow_no_gpu:
        raise SdkMissing(
            "no GPU answers here, and a receipt tells what one computed; run it on a machine with an NVIDIA GPU, or "
            "give --allow-no-gpu for a receipt that says that none ran anything"
        )
    exports = [_export(folder, request, with_gpu=capability is not None) for folder in request.folders]
    records = [export["throughput"] for export in exports if export["throughput"] is not None]
    passed, verdict = verdict_of(exports)
    receipt = {
        "ran_on_gpu": ran_on_gpu(exports),
        "schema": SCHEMA,
        "tool": VERSION,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": {"compute_capability": capability, **machine_of(records)},
        "versions": versions_of(records),
        "card": card_of(records),
        "exports": exports,
        "passed": passed,
        "verdict": verdict,
    }
    return {**receipt, DIGEST: digest_of(receipt)}


def engines_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The engines of an export, float32 first, so that others are compared with it.

    Raises:
        InputRejected: no export was written there, or it has no engine.
    """
    if not (folder / REPORT_NAME).is_file():
        raise InputRejected(f"{folder}: has no {REPORT_NAME}, so no export wrote it; give the directory of an export")
    engines = sorted(folder.glob(f"*{ENGINE_SUFFIX}"), key=lambda path: (_rank(path), path.name))
    if not engines:
        raise InputRejected(f"{folder}: has no engine to be run; export again with --trt")
    return engines


def _check_names(folder: pathlib.Path) -> None:
    """Looks, before anything is run, whether all that is told whole may be told, and read by others."""
    for name in file_names(folder):
        if not name.isprintable() or "\\" in name:
            raise InputRejected(f"{folder}: a receipt cannot tell of a file that is called {name!a}; rename it")
    for engine in engines_of(folder):
        try:
            told = manifest_from_file(sidecar_path(engine))
        except InputRejected:
            continue  # and then it is not told
        directory = directory_in(told, [folder])
        if directory is not None:
            raise InputRejected(
                f"{sidecar_path(engine)}: names {directory}, and a receipt tells all of it; build the engine again"
            )


def _rank(engine: pathlib.Path) -> int:
    try:
        return list(GATES).index(manifest_from_file(sidecar_path(engine)).precision)
    except (InputRejected, ValueError):
        return len(GATES)


def _export(folder: pathlib.Path, request: Request, *, with_gpu: bool) -> dict[str, Any]:
    """Everything about one directory."""
    found = [
        finding
        for finding in Verification(static=True).findings_of_folder(folder)
        if not (finding.engine and finding.check == RUN)
    ]
    engines = [_engine(path, request.options.device, with_gpu=with_gpu) for path in engines_of(folder)]
    for engine in engines:
        request.told(f"{engine['file']}: {engine['detail']}")
    ran = [folder / engine["file"] for engine in engines if engine["answers"] is not None]
    throughput, problem = _throughput(ran, request) if ran else (None, None)
    return {
        "files": _files(folder),
        "findings": [
            {name: getattr(finding, name) for name in ("file", "check", "passed")}
            | {"detail": without_directories(finding.detail, [folder])}
            for finding in found
        ],
        "golden": _golden(folder / GOLDEN_NAME),
        "engines": anonymous(engines, [folder], kept=frozenset({"answers", "sidecar"})),
        "throughput": throughput,
        "throughput_problem": None if problem is None else without_directories(problem, [folder]),
        "works": _works(ran),
    }


def _listed(folder: pathlib.Path) -> dict[str, ListedFile]:
    """By name; none where the report cannot be read, which a finding says."""
    try:
        return {file.name: file for file in report_from_file(folder / REPORT_NAME).files}
    except InputRejected:
        return {}


def file_names(folder: pathlib.Path) -> list[str]:
    """Of all files that a receipt is about."""
    engines = [name for path in folder.glob(f"*{ENGINE_SUFFIX}") for name in (path.name, sidecar_path(path).name)]
    graphs = [path.name for path in folder.glob(f"*{ONNX_SUFFIX}")]
    return sorted({REPORT_NAME, GOLDEN_NAME, *_listed(folder), *engines, *graphs})


def _files(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Each as it is found and as it is listed."""
    listed = _listed(folder)
    found = []
    for name in file_names(folder):
        path, there = folder / name, listed.get(name)
        found.append(
            {
                "name": name,
                "bytes": path.stat().st_size if path.is_file() else None,
                "sha256": sha256_of(path) if path.is_file() else None,
                "listed": None if there is None else {"bytes": there.bytes, "sha256": there.sha256},
            }
        )
    return found


def _golden(path: pathlib.Path) -> dict[str, Any] | None:
    """The reference, and a digest of each image; None where the file is no golden vectors, which a finding says."""
    try:
        images = golden_from_file(path).images
        with np.load(path, allow_pickle=False) as archive:
            outputs = {name: packed_array(archive[name]) for name in archive.files if name != INPUT}
    except InputRejected:
        return None
    return {"images": [hashlib.sha256(image.tobytes()).hexdigest() for image in images], "outputs": outputs}


def _engine(path: pathlib.Path, device: int, *, with_gpu: bool) -> dict[str, Any]:
    """An engine's sidecar, its answers and what they come to, or why there are none."""
    entry: dict[str, Any] = dict.fromkeys(("file", "sidecar", "answers", *FIGURES, "layers", "layers_problem"))
    entry["file"] = path.name
    try:
        _, manifest = checked_engine(path)
        if manifest is None:
            raise InputRejected(f"{path}: has no sidecar")
        entry["sidecar"] = sidecar_path(path).read_bytes().decode()
        if not with_gpu:
            return entry | {"detail": "no GPU answers here"}
        return entry | _answered(path, manifest, device)
    except (ReportedError, ValueError) as error:
        return entry | {"passed": False, "detail": str(error).removeprefix(f"{path}: ")}


def _answered(path: pathlib.Path, manifest: Manifest, device: int) -> dict[str, Any]:
    """Runs the golden images; where the answers do not pass, computes layer by layer."""
    golden = telling_golden(path.parent / GOLDEN_NAME)
    with load(path, device=device) as runner:
        answers = answers_to_golden(runner, golden)
    judged = judgement(golden, answers, gate_of_engine(manifest.precision, manifest.tolerance))
    entry = {"answers": {name: packed_array(array) for name, array in answers.items()}, **figures_of_judgement(judged)}
    return entry if judged.failure is None else entry | _layers(path, device)


def _layers(path: pathlib.Path, device: int) -> dict[str, Any]:
    try:
        layers = layers_of_engine(path, device=device)
    except ReportedError as error:
        return {"layers_problem": str(error).removeprefix(f"{path}: ")}
    figures = ("relative_error", "sqnr_db")
    return {
        "layers": [
            dataclasses.asdict(layer) | {name: finite(getattr(layer, name)) for name in figures} for layer in layers
        ]
    }


def _throughput(engines: Sequence[pathlib.Path], request: Request) -> tuple[dict[str, Any] | None, str | None]:
    """The benchmark's record without what is the environment's, or why there is none."""
    try:
        record = bench(engines, request.options, told=request.told)
    except ReportedError as error:
        return None, str(error)
    value = record.to_value(raw=False)
    value["settings"] = [setting for setting in value["settings"] if setting["source"] != "environment"]
    for row, measured in zip(value["rows"], record.rows, strict=True):
        row["raw"] = raw_from_measurement(measured.measurement)
    return anonymous(value, [engine.parent for engine in engines], kept=frozenset({"raw"})), None


def _works(engines: Sequence[pathlib.Path]) -> dict[str, Any]:
    """By file, what each kernel computes and moves for a golden image; none where its graph cannot be counted."""
    found = {}
    for path in engines:
        try:
            height, width = golden_from_file(path.parent / GOLDEN_NAME).images.shape[2:]
            found[path.name] = [dataclasses.asdict(work) for work in works_of_file(path, (height, width))]
        except ReportedError:
            continue
    return found
