"""What an INT8 file is worth, measured on labelled images that no calibration saw.

Every file is run by ONNX Runtime with optimizations off, so that QuantizeLinear, DequantizeLinear and the convolutions
between them are computed as they are written, in float32.

    SQNR         10 log10(sum y^2 / sum (y - q)^2) in dB over all logits, y of the float32 file and q of the INT8 one
    top-1, drop  and the drop's standard error, of the paired difference: ``exporter.accuracy``
    agreement    the part of the images that both give the same class
"""

from __future__ import annotations

import dataclasses
import math
import pathlib

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from exporter.accuracy import row_from_answers
from exporter.dataset import Dataset

IMAGES_AT_ONCE = 50


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one INT8 file: the SQNR in dB, the rest in percent and percentage points."""

    sqnr_db: float
    float32_top1: float
    top1: float
    drop: float
    standard_error: float
    agreement: float


def logits_of_file(path: pathlib.Path, images: Dataset) -> NDArray[np.float32]:
    """The answers to all images, (N, classes)."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": batch})[0] for batch in images.batches(IMAGES_AT_ONCE)])


def figures_from_logits(
    quantized: NDArray[np.floating], float32: NDArray[np.floating], labels: NDArray[np.int64]
) -> Figures:
    """From both networks' answers to the same images, each (N, classes), and the labels, (N,)."""
    row = row_from_answers("int8", quantized.argmax(axis=1), float32.argmax(axis=1), labels)
    return Figures(
        sqnr_db=sqnr_db(quantized, float32),
        float32_top1=100 * float((float32.argmax(axis=1) == labels).mean()),
        top1=100 * row.top1,
        drop=100 * row.drop,
        standard_error=100 * row.standard_error,
        agreement=100 * row.agreement,
    )


def sqnr_db(quantized: NDArray[np.floating], float32: NDArray[np.floating]) -> float:
    """The signal to quantization noise ratio; infinite where nothing differs, NaN where an answer is."""
    signal, answer = float32.astype(np.float64), quantized.astype(np.float64)
    noise = float(np.square(signal - answer).sum())
    with np.errstate(divide="ignore"):
        return math.inf if noise == 0 else float(10 * np.log10(np.square(signal).sum() / noise))
