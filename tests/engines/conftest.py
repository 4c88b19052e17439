"""Real engines of small networks, each compiled once a session, and what their ONNX files say must be in them."""

from __future__ import annotations

import dataclasses
import pathlib

import onnx
import pytest
import torch
from onnx import numpy_helper

import exporter
from engines.audit import ExpectedConvolution, ExpectedMatrix
from tests.networks import NaiveRepVGG, Shape, contiguous_float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """An engine, the typed ONNX file it came from, and that file's nodes with weights."""

    onnx: pathlib.Path
    engine: pathlib.Path
    sidecar: pathlib.Path
    line: str
    convolutions: list[ExpectedConvolution]
    matrices: list[ExpectedMatrix]

    @property
    def bytes(self) -> bytes:
        return self.engine.read_bytes()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """``compiled(shape, precision, seed)``: the checked export of a NaiveRepVGG for 32x32 images."""
    made = {}

    def compile_once(shape=None, precision="fp16", seed=1):
        key = (shape or Shape(classes=8), precision, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp("compiled")
            torch.save(contiguous_float(NaiveRepVGG(key[0], seed).state_dict()), folder / "net.pt")
            report = exporter.export(folder / "net.pt", folder, onnx=False, trt=(precision,), size=32)
            typed, engine = folder / f"net.{precision}.onnx", folder / f"net.{precision}.engine"
            sidecar = folder / f"{engine.name}.json"
            made[key] = Compiled(typed, engine, sidecar, report.engines[0].audit["line"], *expected(typed))
        return made[key]

    return compile_once


def expected(path):
    """Every Conv (with the ReLU that reads it) and every Gemm of an ONNX file."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    relus = {node.input[0]: node.name for node in graph.node if node.op_type == "Relu"}
    convolutions = [
        ExpectedConvolution(n.name, relus.get(n.output[0]), arrays[n.input[1]], arrays[n.input[2]])
        for n in graph.node
        if n.op_type == "Conv"
    ]
    return convolutions, [
        ExpectedMatrix(n.name, *(arrays[name] for name in n.input[1:])) for n in graph.node if n.op_type == "Gemm"
    ]
