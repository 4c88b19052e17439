"""Where an engine goes wrong: a copy with every layer as an output, and the first layer that departs by name."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from engines.audit import audit_of_file
from engines.backends.backend import TensorDescription
from engines.errors import CompilerRefused, InputRejected, SdkMissing
from engines.golden import golden_from_file
from engines.manifest import manifest_from_file, sidecar_path
from engines.onnx_file import DTYPES, onnx_file_from_path
from engines.parity import GATES
from engines.plan import header_from_file
from engines.receipts import layer_by_layer
from engines.receipts.figures import first_departure
from engines.receipts.layer_by_layer import (
    compile_copy,
    layer_from_results,
    layer_names,
    layers_of_engine,
    with_outputs,
    write_copy,
)
from engines.sdk import SDKS
from tests.engines.conftest import expected
from tests.engines.fake_machine import fake_machine
from tests.engines.fake_tensorrt import engine_bytes

BLOCKS = tuple(f"stage{stage}.{index}" for stage, depth in enumerate((1, 4, 3, 2, 1)) for index in range(depth))
RTX_SDK = SDKS[1]
PROFILE = [(1, 1, 28, 28), (8, 1, 28, 28), (32, 1, 28, 28)]


def computed(path, images):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return {value.name: value.type for value in session.get_outputs()}, dict(
        zip(names, session.run(names, {"input": images}), strict=True)
    )


# --- the copy


@pytest.mark.parametrize(
    ("name", "element", "added", "drift"),
    [("fashion.onnx", "float", (), 0), ("fashion.fp16.onnx", "float16", ("output/half",), 1e-3)],
    ids=["fp32", "fp16"],
)
def test_the_copy_has_every_layer_and_computes_what_the_file_computes(
    fashion_export, tmp_path, name, element, added, drift
):
    """ONNX Runtime rounds float16 at outputs alone, so that there are roundings more in the copy of that."""
    images = golden_from_file(fashion_export / "golden.npz").images
    names = write_copy(fashion_export / name, tmp_path / "copy.onnx")
    assert names == (*BLOCKS, *added, "output")
    types, outputs = computed(tmp_path / "copy.onnx", images)
    assert types == {"output": "tensor(float)"} | dict.fromkeys((*BLOCKS, *added), f"tensor({element})")
    _, alone = computed(fashion_export / name, images)
    scale = np.abs(alone["output"]).max()
    assert np.abs(outputs["output"] - alone["output"]).max() <= drift * scale
    assert all(outputs[layer].min() == 0 < outputs[layer].max() for layer in BLOCKS)


def test_the_copy_is_the_file_with_outputs_and_nothing_else(fashion_export, tmp_path):
    source = fashion_export / "fashion.fp16.onnx"
    write_copy(source, tmp_path / "copy.onnx")
    model, copy = onnx.load(source), onnx.load(tmp_path / "copy.onnx")
    onnx.checker.check_model(copy, full_check=True)
    assert (tmp_path / "copy.onnx").read_bytes().startswith(source.read_bytes())
    added = list(copy.graph.output)[1:]
    assert {value.type.tensor_type.elem_type for value in added} == {onnx.TensorProto.FLOAT16}
    assert [len(value.type.tensor_type.shape.dim) for value in added] == [4] * len(BLOCKS) + [2]
    del copy.graph.output[1:]
    assert copy == model


def test_a_feature_map_without_relu_or_gemm_is_a_layer_too(fashion_export, tmp_path):
    file = onnx_file_from_path(fashion_export / "fashion.onnx")
    nodes = tuple(node for node in file.nodes if node.op_type == "Conv")
    assert layer_names(dataclasses.replace(file, nodes=nodes)) == ("output",)


@pytest.mark.parametrize("length", [1, 127, 128, 20000])
def test_names_of_any_length_are_written(length):
    model = onnx.ModelProto(ir_version=8)
    model.graph.name = "kept"
    name = "x" * length
    read = onnx.load_from_string(
        with_outputs(model.SerializeToString(), [TensorDescription(name, "int8", (None, 4)), *PLAIN])
    )
    assert (read.graph.name, [value.name for value in read.graph.output]) == ("kept", [name, "plain"])
    assert read.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.INT8
    assert not read.graph.output[1].HasField("type")


PLAIN = [TensorDescription("plain", DTYPES[0], ())]


def test_the_real_compiler_takes_the_copy_and_computes_the_same_layers(fashion_export, tmp_path):
    """Its kernels hold the graph's weights bit for bit, as those of the engine itself."""
    engine = fashion_export / "fashion.fp16.engine"
    write_copy(fashion_export / "fashion.fp16.onnx", tmp_path / "layers.onnx")
    compile_copy(
        tmp_path / "layers.onnx", tmp_path / "layers.engine", RTX_SDK, manifest_from_file(sidecar_path(engine)), 86
    )
    header = header_from_file(tmp_path / "layers.engine")
    assert header.compute_capabilities == (86,)
    audit = audit_of_file(tmp_path / "layers.engine", *expected(fashion_export / "fashion.fp16.onnx"))
    assert (audit.problems, audit.by_dtype) == ((), {"float16": len(BLOCKS)})
    assert b"stage1.1" in (tmp_path / "layers.engine").read_bytes()


