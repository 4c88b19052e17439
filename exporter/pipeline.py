"""From a checkpoint to checked files: the page to read first.

    model.pt --checkpoint_from_path--> tensors --network_from_checkpoint--> architecture
      --reference_from_repvgg--> float64 answers of the branches themselves: what everything else must give
      --plain_from_repvgg--> one 3x3 convolution per block, each certified against its own branches
      --onnx_from_plain--> float32 graph --typed_from_graph, int8_from_request--> a typed graph per precision
      --write_onnx--> files, read back and held to the graph contract, run by ONNX Runtime against the reference
      --engine_from_typed--> engines, audited against their typed graphs, each with a sidecar

Every form of the network computes the same inputs, and the ledger says what each step cost (``exporter.ledger``). What
no tensor tells is asked of witnesses from outside: the statistics in the batch norms, and the user's own answers.

An engine compiles in a process of its own while the graphs are checked here. Files appear in the output directory at
the end and together; a run that fails a check leaves them as ``*.rejected``.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from engines.compilation import Progress
from engines.files import reported_write_errors, sha256_of, write_whole
from engines.interrupts import Uninterrupted
from engines.traffic import prediction_of_file
from exporter import checks
from exporter.accuracy import BASELINE, accuracy_from_labels
from exporter.checkpoint import Checkpoint, check_archive, checkpoint_from_path
from exporter.description import Subject
from exporter.findings import Findings, Notify
from exporter.images import normalisation
from exporter.inputs import Inputs, inputs_from_request
from exporter.int8 import int8_from_request
from exporter.layers import (
    LayerGraph,
    farthest_row,
    first_departing,
    layer_stages,
    layers_of_network,
    rows_from_stages,
)
from exporter.ledger import Run, largest_batch
from exporter.measured import FLOAT32_LOSS_FACTOR, Measured, at_least
from exporter.model import outputs_of_network
from exporter.onnx_file import graph_from_file, write_onnx
from exporter.onnx_graph import Graph, onnx_from_plain, structure_from_architecture
from exporter.onnxruntime_cpu import Session, session_from_file, session_from_graph
from exporter.outside import expectation_checks, source_of_peaks, witness_from_inputs
from exporter.plain import Plain, plain_from_repvgg
from exporter.precisions import INT8, PRECISIONS
from exporter.processes import Processes
from exporter.reference import GOLDEN_NAME, PeakObserver, Reference, reference_from_repvgg, with_peaks_of, write_golden
from exporter.report import AccuracyRow, Check, FileRecord, LayerRow, Report, markdown_from_report
from exporter.repvgg import Network, network_from_checkpoint, training_time_loss
from exporter.request import Request
from exporter.sizes import measured_at_ends
from exporter.staging import REPORT_NAME, SUMMARY_NAME, Staging, staging
from exporter.typed import (
    Typed,
    contract_checks_of_typed,
    engine_check,
    engine_from_typed,
    numeric_checks_of_typed,
    session_of_typed,
    submit,
    typed_from_graph,
    write_sidecar,
)

SIMPLIFIED = "ONNX simplified, fp32"


def report_from_checkpoint(
    request: Request, processes: Processes, notify: Notify, progress: Progress, interrupts: Uninterrupted
) -> Report:
    """Runs the whole export. The caller looks at ``Report.passed``: a run that failed a check returns, too.

    Raises:
        ReportedError: of the kind and exit code that ``exporter.errors`` lists; nothing is left behind.
    """
    protected = [path for path in (request.path, request.calibration, request.labels, request.expect) if path]
    with (
        concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool,
        staging(request.out, pool, protected) as stage,
        processes,  # ended before their directory is removed
    ):
        checkpoint = checkpoint_from_path(request.path, request.weights)
        digest, intact = pool.submit(sha256_of, request.path), pool.submit(check_archive, request.path)
        network = network_from_checkpoint(checkpoint, request)
        architecture, tensors = network.architecture, network.tensors
        structure = structure_from_architecture(architecture, request.size if request.size_range is None else None)
        processes.simplifier.submit(structure.SerializeToString())
        subject = subject_from(request, checkpoint, network)
        inputs = inputs_from_request(request, architecture, subject.normalise)
        for line in [*subject.lines, f"inputs: {inputs.source}", *(f"note: {note}" for note in inputs.notes)]:
            notify(line)

        found = Findings(notify)
        found.add(expectation_checks(architecture, tensors, inputs))
        witnessed = PeakObserver()
        found.add_witness(*witness_from_inputs(architecture, tensors, inputs, request, witnessed))
        reference = reference_from_repvgg(architecture, tensors, inputs.images)
        ends = measured_at_ends(architecture, tensors, inputs, request)
        plain = plain_from_repvgg(architecture, tensors, inputs.affordable)
        intact.result()
        tensors.clear()  # with the next line this unmaps the file, whose pages count as this process's memory
        checkpoint.tensors.clear()
        found.add(checks.fusion_checks(plain, reference))
        measured = Measured(reference, largest_batch(architecture, request.size, request.batch[2]))
        measure_fused(measured, plain, structure)

        metadata = functools.partial(subject.metadata, digest.result())
        simplified = onnx.ModelProto.FromString(processes.simplifier.result())
        graph = onnx_from_plain(plain, simplified, metadata("fp32"))
        seen = with_peaks_of(reference, [witnessed.peaks, *(end.source.peaks for end in ends)])
        typed = typed_from_request(request, graph, plain, seen, metadata, processes, stage, found)
        typed += int8_from_request(subject, graph, plain, inputs, digest.result(), processes, stage, found, progress)
        for one in typed:
            found.add_headroom(one.headroom, source_of_peaks(inputs, found.witness))
        path = float32_file_from_graph(request, graph, plain, stage, found)
        float32 = functools.partial(session_from_file, path) if path else functools.partial(session_from_graph, graph)
        del graph
        plain.tensors.clear()  # the files hold the weights from here on
        return_freed_memory()
        everywhere = (measured, *ends)
        add_numeric_checks(subject, everywhere, float32, typed, found)
        found.add_accuracy(accuracy_from_inputs(inputs, float32, typed, progress), request.max_drop)
        if request.layers:
            found.add_layers(*layers_from_run(subject, measured, typed, path, found))
        add_engines(request, typed, everywhere, processes, stage, found, progress)
        write_golden_vectors(reference, stage)
        files = [FileRecord(file.name, file.stat().st_size, stage.sha256(file)) for file in stage.files]
        report = found.report(subject, digest.result(), inputs.source, plain, everywhere, files)
        write_report(report, stage)
        interrupts.too_late()
        stage.publish() if report.passed else stage.reject()
    return report


def typed_from_request(
    request: Request,
    graph: Graph,
    plain: Plain,
    reference: Reference,
    metadata: Callable[[str], Mapping[str, str]],
    processes: Processes,
    stage: Staging,
    found: Findings,
) -> list[Typed]:
    """The typed graph of every precision asked for, written and held to the contract; its engine is being compiled."""
    typed = []
    for precision in (precision for precision in PRECISIONS if precision.name in request.trt and precision is not INT8):
        path = stage.path(f"{request.path.stem}.{precision.name}.onnx")
        typed.append(typed_from_graph(precision, graph, reference, metadata(precision.name), path))
        submit(typed[-1], processes.compilers[precision.name], request)
        stage.seal(*typed[-1].files)
        found.add(contract_checks_of_typed(typed[-1], plain))
    return typed


def float32_file_from_graph(
    request: Request, graph: Graph, plain: Plain, stage: Staging, found: Findings
) -> pathlib.Path | None:
    """``<stem>.onnx``, held to the contract, where it is asked for."""
    if not request.onnx:
        return None
    path = stage.path(f"{request.path.stem}.onnx")
    stage.seal(*write_onnx(graph, path))
    found.add([checks.contract_check("fp32", path, plain, graph)])
    return path


def add_numeric_checks(
    subject: Subject,
    everywhere: Sequence[Measured],
    float32: Callable[[], Session],
    typed: Sequence[Typed],
    found: Findings,
) -> None:
    """What the float32 graph and each typed one compute, at every size; the usual size comes first."""
    usual, *ends = everywhere
    found.add_gated("fp32", check_of_float32(subject, usual, float32))
    found.add([check_of_float32(subject, end, float32) for end in ends])
    for one in typed:
        found.add([check for measured in everywhere for check in numeric_checks_of_typed(one, measured)])


def add_engines(
    request: Request,
    typed: Sequence[Typed],
    everywhere: Sequence[Measured],
    processes: Processes,
    stage: Staging,
    found: Findings,
    progress: Progress,
) -> None:
    """Waits for each engine, audits it, runs it where a GPU is, and writes its sidecar."""
    for one in (one for one in typed if one.engine is not None):
        record, audit = engine_from_typed(one, processes.compilers[one.precision.name], progress)
        write_sidecar(one, record, request, stage)
        required = "trt" in request.require
        run = [engine_check(one, measured, required=required) for measured in everywhere]
        once = {check.stage: check for check in run}  # without a GPU no size is any different
        if one.precision is INT8:
            found.add_traffic(prediction_of_file(stage.path(record.name), request.batch[1], request.size))
        found.add_engine(record, [checks.audit_check(one.precision, audit), *once.values()])


def return_freed_memory() -> None:
    """Gives freed blocks back to the system, which glibc does not do by itself and ONNX Runtime allocates beside."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def subject_from(request: Request, checkpoint: Checkpoint, network: Network) -> Subject:
    """Everything about the run that goes into metadata, sidecars and the report."""
    normalise = normalisation(network.architecture.in_channels, request.mean, request.std)
    return Subject(
        request,
        checkpoint.container,
        checkpoint.others,
        checkpoint.weights,
        network.architecture,
        normalise,
        network.prefix,
        network.dropped,
        network.lineage.note,
    )


