"""What an ONNX operation makes of its operands: dtype and extents, by ONNX's own rules, for exactly those in RULES.

Operands that do not fit are a ``ValueError`` that says which; ``engines.roofline.tensor_types`` adds which node it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.onnx_file import DTYPES, NUMPY_DTYPES, Attribute, Node

Shape = tuple[int, ...]
Constants = Mapping[str, NDArray[Any]]

LARGEST_EXTENT = 1 << 31
SAME_PADDING = ("SAME_UPPER", "SAME_LOWER")


@dataclasses.dataclass(frozen=True)
class TensorType:
    """A tensor's dtype, by its name in numpy, and its extents."""

    dtype: str
    shape: Shape

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self.numbers * np.dtype(self.dtype).itemsize


class Operation:
    """A node with what its inputs are, which must all be known. Everything that does not fit is a ``ValueError``."""

    def __init__(self, node: Node, types: Mapping[str, TensorType], constants: Constants) -> None:
        self._node, self._types, self._constants = node, types, constants

    def has(self, index: int) -> bool:
        """Whether input ``index`` is given."""
        return len(self._node.inputs) > index and self._node.inputs[index] != ""

    def input(self, index: int, rank: int = 0) -> TensorType:
        """What input ``index`` is, of at least ``rank`` axes."""
        if not self.has(index):
            raise ValueError(f"it has no input {index}")
        name = self._node.inputs[index]
        if len(self._types[name].shape) < rank:
            raise ValueError(f"{name} has {len(self._types[name].shape)} axes, not {rank} or more")
        return self._types[name]

    def inputs(self) -> list[TensorType]:
        """What all of them are; none may be absent."""
        return [self.input(index) for index in range(len(self._node.inputs))]

    def attribute(self, name: str, default: Attribute) -> Any:
        """An attribute, of the type of ``default``."""
        value = self._node.attributes.get(name, default)
        if type(value) is not type(default) or (isinstance(value, tuple) and not all(type(n) is int for n in value)):
            raise ValueError(f"its {name} is {value!r}")
        return value

    def sides(self, name: str, count: int, default: int) -> Sequence[int]:
        """An attribute of a number for each of ``count`` axes."""
        values: tuple[int, ...] = self.attribute(name, (default,) * count)
        if len(values) != count or not all(0 <= value <= LARGEST_EXTENT for value in values):
            raise ValueError(f"its {name} is {list(values)}, not {count} numbers")
        return values

    def integers(self, index: int, name: str) -> tuple[int, ...] | None:
        """Whole numbers that older versions have as an attribute, newer ones as a stored input; None for neither."""
        if not self.has(index):
            return self.attribute(name, ()) if name in self._node.attributes else None
        array = self._constants.get(self._node.inputs[index])
        if array is None or array.dtype.kind != "i" or array.ndim > 1 or array.size > 16:
            raise ValueError(f"its {name} is not stored")
        return tuple(array.reshape(-1).tolist())


def _same(operation: Operation) -> TensorType:
    return operation.input(0)


def _elementwise(operation: Operation) -> TensorType:
    operands = operation.inputs()
    if len({operand.dtype for operand in operands}) != 1:
        raise ValueError(f"operands of {', '.join(operand.dtype for operand in operands) or 'no dtype'}")
    return TensorType(operands[0].dtype, _broadcast(*(operand.shape for operand in operands)))


def _broadcast(*shapes: Shape) -> Shape:
    try:
        return tuple(np.broadcast_shapes(*shapes))
    except ValueError:
        raise ValueError(f"operands of {', '.join(str(list(shape)) for shape in shapes)} do not fit") from None


def _convolution(operation: Operation) -> TensorType:
    source, weight, group = operation.input(0, rank=3), operation.input(1, rank=3), operation.attribute("group", 1)
    out, per_group, *kernel = weight.shape
    if len(source.shape) != len(weight.shape) or source.dtype != weight.dtype:
        raise ValueError(f"a weight of {weight.dtype} {list(weight.shape)} on {source.dtype} {list(source.shape)}")
    if group < 1 or per_group * group != source.shape[1] or out % group:
        raise ValueError(f"a weight of {list(weight.shape)} in {group} groups on {source.shape[1]} channels")
    if operation.has(2) and operation.input(2) != TensorType(weight.dtype, (out,)):
        raise ValueError(f"a bias of {operation.input(2).dtype} {list(operation.input(2).shape)} for {out} channels")
    return TensorType(source.dtype, (source.shape[0], out, *_window(operation, source.shape[2:], kernel)))


