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

AUDITED_VERSIONS = ((1, 7, 1, 116),)
CARDS = (75, 80, 86, 89, 120, 121)
NEWER_CARDS_BIT = 6
HEADER_BYTES = 64
PAYLOAD_ALIGNMENT = 128
LITERALS = "_literal"  # ends the name of a region whose single numbers stand among the other constants
OTHER_KERNELS = ("function", "runtime_fusion", "fully_connected")
SDK_TAGS = {b"vtrt": "tensorrt_rtx", b"ftrt": "tensorrt"}
NUMPY_DTYPES = {"half": "float16", "float": "float32", "int8": "int8", "int32": "int32", "int64": "int64"}

_PROGRAM = re.compile(rb"header \{\n[^\x00]*")
_BRACES = r'\{(?:[^{}"]|"[^"]*")*\}'
for _ in range(3):  # a block holds lists, and a function's condition holds lists of its own
    _BRACES = rf'\{{(?:[^{{}}"]|"[^"]*"|{_BRACES})*\}}'
_FIELD = re.compile(rf'\b(\w+)\s*=\s*("[^"]*"|{_BRACES}|[^\s{{}}"]+)')
_OPERATION = re.compile(rf"^  (\w+)=({_BRACES})", re.MULTILINE)
_REGION = re.compile(r"^  region = \{ name=(\S+) .*constant=true", re.MULTILINE)
_TF32 = re.compile(r"^  tf32=1$", re.MULTILINE)
_QUOTED = re.compile(r'"([^"]*)"')
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]\[]*)\]")


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
class Constant:
    """A weight in the plan: ``dims`` and ``strides`` in elements, ``position`` in bytes from the file's start."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    position: int
    size: int


@dataclasses.dataclass(frozen=True)
class ConvolutionKernel:
    """One compiled convolution: the ONNX nodes in it, the dtypes that go in and out, and the constants it reads."""

    onnx_nodes: tuple[str, ...]
    input_dtype: str
    weight_dtype: str
    output_dtype: str
    relu: bool
    weight: Constant | None
    constants: tuple[Constant, ...]


@dataclasses.dataclass(frozen=True)
class FunctionKernel:
    """Any other kernel, with the ONNX nodes in it and the constants it reads.

    Generated code may hold a small 1x1 convolution, and the bias of a convolution whose own kernel has none.
    """

    onnx_nodes: tuple[str, ...]
    constants: tuple[Constant, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """An engine file's program and constants."""

    header: Header
    convolutions: tuple[ConvolutionKernel, ...]
    functions: tuple[FunctionKernel, ...]
    constants: tuple[Constant, ...]
    tf32: bool
    """Whether the card may round what is float32 to TF32, which has 10 bits of mantissa, before it multiplies."""
    data: Any

    @property
    def kernels(self) -> int:
        """How many kernels are launched on the card for one inference."""
        return len(self.convolutions) + len(self.functions)

    def constants_of(self, node: str) -> list[Constant]:
        """Every constant that a kernel with the ONNX node in it reads."""
        kernels: list[ConvolutionKernel | FunctionKernel] = [*self.convolutions, *self.functions]
        return [constant for kernel in kernels if node in kernel.onnx_nodes for constant in kernel.constants]

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
    main, *fusions = (_Program(text) for text in texts)
    constants = _constants(main, weights_start, weights_end)
    convolutions, functions = [], []
    for kind, fields in main.operations:
        if kind == "corrltn":
            convolutions.append(_convolution(main, fields, fields, constants))
        elif kind == "runtime_fusion" and fields.get("backbone") == "conv":
            program = _fusion_of(fusions, _onnx_nodes(fields))
            inner = next(inner for inner_kind, inner in program.operations if inner_kind == "corrltn")
            convolutions.append(_convolution(program, fields, inner, constants))
        elif kind in OTHER_KERNELS:
            functions.append(FunctionKernel(_onnx_nodes(fields), _constants_read(fields, constants)))
    tf32 = any(_TF32.search(text) for text in texts)
    return Plan(header, tuple(convolutions), tuple(functions), tuple(constants.values()), tf32, data)


def _chunk(data: Any, index: int, tag: bytes) -> tuple[int, int]:
    """Start and end of the chunk that stands at ``index`` in the table."""
    found, start, size = struct.unpack_from("<4s4xQQ", data, HEADER_BYTES + 24 * index)
    if found != tag or start + size > len(data):
        raise ValueError(f"chunk {index} is not a whole {tag.decode()}")
    return start, start + size


