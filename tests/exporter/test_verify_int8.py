"""python -m exporter.verify on INT8 files: of both forms, sabotaged, and such as ONNX and TensorRT read differently."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

import exporter
from engines.parity import GATES, Gate
from exporter.errors import VerificationFailed
from exporter.images import noise_images
from exporter.onnx_file import graph_from_file, write_onnx
from exporter.quantization.form import FORMS, RTX
from exporter.quantization.qdq import graph_from_quantized
from exporter.verify import main, verdict_of
from tests.conftest import EXAMPLES
from tests.quantized_networks import quantized_graph

CONV, TENSOR = "stage2.1", "stage2.0"
KEPT = {RTX.name: ("stage1.2/Conv",)}
"""Whose channels are too unlike for one scale: with it, what nearest rounding leaves is 7 dB, and without it 27."""
NAMES = {form.name: f"fashion.{form.name}.onnx" for form in FORMS}
IDS = [form.name for form in FORMS]


def calibration_images():
    with np.load(EXAMPLES / "fashion_calibration.npz") as data:
        return (data["images"][:32].reshape(-1, 1, 28, 28).astype(np.float32) / 255 - 0.5) / 0.5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """fashion.pt as ONNX file and as INT8 files of both forms, calibrated on images and noise."""
    folder = tmp_path_factory.mktemp("int8") / "out"
    exporter.export(EXAMPLES / "fashion.pt", folder, size=28)
    graph = graph_from_file(folder / "fashion.onnx")
    images = np.concatenate([calibration_images(), noise_images(1, (28, 28))])
    for form in FORMS:
        quantized = quantized_graph(graph, images, form, KEPT.get(form.name, ()))
        write_onnx(graph_from_quantized(quantized), folder / NAMES[form.name])
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Images that nothing was calibrated on."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    with np.load(EXAMPLES / "fashion_test.npz") as data:
        np.savez(path, images=data["images"][:32])
    return path


@pytest.fixture
def spoilt(exported, tmp_path):
    """``spoilt(form, change)``: a copy of an INT8 file with its model changed."""

    def make(form, change):
        model = onnx.load(exported / NAMES[form.name])
        change(model)
        onnx.save(model, tmp_path / "spoilt.onnx")
        return tmp_path / "spoilt.onnx"

    return make


def array(name, change):
    def spoil(model):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        old = numpy_helper.to_array(tensor)
        new = np.asarray(change(old.copy()))
        assert not np.array_equal(new, old) or new.dtype != old.dtype
        tensor.CopyFrom(numpy_helper.from_array(new, name))

    return spoil


def shuffled(codes):
    flat = codes.reshape(-1)
    np.random.default_rng(5).shuffle(flat)
    return codes


def node_of(model, name):
    return next(node for node in model.graph.node if node.name == name)


# --- the same


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("noise", [True, False], ids=["noise", "images"])
@pytest.mark.parametrize("other", ["fashion.pt", "fashion.onnx"])
def test_an_int8_file_agrees_with_what_it_was_made_from_without_any_flag(other, noise, form, exported, photographs):
    paths = [EXAMPLES / other if other == "fashion.pt" else exported / other, exported / NAMES[form.name]]
    for pair in (paths, paths[::-1]):
        verdict = verdict_of(*pair, inputs=None if noise else photographs)
        assert verdict.passed
        assert verdict.reference.startswith(f"{other} (")
        assert verdict.candidate == f"{NAMES[form.name]} (ONNX, int8)"
        assert verdict.checks[0].gate == GATES["int8"].max_relative_error
        assert verdict.rows[0].comparison.sqnr_db > 20


def test_the_two_forms_agree_and_the_first_is_the_reference(exported):
    verdict = verdict_of(exported / NAMES["int8.rtx"], exported / NAMES["int8"])
    assert verdict.passed
    assert verdict.reference == "fashion.int8.rtx.onnx (ONNX, int8)"


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_an_int8_file_is_run_as_it_is_written(form, exported):
    """And not with kernels that round elsewhere, so that batches of one and of many differ by float32's noise alone."""
    path = exported / NAMES[form.name]
    assert verdict_of(path, path).rows[0].comparison.sqnr_db > 100


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_the_command_passes_and_its_gate_may_be_given(form, exported, capsys):
    files = [str(exported / "fashion.onnx"), str(exported / NAMES[form.name])]
    assert main(files) == 0
    out = capsys.readouterr().out
    assert f"ok   {NAMES[form.name]} (ONNX, int8) against fashion.onnx (ONNX, fp32)" in out
    assert main([*files, "--gate", "1e-4"]) == 1
    assert "exceeds 1.0e-04" in capsys.readouterr().err


# --- not the same


