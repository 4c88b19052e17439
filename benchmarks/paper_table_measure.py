"""One network of ``benchmarks/paper_table.py``: its files written, its modules and files measured and judged."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

import exporter
from benchmarks.int8_exporter import loaded_graph, quantize
from benchmarks.int8_timing import structured_images
from benchmarks.int8_worker import dataset_of
from benchmarks.paper_table_eager import measured_modules
from benchmarks.paper_table_networks import (
    GOLDEN_IMAGES,
    deployed_module,
    multiply_accumulates_of,
    parameters_of,
    parameters_of_file,
    random_network,
    resnet,
    write_golden_vectors,
    write_module,
    write_training_form,
)
from benchmarks.paper_table_text import DEPLOYED, FILE, FP16, INT8, MODULE, TRAINING, Found, rows_from_bench
from engines.bench import Options, bench
from engines.errors import ReportedError
from engines.golden import GOLDEN_NAME
from engines.judgement import telling_golden
from engines.parity import GATES
from engines.report_file import REPORT_NAME, report_from_file
from engines.sdk import gpu_compute_capability
from engines.verification import gate_of_precision
from exporter.onnx_file import graph_from_file, write_onnx
from exporter.onnx_graph import with_metadata
from exporter.quantization.calibration import Settings
from exporter.quantization.form import FORMS
from exporter.variants import Variant

IMAGES_NAME = "images.npz"
STEP = 32
"""Sizes are multiples of it."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How to measure; ``duration`` is in seconds, for each row."""

    batch: int
    size: int
    duration: float
    provider: str | None
    classes: int = 1000

    @property
    def device(self) -> str:
        """Where PyTorch computes."""
        return "cuda" if self.provider not in (None, "cpu") and torch.cuda.is_available() else "cpu"


def found_of_repvgg(variant: Variant, wanted: Wanted, directory: pathlib.Path) -> Found:
    """Writes, measures and judges every form of one network.

    Raises:
        ReportedError: the export failed, or nothing could be measured.
    """
    name = variant.title
    checkpoint = directory / f"{name}.pt"
    model = random_network(variant, wanted.classes)
    torch.save(model.state_dict(), checkpoint)
    images = write_images(directory, wanted.size)
    exporter.export(
        checkpoint, directory, size=wanted.size, batch=_profile(wanted), calibration=images, ignore_witness=True
    )
    files = {
        TRAINING: write_training_form(model, wanted.size, directory / f"{name}.training.onnx"),
        DEPLOYED: directory / f"{name}.onnx",
    }
    modules = {TRAINING: model, DEPLOYED: deployed_module(files[DEPLOYED])}
    notes: list[str] = []
    if gpu_compute_capability() is not None:
        engines, notes = engines_for(checkpoint, images, wanted, directory)
        files |= engines
    elif wanted.provider in (None, "cpu"):
        files[INT8] = write_int8(files[DEPLOYED], images)
    return _found(name, modules, files, wanted, directory, notes)


def found_of_resnet(title: str, wanted: Wanted, directory: pathlib.Path) -> Found:
    """Measures a ResNet: the module with its batch norms, and the file without them.

    Raises:
        SdkMissing: timm is not here.
    """
    module = resnet(title)
    write_golden_vectors(module, wanted.size, directory)
    files = {DEPLOYED: write_module(module, wanted.size, directory / f"{title}.onnx")}
    return _found(title, {TRAINING: module}, files, wanted, directory, [])


def write_int8(float32: pathlib.Path, images: pathlib.Path) -> pathlib.Path:
    """Quantizes the deployed file, calibrated on the images that its answers are compared on."""
    path = float32.with_suffix(".int8.onnx")
    quantize(loaded_graph(float32), dataset_of(images, float32), path, Settings(FORMS[0]))
    write_onnx(with_metadata(graph_from_file(path), {"precision": "int8"}), path.with_suffix(".named"))
    return path.with_suffix(".named").replace(path)


def write_images(directory: pathlib.Path, size: int) -> pathlib.Path:
    """Images of one loudness: on an export's own noise, answers of random weights differ by a hundred times."""
    path = directory / IMAGES_NAME
    np.savez(path, images=structured_images(GOLDEN_IMAGES, size))
    return path


def engines_for(
    checkpoint: pathlib.Path, images: pathlib.Path, wanted: Wanted, directory: pathlib.Path
) -> tuple[dict[str, pathlib.Path], list[str]]:
    """Engines for the GPU that is here, each exported to a directory of its own; and why one is missing."""
    found: dict[str, pathlib.Path] = {}
    notes: list[str] = []
    for precision in (FP16, INT8):
        out = directory / precision
        try:
            exporter.export(
                checkpoint,
                out,
                onnx=False,
                trt=(precision,),
                size=wanted.size,
                batch=_profile(wanted),
                calibration=images,
                ignore_witness=True,
            )
        except ReportedError as error:
            notes.append(f"{checkpoint.stem}: no {precision} engine: {error}")
            continue
        found[precision] = out / f"{checkpoint.stem}.{precision}.engine"
    return found, notes


def _found(
    name: str,
    modules: dict[str, nn.Module],
    files: dict[str, pathlib.Path],
    wanted: Wanted,
    directory: pathlib.Path,
    notes: Sequence[str],
) -> Found:
    """Measures modules and files, the ones after the others, so that neither's threads are in the other's way."""
    golden = telling_golden(directory / GOLDEN_NAME)
    report = directory / REPORT_NAME
    gate = gate_of_precision("fp32", report_from_file(report) if report.is_file() else None) or GATES["fp32"]
    sizes = {form: (parameters_of(one), multiply_accumulates_of(one, wanted.size)) for form, one in modules.items()}
    titles = {form: form for form in modules}
    sizes[DEPLOYED] = parameters_of_file(files[DEPLOYED]), sizes.get(DEPLOYED, sizes[TRAINING])[1]
    eager = measured_modules(modules, golden, gate, batch=wanted.batch, duration=wanted.duration, device=wanted.device)
    modules.clear()
    options = Options(batches=(wanted.batch,), provider=wanted.provider, duration=wanted.duration)
    record = bench(list(files.values()), options)
    forms = {path.name: form for form, path in files.items()}
    rows = [
        *rows_from_bench(*eager, titles, MODULE, sizes),
        *rows_from_bench(record.rows, record.files, forms, FILE, sizes),
    ]
    warnings = [*notes, *(f"{name}: {warning}" for warning in record.warnings)]
    return Found(name, tuple(rows), record.to_value(), tuple(warnings))


def _profile(wanted: Wanted) -> tuple[int, int, int]:
    """Smallest, usual and largest batch of engines."""
    return 1, wanted.batch, max(32, wanted.batch)