class _Program:
    """One program's text: its descriptors by tensor name, and the operations of its main block in order."""

    def __init__(self, text: str) -> None:
        header, _, rest = text.partition("\ndescriptors {")
        descriptors, _, body = rest.partition("\nmain {")
        regions = _REGION.findall(header)
        self.constant_regions = frozenset(name + suffix for name in regions for suffix in ("", LITERALS))
        self.descriptors = {}
        for _, block in _OPERATION.findall(descriptors):
            fields = _fields(block)
            self.descriptors[fields["name"].strip('"')] = fields
        self.operations = [(kind, _fields(block)) for kind, block in _OPERATION.findall(body.partition("\n}\n")[0])]

    def dtype(self, tensor: str) -> str:
        """The numpy name of a tensor's type, or the compiler's own name where numpy has none."""
        kind = self.descriptors[tensor]["type"]
        return NUMPY_DTYPES.get(kind, kind)


def _fields(block: str) -> dict[str, str]:
    return dict(_FIELD.findall(block[1:-1]))


def _names(value: str) -> list[str]:
    return _QUOTED.findall(value)


def _numbers(value: str) -> tuple[int, ...]:
    return tuple(int(number) for number in value.strip("{} ").split())


def _onnx_nodes(fields: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(_ONNX_LAYER.findall(fields.get("layers", "")))


def _constants(program: _Program, start: int, end: int) -> dict[str, Constant]:
    """Every constant with a payload, with its position: payloads stand in the order of their ``offset``.

    Constants of one offset are equal, and stored once.
    """
    payloads: dict[int, list[tuple[str, dict[str, str]]]] = {}
    for name, fields in program.descriptors.items():
        if "const_payload_size" in fields and fields["region"].strip('"') in program.constant_regions:
            payloads.setdefault(int(fields["offset"]), []).append((name, fields))
    if sorted(payloads) != list(range(len(payloads))):
        raise ValueError("its constants are not numbered one by one")
    constants: dict[str, Constant] = {}
    position = written_to = start
    for rank in range(len(payloads)):
        equal = [_constant(name, fields, position) for name, fields in payloads[rank]]
        size = equal[0].size
        if any(constant.size != size for constant in equal):
            raise ValueError(f"constants of different sizes are stored as number {rank}")
        constants |= {constant.name: constant for constant in equal}
        written_to = position + size
        position += -(-size // PAYLOAD_ALIGNMENT) * PAYLOAD_ALIGNMENT
    if not written_to <= end <= position:
        raise ValueError(f"its constants end at {written_to}, the chunk at {end}")
    return constants


def _constant(name: str, fields: Mapping[str, str], position: int) -> Constant:
    dims, strides = _numbers(fields["dims"]), _numbers(fields["strides"])
    size, kind = int(fields["const_payload_size"]), fields["type"]
    if len(dims) != len(strides) or size < 0 or min(dims, default=1) < 1 or min(strides, default=0) < 0:
        raise ValueError(f"the layout of constant {name} makes no sense")
    dtype = NUMPY_DTYPES.get(kind)
    if dtype is not None:
        last = sum((extent - 1) * stride for extent, stride in zip(dims, strides, strict=True))
        if (last + 1) * np.dtype(dtype).itemsize > size:
            raise ValueError(f"constant {name} reaches past its {size} bytes")
    return Constant(name, dtype or kind, dims, strides, position, size)


def _fusion_of(fusions: Sequence[_Program], nodes: tuple[str, ...]) -> _Program:
    """The program of the run-time fusion that computes the convolution among ``nodes``."""
    found = [
        program
        for program in fusions
        for kind, fields in program.operations
        if kind == "corrltn" and set(_onnx_nodes(fields)) & set(nodes)
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} fused programs stand for {', '.join(nodes)}")
    return found[0]


def _convolution(
    program: _Program, launch: Mapping[str, str], fields: Mapping[str, str], constants: Mapping[str, Constant]
) -> ConvolutionKernel:
    """A kernel from its launch in the main program and the ``corrltn`` inside (the same, where nothing is fused)."""
    fused = launch is not fields
    inputs = _names(fields["input"])
    output = _names(program.operations[-1][1]["output"] if fused else fields["output"])[0]
    return ConvolutionKernel(
        onnx_nodes=_onnx_nodes(launch),
        input_dtype=program.dtype(inputs[0]),
        weight_dtype=program.dtype(inputs[1]),
        output_dtype=program.dtype(output),
        relu=fields.get("relu") == "true" or (fused and any(kind == "relu" for kind, _ in program.operations)),
        weight=constants.get(inputs[1]),
        constants=_constants_read(launch, constants),
    )


def _constants_read(launch: Mapping[str, str], constants: Mapping[str, Constant]) -> tuple[Constant, ...]:
    names = _names(launch.get("input_args") or launch.get("input") or "")
    return tuple(constants[name] for name in names if name in constants)
