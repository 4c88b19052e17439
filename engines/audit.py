"""Holds a compiled engine against the typed graph it was compiled from: precision, fusion, every weight, bit by bit.

The claim, for each convolution of the graph: exactly one kernel of the plan covers its node; that kernel takes and
holds numbers of the graph's dtype; the ReLU that follows is inside the same kernel; and the kernel's weights and bias,
put back from the plan's memory layout into (out, in / groups, height, width), have the graph's very bits. A compiler
may pad the input channels of a weight (it does so for the first convolution); the padding must then be zero.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.plan import (
    AUDITED_VERSIONS,
    Constant,
    ConvolutionKernel,
    Plan,
    header_from_file,
    plan_from_file,
)


@dataclasses.dataclass(frozen=True)
class ExpectedConvolution:
    """A Conv of the typed graph: ``weight`` (out, in / groups, height, width) and ``bias`` (out,) in its dtype."""

    node: str
    relu_node: str | None
    weight: NDArray[Any]
    bias: NDArray[Any]


@dataclasses.dataclass(frozen=True)
class ExpectedMatrix:
    """A Gemm of the typed graph with ``weight`` (classes, channels), in its dtype."""

    node: str
    weight: NDArray[Any]


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
        return f"{dtypes}, {fused}, {equal}"


def _short(dtype: str) -> str:
    return {"float16": "FP16", "float32": "FP32", "int8": "INT8"}.get(dtype, dtype)


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
        )
    return audit_of_plan(plan_from_file(path), convolutions, matrices)


def audit_of_plan(plan: Plan, convolutions: Sequence[ExpectedConvolution], matrices: Sequence[ExpectedMatrix]) -> Audit:
    """Compares ``plan`` with what the typed graph holds; every difference is named in ``problems``."""
    problems: list[str] = []
    by_dtype: dict[str, int] = {}
    with_relu = bit_equal = 0
    for expected in convolutions:
        kernels = [kernel for kernel in plan.convolutions if expected.node in kernel.onnx_nodes]
        if len(kernels) != 1:
            problems.append(f"{expected.node}: {len(kernels)} kernels of the engine compute it, not one")
            continue
        kernel = kernels[0]
        by_dtype[kernel.weight_dtype] = by_dtype.get(kernel.weight_dtype, 0) + 1
        problems += _dtype_problems(expected, kernel)
        relu_inside = kernel.relu and expected.relu_node in kernel.onnx_nodes
        with_relu += expected.relu_node is not None and relu_inside
        equal_problems = _weight_problems(plan, expected, kernel)
        bit_equal += not equal_problems
        problems += equal_problems
    for matrix in matrices:
        found = any(_is_matrix(plan, constant, matrix.weight) for constant in plan.constants)
        bit_equal += found
        if not found:
            problems.append(f"{matrix.node}: its matrix does not stand in the engine bit for bit")
    return Audit(
        audited=True,
        reason=None,
        kernels=plan.kernels,
        convolutions=len(plan.convolutions),
        expected_convolutions=len(convolutions),
        by_dtype=by_dtype,
        with_relu=with_relu,
        expected_relus=sum(expected.relu_node is not None for expected in convolutions),
        weights_bit_equal=bit_equal,
        expected_weights=len(convolutions) + len(matrices),
        problems=tuple(problems),
    )


def _dtype_problems(expected: ExpectedConvolution, kernel: ConvolutionKernel) -> list[str]:
    wanted = str(expected.weight.dtype)
    if kernel.weight_dtype == wanted and kernel.input_dtype == wanted:
        return []
    return [f"{expected.node}: asked for {wanted}, compiled with {kernel.input_dtype} x {kernel.weight_dtype}"]


def _weight_problems(plan: Plan, expected: ExpectedConvolution, kernel: ConvolutionKernel) -> list[str]:
    problems = []
    if kernel.weight is None or not _is_weight(plan, kernel.weight, expected.weight):
        problems.append(f"{expected.node}: its weights do not stand in the engine bit for bit")
    if kernel.bias is None or not _is_bias(plan, kernel.bias, expected.bias):
        problems.append(f"{expected.node}: its bias does not stand in the engine bit for bit")
    return problems


def _is_weight(plan: Plan, constant: Constant, weight: NDArray[Any]) -> bool:
    out, channels = weight.shape[:2]
    if constant.dtype != str(weight.dtype) or len(constant.dims) != weight.ndim:
        return False
    if constant.dims[0] != out or constant.dims[1] < channels or constant.dims[2:] != weight.shape[2:]:
        return False
    stored = plan.array(constant)
    return _bits_equal(stored[:, :channels], weight) and not stored[:, channels:].any()


def _is_bias(plan: Plan, constant: Constant, bias: NDArray[Any]) -> bool:
    return constant.dtype == str(bias.dtype) and _bits_equal(plan.array(constant).reshape(-1), bias)


def _is_matrix(plan: Plan, constant: Constant, weight: NDArray[Any]) -> bool:
    """A Gemm's matrix is kept as it is or transposed, with leading dimensions of 1 or none."""
    if constant.dtype != str(weight.dtype) or np.prod(constant.dims) != weight.size:
        return False
    stored = plan.array(constant)
    stored = stored.reshape([extent for extent in constant.dims if extent > 1] or [1])
    shape = [extent for extent in weight.shape if extent > 1] or [1]
    flat = weight.reshape(shape)
    return (stored.shape == flat.shape and _bits_equal(stored, flat)) or (
        stored.shape == flat.T.shape and _bits_equal(stored, flat.T)
    )


def _bits_equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal bit patterns: -0.0 differs from 0.0, and a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    unsigned = f"u{a.dtype.itemsize}"
    return bool(np.array_equal(np.ascontiguousarray(a).view(unsigned), np.ascontiguousarray(b).view(unsigned)))
