"""Multiply-accumulates of every named network, off its deployed graph: as published, and as counted in other ways.

The graphs are the exporter's own, from shapes alone; their weights are views of one zero, so that B3 takes no memory.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engines.onnx_file import onnx_file_from_path
from engines.roofline import operations_per_image
from engines.roofline.fused_kernels import works_from_onnx
from exporter.architecture import Architecture, Block
from exporter.onnx_graph import INPUT, Graph, structure_from_architecture, without_declarations
from exporter.variants import VARIANTS, variant_from_name
from exporter.workload import multiply_accumulates

PAPER = {
    "A0": 1.4, "A1": 2.4, "A2": 5.1, "B0": 3.1, "B1": 11.8, "B1g2": 8.8, "B1g4": 7.3, "B2": 18.4, "B2g4": 11.3,
    "B3": 26.2, "B3g4": 16.1,
}  # fmt: skip
"""Billions, "Theo FLOPs (B)": Ding et al., RepVGG: Making VGG-style ConvNets Great Again, CVPR 2021, tables 4 and 5."""

MMPRETRAIN = {
    "A0": (1.36, 1.52), "A1": (2.37, 2.64), "A2": (5.12, 5.7), "B0": (3.06, 3.42), "B1": (11.82, 13.16),
    "B1g2": (8.82, 9.82), "B1g4": (7.32, 8.15), "B2": (18.39, 20.46), "B2g4": (11.34, 12.63), "B3": (26.22, 29.17),
    "B3g4": (16.08, 17.9), "D2se": (32.85, 36.56),
}  # fmt: skip
"""Billions, deployed and in training form: OpenMMLab, mmpretrain, configs/repvgg/README.md, "Flops (G)".

They count additions of biases and ReLUs, too: at most half a per cent more.
"""

MOBILEONE = {"S0": 275, "S1": 825, "S2": 1299, "S3": 1896, "S4": 2978}
"""Millions: Vasu et al., MobileOne: An Improved One Millisecond Mobile Backbone, CVPR 2023, "FLOPs (M)"."""

UNPUBLISHED = {"B2g2", "B3g2", "L2pse"}
EACH = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def architecture_of(variant):
    """A named network of the published strides: 2 at the beginning of each stage."""
    blocks, channels, seen = [], 3, set()
    for index, block in enumerate(variant.blocks):
        stride = 1 if block.stage in seen else 2
        seen.add(block.stage)
        blocks.append(
            Block(
                f"stage{block.stage}.{index}", channels, block.out_channels, stride, block.groups, ("fused",),
                block.se_channels, block.kernel,
            )
        )  # fmt: skip
        channels = block.out_channels
    return Architecture(tuple(blocks), 1000, 1e-5, "official", variant.name, (2,) * 5, (True,) * 5, variant.family)


def file_of(architecture, folder, size=(224, 224)):
    """The deployed graph as a file is read, with weights that take no room."""
    structure = structure_from_architecture(architecture, size)
    zero = np.zeros((), np.float32)
    weights = {
        value.name: np.broadcast_to(zero, [dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in structure.graph.input
        if value.name != INPUT
    }
    path = folder / "net.onnx"
    path.write_bytes(without_declarations(Graph(structure, weights)).SerializeToString())
    assert path.stat().st_size < 100_000
    return dataclasses.replace(onnx_file_from_path(path), weights=weights)


@pytest.fixture
def billions(tmp_path):
    """Multiply-accumulates of a variant's deployed graph at 224 pixels."""

    def counted(variant):
        return operations_per_image(works_from_onnx(file_of(architecture_of(variant), tmp_path))) / 2e9

    return counted


