"""The bits that each weight of a written file must have: the fused network's, in the type that was asked for.

Where channels were rescaled, the exponents that were recorded say by how much, and the architecture says which weights
that touches. A convolution's row of a channel c with exponent e has the factor 2^e, every column that reads c has 2^-e,
and on each way from one to the other the two multiply to 1:

    block                 its convolution's rows 2^e; the next block's columns, SE's squeezing ones and, behind the last
                          block, the classifier's 2^-e
    SE's squeezing        its rows 2^e, the expanding one's columns 2^-e
    SE's expanding, head  never rescaled: a Sigmoid or the user reads them; nor is a block whose result is an output
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.architecture import Architecture, Block


def weight_problems(
    written: Mapping[str, NDArray[Any]],
    architecture: Architecture,
    weights: Mapping[str, NDArray[np.float32]],
    half: Collection[str],
    exponents: Mapping[str, NDArray[np.int64]],
) -> list[str]:
    """Everything in which the weights of a file differ from what they must be; an empty list is a pass.

    Args:
        written: the weights in the file, by name.
        architecture: of the plain network.
        weights: the fused float32 weights by the same names.
        half: the names of those that must stand in the file rounded to float16.
        exponents: by the name of a Conv, the powers of two (C,) that the channels of its result were multiplied by.
    """
    problems = list(_exponent_problems(architecture, exponents))
    if problems:
        return problems
    if written.keys() != weights.keys():
        problems.append(f"its weights are not those of the network ({len(written)} where {len(weights)} belong)")
    powers = dict(_powers(architecture, exponents)) if exponents else {}
    for name in sorted(written.keys() & weights.keys()):
        array, fused, power = written[name], weights[name], powers.get(name)
        exact = fused if power is None or not power.any() else np.ldexp(fused, power)
        expected: NDArray[Any] = torch.from_numpy(exact).half().numpy() if name in half else exact
        scaled = "" if exact is fused else " times its channels' powers of two"
        problems += bit_problems(name, array, expected, f"the fused one{scaled}")
    return problems


def bit_problems(name: str, written: NDArray[Any], expected: NDArray[Any], title: str) -> list[str]:
    """The first in which an array of a file differs from ``expected``, called ``title``: type, shape, or any bit."""
    unsigned = f"u{expected.dtype.itemsize}"
    if written.shape != expected.shape or written.dtype != expected.dtype:
        return [f"weight {name} is {written.dtype} {written.shape}, not {expected.dtype} {expected.shape}"]
    if not np.array_equal(written.view(unsigned), expected.view(unsigned)):
        return [f"weight {name} differs from {title}"]
    return []


def _exponent_problems(architecture: Architecture, exponents: Mapping[str, NDArray[np.int64]]) -> Iterator[str]:
    """Exponents of what cannot be rescaled, or of another number of channels."""
    outputs = {output.block for output in architecture.outputs}
    channels = {f"{block.name}/Conv": block.out_channels for block in architecture.blocks if block.name not in outputs}
    channels |= {_squeezing(block): block.se_channels for block in architecture.blocks if block.se_channels is not None}
    for name, values in exponents.items():
        if name not in channels:
            yield f"{name} was rescaled, which its readers cannot make up for"
        elif values.shape != (channels[name],):
            yield f"{name} was rescaled in {values.size} channels where it has {channels[name]}"


def _powers(
    architecture: Architecture, exponents: Mapping[str, NDArray[np.int64]]
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """The exponent of every weight that can have one, in a shape that broadcasts to the weight's."""
    before = np.zeros(architecture.in_channels, np.int64)
    for block in architecture.blocks:
        name = block.name
        own = exponents.get(f"{name}/Conv", np.zeros(block.out_channels, np.int64))
        yield f"{name}.weight", (own[:, None] - before[_read_channels(block)])[:, :, None, None]
        yield f"{name}.bias", own
        if block.se_channels is not None:
            squeezed = exponents.get(_squeezing(block), np.zeros(block.se_channels, np.int64))
            yield f"{name}.se.reduce.weight", (squeezed[:, None] - own[None, :])[:, :, None, None]
            yield f"{name}.se.reduce.bias", squeezed
            yield f"{name}.se.expand.weight", -squeezed[None, :, None, None]
        before = own
    yield "head.weight", -before[None, :]


def _read_channels(block: Block) -> NDArray[np.int64]:
    """The input channel that each of the kernel's (out, in / groups) planes reads."""
    inner, outer = block.in_channels // block.groups, block.out_channels // block.groups
    group = np.arange(block.out_channels) // outer
    return group[:, None] * inner + np.arange(inner)


def _squeezing(block: Block) -> str:
    return f"{block.name}/se/reduce/Conv"
