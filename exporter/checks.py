"""The postconditions of a run, each a ``Check``: what was measured, the gate, and the verdict in words."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.audit import Audit, ExpectedConvolution, ExpectedMatrix
from engines.parity import Comparison, Gate, compare
from exporter.contract import contract_problems, operation_counts
from exporter.errors import VerificationFailed, listed
from exporter.onnx_graph import OUTPUT, Graph, weights_from_plain
from exporter.plain import CERTIFICATE_GATE, Plain
from exporter.precisions import Precision
from exporter.report import Check

FLOAT32_LOSS_FACTOR = 4.0
Outputs = NDArray[np.float32]


def fusion_checks(plain: Plain) -> list[Check]:
    """The largest block certificate, and the whole network in float64."""
    worst = max(plain.certificates, key=lambda certificate: _nan_last(certificate.error))
    blocks = f"{len(plain.certificates)} blocks, the largest error is {worst.error:.1e} in {worst.block}"
    return [
        _gated("fusion, block by block", worst.error, CERTIFICATE_GATE, blocks),
        _gated(
            "fusion, whole network in float64",
            plain.float64_error,
            CERTIFICATE_GATE,
            f"relative error {plain.float64_error:.1e}",
        ),
    ]


def contract_check(stage: str, path: pathlib.Path, plain: Plain, graph: Graph) -> Check:
    """The graph contract on the file that was written."""
    weights = weights_from_plain(plain)
    half = [name for name, array in graph.weights.items() if array.dtype == np.float16]
    problems = contract_problems(path, plain.architecture, weights, half)
    counts = ", ".join(f"{count} {operation}" for operation, count in sorted(operation_counts(graph.structure).items()))
    detail = listed(problems, 3) if problems else f"{counts}; all {len(weights)} weights bit-equal"
    return Check(f"{stage}, graph contract", not problems, None, None, detail)


def float32_check(
    reference: NDArray[np.float64], outputs: Callable[[], Sequence[Outputs]], gate: Gate, loss: Callable[[], float]
) -> Check:
    """ONNX Runtime's float32 outputs against the float64 reference.

    The gate is the larger of the precision's own and four times what the training-time model itself loses in float32;
    ``loss`` computes the latter and is called only when the first does not suffice.
    """

    def judged(comparison: Comparison) -> tuple[Gate, str | None]:
        failure = gate.failure(comparison)
        if failure is None or comparison.non_finite:
            return gate, failure
        wider = Gate(max(gate.max_relative_error, FLOAT32_LOSS_FACTOR * loss()), gate.top1)
        return wider, wider.failure(comparison)

    return _parity("fp32, ONNX Runtime against float64", reference, outputs, judged)


def twin_check(precision: Precision, reference: NDArray[np.float64], outputs: Callable[[], Sequence[Outputs]]) -> Check:
    """The typed graph's rounding and range, computed by its explicit-cast twin, against the float64 reference."""
    gate = precision.gate
    stage = f"{precision.name}, explicit-cast twin against float64"
    return _parity(stage, reference, outputs, lambda comparison: (gate, gate.failure(comparison)))


def audit_check(precision: Precision, audit: Audit) -> Check:
    """The engine's file. An engine that cannot be audited passes as "not audited", and says so."""
    detail = listed(list(audit.problems), 3) if audit.problems else audit.line
    return Check(f"{precision.name}, engine audit", not audit.problems, None, None, detail)


def expected_convolutions(graph: Graph) -> tuple[list[ExpectedConvolution], list[ExpectedMatrix]]:
    """What an engine compiled from ``graph`` must hold: every Conv with the ReLU that reads it, every Gemm."""
    nodes = graph.structure.graph.node
    relu_of = {node.input[0]: node.name for node in nodes if node.op_type == "Relu"}
    convolutions = [
        ExpectedConvolution(
            node.name, relu_of.get(node.output[0]), graph.weights[node.input[1]], graph.weights[node.input[2]]
        )
        for node in nodes
        if node.op_type == "Conv"
    ]
    matrices = [
        ExpectedMatrix(node.name, graph.weights[node.input[1]], graph.weights[node.input[2]])
        for node in nodes
        if node.op_type == "Gemm"
    ]
    return convolutions, matrices


def batches_of(images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Four images as a batch of one and a batch of three, so that the batch is seen to be dynamic."""
    return [images[:1], images[1:]]


def _parity(
    stage: str,
    reference: NDArray[np.float64],
    outputs: Callable[[], Sequence[Outputs]],
    judged: Callable[[Comparison], tuple[Gate, str | None]],
) -> Check:
    try:
        comparison = compare(reference, np.concatenate(outputs()))
    except (VerificationFailed, ValueError) as error:
        return Check(stage, passed=False, value=None, gate=None, detail=f"{OUTPUT}: {error}")
    gate, failure = judged(comparison)
    detail = (
        f"relative error {comparison.relative_error:.1e} (gate {gate.max_relative_error:.1e}), "
        f"SQNR {comparison.sqnr_db:.1f} dB, top-1 agrees on {comparison.top1_agreement:.0%} of {comparison.rows}"
    )
    return Check(
        stage,
        failure is None,
        comparison.relative_error,
        gate.max_relative_error,
        f"{failure}; {detail}" if failure else detail,
    )


def _gated(stage: str, value: float, gate: float, detail: str) -> Check:
    return Check(stage, value <= gate, value, gate, f"{detail} (gate {gate:.0e})")


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
