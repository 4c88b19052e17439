"""From a checkpoint to checked files: the page to read first.

    model.pt --checkpoint_from_path--> tensors --architecture_from_tensors--> architecture
      --plain_from_repvgg--> one 3x3 convolution per block, each certified against its own branches
      --reference_from_repvgg--> float64 answers of the branches themselves: what everything else must give
      --onnx_from_plain--> float32 graph --typed_from_graph--> a typed graph per precision
      --write_onnx--> files, read back and held to the graph contract, run by ONNX Runtime against the reference
      --engine_from_typed--> engines, audited against their typed graphs, each with a sidecar

An engine compiles in a process of its own while the graphs are checked here. Files appear in the output directory at
the end and together; a run that fails a check leaves them as ``*.rejected``.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.build import Progress
from engines.files import reported_write_errors, sha256_of, write_whole
from engines.sdk import versions
from exporter import checks
from exporter.architecture import Architecture, architecture_from_tensors, check_variant
from exporter.checkpoint import Checkpoint, check_archive, checkpoint_from_path
from exporter.description import Subject
from exporter.images import images_from_npz, noise_images, normalisation
from exporter.interrupts import Uninterrupted
from exporter.lineages import canonical_from_raw, lineage_from_names
from exporter.model import logits
from exporter.onnx_file import write_onnx
from exporter.onnx_graph import onnx_from_plain, structure_from_architecture
from exporter.onnxruntime_cpu import outputs_from_file, outputs_from_graph
from exporter.plain import Plain, plain_from_repvgg, relative_error
from exporter.precisions import PRECISIONS
from exporter.processes import Processes
from exporter.reference import GOLDEN_NAME, Reference, reference_from_repvgg, write_golden
from exporter.report import Check, EngineRecord, FileRecord, Report, markdown_from_report
from exporter.request import Request
from exporter.staging import REPORT_NAME, SUMMARY_NAME, Staging, staging
from exporter.typed import (
    contract_checks_of_typed,
    engine_from_typed,
    numeric_checks_of_typed,
    submit,
    typed_from_graph,
    write_sidecar,
)
from exporter.variants import variant_from_name
from exporter.version import VERSION

Batch = NDArray[np.float32]

Notify = Callable[[str], None]
"""Told each finding, one line at a time, as it is made."""


def report_from_checkpoint(
    request: Request, processes: Processes, notify: Notify, progress: Progress, interrupts: Uninterrupted
) -> Report:
    """Runs the whole export. The caller looks at ``Report.passed``: a run that failed a check returns, too.

    Raises:
        ReportedError: of the kind and exit code that ``exporter.errors`` lists; nothing is left behind.
    """
    protected = [path for path in (request.path, request.calibration) if path is not None]
    with (
        concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool,
        staging(request.out, pool, protected) as stage,
        processes,  # ended before their directory is removed
    ):
        checkpoint = checkpoint_from_path(request.path)
        digest, intact = pool.submit(sha256_of, request.path), pool.submit(check_archive, request.path)
        architecture, tensors = repvgg_from_checkpoint(checkpoint, request)
        structure = structure_from_architecture(architecture, request.size)
        processes.simplifier.submit(structure.SerializeToString())
        subject = subject_from(request, checkpoint, architecture)
        images, source = images_from_request(subject)
        for line in [*subject.lines, f"inputs: {source}"]:
            notify(line)

        plain = plain_from_repvgg(architecture, tensors)
        reference = reference_from_repvgg(architecture, tensors, images)
        intact.result()
        tensors.clear()  # with the next line this unmaps the file, whose pages count as this process's memory
        checkpoint.tensors.clear()

        metadata = functools.partial(subject.metadata, digest.result())
        structure = onnx.ModelProto.FromString(processes.simplifier.result())
        graph = onnx_from_plain(plain, structure, metadata("fp32"))
        found = Findings(notify)
        found.add(checks.fusion_checks(plain))
        typed = []
        for precision in (precision for precision in PRECISIONS if precision.name in request.trt):
            path = stage.path(f"{request.path.stem}.{precision.name}.onnx")
            typed.append(typed_from_graph(precision, graph, reference, metadata(precision.name), path))
            submit(typed[-1], processes.compilers[precision.name], request)
            stage.seal(*typed[-1].files)
            found.add(contract_checks_of_typed(typed[-1], plain))
        run_float32 = functools.partial(outputs_from_graph, graph)
        if request.onnx:
            path = stage.path(f"{request.path.stem}.onnx")
            stage.seal(*write_onnx(graph, path))
            found.add([checks.contract_check("fp32", path, plain, graph)])
            run_float32 = functools.partial(outputs_from_file, path)
        del graph
        plain.tensors.clear()  # the files hold the weights from here on
        return_freed_memory()
        found.add([check_of_float32(subject, reference, run_float32)])
        for one in typed:
            found.add(numeric_checks_of_typed(one, reference))
        engines = []
        for one in typed:
            record, audit = engine_from_typed(one, processes.compilers[one.precision.name], progress)
            write_sidecar(one, record, subject, digest.result(), stage)
            found.add([checks.audit_check(one.precision, audit)])
            engines.append(record)
        report = report_from_findings(stage, subject, digest.result(), source, plain, reference, found, engines)
        interrupts.too_late()
        stage.publish() if report.passed else stage.reject()
    return report


def return_freed_memory() -> None:
    """Gives freed blocks back to the system, which glibc does not do by itself and ONNX Runtime allocates beside."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Findings:
    """The checks of a run in order; each is told as it comes."""

    def __init__(self, notify: Notify) -> None:
        self.checks: list[Check] = []
        self._notify = notify

    def add(self, found: Sequence[Check]) -> None:
        """Keeps and tells ``found``."""
        for check in found:
            self.checks.append(check)
            self._notify(f"{'ok  ' if check.passed else 'FAIL'} {check.stage}: {check.detail}")