def counted_by_loops(architecture, height, width):
    """Every product of every convolution and matrix, by the shapes that the network's layers have."""
    total = 0
    for block in architecture.blocks:
        height, width = (
            (height + 2 * (block.kernel // 2) - block.kernel) // block.stride + 1,
            (width + 2 * (block.kernel // 2) - block.kernel) // block.stride + 1,
        )
        for_each_number = block.in_channels // block.groups * block.kernel * block.kernel
        total += block.out_channels * height * width * for_each_number
        if block.se_channels:
            total += block.out_channels * block.se_channels + block.se_channels * block.out_channels
    return total + architecture.blocks[-1].out_channels * architecture.classes


@pytest.mark.parametrize("name", PAPER)
def test_the_operations_of_a_repvgg_are_the_papers(billions, name):
    assert round(billions(variant_from_name(name)), 1) == PAPER[name]


@pytest.mark.parametrize("name", MMPRETRAIN)
def test_the_operations_of_a_repvgg_are_those_of_another_library(billions, name):
    assert billions(variant_from_name(name)) == pytest.approx(MMPRETRAIN[name][0], rel=0.005)


@pytest.mark.parametrize("name", MOBILEONE)
def test_the_operations_of_a_mobileone_are_the_papers(billions, name):
    assert billions(variant_from_name(name)) * 1e3 == pytest.approx(MOBILEONE[name], rel=0.01)


@EACH
def test_the_operations_are_those_of_the_exporters_ledger_and_of_a_loop_over_the_layers(tmp_path, variant):
    """Also where strides do not divide the size."""
    architecture = architecture_of(variant)
    for size in ((224, 224), (97, 130)):
        found = operations_per_image(works_from_onnx(file_of(architecture, tmp_path, size)))
        assert found == 2 * multiply_accumulates(architecture, size) == 2 * counted_by_loops(architecture, *size)


def test_every_network_is_held_against_something_published_or_named_as_unpublished():
    assert {variant.name for variant in VARIANTS} == {*PAPER, *MMPRETRAIN, *MOBILEONE, *UNPUBLISHED}
    assert not UNPUBLISHED & {*PAPER, *MMPRETRAIN, *MOBILEONE}


def without_a_block(architecture):
    return dataclasses.replace(architecture, blocks=architecture.blocks[:-2] + architecture.blocks[-1:])


def of_stride_one(architecture):
    first, *others = architecture.blocks
    return dataclasses.replace(architecture, blocks=(dataclasses.replace(first, stride=1), *others))


def with_groups(architecture):
    blocks = tuple(
        dataclasses.replace(block, groups=2) if index in (2, 4) else block
        for index, block in enumerate(architecture.blocks)
    )
    return dataclasses.replace(architecture, blocks=blocks)


@pytest.mark.parametrize("change", [without_a_block, of_stride_one, with_groups])
@pytest.mark.parametrize("name", ["A0", "B1"])
def test_a_network_that_is_nearly_the_published_one_has_other_operations(tmp_path, name, change):
    architecture = change(architecture_of(variant_from_name(name)))
    found = operations_per_image(works_from_onnx(file_of(architecture, tmp_path))) / 2e9
    assert found != pytest.approx(MMPRETRAIN[name][0], rel=0.005)


# --- the form with branches


def training_form(architecture):
    """The products of the same network with a 1x1 branch beside each 3x3: once for each number of the result."""
    pointwise = [dataclasses.replace(block, kernel=1, se_channels=None) for block in architecture.blocks]
    return dataclasses.replace(architecture, blocks=tuple(pointwise), classes=None)


@pytest.mark.parametrize("name", MMPRETRAIN)
def test_what_deploying_saves_is_the_published_difference(tmp_path, name):
    """The 1x1 branches; and their batch norms, which the published figures count, and nothing here does."""
    deployed, trained = MMPRETRAIN[name]
    branches = training_form(architecture_of(variant_from_name(name)))
    saved = operations_per_image(works_from_onnx(file_of(branches, tmp_path))) / 2e9
    assert saved < trained - deployed + 0.01
    assert saved == pytest.approx(trained - deployed, rel=0.1)
