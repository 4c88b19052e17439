"""Reports and a calibration without a run: one of every kind of finding, and whatever hypothesis comes up with."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from engines.parity import Comparison, Flip
from exporter.quantization.calibration_file import Binding, CalibrationFile, FormCalibration
from exporter.report import (
    AccuracyRow,
    Check,
    EngineRecord,
    FileRecord,
    Headroom,
    HeadroomRow,
    LayerRow,
    LedgerRow,
    QuantizationRecord,
    QuantizedLayerRow,
    Report,
)

DIGEST = "0123456789abcdef" * 4

COMPARISON = Comparison(
    relative_error=1.5e-3,
    max_abs_error=0.25,
    mean_abs_error=0.0625,
    sqnr_db=61.25,
    cosine=0.999999871,
    top1_agreement=0.75,
    flips=(Flip(2, 0.5),),
    decided_flips=1,
    non_finite=0,
    rows=4,
)
AUDIT = {
    "audited": True,
    "reason": None,
    "kernels": 15,
    "convolutions": 11,
    "expected_convolutions": 11,
    "by_dtype": {"float16": 11},
    "with_relu": 11,
    "expected_relus": 11,
    "weights_bit_equal": 12,
    "expected_weights": 12,
    "problems": (),
    "unproven": ("head/Gemm: its bias of one number",),
    "int8_outputs": {"float16": 11},
    "requantize_kernels": 10,
    "line": "11 of 11 convs in FP16",
}
REPORT = Report(
    version="0.1.0",
    checkpoint={
        "name": "model.pt",
        "sha256": DIGEST,
        "container": "state_dict",
        "unused_beside_it": ("ema",),
        "weights": "ema",
        "left_out": ("aux.fc.weight",),
        "lineage": "official",
        "form": "training",
    },
    architecture={
        "title": "RepVGG-A0",
        "family": "RepVGG",
        "variant": "A0",
        "depths": (1, 2),
        "widths": (48, 96),
        "stage_strides": (2, 2),
        "strides_told_by_tensors": (False, True),
        "groups": [1, 1, 1],
        "kernels": [3, 3, 1],
        "se_channels": [None, 6, 6],
        "in_channels": 3,
        "classes": 1000,
        "features": (1, 2),
        "bn_eps": 1e-5,
    },
    assumptions={"strides": "2,2", "eps": "1e-05", "size": "224x224", "mean": "0.5,0.5,0.5", "std": "1,1,1"},
    inputs="seeded noise (no --calib given)",
    certificates=({"block": "stage0.0", "branches": ("dense", "pointwise"), "error": 1e-15, "rounding_error": 1e-7},),
    checks=(
        Check("fusion, block by block", passed=True, value=1.2e-15, gate=1e-12, detail="1 block"),
        Check("fp16, graph contract", passed=False, value=None, gate=None, detail="2 Conv where 3 belong"),
        Check("fp16, engine on this machine's GPU", passed=None, value=None, gate=None, detail="no GPU answers here"),
    ),
    ledger=(LedgerRow("fused, float64", COMPARISON, 1e-15, (4,)), LedgerRow("fp16", COMPARISON, 1.5e-3, (1, 3, 32))),
    layers=(LayerRow("stage0.0", {"fused, float64": 1e-16, "fp16": 2e-3}), LayerRow("output", {"fp16": float("nan")})),
    first_departing_layer="stage0.0 in fp16",
    accuracy=(
        AccuracyRow("fp32", 2000, 0.93, 0.0, 0.0, 1.0, 0),
        AccuracyRow("fp16", 2000, 0.925, 0.005, 0.0012, 0.99, 3),
    ),
    headroom=(
        HeadroomRow("stage0.0/Conv", Headroom(131008.0, 2, 0.5, -1.0), Headroom(8188.0, 2, 8.0, 3.0), (0, 1, -4), None),
        HeadroomRow(
            "stage1.0/se/expand/Conv", Headroom(2.0, 0, 32752.0, 15.0), Headroom(2.0, 0, 32752.0, 15.0), (), "a Sigmoid"
        ),
    ),
    quantization=(
        QuantizationRecord(
            form="int8",
            file="model.int8.onnx",
            effort="high",
            weight_bits=8,
            activation_bits=8,
            equalized=True,
            equalized_db=33.625,
            plain_db=31.875,
            images=512,
            fitted_images=64,
            sqnr_db=33.4375,
            agreement=0.9906,
            simulation_db=56.5,
            kernels_db=41.125,
            budget_db=35.0,
            layers=(
                QuantizedLayerRow("stage0.0/Conv", 2.75, "mse", 0.00125, 41.5, 44.25, 34.0),
                QuantizedLayerRow("head/Gemm", 7.5, "kl", 0.0, 33.4375, 46.0, 33.5),
            ),
            kept={"stage1.0/Conv": "the budget of 35 dB", "stage1.0/se/reduce/Conv": "a part of SE"},
            seconds=2.5,
            traffic="INT8 moves 1.4x the bytes of FP16",
        ),
    ),
    witness={
        "verdict": "suspicious",
        "images": 128,
        "layers": [
            {
                "layer": "stage0.0.dense",
                "drift": 0.25,
                "spread": 0.5,
                "drift_by_chance": 0.01,
                "spread_by_chance": 0.02,
                "excess_drift": 0.24,
                "excess_spread": None,
            }
        ],
        "agreements": [{"block": "stage1.1", "disagreement": 0.125}],
        "first_departure": "stage0.0.dense",
        "line": "suspicious: the images depart in stage0.0.dense",
        "proposal": {
            "found": True,
            "flags": "--mean 0,0,0",
            "reversed_channels": False,
            "drift_before": 0.5,
            "drift_after": 0.01,
            "tried": ("ImageNet", "strides 2,1"),
            "line": "your images fit --mean 0,0,0 far better",
        },
    },
    gates={"fp32": 5e-6, "fp16": 5e-3, "int8": 0.25},
    engines=(
        EngineRecord(
            name="model.fp16.engine",
            precision="fp16",
            sdk="tensorrt_rtx",
            sdk_version="1.7.1.116",
            compute_capabilities=(86, 89),
            seconds=1.5,
            kept_in_float32={"stage0.0/Conv": "its weights overflow in half"},
            audit=AUDIT,
        ),
    ),
    files=(FileRecord("model.fp16.engine", 17, DIGEST), FileRecord("golden.npz", 0, None)),
    versions={"numpy": "2.4.6"},
)
CALIBRATED = CalibrationFile(
    schema=1,
    binding=Binding(
        checkpoint=DIGEST,
        data=DIGEST[::-1],
        images=512,
        preprocessing={"resize": "256", "size": "224x224", "mean": "0.5,0.5,0.5", "std": "1,1,1"},
        network={"strides": "2,2,2,2,2", "eps": "1e-05", "weights": "ema"},
        method={"effort": "high", "weight_bits": "8", "activation_bits": "8", "fitted_images": "64", "algorithm": "1"},
    ),
    forms=(
        FormCalibration(
            form="int8",
            equalized=True,
            factors={"stage0.0/Conv": (0.1, 3.0)},
            ranges={"stage0.0/Conv": 2.75, "head/Gemm": 7.5},
            methods={"stage0.0/Conv": "mse", "head/Gemm": "kl"},
            weight_scales={"stage0.0/Conv": (1e-3, 0.25), "head/Gemm": (1 / 3, 5e-324, 1.0)},
            sqnr_db=33.4375,
        ),
        FormCalibration(
            form="int8.rtx",
            equalized=False,
            factors={},
            ranges={"head/Gemm": 7.5},
            methods={"head/Gemm": "max"},
            weight_scales={"head/Gemm": (0.5,)},
            sqnr_db=-0.25,
        ),
    ),
)
PASSING = dataclasses.replace(REPORT, checks=REPORT.checks[:1])

names = st.text(max_size=20)
numbers = st.floats() | st.sampled_from([0.0, 1e-9, 0.5])
fractions = st.floats(0, 1)
counts = st.integers(0, 10**6)
comparisons = st.builds(
    Comparison,
    relative_error=numbers,
    max_abs_error=numbers,
    mean_abs_error=numbers,
    sqnr_db=numbers,
    cosine=numbers,
    top1_agreement=fractions,
    flips=st.lists(st.builds(Flip, counts, numbers), max_size=9).map(tuple),
    decided_flips=counts,
    non_finite=counts,
    rows=st.integers(1, 100),
)
checks = st.builds(
    Check, names, st.sampled_from([True, False, None]), st.none() | numbers, st.none() | numbers, st.text(max_size=80)
)
batches = st.lists(st.integers(1, 99), max_size=3).map(tuple)
layers = st.builds(LayerRow, names, st.dictionaries(names, numbers, max_size=3))
accuracies = st.builds(
    AccuracyRow,
    st.sampled_from(["fp32", "fp16", "int8", "int8.rtx"]),
    st.integers(1, 10**6),
    fractions,
    fractions,
    numbers,
    fractions,
    counts,
)
headrooms = st.builds(Headroom, numbers, counts, numbers, numbers)
headroom_rows = st.builds(
    HeadroomRow,
    names,
    headrooms,
    headrooms,
    st.just(()) | st.lists(st.integers(-40, 40), min_size=1, max_size=4).map(lambda powers: (*powers, 1)),
    st.none() | names,
)
quantized_layers = st.builds(
    QuantizedLayerRow,
    names,
    numbers,
    st.sampled_from(["mse", "kl", "max"]),
    fractions,
    numbers,
    st.none() | numbers,
    st.none() | numbers,
)
quantizations = st.builds(
    QuantizationRecord,
    form=st.sampled_from(["int8", "int8.rtx"]),
    file=names,
    effort=st.sampled_from(["default", "high"]),
    weight_bits=st.integers(2, 8),
    activation_bits=st.integers(2, 8),
    equalized=st.booleans(),
    equalized_db=st.none() | numbers,
    plain_db=st.none() | numbers,
    images=st.integers(1, 10**6),
    fitted_images=st.integers(1, 10**6),
    sqnr_db=numbers,
    agreement=st.none() | fractions,
    simulation_db=numbers,
    kernels_db=st.none() | numbers,
    budget_db=st.none() | numbers,
    layers=st.lists(quantized_layers, max_size=7).map(tuple),
    kept=st.dictionaries(names, names, max_size=4),
    seconds=st.floats(0, 1e6),
    traffic=st.none() | names,
)
reports = st.builds(
    lambda name, **fields: dataclasses.replace(REPORT, checkpoint={**REPORT.checkpoint, "name": name}, **fields),
    names,
    inputs=names,
    checks=st.lists(checks, max_size=5).map(tuple),
    ledger=st.lists(st.builds(LedgerRow, names, comparisons, numbers, batches), max_size=3).map(tuple),
    layers=st.lists(layers, max_size=3).map(tuple),
    first_departing_layer=st.none() | names,
    accuracy=st.lists(accuracies, max_size=2).map(tuple),
    headroom=st.lists(headroom_rows, max_size=7).map(tuple),
    quantization=st.lists(quantizations, max_size=2).map(tuple),
    versions=st.dictionaries(names, names, max_size=3),
    engines=st.sampled_from([(), REPORT.engines]),
)
