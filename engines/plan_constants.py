"""Where the weights of a compiled plan (see ``engines.plan``) stand in its file, by its program's descriptors."""

from __future__ import annotations

import dataclasses

import numpy as np

from engines.plan_program import NUMPY_DTYPES, Fields, Program, numbers

PAYLOAD_ALIGNMENT = 128


@dataclasses.dataclass(frozen=True)
class Constant:
    """A weight in the plan: ``dims`` and ``strides`` in elements, ``position`` in bytes from the file's start."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    position: int
    size: int


def constants_from_program(program: Program, start: int, end: int) -> dict[str, Constant]:
    """Every constant with a payload, with its position: payloads stand in the order of their ``offset``.

    Constants of one offset are equal, and stored once.

    Args:
        program: the plan's main program.
        start: of the program's payloads, in bytes from the file's start.
        end: of the chunk of weights, which they end.

    Raises:
        ValueError: the descriptors contradict each other or the chunk.
    """
    payloads: dict[int, list[tuple[str, Fields]]] = {}
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


def _constant(name: str, fields: Fields, position: int) -> Constant:
    dims, strides = numbers(fields["dims"]), numbers(fields["strides"])
    size, kind = int(fields["const_payload_size"]), fields["type"]
    if len(dims) != len(strides) or size < 0 or min(dims, default=1) < 1 or min(strides, default=0) < 0:
        raise ValueError(f"the layout of constant {name} makes no sense")
    dtype = NUMPY_DTYPES.get(kind)
    if dtype is not None:
        last = sum((extent - 1) * stride for extent, stride in zip(dims, strides, strict=True))
        if (last + 1) * np.dtype(dtype).itemsize > size:
            raise ValueError(f"constant {name} reaches past its {size} bytes")
    return Constant(name, dtype or kind, dims, strides, position, size)
