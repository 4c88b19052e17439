"""Real engines of small networks, each compiled once a session, and what their ONNX files say must be in them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import shutil

import onnx
import pytest
import torch
from onnx import numpy_helper

import exporter
from engines.audit import ExpectedConvolution, ExpectedMatrix
from tests.conftest import EXAMPLES, Outcome
from tests.engines.quantized_graphs import QuantizedGraph, engine_from_model
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


@pytest.fixture(scope="session")
def compiled_int8(tmp_path_factory):
    """``compiled_int8(form, *blocks)``: an engine for SM86 of a QuantizedGraph with a head of ten classes."""
    made = {}

    def compile_once(form, *blocks, kept_head=False, cards=(86,), classes=10, channels=3):
        key = (form, blocks, kept_head, cards, classes, channels)
        if key not in made:
            graph = QuantizedGraph(form, channels=channels).blocks(*blocks).head(classes, kept=kept_head)
            made[key] = engine_from_model(graph.model(), tmp_path_factory.mktemp("int8"), cards=cards)
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


@pytest.fixture(scope="session")
def fashion_export(tmp_path_factory):
    """The directory that the shipped checkpoint is exported to, ONNX and FP16 engine; not to be changed."""
    folder = tmp_path_factory.mktemp("fashion") / "fashion"
    exporter.export(EXAMPLES / "fashion.pt", folder, trt=("fp16",), size=28)
    return folder


@pytest.fixture
def fashion(fashion_export, tmp_path):
    """A copy of the shipped checkpoint's export, to be damaged at will."""
    return shutil.copytree(fashion_export, tmp_path / "fashion")


@pytest.fixture
def engines_command(tmp_path, monkeypatch):
    """Runs ``python -m engines`` in this process, in ``tmp_path``."""
    from engines.cli import main

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = main([str(argument) for argument in arguments])
        return Outcome(code, stdout.getvalue(), stderr.getvalue())

    return run
