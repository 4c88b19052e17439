"""The other side of ``benchmarks/int8.py``: ONNX Runtime's own static quantization, as its documentation uses it.

    python -m benchmarks.int8_onnxruntime FLOAT32.onnx CALIBRATION.npz OUT.onnx [--method MinMax] [--per-tensor]

``quant_pre_process``, then ``quantize_static``: QDQ, signed, symmetric weights and activations; everything else is left
at its default. The images come as a stream, a few at a time, which takes less
time than single ones and less memory than many.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.tools import symbolic_shape_infer

from benchmarks.int8_worker import cost_of, print_cost, watched_dataset, worker_parser
from exporter.dataset import Dataset

LATE_IMPORTS = (symbolic_shape_infer,)
"""What ``quant_pre_process`` imports when it runs, torch with it: here already, so that nobody pays for it in time."""
WEIGHTS = {8: QuantType.QInt8, 4: QuantType.QInt4}
METHODS = ("MinMax", "Entropy", "Percentile")
IMAGES_AT_ONCE = 4


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches in the form that ONNX Runtime asks for them."""

    def __init__(self, images: Dataset, size: int = IMAGES_AT_ONCE) -> None:
        self._batches = images.batches(size)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next batch; none at the end."""
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch}


def quantize(
    float32: pathlib.Path,
    images: Dataset,
    out: pathlib.Path,
    method: str = METHODS[0],
    *,
    per_channel: bool = True,
    weight_bits: int = 8,
) -> None:
    """Writes the INT8 file of a float32 one."""
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = pathlib.Path(directory) / "prepared.onnx"
        quant_pre_process(str(float32), str(prepared))
        quantize_static(
            str(prepared),
            str(out),
            Reader(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=WEIGHTS[weight_bits],
            per_channel=per_channel,
            calibrate_method=CalibrationMethod[method],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Writes one file and prints what that took."""
    parser = worker_parser(__doc__)
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    parser.add_argument("--per-tensor", action="store_true", help="one weight scale for each convolution")
    arguments = parser.parse_args(argv)
    images = watched_dataset(arguments.calibration, arguments.float32)
    loaded = onnxruntime.InferenceSession(str(arguments.float32), providers=["CPUExecutionProvider"])
    chosen = {"per_channel": not arguments.per_tensor, "weight_bits": arguments.weight_bits}
    with contextlib.redirect_stdout(sys.stderr):
        cost = cost_of(lambda: quantize(arguments.float32, images, arguments.out, arguments.method, **chosen), images)
    del loaded
    print_cost(cost)


if __name__ == "__main__":
    main()