def _window(operation: Operation, extents: Sequence[int], kernel: Sequence[int]) -> Shape:
    """Extents of what a window of ``kernel`` numbers, moved over ``extents``, gives."""
    axes = len(extents)
    strides, dilations = operation.sides("strides", axes, 1), operation.sides("dilations", axes, 1)
    pads = list(operation.sides("pads", 2 * axes, 0))
    how, rounded_up = operation.attribute("auto_pad", "NOTSET"), operation.attribute("ceil_mode", 0)
    if min(*strides, *dilations, *kernel) < 1 or how not in ("NOTSET", "VALID", *SAME_PADDING):
        raise ValueError(f"a window of {list(kernel)}, strides {list(strides)}, auto_pad {how}")
    if how in SAME_PADDING:
        return tuple(-(-extent // stride) for extent, stride in zip(extents, strides, strict=True))
    results = []
    for axis, extent in enumerate(extents):
        begin, end = (0, 0) if how == "VALID" else (pads[axis], pads[axis + axes])
        room = extent + begin + end - dilations[axis] * (kernel[axis] - 1) - 1
        if room < 0:
            raise ValueError(f"a window of {list(kernel)} on {list(extents)}")
        steps = -(-room // strides[axis]) if rounded_up else room // strides[axis]
        if rounded_up and steps * strides[axis] >= extent + begin:
            steps -= 1  # a window must begin inside, or in the front padding
        results.append(steps + 1)
    return tuple(results)


def _pool(operation: Operation) -> TensorType:
    source = operation.input(0, rank=3)
    extents = source.shape[2:]
    kernel = operation.sides("kernel_shape", len(extents), 0)
    return TensorType(source.dtype, (*source.shape[:2], *_window(operation, extents, kernel)))


def _global_pool(operation: Operation) -> TensorType:
    source = operation.input(0, rank=3)
    return TensorType(source.dtype, (*source.shape[:2], *(1 for _ in source.shape[2:])))


def _batch_norm(operation: Operation) -> TensorType:
    source = operation.input(0, rank=2)
    if any(operation.input(index).shape != source.shape[1:2] for index in range(1, 5)):
        raise ValueError(f"its vectors are not of {source.shape[1]} channels")
    return source


def _gemm(operation: Operation) -> TensorType:
    left, right = operation.input(0, rank=2), operation.input(1, rank=2)
    if len(left.shape) != 2 or len(right.shape) != 2:
        raise ValueError(f"matrices of {list(left.shape)} and {list(right.shape)}")
    rows, inner = left.shape[:: -1 if operation.attribute("transA", 0) else 1]
    also_inner, columns = right.shape[:: -1 if operation.attribute("transB", 0) else 1]
    result = _product(left, right, (rows, inner), (also_inner, columns))
    if operation.has(2) and _broadcast(operation.input(2).shape, result.shape) != result.shape:
        raise ValueError(f"{list(operation.input(2).shape)} added to {list(result.shape)}")
    return result


def _matmul(operation: Operation) -> TensorType:
    left, right = operation.input(0, rank=2), operation.input(1, rank=2)
    product = _product(left, right, left.shape[-2:], right.shape[-2:])
    return TensorType(product.dtype, (*_broadcast(left.shape[:-2], right.shape[:-2]), *product.shape))


def _product(left: TensorType, right: TensorType, first: Sequence[int], second: Sequence[int]) -> TensorType:
    if first[1] != second[0] or left.dtype != right.dtype:
        raise ValueError(f"{left.dtype} {list(left.shape)} times {right.dtype} {list(right.shape)}")
    return TensorType(left.dtype, (first[0], second[1]))


def _mean(operation: Operation) -> TensorType:
    source, axes = operation.input(0), operation.integers(1, "axes")
    if not axes:
        raise ValueError("it says no axes")
    gone, kept = _axes(axes, len(source.shape)), operation.attribute("keepdims", 1)
    extents = [1 if axis in gone else extent for axis, extent in enumerate(source.shape) if kept or axis not in gone]
    return TensorType(source.dtype, tuple(extents))


def _axes(axes: Sequence[int], rank: int) -> set[int]:
    if not all(-rank <= axis < rank for axis in axes):
        raise ValueError(f"axes {list(axes)} of {rank}")
    return {axis % rank for axis in axes}


def _flatten(operation: Operation) -> TensorType:
    source, axis = operation.input(0), operation.attribute("axis", 1)
    if not -len(source.shape) <= axis <= len(source.shape):
        raise ValueError(f"axis {axis} of {len(source.shape)}")
    cut = axis if axis >= 0 else axis + len(source.shape)
    return TensorType(source.dtype, (math.prod(source.shape[:cut]), math.prod(source.shape[cut:])))


def _reshape(operation: Operation) -> TensorType:
    source, wanted = operation.input(0), operation.integers(1, "shape")
    if wanted is None:
        raise ValueError("it says no shape")
    extents = list(wanted)
    if not operation.attribute("allowzero", 0):
        extents = [source.shape[axis] if n == 0 and axis < len(source.shape) else n for axis, n in enumerate(extents)]
    others = math.prod(extent for extent in extents if extent != -1)
    if extents.count(-1) == 1 and others > 0:
        extents[extents.index(-1)] = source.numbers // others
    if math.prod(extents) != source.numbers or min(extents, default=1) < 1:
        raise ValueError(f"{list(source.shape)} to {list(wanted)}")
    return TensorType(source.dtype, tuple(extents))


def _squeeze(operation: Operation) -> TensorType:
    source, axes = operation.input(0), operation.integers(1, "axes")
    gone = _axes(axes or (), len(source.shape))
    if not gone or any(source.shape[axis] != 1 for axis in gone):
        raise ValueError(f"axes {sorted(gone)} of {list(source.shape)}")
    return TensorType(source.dtype, tuple(n for axis, n in enumerate(source.shape) if axis not in gone))


def _unsqueeze(operation: Operation) -> TensorType:
    source, axes = operation.input(0), operation.integers(1, "axes") or ()
    new = _axes(axes, len(source.shape) + len(axes))
    extents = iter(source.shape)
    return TensorType(
        source.dtype, tuple(1 if axis in new else next(extents) for axis in range(len(source.shape) + len(new)))
    )


def _cast(operation: Operation) -> TensorType:
    number = operation.attribute("to", 0)
    if not 0 < number < len(DTYPES) or DTYPES[number] not in NUMPY_DTYPES:
        raise ValueError(f"to type {number}, which numpy lacks")
    return TensorType(DTYPES[number], operation.input(0).shape)


def _quantize(operation: Operation) -> TensorType:
    dtype = operation.input(2).dtype if operation.has(2) else "uint8"
    if dtype not in ("int8", "uint8") or operation.attribute("output_dtype", 0):
        raise ValueError(f"codes of {dtype}, or told by output_dtype")
    return TensorType(dtype, operation.input(0).shape)


def _dequantize(operation: Operation) -> TensorType:
    return TensorType(operation.input(1).dtype, operation.input(0).shape)


RULES: Mapping[str, Callable[[Operation], TensorType]] = {
    "Add": _elementwise,
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _same,
    "Conv": _convolution,
    "DequantizeLinear": _dequantize,
    "Div": _elementwise,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool,
    "Identity": _same,
    "MatMul": _matmul,
    "Max": _elementwise,
    "MaxPool": _pool,
    "Mul": _elementwise,
    "QuantizeLinear": _quantize,
    "ReduceMean": _mean,
    "Relu": _same,
    "Reshape": _reshape,
    "Sigmoid": _same,
    "Squeeze": _squeeze,
    "Sub": _elementwise,
    "Unsqueeze": _unsqueeze,
}
"""The type of the first result of each operation, and with it what operations there are."""
