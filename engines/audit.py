"""Holds a compiled engine against the typed graph it was compiled from: precision, fusion, every weight, bit by bit.

The claim, for each convolution of the graph: exactly one kernel of the plan covers its node; that kernel takes and
holds numbers of the graph's dtype; the ReLU that follows is inside the same kernel; and the kernel's weights and bias,
put back from the plan's memory layout into (out, in / groups, height, width), have the graph's very bits. A compiler
may pad the channels of a weight (of the first convolution; for Turing, of any) or either side of the matrix; the
padding must then be zero. A 1x1 convolution of a few channels, such as SE has, may be compiled into generated code that
reads each column of its weights, or each number, as a constant of its own; then every one must be there. A bias may
have been moved into the kernel that comes next. Weights of one single number may become part of the code; they are
reported as not readable, and as nothing else.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputRejected
from engines.onnx_file import Node, OnnxFile
from engines.plan import (
    AUDITED_VERSIONS,
    NUMPY_DTYPES,
    Constant,
    ConvolutionKernel,
    Plan,
    header_from_file,
    plan_from_file,
)

_NUMPY_NAMES = frozenset(NUMPY_DTYPES.values())


@dataclasses.dataclass(frozen=True)
class ExpectedConvolution:
    """A Conv of the typed graph: ``weight`` (out, in / groups, height, width) and ``bias`` (out,) in its dtype."""

    node: str
    relu_node: str | None
    weight: NDArray[Any]
    bias: NDArray[Any]


@dataclasses.dataclass(frozen=True)
class ExpectedMatrix:
    """A Gemm of the typed graph: ``weight`` (classes, channels) and ``bias`` (classes,) in its dtype."""

    node: str
    weight: NDArray[Any]
    bias: NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was found. ``problems`` is empty exactly when the engine is what the graph says, or was not audited."""

    audited: bool
    reason: str | None
    kernels: int
    convolutions: int
    expected_convolutions: int
    by_dtype: dict[str, int]
    with_relu: int
    expected_relus: int
    weights_bit_equal: int
    expected_weights: int
    problems: tuple[str, ...]
    unproven: tuple[str, ...]
    """Weights that are single numbers, which the compiler may write into code, where they cannot be read."""

    @property
    def line(self) -> str:
        """The finding in one line, as in "22 of 22 convs in FP16, Conv+ReLU in one kernel each, ..."."""
        if not self.audited:
            return f"not audited: {self.reason}"
        dtypes = ", ".join(
            f"{count} of {self.expected_convolutions} convs in {_short(d)}" for d, count in self.by_dtype.items()
        )
        fused = (
            "Conv+ReLU in one kernel each"
            if self.with_relu == self.expected_relus
            else f"Conv+ReLU in one kernel for {self.with_relu} of {self.expected_relus}"
        )
        equal = (
            f"all {self.expected_weights} weights bit-equal"
            if self.weights_bit_equal == self.expected_weights
            else f"{self.weights_bit_equal} of {self.expected_weights} weights bit-equal"
        )
        unread = f" (not readable: {'; '.join(self.unproven)})" if self.unproven else ""
        return f"{dtypes}, {fused}, {equal}{unread}"

    @property
    def record(self) -> dict[str, Any]:
        """Every field and the line, for a sidecar or a report."""
        return {**dataclasses.asdict(self), "line": self.line}


def _short(dtype: str) -> str:
    return {"float16": "FP16", "float32": "FP32", "int8": "INT8"}.get(dtype, dtype)


def expected_from_onnx(onnx: OnnxFile) -> tuple[list[ExpectedConvolution], list[ExpectedMatrix]]:
    """What an engine compiled from a typed ONNX file must hold; see ``expected_from_nodes``."""
    return expected_from_nodes(onnx.nodes, onnx.weights, str(onnx.path))


