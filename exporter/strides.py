"""The stride patterns that a network's tensors allow: no tensor has a stride, but some shapes rule one out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from exporter.architecture import Architecture, stage_of


def stride_choices(architecture: Architecture) -> tuple[tuple[int, ...], ...]:
    """Per stage, the strides that the tensors allow its first block; deployed blocks allow both."""
    firsts = {stage_of(block): block for block in reversed(architecture.blocks)}
    identities = any("identity" in block.branches for block in architecture.blocks)
    choices: list[tuple[int, ...]] = []
    for _, block in sorted(firsts.items()):
        if "identity" in block.branches:
            choices.append((1,))
        elif identities and not block.deployed and block.in_channels == block.out_channels:
            choices.append((2,))
        else:
            choices.append((1, 2))
    return tuple(choices)


def with_strides(architecture: Architecture, strides: tuple[int, ...]) -> Architecture:
    """``architecture`` with other strides of the first blocks of its stages. Its published name is kept."""
    blocks, seen = [], set()
    for block in architecture.blocks:
        stage = stage_of(block)
        blocks.append(block if stage in seen else block.at_stride(strides[stage]))
        seen.add(stage)
    return dataclasses.replace(architecture, blocks=tuple(blocks), stage_strides=strides)


def neighbours(strides: tuple[int, ...], choices: tuple[tuple[int, ...], ...]) -> Iterator[tuple[int, ...]]:
    """The patterns among ``choices`` that differ in one stage, or by an exchange of two stages' strides."""
    for stage, allowed in enumerate(choices):
        for stride in allowed:
            if stride != strides[stage]:
                yield (*strides[:stage], stride, *strides[stage + 1 :])
    for first, second in itertools.combinations(range(len(strides)), 2):
        if strides[first] != strides[second] and len(choices[first]) == len(choices[second]) == 2:
            exchanged = list(strides)
            exchanged[first], exchanged[second] = strides[second], strides[first]
            yield tuple(exchanged)
