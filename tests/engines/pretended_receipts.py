"""Exports whose engines a pretended machine runs, and the receipts that it writes. No GPU runs anything here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines import verification
from engines.bench import Options
from engines.manifest import Manifest, manifest_from_file, sidecar_path
from engines.parity import GATES
from engines.receipts import layer_by_layer, receipt
from engines.receipts.figures import DIGEST, digest_of
from engines.receipts.receipt import Request, receipt_from_folders
from engines.report_file import REPORT_NAME
from tests.engines import fake_nvml
from tests.engines.fake_cuda import Costs
from tests.engines.fake_machine import FakeMachine, fake_machine
from tests.engines.fake_tensorrt import engine_bytes
from tests.engines.sdk_bindings import FULL

GPU, CAPABILITY = "NVIDIA GeForce RTX 3090", 86
PROFILE = [(1, 1, 28, 28), (4, 1, 28, 28), (8, 1, 28, 28)]
SECONDS = {"fp32": (200e-3, 10e-3), "fp16": (100e-3, 5e-3)}
"""What a batch takes on the pretended card, and each of its images."""

Harm = Callable[[onnx.ModelProto], None]


def scaled(name: str, factor: float = 1.01) -> Harm:
    """Multiplies one weight of a graph."""

    def harm(model: onnx.ModelProto) -> None:
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))

    return harm


def pretended_machine(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, harm: Harm | None = None) -> FakeMachine:
    """Full TensorRT, whose files are not audited, on a card whose peaks are known; its compiler does ``harm``."""
    machine = fake_machine(monkeypatch, folder, FULL[1])
    monkeypatch.setitem(fake_nvml.NAMES, 0, GPU)
    machine.cuda.costs = Costs(to_device=1e-6, to_host=1e-6, launches=2e-3, graph_launch=0.5e-3)
    for module in (receipt, verification, layer_by_layer):
        monkeypatch.setattr(module, "gpu_compute_capability", lambda _=0: CAPABILITY)
    monkeypatch.setattr(receipt, "bench", functools.partial(receipt.bench, clock=machine.cuda.clock))

    def compile_copy(copy: pathlib.Path, engine: pathlib.Path, *_: object) -> None:
        engine.write_bytes(pretended_engine(copy.read_bytes(), "fp32", harm))

    monkeypatch.setattr(layer_by_layer, "compile_copy", compile_copy)
    return machine


def pretended_engine(graph: bytes, precision: str, harm: Harm | None) -> bytes:
    """An engine that computes the graph, or what ``harm`` makes of it."""
    if harm is not None:
        model = onnx.load_from_string(graph)
        harm(model)
        graph = model.SerializeToString()
    return engine_bytes(graph, "tensorrt", FULL[1], PROFILE, seconds=SECONDS[precision])


def pretended_export(
    source: pathlib.Path, folder: pathlib.Path, *, checkpoint: str | None = None, harm: Harm | None = None
) -> pathlib.Path:
    """A copy of a real export, with engines in fp32 and fp16 for the pretended machine; ``harm`` is the first one's."""
    shutil.copytree(source, folder)
    shutil.copy(folder / "fashion.onnx", folder / "fashion.fp32.onnx")
    manifest = manifest_from_file(folder / "fashion.fp16.engine.json")
    for precision in SECONDS:
        graph = (folder / f"fashion.{precision}.onnx").read_bytes()
        content = pretended_engine(graph, precision, harm if precision == "fp32" else None)
        engine = folder / f"fashion.{precision}.engine"
        engine.write_bytes(content)
        sidecar_path(engine).write_text(_manifest(manifest, precision, graph, content, checkpoint).to_json())
    _list_again(folder)
    return folder


def _manifest(manifest: Manifest, precision: str, graph: bytes, engine: bytes, checkpoint: str | None) -> Manifest:
    return dataclasses.replace(
        manifest,
        name=f"fashion.{precision}.engine",
        precision=precision,
        tolerance=GATES[precision].max_relative_error,
        sha256={
            "checkpoint": checkpoint or manifest.sha256["checkpoint"],
            "onnx": hashlib.sha256(graph).hexdigest(),
            "engine": hashlib.sha256(engine).hexdigest(),
        },
        sdk={"name": "tensorrt", "version": FULL[1]},
        compute_capabilities=(CAPABILITY,),
        profile={"input": tuple(PROFILE)},
        audit={"audited": False, "line": "not audited", "problems": []},
    )


def _list_again(folder: pathlib.Path) -> None:
    report = json.loads((folder / REPORT_NAME).read_text())
    names = sorted(path.name for path in folder.iterdir() if path.name != REPORT_NAME)
    report["files"] = [
        {
            "name": name,
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in names
    ]
    (folder / REPORT_NAME).write_text(json.dumps(report))


@contextlib.contextmanager
def written_receipt(
    source: pathlib.Path,
    folder: pathlib.Path,
    *,
    checkpoint: str | None = None,
    harm: Harm | None = None,
    batches: tuple[int, ...] = (1, 4),
    duration: float = 0.3,
    with_gpu: bool = True,
) -> Iterator[dict[str, object]]:
    """The receipt of one export of the pretended machine, as plain values."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = pretended_machine(monkeypatch, folder, harm)
        export = pretended_export(source, folder / "fashion", checkpoint=checkpoint, harm=harm)
        if not with_gpu:
            monkeypatch.setattr(receipt, "gpu_compute_capability", lambda _: None)
        request = Request((export,), Options(batches=batches, duration=duration), allow_no_gpu=not with_gpu)
        made = receipt_from_folders(request)
        machine.assert_nothing_left()
        yield json.loads(json.dumps(made, allow_nan=False))


def sealed(value: dict[str, object]) -> dict[str, object]:
    """A receipt with the digest of what it holds now, as someone would make it who changes one on purpose."""
    return {**value, DIGEST: digest_of(value)}