def repvgg_from_checkpoint(checkpoint: Checkpoint, request: Request) -> tuple[Architecture, dict[str, Tensor]]:
    """The network and its tensors under canonical names, after every check that needs no arithmetic.

    Raises:
        ArchitectureRejected: not a RepVGG that is known, not a whole one, or not the ``--arch`` that was named.
    """
    where = request.path.name
    lineage = lineage_from_names(list(checkpoint.tensors), where)
    tensors, unexpected = canonical_from_raw(checkpoint.tensors, lineage, request.ignore_keys)
    architecture = architecture_from_tensors(
        tensors, lineage, unexpected=unexpected, where=where, strides=request.strides, eps=request.eps
    )
    if request.arch is not None:
        check_variant(architecture, variant_from_name(request.arch), where)
    return architecture, tensors


def subject_from(request: Request, checkpoint: Checkpoint, architecture: Architecture) -> Subject:
    """Everything about the run that goes into metadata, sidecars and the report."""
    normalise = normalisation(architecture.in_channels, request.mean, request.std)
    return Subject(request, checkpoint.container, checkpoint.others, architecture, normalise)


def images_from_request(subject: Subject) -> tuple[NDArray[np.float32], str]:
    """The four images that everything is compared on, and where they come from, in words."""
    request, channels = subject.request, subject.architecture.in_channels
    if request.calibration is None:
        return noise_images(channels, request.size), "seeded noise (no --calib given)"
    images = images_from_npz(request.calibration, channels, request.size, subject.normalise)
    return images, f"the first {len(images)} images of {request.calibration.name}"


def check_of_float32(subject: Subject, reference: Reference, run: Callable[[list[Batch]], list[Batch]]) -> Check:
    """ONNX Runtime's outputs in float32 against the reference."""
    loss = functools.partial(training_time_loss, subject.request, subject.architecture, reference)
    batches = checks.batches_of(reference.images)
    return checks.float32_check(reference.outputs, lambda: run(batches), PRECISIONS[0].gate, loss)


def training_time_loss(request: Request, architecture: Architecture, reference: Reference) -> float:
    """What the training-time network itself loses in float32; reads the checkpoint again, since few runs need it."""
    tensors = repvgg_from_checkpoint(checkpoint_from_path(request.path), request)[1]
    outputs = logits(architecture, tensors, torch.from_numpy(reference.images))
    return relative_error(torch.from_numpy(reference.outputs), outputs.double())


def report_from_findings(
    stage: Staging,
    subject: Subject,
    checkpoint_sha256: str,
    inputs: str,
    plain: Plain,
    reference: Reference,
    found: Findings,
    engines: Sequence[EngineRecord],
) -> Report:
    """Writes the golden vectors and the report's files; the report lists every file but itself."""
    golden = stage.path(GOLDEN_NAME)
    with reported_write_errors(stage.out):
        write_golden(reference, golden)
    stage.seal(golden)
    files = [FileRecord(path.name, path.stat().st_size, stage.sha256(path)) for path in stage.files]
    report = Report(
        version=VERSION,
        checkpoint=subject.checkpoint_record(checkpoint_sha256),
        architecture=subject.architecture_record,
        assumptions=subject.assumptions,
        inputs=inputs,
        certificates=tuple(dataclasses.asdict(certificate) for certificate in plain.certificates),
        checks=tuple(found.checks),
        engines=tuple(engines),
        files=tuple(files),
        versions=versions(),
    )
    for name, text in ((SUMMARY_NAME, markdown_from_report(report)), (REPORT_NAME, report.to_json())):
        write_whole(stage.path(name), text.encode())
        stage.seal(stage.path(name))
    return report