def expected_from_nodes(
    nodes: Sequence[Node], weights: Mapping[str, NDArray[Any]], where: str
) -> tuple[list[ExpectedConvolution], list[ExpectedMatrix]]:
    """Every Conv, with the ReLU that reads it, and every Gemm; ``where`` names the graph in errors.

    Raises:
        InputRejected: one of them has no bias, or reads a weight or bias that is not stored in the file.
    """
    relu_of = {node.inputs[0]: node.name for node in nodes if node.op_type == "Relu" and node.inputs}

    def stored(node: Node) -> list[NDArray[Any]]:
        if len(node.inputs) != 3 or not node.outputs or not all(name in weights for name in node.inputs[1:]):
            raise InputRejected(
                f"{where}: {node.op_type} {node.name} has no stored weight and bias; export it with python -m exporter"
            )
        return [weights[name] for name in node.inputs[1:]]

    convolutions = [
        ExpectedConvolution(node.name, relu_of.get(node.outputs[0]), weight, bias)
        for node in nodes
        if node.op_type == "Conv"
        for weight, bias in [stored(node)]
    ]
    matrices = [ExpectedMatrix(node.name, *stored(node)) for node in nodes if node.op_type == "Gemm"]
    return convolutions, matrices


def audit_of_file(
    path: pathlib.Path, convolutions: Sequence[ExpectedConvolution], matrices: Sequence[ExpectedMatrix]
) -> Audit:
    """Audits the engine at ``path``; an SDK whose files cannot be read gives ``audited`` False and the reason.

    Raises:
        PlanRejected: the file is not an engine, is cut short, or contradicts itself.
    """
    header = header_from_file(path)
    if header.sdk != "tensorrt_rtx" or header.version not in AUDITED_VERSIONS:
        known = ", ".join(".".join(map(str, version)) for version in AUDITED_VERSIONS)
        reason = f"plans of {header.sdk} {header.version_text} cannot be read (known: tensorrt_rtx {known})"
        return Audit(
            audited=False,
            reason=reason,
            kernels=0,
            convolutions=0,
            expected_convolutions=len(convolutions),
            by_dtype={},
            with_relu=0,
            expected_relus=0,
            weights_bit_equal=0,
            expected_weights=0,
            problems=(),
            unproven=(),
        )
    return audit_of_plan(plan_from_file(path), convolutions, matrices)


def audit_of_plan(plan: Plan, convolutions: Sequence[ExpectedConvolution], matrices: Sequence[ExpectedMatrix]) -> Audit:
    """Compares ``plan`` with what the typed graph holds; every difference is named in ``problems``."""
    findings = [_convolution_finding(plan, expected) for expected in convolutions]
    dtypes = [finding.dtype for finding in findings if finding.dtype is not None]
    with_relu = sum(finding.relu_inside for finding in findings)
    findings += [_matrix_finding(plan, expected) for expected in matrices]
    problems = [problem for finding in findings for problem in finding.problems]
    nodes: list[ExpectedConvolution | ExpectedMatrix] = [*convolutions, *matrices]
    wide = [expected.node for expected in nodes if expected.weight.dtype == np.float32]
    if plan.tf32 and wide:
        problems.insert(0, f"{wide[0]}: asked for float32, compiled with TF32 allowed; build it again")
    return Audit(
        audited=True,
        reason=None,
        kernels=plan.kernels,
        convolutions=len(plan.convolutions),
        expected_convolutions=len(convolutions),
        by_dtype={dtype: dtypes.count(dtype) for dtype in sorted(set(dtypes))},
        with_relu=with_relu,
        expected_relus=sum(expected.relu_node is not None for expected in convolutions),
        weights_bit_equal=sum(not finding.problems and not finding.unread for finding in findings),
        expected_weights=len(findings),
        problems=tuple(problems),
        unproven=tuple(unread for finding in findings for unread in finding.unread),
    )


@dataclasses.dataclass(frozen=True)
class _Finding:
    """About one node: the dtype it was compiled in, and what is wrong with it or cannot be read."""

    dtype: str | None
    relu_inside: bool
    problems: tuple[str, ...]
    unread: tuple[str, ...]


def _convolution_finding(plan: Plan, expected: ExpectedConvolution) -> _Finding:
    kernels = [kernel for kernel in plan.convolutions if expected.node in kernel.onnx_nodes]
    generated = [function for function in plan.functions if expected.node in function.onnx_nodes]
    if len(kernels) == 1 and expected.weight.size > 1:
        kernel = kernels[0]
        problems, unread = _stand(plan, expected.node, bias=expected.bias)
        relu_inside = kernel.relu and expected.relu_node in kernel.onnx_nodes
        return _Finding(
            kernel.weight_dtype, relu_inside, (*_kernel_problems(plan, expected, kernel), *problems), unread
        )
    if (generated or kernels) and len(kernels) < 2 and expected.weight.shape[2:] == (1, 1):
        problems, unread = _stand(plan, expected.node, weights=expected.weight[:, :, 0, 0], bias=expected.bias)
        relu_inside = any(expected.relu_node in function.onnx_nodes for function in generated)
        return _Finding(str(expected.weight.dtype), relu_inside, problems, unread)
    problem = f"{expected.node}: {len(kernels)} kernels of the engine compute it, not one"
    return _Finding(dtype=None, relu_inside=False, problems=(problem,), unread=())


