"""The kernels of a compiled plan (see ``engines.plan``): what each computes, reads and writes.

A convolution is launched as ``corrltn`` and a product of matrices as ``fully_connected``, each with the operands image,
weight, factor, a second factor of 0 and, where there is one, the bias; or either stands, with what follows it, in a
fused program of its own. The result is

    factor * (weight * image) + bias        clipped at zero where ``relu`` says so

in which the factor, one number or one for each channel, is 1 for floating point and what a code stands for in INT8.
Everything else is generated code, ``function``, known by the nodes that it covers and the constants that it reads.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines.plan_constants import Constant
from engines.plan_program import Fields, Program, names, numbers, onnx_nodes

OTHER_KERNELS = ("function", "runtime_fusion")
_FACTOR, _BIAS = 2, 4
"""Places among the operands."""

_ONE = "3F800000"
_INDEX_DTYPES = frozenset({"int64", "bool"})


@dataclasses.dataclass(frozen=True)
class Activation:
    """A tensor that a kernel reads or writes; an extent that is free stands as its name in the program.

    ``outside`` says whether it is an input or output of the engine.
    """

    dtype: str
    dims: tuple[int | str, ...]
    outside: bool = False


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution's window goes over an image; each of height and width."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]

    def results(self, axis: int, extent: int, kernel: int) -> int:
        """How many places a window of ``kernel`` has along an ``extent``."""
        reach = self.dilation[axis] * (kernel - 1) + 1
        return (extent + self.before[axis] + self.after[axis] - reach) // self.strides[axis] + 1


@dataclasses.dataclass(frozen=True)
class WeightedKernel:
    """A kernel that multiplies by weights: the ONNX nodes in it, the dtypes that go in and out, what it reads."""

    onnx_nodes: tuple[str, ...]
    input_dtype: str
    weight_dtype: str
    output_dtype: str
    relu: bool
    weight: Constant | None
    constants: tuple[Constant, ...]
    factor: float
    factors: Constant | None
    """As an operand: where it has several numbers, ``factor`` is 1."""
    bias: Constant | None
    reads: tuple[Activation, ...]
    writes: tuple[Activation, ...]


@dataclasses.dataclass(frozen=True)
class ConvolutionKernel(WeightedKernel):
    """One compiled convolution; its weight stands as (out, in / groups, height, width)."""

    window: Window


@dataclasses.dataclass(frozen=True)
class MatrixKernel(WeightedKernel):
    """One compiled product of matrices: a Gemm, or a 1x1 convolution of many channels.

    ``weight_first`` says whether the weight stands as (out, in), as the first factor does, or as (in, out).
    """

    weight_first: bool


@dataclasses.dataclass(frozen=True)
class FunctionKernel:
    """Any other kernel, with the ONNX nodes in it and the constants it reads.

    Generated code may hold a small 1x1 convolution, and the bias of a convolution whose own kernel has none.
    ``behind`` are the nodes whose results it reads, by the kernels that make them, and ``behind_weighted`` says whether
    the only result that it reads is that of a kernel with weights. ``name`` spells its operations, as in
    ``__myl_AddReluMean``.
    """

    onnx_nodes: tuple[str, ...]
    constants: tuple[Constant, ...]
    behind: frozenset[str] = frozenset()
    behind_weighted: bool = False
    reads: tuple[Activation, ...] = ()
    writes: tuple[Activation, ...] = ()
    name: str = ""

    @property
    def rescales(self) -> bool:
        """Whether it does for one convolution or product what could have been done in the same kernel.

        It then reads that result and nothing else, and writes as many pixels as it reads: it multiplies by scales, adds
        the bias, clips at zero, makes codes. A pooling makes one pixel of many; a mere change of layout has no node.
        """
        if not self.behind_weighted or not self.onnx_nodes or len(self.writes) != 1:
            return False
        return self.reads[0].dims[2:] == self.writes[0].dims[2:]


Kernel = ConvolutionKernel | MatrixKernel | FunctionKernel


def kernels_from_programs(
    main: Program, fusions: Sequence[Program], constants: Mapping[str, Constant]
) -> tuple[Kernel, ...]:
    """Every kernel that is launched for one inference, in order.

    Args:
        main: the plan's main program.
        fusions: the smaller ones, one for each fusion that is compiled at run time.
        constants: by name.

    Raises:
        ValueError, KeyError, IndexError: the programs contradict each other.
    """
    kernels: list[Kernel] = []
    made_by: dict[str, _Maker] = {}
    for kind, fields in main.operations:
        backbone = fields.get("backbone") if kind == "runtime_fusion" else None
        weighted = next((name for name in (kind, backbone) if name in _BACKBONES), None)
        if weighted is not None:
            wanted, build = _BACKBONES[weighted]
            kernels.append(build(*_launched(wanted, kind, fields, main, fusions), fields, main, constants))
        elif kind in OTHER_KERNELS:
            kernels.append(_function(fields, main, constants, made_by))
        maker = _Maker(onnx_nodes(fields), weighted is not None)
        made_by |= dict.fromkeys(map(main.base, main.writes(fields)), maker)
    return tuple(kernels)


@dataclasses.dataclass(frozen=True)
class _Maker:
    """What makes a tensor: the ONNX nodes of the operation, and whether that multiplies by weights."""

    onnx_nodes: tuple[str, ...]
    weighted: bool


def _launched(
    wanted: str, kind: str, launch: Fields, main: Program, fusions: Sequence[Program]
) -> tuple[Program, Fields]:
    """The operation of the ``wanted`` kind that a launch in ``main`` computes, itself or in a fused program of its own.

    Returns:
        The program that it stands in, and its fields there.
    """
    if kind == wanted:
        return main, launch
    nodes = set(onnx_nodes(launch))
    found = [
        (program, fields)
        for program in fusions
        for kind, fields in program.operations
        if kind == wanted and nodes.intersection(onnx_nodes(fields))
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} fused programs stand for {', '.join(sorted(nodes))}")
    return found[0]


def _convolution(
    program: Program, fields: Fields, launch: Fields, main: Program, constants: Mapping[str, Constant]
) -> ConvolutionKernel:
    """A kernel from its launch in the main program and the ``corrltn`` inside (the same, where nothing is fused)."""
    image, weight = names(fields["input"])[:2]
    window = Window(*(numbers(fields[name]) for name in ("lpadding", "rpadding", "strides", "dilation")))
    return ConvolutionKernel(**_weighted(program, fields, launch, main, constants, image, weight), window=window)


def _matrix(
    program: Program, fields: Fields, launch: Fields, main: Program, constants: Mapping[str, Constant]
) -> MatrixKernel:
    """As ``_convolution``, from a ``fully_connected``; of its two factors either may be the weight."""
    factors = names(fields["input"])[:2]
    first = factors[0] in constants and factors[1] not in constants
    weight, other = factors if first else reversed(factors)
    turned = fields.get("trA" if first else "trB") == "true"
    return MatrixKernel(
        **_weighted(program, fields, launch, main, constants, other, weight), weight_first=first != turned
    )


_BACKBONES: dict[str, tuple[str, Callable[..., ConvolutionKernel | MatrixKernel]]] = {
    "corrltn": ("corrltn", _convolution),
    "conv": ("corrltn", _convolution),
    "fully_connected": ("fully_connected", _matrix),
    "gemm": ("fully_connected", _matrix),
}
"""By the kind of an operation, or of what a fusion is built around: what it is inside, and what reads it."""


def _weighted(
    program: Program,
    fields: Fields,
    launch: Fields,
    main: Program,
    constants: Mapping[str, Constant],
    source: str,
    weight: str,
) -> dict[str, Any]:
    """The fields of a ``WeightedKernel``."""
    fused = launch is not fields
    result = program.writes(program.operations[-1][1] if fused else fields)[0]
    operands: list[str | None] = [*names(fields["input"]), *[None] * (_BIAS + 1)]
    return {
        "onnx_nodes": onnx_nodes(launch),
        "input_dtype": program.dtype(source),
        "weight_dtype": program.dtype(weight),
        "output_dtype": program.dtype(result),
        "relu": fields.get("relu") == "true" or (fused and any(kind == "relu" for kind, _ in program.operations)),
        "weight": constants.get(weight),
        "constants": _constants_read(main, launch, constants),
        "factor": _float32(fields.get("alpha", _ONE)),
        "factors": constants.get(operands[_FACTOR] or ""),
        "bias": constants.get(operands[_BIAS] or ""),
        "reads": _activations(main, main.reads(launch), constants),
        "writes": _activations(main, main.writes(launch), constants),
    }


def _function(
    fields: Fields, main: Program, constants: Mapping[str, Constant], made_by: Mapping[str, _Maker]
) -> FunctionKernel:
    read = main.reads(fields)
    makers = [made_by[main.base(tensor)] for tensor in read if main.base(tensor) in made_by]
    return FunctionKernel(
        onnx_nodes(fields),
        _constants_read(main, fields, constants),
        behind=frozenset(node for maker in makers for node in maker.onnx_nodes),
        behind_weighted=[maker.weighted for maker in makers] == [True],
        reads=_activations(main, read, constants),
        writes=_activations(main, main.writes(fields), constants),
        name=fields.get("name", ""),
    )


def _float32(bits: str) -> float:
    """A number that is written as the hexadecimal digits of its bits."""
    (value,) = struct.unpack(">f", int(bits, 16).to_bytes(4, "big"))
    return float(value)


def _activations(program: Program, tensors: Sequence[str], constants: Mapping[str, Constant]) -> tuple[Activation, ...]:
    """Those of the ``tensors`` that are neither constants nor extents."""
    return tuple(
        Activation(program.dtype(tensor), program.dims(tensor), program.is_outside(tensor))
        for tensor in tensors
        if tensor not in constants and program.dtype(tensor) not in _INDEX_DTYPES
    )


def _constants_read(program: Program, launch: Fields, constants: Mapping[str, Constant]) -> tuple[Constant, ...]:
    return tuple(constants[name] for name in program.reads(launch) if name in constants)
