"""Reads a compiled engine file without a GPU and without the SDK that made it.

What stands in a TensorRT for RTX plan (little endian, undocumented, read off files of the AUDITED_VERSIONS):

    0   tag 'vtrt'      8   u64 2      16  u64 size of the whole file
    24  version, 4 bytes (1, 7, 1, 116)
    32  u32 mask of compute capabilities, bit i for CARDS[i], bit 6 for cards newer than those
    64  chunk table, 24 bytes an entry: tag, u64 offset, u64 size
          'NGNE'  the engine: among other things its program as text, and a smaller program per run-time fusion
          'THGW'  the weights: payloads one after the other, each beginning on a multiple of 128 bytes

The program's text names each kernel (``corrltn`` is a convolution), the ONNX nodes that it covers, its inputs and
outputs, and, in ``descriptors``, their types, shapes and memory layout. A constant's ``offset`` is its rank among the
payloads, so its bytes are found by adding up the sizes of those before it. Nothing is searched for and nothing guessed:
a file of another version is reported as not audited, and one that contradicts itself raises ``PlanRejected``.
"""

from __future__ import annotations

import dataclasses
import mmap
import pathlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputRejected
from engines.plan_constants import Constant, constants_from_program
from engines.plan_program import Fields, Program, names, onnx_nodes

AUDITED_VERSIONS = ((1, 7, 1, 116),)
CARDS = (75, 80, 86, 89, 120, 121)
NEWER_CARDS_BIT = 6
HEADER_BYTES = 64
OTHER_KERNELS = ("function", "runtime_fusion")
SDK_TAGS = {b"vtrt": "tensorrt_rtx", b"ftrt": "tensorrt"}

_PROGRAM = re.compile(rb"header \{\n[^\x00]*")


class PlanRejected(InputRejected):
    """The file is not an engine, or not a whole one."""


@dataclasses.dataclass(frozen=True)
class Header:
    """The first 64 bytes. ``compute_capabilities`` as in 86 for 8.6; empty where the format does not say."""

    sdk: str
    version: tuple[int, int, int, int]
    size: int
    compute_capabilities: tuple[int, ...]
    newer_cards: bool

    @property
    def version_text(self) -> str:
        """As in ``1.7.1.116``."""
        return ".".join(str(part) for part in self.version)


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


@dataclasses.dataclass(frozen=True)
class ConvolutionKernel(WeightedKernel):
    """One compiled convolution; its weight stands as (out, in / groups, height, width)."""


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
    ``behind`` are the nodes whose results it reads, by the kernels that make them.
    """

    onnx_nodes: tuple[str, ...]
    constants: tuple[Constant, ...]
    behind: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Plan:
    """An engine file's program and constants."""

    header: Header
    convolutions: tuple[ConvolutionKernel, ...]
    matrices: tuple[MatrixKernel, ...]
    functions: tuple[FunctionKernel, ...]
    constants: tuple[Constant, ...]
    tf32: bool
    """Whether the card may round what is float32 to TF32, which has 10 bits of mantissa, before it multiplies."""
    data: Any

    @property
    def kernels(self) -> int:
        """How many kernels are launched on the card for one inference."""
        return len(self.convolutions) + len(self.matrices) + len(self.functions)

    def constants_of(self, node: str) -> list[Constant]:
        """Every constant that a kernel with the ONNX node in it reads."""
        kernels: list[WeightedKernel | FunctionKernel] = [*self.convolutions, *self.matrices, *self.functions]
        return [constant for kernel in kernels if node in kernel.onnx_nodes for constant in kernel.constants]

    def constants_behind(self, node: str) -> list[Constant]:
        """Every constant that generated code reads together with the result of a kernel with the ONNX node in it."""
        return [constant for kernel in self.functions if node in kernel.behind for constant in kernel.constants]

    def array(self, constant: Constant) -> NDArray[Any]:
        """The constant's value with its ``dims``, a view of the file where the layout allows."""
        flat = np.frombuffer(
            self.data, constant.dtype, constant.size // np.dtype(constant.dtype).itemsize, constant.position
        )
        steps = tuple(stride * flat.itemsize for stride in constant.strides)
        return np.lib.stride_tricks.as_strided(flat, constant.dims, steps, writeable=False)


def plan_from_file(path: pathlib.Path) -> Plan:
    """Reads a plan from disk through a memory map; see ``plan_from_bytes``.

    Raises:
        PlanRejected: not an engine, cut short, of a version whose layout is not known, or contradicting itself.
    """
    return plan_from_bytes(mapped(path), str(path))


def header_from_file(path: pathlib.Path) -> Header:
    """Reads and checks only the header of a plan, of either SDK.

    Raises:
        PlanRejected: not an engine, or cut short.
    """
    return header_from_bytes(mapped(path), str(path))


