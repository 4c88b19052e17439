"""The postconditions of a run, each a ``Check``: what was measured, the gate, and the verdict in words."""

from __future__ import annotations

import math
import pathlib

import numpy as np

from engines.audit import Audit, ExpectedConvolution, ExpectedMatrix, expected_from_nodes
from engines.onnx_file import Node
from engines.parity import compare
from exporter.contract import contract_problems, operation_counts
from exporter.errors import listed
from exporter.onnx_graph import Graph, weights_from_plain
from exporter.plain import CERTIFICATE_GATE, Plain
from exporter.precisions import Exponents, Precision
from exporter.reference import Reference
from exporter.report import Check


def fusion_checks(plain: Plain, reference: Reference) -> list[Check]:
    """The largest block certificate, and the whole network's outputs in float64, before any rounding.

    ``reference`` has at least the images of ``plain.outputs``.
    """
    worst = max(plain.certificates, key=lambda certificate: _nan_last(certificate.error))
    blocks = f"{len(plain.certificates)} blocks, the largest error is {worst.error:.1e} in {worst.block}"
    outputs = reference.layout.joined(plain.outputs)
    whole = compare(reference.outputs[: len(outputs)], outputs).relative_error
    detail = f"relative error {whole:.1e}"
    if worst.error <= CERTIFICATE_GATE < whole:
        detail += (
            ", though every block holds: the network amplifies rounding on these inputs; give real images (--calib)"
        )
    return [
        _gated("fusion, block by block", worst.error, CERTIFICATE_GATE, blocks),
        _gated("fusion, whole network in float64", whole, CERTIFICATE_GATE, detail),
    ]


def contract_check(
    stage: str, path: pathlib.Path, plain: Plain, graph: Graph, exponents: Exponents | None = None
) -> Check:
    """The graph contract on the file that was written, whose channels were rescaled by ``exponents``."""
    weights = weights_from_plain(plain)
    half = [name for name, array in graph.weights.items() if array.dtype == np.float16]
    problems = contract_problems(path, plain.architecture, weights, half, exponents or {})
    counts = ", ".join(f"{count} {operation}" for operation, count in sorted(operation_counts(graph.structure).items()))
    equal = f"all {len(weights)} weights bit-equal{' times powers of two' if exponents else ''}"
    detail = listed(problems, 3) if problems else f"{counts}; {equal}"
    return Check(f"{stage}, graph contract", not problems, None, None, detail)


def audit_check(precision: Precision, audit: Audit) -> Check:
    """The engine's file. An engine that cannot be audited passes as "not audited", and says so."""
    detail = listed(list(audit.problems), 3) if audit.problems else audit.line
    return Check(f"{precision.name}, engine audit", not audit.problems, None, None, detail)


def expected_convolutions(graph: Graph) -> tuple[list[ExpectedConvolution], list[ExpectedMatrix]]:
    """What an engine compiled from ``graph`` must hold: every Conv with the ReLU that reads it, every Gemm."""
    nodes = [
        Node(node.name, node.op_type, node.domain, tuple(node.input), tuple(node.output))
        for node in graph.structure.graph.node
    ]
    return expected_from_nodes(nodes, graph.weights, "the typed graph")


def _gated(stage: str, value: float, gate: float, detail: str) -> Check:
    return Check(stage, value <= gate, value, gate, f"{detail} (gate {gate:.0e})")


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
