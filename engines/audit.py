"""Holds a compiled engine against the typed graph it was compiled from: precision, fusion, every weight, bit by bit.

The claim, for each convolution of the graph: exactly one kernel of the plan covers its node; that kernel takes and
holds numbers of the graph's dtype; the ReLU that follows is inside the same kernel; and the kernel's weights and bias,
put back from the plan's memory layout into (out, in / groups, height, width), have the graph's very bits. A compiler
may pad the channels of a weight (of the first convolution; for Turing, of any) or either side of the matrix; the
padding must then be zero. A 1x1 convolution of many channels may be compiled as a product of matrices; one of a few,
such as SE has, into generated code that reads each column of its weights, or each number, as a constant of its own,
and then every one must be there. A bias may have been moved into generated code that reads the result. Weights of one
single number may become part of the code; they are reported as not readable, and as nothing else.

In INT8 the weights are codes, kernel and input must be int8, and ``engines.audit_int8`` says what else must be there.
The results are half or float32, and generated code makes codes of them again: such kernels are counted.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.audit_int8 import scale_problems
from engines.expected import ExpectedConvolution, ExpectedMatrix, expected_from_nodes, expected_from_onnx
from engines.plan import AUDITED_VERSIONS, Plan, header_from_file, plan_from_file
from engines.plan_kernels import WeightedKernel
from engines.plan_weights import is_convolution, is_matrix, missing

__all__ = [
    "Audit",
    "ExpectedConvolution",
    "ExpectedMatrix",
    "audit_of_file",
    "audit_of_plan",
    "expected_from_nodes",
    "expected_from_onnx",
]

INT8 = "int8"


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
    int8_outputs: dict[str, int] = dataclasses.field(default_factory=dict)
    """By dtype, the results of the convolutions that were compiled in INT8."""
    requantize_kernels: int = 0
    """Kernels of an INT8 engine that only scale, clip or round the result of another, or add its bias."""

    @property
    def line(self) -> str:
        """The finding in one line, as in "22 of 22 convs in FP16, Conv+ReLU in one kernel each, ..."."""
        if not self.audited:
            return f"not audited: {self.reason}"
        dtypes = ", ".join(
            f"{count} of {self.expected_convolutions} convs in {_short(dtype)}{self._results(dtype)}"
            for dtype, count in sorted(self.by_dtype.items(), key=lambda item: item[0] != INT8)
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
        beside = f", {self.requantize_kernels} requantize kernels beside them" if self.int8_outputs else ""
        return f"{dtypes}, {fused}{beside}, {equal}{unread}"

    def _results(self, dtype: str) -> str:
        """As in " (half out)", of convolutions in INT8."""
        if dtype != INT8:
            return ""
        if len(self.int8_outputs) == 1:
            return f" ({_long(*self.int8_outputs)} out)"
        return f" ({', '.join(f'{count} {_long(name)}' for name, count in self.int8_outputs.items())} out)"

    @property
    def record(self) -> dict[str, Any]:
        """Every field and the line, for a sidecar or a report."""
        return {**dataclasses.asdict(self), "line": self.line}


def _short(dtype: str) -> str:
    return {"float16": "FP16", "float32": "FP32", INT8: "INT8"}.get(dtype, dtype)


def _long(dtype: str) -> str:
    return {"float16": "half", "float32": "float"}.get(dtype, dtype)


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
    results = [finding.output_dtype for finding in findings if finding.dtype == INT8 and finding.output_dtype]
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
        int8_outputs={dtype: results.count(dtype) for dtype in sorted(set(results))},
        requantize_kernels=sum(kernel.rescales for kernel in plan.functions) if results else 0,
    )


@dataclasses.dataclass(frozen=True)
class _Finding:
    """About one node: the dtype it was compiled in, and what is wrong with it or cannot be read."""

    dtype: str | None
    relu_inside: bool
    problems: tuple[str, ...]
    unread: tuple[str, ...]
    output_dtype: str | None = None


def _convolution_finding(plan: Plan, expected: ExpectedConvolution) -> _Finding:
    node = expected.node
    convolutions = [kernel for kernel in plan.convolutions if node in kernel.onnx_nodes]
    matrices = [kernel for kernel in plan.matrices if node in kernel.onnx_nodes]
    generated = [function for function in plan.functions if node in function.onnx_nodes]
    is_pointwise = expected.weight.shape[2:] == (1, 1)
    is_whole = expected.weight.size > 1 or expected.scales is not None
    if len(convolutions) + len(matrices) > 1:
        return _not_one_kernel(node, len(convolutions) + len(matrices))
    if matrices and not is_pointwise:
        problem = f"{node}: compiled as a product of matrices, which a window of {expected.weight.shape[2]} is not"
        return _Finding(dtype=None, relu_inside=False, problems=(problem,), unread=())
    if convolutions and is_whole:
        return _kernel_finding(
            plan, expected, convolutions[0], is_weight=is_convolution(plan, convolutions[0].weight, expected.weight)
        )
    if matrices:
        return _kernel_finding(
            plan, expected, matrices[0], is_weight=is_matrix(plan, matrices[0], expected.weight[:, :, 0, 0])
        )
    if (generated or convolutions) and is_pointwise and expected.scales is None:
        problems, unread = missing(plan, node, weights=expected.weight[:, :, 0, 0], bias=expected.bias)
        relu_inside = any(expected.relu_node in function.onnx_nodes for function in generated)
        was_read = not problems and expected.weight.size > 1
        return _Finding(str(expected.weight.dtype) if was_read else None, relu_inside, problems, unread)
    return _not_one_kernel(node, len(convolutions))


def _not_one_kernel(node: str, kernels: int) -> _Finding:
    problem = f"{node}: {kernels} kernels of the engine compute it, not one"
    return _Finding(dtype=None, relu_inside=False, problems=(problem,), unread=())


def _kernel_finding(plan: Plan, expected: ExpectedConvolution, kernel: WeightedKernel, *, is_weight: bool) -> _Finding:
    """Of a convolution that one kernel computes."""
    problems, unread = _kernel_problems(plan, expected, kernel, is_weight=is_weight)
    relu_inside = kernel.relu and expected.relu_node in kernel.onnx_nodes
    return _Finding(
        kernel.weight_dtype,
        relu_inside,
        (*problems, *_relu_problems(plan, expected, kernel)),
        unread,
        kernel.output_dtype,
    )


def _kernel_problems(
    plan: Plan, expected: ExpectedConvolution | ExpectedMatrix, kernel: WeightedKernel, *, is_weight: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is wrong with the one kernel of a node, and what cannot be read of it."""
    problems = _dtype_problems(expected.node, expected.weight, kernel)
    if problems and expected.scales is not None:
        return tuple(problems), ()  # what it then holds are other numbers, all of them
    if not is_weight:
        problems.append(f"{expected.node}: its weights do not stand in the engine bit for bit")
    if expected.scales is None:
        others, unread = missing(plan, expected.node, bias=expected.bias)
        if kernel.factor != 1 or (kernel.factors is not None and (plan.array(kernel.factors) != 1).any()):
            problems.append(f"{expected.node}: its result is multiplied by something else than 1")
    else:
        others, unread = scale_problems(plan, kernel, expected, expected.scales)
    return (*problems, *others), unread