def test_what_the_compiler_refuses_is_said(fashion_export, tmp_path):
    model = onnx.load(fashion_export / "fashion.fp16.onnx")
    model.graph.node[1].op_type = "NoSuchOperation"
    onnx.save(model, tmp_path / "layers.onnx")
    manifest = manifest_from_file(fashion_export / "fashion.fp16.engine.json")
    with pytest.raises(CompilerRefused, match="NoSuchOperation"):
        compile_copy(tmp_path / "layers.onnx", tmp_path / "layers.engine", RTX_SDK, manifest, 86)


# --- departures


@pytest.fixture
def faulty(monkeypatch, tmp_path, fashion_export):
    """``faulty(harm)``: an fp32 engine of a pretended machine, whose compiler does ``harm`` to the copy's weights."""
    machine = fake_machine(monkeypatch, tmp_path)
    monkeypatch.setattr(layer_by_layer, "gpu_compute_capability", lambda _=0: 86)
    graph = shutil.copy(fashion_export / "fashion.onnx", tmp_path / "fashion.fp32.onnx")
    shutil.copy(fashion_export / "golden.npz", tmp_path)
    engine = tmp_path / "fashion.fp32.engine"
    content = engine_bytes(graph.read_bytes(), machine.sdk, machine.version, PROFILE)
    engine.write_bytes(content)
    manifest = dataclasses.replace(
        manifest_from_file(fashion_export / "fashion.fp16.engine.json"),
        name=engine.name,
        precision="fp32",
        tolerance=GATES["fp32"].max_relative_error,
        sha256={
            "checkpoint": "0" * 64,
            "onnx": hashlib.sha256(graph.read_bytes()).hexdigest(),
            "engine": hashlib.sha256(content).hexdigest(),
        },
    )
    sidecar_path(engine).write_text(manifest.to_json())

    def plug_in(harm):
        def compile_with_harm(copy, target, sdk, manifest, capability):
            assert (sdk.module, capability) == (machine.sdk, 86)
            model = onnx.load(copy)
            weights = {tensor.name: tensor for tensor in model.graph.initializer}
            harm(weights)
            target.write_bytes(engine_bytes(model.SerializeToString(), machine.sdk, machine.version, PROFILE))

        monkeypatch.setattr(layer_by_layer, "compile_copy", compile_with_harm)
        return engine

    yield plug_in
    machine.assert_nothing_left()


def scaled(name, factor):
    def harm(weights):
        array = numpy_helper.to_array(weights[name]) * np.float32(factor)
        weights[name].CopyFrom(numpy_helper.from_array(array, name))

    return harm


def test_an_engine_without_a_fault_departs_nowhere(faulty):
    layers = layers_of_engine(faulty(lambda weights: None))
    assert [layer.name for layer in layers] == [*BLOCKS, "output"]
    assert first_departure(layers) is None
    assert max(layer.relative_error for layer in layers) < 1e-6


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("stage0.0.bias", "stage0.0"),
        ("stage1.2.weight", "stage1.2"),
        ("stage4.0.weight", "stage4.0"),
        ("head.weight", "output"),
    ],
)
def test_the_layer_with_the_fault_is_the_first_that_departs(faulty, weight, layer):
    layers = layers_of_engine(faulty(scaled(weight, 1.01)))
    names = [found.name for found in layers]
    found = first_departure(layers)
    assert found.name == layer
    assert 1e-3 < found.relative_error < 2e-2
    assert 30 < found.sqnr_db < 70
    assert all(earlier.relative_error < 1e-6 for earlier in layers[: names.index(layer)])


def test_a_fault_within_the_gate_is_none(faulty):
    layers = layers_of_engine(faulty(scaled("head.weight", 1 + 1e-6)))
    assert first_departure(layers) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_layer_of_nan_or_infinity_departs(faulty, value):
    found = first_departure(layers_of_engine(faulty(scaled("stage2.1.bias", value))))
    assert (found.name, found.non_finite > 0) == ("stage2.1", True)


def test_half_results_are_compared_as_they_are():
    reference = np.linspace(-1, 1, 24, dtype=np.float16).reshape(2, 3, 2, 2)
    near, far = reference.copy(), reference.copy()
    near[0, 0, 0, 0] += np.float16(2e-3)
    far[1, 2, 1, 1] += np.float16(2e-2)
    assert layer_from_results("x", reference, near, GATES["fp16"]).passed
    assert not layer_from_results("x", reference, far, GATES["fp16"]).passed
    swapped = reference[:, ::-1]
    assert not layer_from_results("x", reference, swapped, GATES["fp16"]).passed


def test_int8_noise_is_held_to_its_sqnr():
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(4, 100)).astype(np.float32)
    noise = generator.normal(size=(4, 100)).astype(np.float32)
    found = [layer_from_results("x", reference, reference + noise * part, GATES["int8"]) for part in (0.05, 0.15)]
    assert [layer.passed for layer in found] == [True, False]
    assert found[1].relative_error < GATES["int8"].max_relative_error


def test_without_a_gpu_or_the_graph_nothing_is_compiled(faulty, monkeypatch):
    engine = faulty(lambda weights: pytest.fail("compiled"))
    monkeypatch.setattr(layer_by_layer, "gpu_compute_capability", lambda _=0: None)
    with pytest.raises(SdkMissing, match="no GPU answers here"):
        layers_of_engine(engine)
    monkeypatch.setattr(layer_by_layer, "gpu_compute_capability", lambda _=0: 86)
    engine.with_suffix(".onnx").unlink()
    with pytest.raises(InputRejected, match="typed graph that it was made from is not beside it"):
        layers_of_engine(engine)