def measure_fused(measured: Measured, plain: Plain, structure: onnx.ModelProto) -> None:
    """The fused network before it is a file: in float64, in float32 by torch, and as an ONNX graph."""
    measured.keep_outputs("fused, float64", plain.outputs)
    count = len(next(iter(plain.outputs.values())))
    measured.keep("fused, float32", lambda: functools.partial(outputs_of_plain, plain), count)
    measured.keep("ONNX", lambda: session_from_graph(onnx_from_plain(plain, structure, {})).run, count)
    return_freed_memory()


def check_of_float32(subject: Subject, measured: Measured, session: Callable[[], Session]) -> Check:
    """ONNX Runtime's outputs in float32 against the reference, also in the largest batch."""
    loss = functools.partial(training_time_loss, subject.request, subject.architecture, measured.source)
    judge = at_least(PRECISIONS[0].gate, loss, FLOAT32_LOSS_FACTOR)
    title = "fp32, ONNX Runtime against float64"
    return measured.check(SIMPLIFIED, title, lambda: session().run, judge, largest=True)


def outputs_of_plain(plain: Plain, batch: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """The fused network in float32, by torch: (n, C, H, W) to the outputs by name."""
    outputs = outputs_of_network(plain.architecture, plain.tensors, torch.from_numpy(batch))
    return {name: value.numpy() for name, value in outputs.items()}


def accuracy_from_inputs(
    inputs: Inputs, float32: Callable[[], Session], typed: Sequence[Typed], progress: Progress
) -> tuple[AccuracyRow, ...]:
    """Top-1 of float32 and of each precision that is exported, where there are labels."""
    if inputs.labelled is None or inputs.labels is None:
        return ()
    networks: dict[str, Run] = {BASELINE: float32().run}
    networks |= {one.name: session_of_typed(one).run for one in typed if one.precision.twin is not None}
    return accuracy_from_labels(inputs.labelled, inputs.labels, networks, progress)


def layers_from_run(
    subject: Subject, measured: Measured, typed: Sequence[Typed], float32: pathlib.Path | None, found: Findings
) -> tuple[list[LayerRow], str | None]:
    """Every form of the network layer by layer; reads the checkpoint again, and the files that were written."""
    request = subject.request
    network = network_from_checkpoint(checkpoint_from_path(request.path, request.weights), request)
    architecture, tensors = network.architecture, network.tensors
    row = farthest_row(measured.reference, measured.stages)
    image = measured.images[row : row + 1]
    graphs = []
    if float32 is not None:
        graphs.append(LayerGraph(SIMPLIFIED, graph_from_file(float32), found.gates[BASELINE], {}))
    graphs += [
        LayerGraph(one.stage, one.computed, one.precision.gate.max_relative_error, one.exponents)
        for one in typed
        if one.precision is not INT8  # its layers have a table of their own
    ]
    stages = layer_stages(architecture, tensors, request.size, image, graphs, found.gates[BASELINE])
    rows = rows_from_stages(layers_of_network(architecture, tensors, torch.from_numpy(image).double()), stages)
    return rows, first_departing(rows, stages)


def write_golden_vectors(reference: Reference, stage: Staging) -> None:
    """``golden.npz``."""
    golden = stage.path(GOLDEN_NAME)
    with reported_write_errors(stage.out):
        write_golden(reference, golden)
    stage.seal(golden)


def write_report(report: Report, stage: Staging) -> None:
    """The report's files; it lists every file but these."""
    for name, text in ((SUMMARY_NAME, markdown_from_report(report)), (REPORT_NAME, report.to_json())):
        write_whole(stage.path(name), text.encode())
        stage.seal(stage.path(name))