def mapped(path: pathlib.Path) -> Any:
    """A read-only memory map of ``path``; raises ``PlanRejected`` where that is impossible."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise PlanRejected(f"{path}: no engine can be read here ({error}); check the path") from error


def header_from_bytes(data: Any, where: str) -> Header:
    """The header of an engine; raises ``PlanRejected`` unless the tag, the length and the version field are sane."""
    if len(data) < HEADER_BYTES:
        raise PlanRejected(f"{where}: {len(data)} bytes are too few for an engine; build it again")
    sdk = SDK_TAGS.get(bytes(data[:4]))
    if sdk is None:
        raise PlanRejected(f"{where}: not a TensorRT engine (it begins with {bytes(data[:4])!r}); build it again")
    version = struct.unpack_from("<4B", data, 24)
    if sdk == "tensorrt":
        return Header(sdk, version, len(data), (), newer_cards=False)
    (size,), (mask,) = struct.unpack_from("<Q", data, 16), struct.unpack_from("<I", data, 32)
    if struct.unpack_from("<Q", data, 8) != (2,) or bytes(data[28:32]) != bytes(data[:4]):
        raise PlanRejected(f"{where}: not audited: its header is of another format; build it again")
    if size != len(data):
        raise PlanRejected(f"{where}: the header says {size} bytes, the file has {len(data)}; build it again")
    cards = tuple(card for bit, card in enumerate(CARDS) if mask >> bit & 1)
    return Header(sdk, version, size, cards, bool(mask >> NEWER_CARDS_BIT & 1))


def plan_from_bytes(data: Any, where: str) -> Plan:
    """Reads a plan from any buffer of bytes. ``where`` names it in errors.

    Raises:
        PlanRejected: not an engine, cut short, of a version whose layout is not known, or contradicting itself.
    """
    header = header_from_bytes(data, where)
    if header.sdk != "tensorrt_rtx" or header.version not in AUDITED_VERSIONS:
        raise PlanRejected(f"{where}: not audited: the layout of {header.sdk} {header.version_text} plans is not known")
    try:
        return _plan_from_chunks(data, header)
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise PlanRejected(f"{where}: the engine contradicts itself ({error}); build it again") from error


def _plan_from_chunks(data: Any, header: Header) -> Plan:
    engine_start, engine_end = _chunk(data, 0, b"NGNE")
    weights_start, weights_end = _chunk(data, 1, b"THGW")
    texts = [match.decode("latin-1") for match in _PROGRAM.findall(bytes(data[engine_start:engine_end]))]
    if not texts:
        raise ValueError("it holds no program")
    main, *fusions = (Program(text) for text in texts)
    constants = constants_from_program(main, weights_start, weights_end)
    convolutions, matrices, functions = [], [], []
    made_by: dict[str, tuple[str, ...]] = {}
    for kind, fields in main.operations:
        backbone = fields.get("backbone") if kind == "runtime_fusion" else None
        if kind == "corrltn" or backbone == "conv":
            convolutions.append(_convolution(*_launched("corrltn", kind, fields, main, fusions), fields, constants))
        elif kind == "fully_connected" or backbone == "gemm":
            matrices.append(_matrix(*_launched("fully_connected", kind, fields, main, fusions), fields, constants))
        elif kind in OTHER_KERNELS:
            behind = frozenset(node for tensor in main.reads(fields) for node in made_by.get(main.base(tensor), ()))
            functions.append(FunctionKernel(onnx_nodes(fields), _constants_read(main, fields, constants), behind))
        made_by |= dict.fromkeys(map(main.base, main.writes(fields)), onnx_nodes(fields))
    tf32 = any(program.tf32 for program in (main, *fusions))
    return Plan(header, tuple(convolutions), tuple(matrices), tuple(functions), tuple(constants.values()), tf32, data)


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


def _chunk(data: Any, index: int, tag: bytes) -> tuple[int, int]:
    """Start and end of the chunk that stands at ``index`` in the table."""
    found, start, size = struct.unpack_from("<4s4xQQ", data, HEADER_BYTES + 24 * index)
    if found != tag or start + size > len(data):
        raise ValueError(f"chunk {index} is not a whole {tag.decode()}")
    return start, start + size


def _convolution(
    program: Program, fields: Fields, launch: Fields, constants: Mapping[str, Constant]
) -> ConvolutionKernel:
    """A kernel from its launch in the main program and the ``corrltn`` inside (the same, where nothing is fused)."""
    image, weight = names(fields["input"])[:2]
    return ConvolutionKernel(*_weighted(program, fields, launch, constants, image, weight))


def _matrix(program: Program, fields: Fields, launch: Fields, constants: Mapping[str, Constant]) -> MatrixKernel:
    """As ``_convolution``, from a ``fully_connected``; of its two factors either may be the weight."""
    factors = names(fields["input"])[:2]
    first = factors[0] in constants and factors[1] not in constants
    weight, other = factors if first else reversed(factors)
    turned = fields.get("trA" if first else "trB") == "true"
    return MatrixKernel(*_weighted(program, fields, launch, constants, other, weight), weight_first=first != turned)


def _weighted(
    program: Program, fields: Fields, launch: Fields, constants: Mapping[str, Constant], source: str, weight: str
) -> tuple[tuple[str, ...], str, str, str, bool, Constant | None, tuple[Constant, ...]]:
    """The fields of a ``WeightedKernel`` in their order."""
    fused = launch is not fields
    result = program.writes(program.operations[-1][1] if fused else fields)[0]
    return (
        onnx_nodes(launch),
        program.dtype(source),
        program.dtype(weight),
        program.dtype(result),
        fields.get("relu") == "true" or (fused and any(kind == "relu" for kind, _ in program.operations)),
        constants.get(weight),
        _constants_read(program, launch, constants),
    )


def _constants_read(program: Program, launch: Fields, constants: Mapping[str, Constant]) -> tuple[Constant, ...]:
    return tuple(constants[name] for name in program.reads(launch) if name in constants)