def _relu_problems(plan: Plan, expected: ExpectedConvolution, kernel: WeightedKernel) -> tuple[str, ...]:
    """A ReLU that is neither in the kernel nor in generated code that reads the kernel's result."""
    relu, node = expected.relu_node, expected.node
    behind = [function for function in plan.functions if node in function.behind]
    if relu is None or (kernel.relu and relu in kernel.onnx_nodes):
        return ()
    if any(relu in function.onnx_nodes or "Relu" in function.name for function in behind):
        return ()
    return (f"{node}: no kernel of the engine computes the ReLU behind it",)


def _matrix_finding(plan: Plan, expected: ExpectedMatrix) -> _Finding:
    kernels = [kernel for kernel in plan.matrices if expected.node in kernel.onnx_nodes]
    if len(kernels) > 1:
        return _not_one_kernel(expected.node, len(kernels))
    if kernels and (kernels[0].weight is not None or expected.scales is not None):
        is_weight = is_matrix(plan, kernels[0], expected.weight)
        problems, unread = _kernel_problems(plan, expected, kernels[0], is_weight=is_weight)
    elif expected.scales is not None:
        return _not_one_kernel(expected.node, 0)
    else:
        problems, unread = missing(plan, expected.node, weights=expected.weight, bias=expected.bias)
        problems = (*(_dtype_problems(expected.node, expected.weight, kernels[0]) if kernels else ()), *problems)
    return _Finding(None, relu_inside=False, problems=problems, unread=unread)


def _dtype_problems(node: str, weight: NDArray[Any], kernel: WeightedKernel) -> list[str]:
    wanted = str(weight.dtype)
    if kernel.weight_dtype == wanted and kernel.input_dtype == wanted:
        return []
    return [f"{node}: asked for {wanted}, compiled with {kernel.input_dtype} x {kernel.weight_dtype}"]