SABOTAGE = {
    "one weight scale times 3": array(f"{CONV}.weight/scale", lambda scale: scale * scale.dtype.type(3)),
    "one input scale by 20": array(f"{TENSOR}/scale", lambda scale: scale / scale.dtype.type(20)),
    "the codes of one convolution shuffled": array(f"{CONV}.weight", shuffled),
    "the codes of one convolution of the other sign": array(f"{CONV}.weight", np.negative),
    "a lost bias": array("stage3.0.bias", np.zeros_like),
    "codes of the head in another order": array("head.weight", lambda codes: codes[::-1]),
    "a head without codes": array("head.weight", np.zeros_like),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("change", SABOTAGE.values(), ids=SABOTAGE)
def test_a_sabotaged_file_fails(change, form, exported, spoilt, photographs, capsys):
    files = [str(exported / "fashion.onnx"), str(spoilt(form, change))]
    assert main([*files, "--inputs", str(photographs), "--quiet"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: spoilt.onnx (ONNX, int8) against fashion.onnx (ONNX, fp32): ")


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_a_coarse_file_fails_a_gate_of_signal_to_noise_alone(form, exported, spoilt, photographs):
    """Of a scale 8 times as large, a few codes are left; the largest error is within a wide gate."""
    path = spoilt(form, array(f"{TENSOR}/scale", lambda scale: scale * scale.dtype.type(8)))
    files = exported / "fashion.onnx", path
    found = verdict_of(*files, inputs=photographs, gate=Gate(0.5, top1=False))
    assert found.passed
    decibels = found.rows[0].comparison.sqnr_db
    assert verdict_of(*files, inputs=photographs, gate=Gate(0.5, top1=False, min_sqnr_db=decibels - 1)).passed
    judged = verdict_of(*files, inputs=photographs, gate=Gate(0.5, top1=False, min_sqnr_db=decibels + 1))
    assert not judged.passed
    assert "SQNR" in judged.failure_line


def test_a_file_calibrated_on_images_alone_fails_on_noise_and_says_why(exported, photographs, tmp_path, capsys):
    quantized = quantized_graph(graph_from_file(exported / "fashion.onnx"), calibration_images(), FORMS[0])
    write_onnx(graph_from_quantized(quantized), tmp_path / "x.onnx")
    files = [str(exported / "fashion.onnx"), str(tmp_path / "x.onnx"), "--quiet"]
    assert main(files) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("calibrated on, not for noise: give some (--inputs)")
    assert main([*files, "--inputs", str(photographs)]) == 0
    assert main([*files, "--inputs", str(photographs), "--gate", "1e-4"]) == 1
    assert "for noise" not in capsys.readouterr().err


# --- refused


def unsigned(model):
    array(f"{TENSOR}/zero_point", lambda zero: zero.view(np.uint8))(model)


def no_zero_point(model):
    for kind in ("Quantize", "Dequantize"):
        node = node_of(model, f"{TENSOR}/{kind}Linear")
        node.input[:] = node.input[:2]


def int32_bias(model):
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == f"{CONV}.bias")
    codes = numpy_helper.from_array(np.zeros(bias.dims, np.int32), "codes")
    model.graph.initializer.append(codes)
    place = [node.name for node in model.graph.node].index(f"{CONV}/Conv")
    made = helper.make_node("DequantizeLinear", ["codes", f"{TENSOR}/scale"], ["made"], name="made/DequantizeLinear")
    model.graph.node.insert(place, made)
    node_of(model, f"{CONV}/Conv").input[2] = "made"


REFUSED = {
    "uint8": (unsigned, f"{TENSOR}/QuantizeLinear has a uint8 zero point"),
    "no zero point": (no_zero_point, f"{TENSOR}/QuantizeLinear has no zero point, which is uint8 to ONNX"),
    "an int32 bias": (int32_bias, f"{CONV}/Conv has a quantized bias"),
    "a scale of 0": (array(f"{TENSOR}/scale", lambda scale: scale * 0), "has a scale of 0"),
}


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_onnx_and_the_compiler_read_apart_is_refused_with_the_reason(
    change, reason, form, exported, spoilt, capsys
):
    path = spoilt(form, change)
    for pair in ((exported / "fashion.onnx", path), (path, exported / "fashion.onnx")):
        assert main([str(one) for one in pair]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path}: not the same to ONNX and TensorRT: ")
        assert reason in line


# --- of another tool


class Images(CalibrationDataReader):
    """What the files above were calibrated on."""

    def __init__(self):
        self.batches = iter([{"input": calibration_images()}, {"input": noise_images(1, (28, 28))}])

    def get_next(self):
        return next(self.batches, None)


def of_onnx_runtime(exported, path, **settings):
    quantize_static(exported / "fashion.onnx", path, Images(), per_channel=True, **settings)
    return path


def test_a_file_of_onnx_runtimes_quantizer_is_refused_as_it_comes(exported, tmp_path):
    """Its activations are uint8 with zero points, its biases int32."""
    path = of_onnx_runtime(exported, tmp_path / "ort.onnx", activation_type=QuantType.QUInt8)
    with pytest.raises(VerificationFailed, match=r"not the same to ONNX and TensorRT: .* has a uint8 zero point"):
        verdict_of(exported / "fashion.onnx", path)


def test_a_file_of_onnx_runtimes_quantizer_in_the_dialect_is_compared(exported, tmp_path):
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    path = of_onnx_runtime(exported, tmp_path / "ort.onnx", activation_type=QuantType.QInt8, extra_options=options)
    verdict = verdict_of(exported / "fashion.onnx", path)
    assert verdict.passed
    assert verdict.candidate == "ort.onnx (ONNX, int8)"
    assert verdict.rows[0].comparison.sqnr_db > 20
