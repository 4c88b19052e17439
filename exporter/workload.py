"""How much arithmetic one image is: multiply-accumulates of the deployed network's convolutions and classifier."""

from __future__ import annotations

from exporter.architecture import Architecture


def multiply_accumulates(architecture: Architecture, size: tuple[int, int]) -> int:
    """Per image of ``size`` (height, width), after fusion; SE's two matrices included, pooling and ReLU not."""
    height, width = size
    total = (architecture.classes or 0) * architecture.blocks[-1].out_channels
    for block in architecture.blocks:
        height, width = -(-height // block.stride), -(-width // block.stride)
        total += block.kernel**2 * height * width * block.out_channels * block.in_channels // block.groups
        total += 2 * block.out_channels * (block.se_channels or 0)
    return total


def output_values(architecture: Architecture, size: tuple[int, int]) -> int:
    """Numbers in all outputs for one image of ``size`` (height, width)."""
    total = 0
    for output in architecture.outputs:
        height, width = (1, 1) if output.block is None else architecture.size_behind(output.block, size)
        total += output.channels * height * width
    return total
