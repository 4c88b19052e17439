"""Whether weights stand in a compiled plan bit for bit, whatever memory layout the compiler gave them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.plan import Plan
from engines.plan_constants import Constant
from engines.plan_kernels import MatrixKernel
from engines.plan_program import NUMPY_DTYPES

_NUMPY_NAMES = frozenset(NUMPY_DTYPES.values())


def is_convolution(plan: Plan, constant: Constant | None, weight: NDArray[Any]) -> bool:
    """The constant is (out, in / groups, height, width) with either of the first two, perhaps, padded by zeros."""
    if constant is None or constant.dtype != str(weight.dtype) or len(constant.dims) != weight.ndim:
        return False
    return _begins_with(plan.array(constant), weight)


def is_matrix(plan: Plan, kernel: MatrixKernel, matrix: NDArray[Any]) -> bool:
    """The kernel's weight is (out, in), as it stands or turned, with either side, perhaps, padded by zeros."""
    constant = kernel.weight
    if constant is None or constant.dtype != str(matrix.dtype) or len(constant.dims) < 2:
        return False
    *many, rows, columns = constant.dims
    if set(many) - {1}:
        return False
    stored = plan.array(constant).reshape(rows, columns)
    return _begins_with(stored if kernel.weight_first else stored.T, matrix)


def _begins_with(stored: NDArray[Any], weight: NDArray[Any]) -> bool:
    """Whether ``stored`` is ``weight`` with the first two axes, perhaps, padded by zeros."""
    out, channels = weight.shape[:2]
    padding = (stored[out:], stored[:, channels:])
    return _bits_equal(stored[:out, :channels], weight) and not any(part.any() for part in padding)


def missing(plan: Plan, node: str, **expected: NDArray[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which of the ``expected`` matrices and vectors are not among the constants that the node's kernels read.

    Args:
        plan: the engine's.
        node: of the ONNX graph.
        expected: matrices (out, in) and vectors (out,), by what they are called.

    Returns:
        Problems, and what is only unread: a single number may have become part of the code.
    """
    own, behind = arrays_of(plan, plan.constants_of(node)), arrays_of(plan, plan.constants_behind(node))
    problems, unread = [], []
    for what, array in expected.items():
        if _matrix_stands(own, array) if array.ndim == 2 else vector_stands([*own, *behind], array):
            continue
        if array.ndim == 2 and _columns_stand(own, array):
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


def arrays_of(plan: Plan, constants: Iterable[Constant]) -> list[NDArray[Any]]:
    """The values of those constants whose type numpy has."""
    return [plan.array(constant) for constant in constants if constant.dtype in _NUMPY_NAMES]


def vector_stands(stored: Sequence[NDArray[Any]], vector: NDArray[Any]) -> bool:
    """Whether the vector (n,) is one of the arrays, perhaps padded by zeros."""
    flat = (array.reshape(-1) for array in stored)
    return any(_bits_equal(array[: vector.size], vector) and not array[vector.size :].any() for array in flat)


def _matrix_stands(stored: Sequence[NDArray[Any]], matrix: NDArray[Any]) -> bool:
    """Whether (out, in) is one constant, which is stored as (in, out), perhaps padded by zeros."""
    for array in stored:
        plane = array.reshape([extent for extent in array.shape if extent > 1] or [1, 1]) if array.ndim > 2 else array
        for turned in (plane.T,) if plane.ndim == 2 else ():
            if _begins_with(turned, matrix):
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
