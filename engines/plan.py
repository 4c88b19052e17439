"""Reads a compiled engine file without a GPU and without the SDK that made it.

What stands in a TensorRT for RTX plan (little endian, undocumented, read off files of the AUDITED_VERSIONS):

    0   tag 'vtrt'      8   u64 2      16  u64 size of the whole file
    24  version, 4 bytes (1, 7, 1, 116)
    32  u32 mask of compute capabilities, bit i for CARDS[i], bit 6 for cards newer than those
    64  chunk table, 24 bytes an entry: tag, u64 offset, u64 size
          'NGNE'  the engine: among other things its program as text, and a smaller program per run-time fusion
                  At byte 218 of it, behind the tag of a u64, stands how many bytes of the weights are not the program's
          'THGW'  the weights: first those bytes (none but in INT8), then the program's payloads one after the other,
                  each beginning a multiple of 128 bytes after the first

The program's text names each kernel (see ``engines.plan_kernels``), the ONNX nodes that it covers, its inputs and
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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputRejected
from engines.plan_constants import Constant, constants_from_program
from engines.plan_kernels import (
    ConvolutionKernel,
    FunctionKernel,
    Kernel,
    MatrixKernel,
    kernels_from_programs,
)
from engines.plan_program import Program

AUDITED_VERSIONS = ((1, 7, 1, 116),)
CARDS = (75, 80, 86, 89, 120, 121)
NEWER_CARDS_BIT = 6
HEADER_BYTES = 64
WEIGHTS_BEFORE, U64 = 218, 0x00018009
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
    def launched(self) -> tuple[Kernel, ...]:
        """Every kernel."""
        return (*self.convolutions, *self.matrices, *self.functions)

    @property
    def kernels(self) -> int:
        """How many kernels are launched on the card for one inference."""
        return len(self.launched)

    def constants_of(self, node: str) -> list[Constant]:
        """Every constant that a kernel with the ONNX node in it reads."""
        return [constant for kernel in self.launched if node in kernel.onnx_nodes for constant in kernel.constants]

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
    constants = constants_from_program(main, weights_start + _preceding(data, engine_start), weights_end)
    kernels = kernels_from_programs(main, fusions, constants)
    return Plan(
        header,
        convolutions=tuple(kernel for kernel in kernels if isinstance(kernel, ConvolutionKernel)),
        matrices=tuple(kernel for kernel in kernels if isinstance(kernel, MatrixKernel)),
        functions=tuple(kernel for kernel in kernels if isinstance(kernel, FunctionKernel)),
        constants=tuple(constants.values()),
        tf32=any(program.tf32 for program in (main, *fusions)),
        data=data,
    )


def _chunk(data: Any, index: int, tag: bytes) -> tuple[int, int]:
    """Start and end of the chunk that stands at ``index`` in the table."""
    found, start, size = struct.unpack_from("<4s4xQQ", data, HEADER_BYTES + 24 * index)
    if found != tag or start + size > len(data):
        raise ValueError(f"chunk {index} is not a whole {tag.decode()}")
    return start, start + size


def _preceding(data: Any, engine_start: int) -> int:
    """How many bytes stand before the program's own in the chunk of weights."""
    tag, size = struct.unpack_from("<IQ", data, engine_start + WEIGHTS_BEFORE)
    if tag != U64:
        raise ValueError("it does not say where its program's weights begin")
    return int(size)