def _matrix_finding(plan: Plan, expected: ExpectedMatrix) -> _Finding:
    problems, unread = _stand(plan, expected.node, weights=expected.weight, bias=expected.bias)
    return _Finding(dtype=None, relu_inside=False, problems=problems, unread=unread)


def _kernel_problems(plan: Plan, expected: ExpectedConvolution, kernel: ConvolutionKernel) -> list[str]:
    problems = []
    wanted = str(expected.weight.dtype)
    if kernel.weight_dtype != wanted or kernel.input_dtype != wanted:
        compiled = f"{kernel.input_dtype} x {kernel.weight_dtype}"
        problems.append(f"{expected.node}: asked for {wanted}, compiled with {compiled}")
    if kernel.weight is None or not _is_weight(plan, kernel.weight, expected.weight):
        problems.append(f"{expected.node}: its weights do not stand in the engine bit for bit")
    return problems


def _is_weight(plan: Plan, constant: Constant, weight: NDArray[Any]) -> bool:
    """The constant is (out, in / groups, height, width) with either of the first two, perhaps, padded by zeros."""
    if constant.dtype != str(weight.dtype) or len(constant.dims) != weight.ndim:
        return False
    stored, (out, channels) = plan.array(constant), weight.shape[:2]
    padding = (stored[out:], stored[:, channels:])
    return _bits_equal(stored[:out, :channels], weight) and not any(part.any() for part in padding)


def _stand(plan: Plan, node: str, **expected: NDArray[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which of the ``expected`` matrices and vectors are not among the constants that the node's kernels read.

    Returns:
        Problems, and what is only unread: a single number may have become part of the code.
    """
    stored = [plan.array(constant) for constant in plan.constants_of(node) if constant.dtype in _NUMPY_NAMES]
    problems, unread = [], []
    for what, array in expected.items():
        if _matrix_stands(stored, array) if array.ndim == 2 else _vector_stands(stored, array):
            continue
        if array.ndim == 2 and _columns_stand(stored, array):
            if array.shape[1] > 1:
                unread.append(f"{node}: the order of its columns")
            continue
        if array.size == 1:
            unread.append(f"{node}: its {what} of one number")
        else:
            problems.append(
                f"{node}: its {what} do not stand in the engine bit for bit".replace("bias do", "bias does")
            )
    return tuple(problems), tuple(unread)


def _vector_stands(stored: Sequence[NDArray[Any]], vector: NDArray[Any]) -> bool:
    """Whether the vector is a constant, perhaps padded by zeros."""
    flat = (array.reshape(-1) for array in stored)
    return any(_bits_equal(array[: vector.size], vector) and not array[vector.size :].any() for array in flat)


def _matrix_stands(stored: Sequence[NDArray[Any]], matrix: NDArray[Any]) -> bool:
    """Whether (out, in) is one constant, which is stored as (in, out), perhaps padded by zeros."""
    rows, columns = matrix.shape
    for array in stored:
        plane = array.reshape([extent for extent in array.shape if extent > 1] or [1, 1]) if array.ndim > 2 else array
        for turned in (plane.T,) if plane.ndim == 2 else ():
            padding = (turned[rows:], turned[:, columns:])
            if _bits_equal(turned[:rows, :columns], matrix) and not any(part.any() for part in padding):
                return True
    return False


def _columns_stand(stored: Sequence[NDArray[Any]], matrix: NDArray[Any]) -> bool:
    """Whether each column of (out, in), or each number, is a constant; which of them is which cannot be read."""
    rows = matrix.shape[0]
    vectors = list(matrix.T)
    numbers = [number for vector in vectors for number in vector[:, None]]
    flat = [array.reshape(-1) for array in stored if array.size <= rows]
    return any(all(any(_bits_equal(array, part) for array in flat) for part in parts) for parts in (vectors, numbers))


def _bits_equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal bit patterns: -0.0 differs from 0.0, and a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    unsigned = f"u{a.dtype.itemsize}"
    return bool(np.array_equal(np.ascontiguousarray(a).view(unsigned), np.ascontiguousarray(b).view(unsigned)))
