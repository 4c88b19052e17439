"""A trained RepVGG in; checked ONNX graphs and TensorRT engines out, with the proof that they are the same network."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from exporter.version import VERSION

if TYPE_CHECKING:
    from exporter.report import Report

__all__ = ["__version__", "export"]

__version__ = VERSION


def export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    onnx: bool = True,
    trt: Sequence[str] = (),
    size: int | str | tuple[int, int] = 224,
    features: Sequence[int] = (),
    weights: str | None = None,
    batch: tuple[int, int, int] = (1, 8, 32),
    strides: Sequence[int] | None = None,
    eps: float | None = None,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: int | None = None,
    calibration: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    max_drop: float | None = None,
    expect: str | os.PathLike[str] | None = None,
    ignore_witness: bool = False,
    layers: bool = False,
    require: Sequence[str] = (),
    sdk: str | None = None,
    gpu: Sequence[int] = (),
    ignore_keys: Sequence[str] = (),
    int8_effort: str = "default",
    int8_report: bool = False,
    int8_budget: float | None = None,
    notify: Callable[[str], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Exports a checkpoint and verifies what was written; what the command line calls.

    Args:
        path: the checkpoint, of torch.save or safetensors.
        out: the directory to write; by default one named after the checkpoint, in the working directory.
        onnx: whether to write ``<stem>.onnx``.
        trt: precisions to write ``<stem>.P.onnx`` and ``<stem>.P.engine`` in, of "fp32", "fp16", "int8"; the last needs
            ``calibration``.
        size: image height and width in pixels, or one number for both; or a text as the command line takes it, such as
            "160:224:320" for a dynamic height and width.
        features: stages whose results are exported instead of the classifier's, such as (1, 2, 3, 4).
        weights: "ema" or "raw", where the file holds both; None takes the averaged ones.
        batch: minimum, optimum and maximum batch of an engine.
        strides: of the first block of stage0 to stage4; None infers them from the tensors.
        eps: the batch norms' epsilon; None takes the lineage's.
        arch: a published name, such as "A0", that the checkpoint must be.
        mean: per channel, for pixels scaled to 0..1; None for ImageNet's, or 0.5 for one channel.
        std: as ``mean``.
        resize: what the shorter side of an image in a folder is scaled to before ``size`` is cut out, in pixels; None
            for the usual.
        calibration: a folder of images, or an ``.npz`` with ``images``; the first four replace the noise that outputs
            are compared on, the first 128 must look to every batch norm as its training images did, and INT8 is
            calibrated on all of them.
        labels: a folder with one of images for each class, or an ``.npz`` with ``images`` and ``labels``; the top-1 of
            every precision is counted on them.
        max_drop: the most top-1, in percentage points, that a precision may lose against float32.
        expect: an ``.npz`` with ``input`` and ``output`` of your own model, which must be reproduced.
        ignore_witness: whether images that the batch norms do not know are told, but let pass.
        layers: whether to compare every layer, too.
        require: ("trt",) where an engine that no GPU here can run is an error.
        sdk: "tensorrt" or "tensorrt_rtx"; None chooses.
        gpu: compute capabilities to build for, as in (86, 89); empty for the SDK's default.
        ignore_keys: globs of tensor names that may go unused.
        int8_effort: "default", or "high", which rounds weights by what they do to the results, and takes longer.
        int8_report: whether to measure what each layer in INT8 costs.
        int8_budget: the SQNR in dB that INT8 must reach; as few layers as that takes are kept out of it.
        notify: called with each finding, one line at a time.
        progress: called with phase, steps done and steps while something takes long, such as an engine's compilation.

    Returns:
        The report; every check in it holds.

    Raises:
        VerificationFailed: a check failed; what was written is kept as ``*.rejected``.
        ReportedError: the other kinds in ``exporter.errors``; nothing is left behind.
    """
    from engines.interrupts import Uninterrupted
    from exporter.errors import VerificationFailed
    from exporter.request import Request, sizes_from_text
    from exporter.run import report_from_request

    checkpoint = pathlib.Path(path)
    wanted, size_range = sizes_from_text(size) if isinstance(size, str) else (size, None)
    request = Request(
        path=checkpoint,
        out=pathlib.Path(out) if out is not None else pathlib.Path(checkpoint.stem),
        onnx=onnx,
        trt=tuple(trt),
        size=(wanted, wanted) if isinstance(wanted, int) else wanted,
        size_range=size_range,
        features=tuple(features),
        weights=weights,
        batch=batch,
        strides=None if strides is None else tuple(strides),
        eps=eps,
        arch=arch,
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        resize=resize,
        calibration=None if calibration is None else pathlib.Path(calibration),
        labels=None if labels is None else pathlib.Path(labels),
        max_drop=max_drop,
        expect=None if expect is None else pathlib.Path(expect),
        ignore_witness=ignore_witness,
        layers=layers,
        require=tuple(require),
        sdk=sdk,
        gpu=tuple(gpu),
        ignore_keys=tuple(ignore_keys),
        int8_effort=int8_effort,
        int8_report=int8_report,
        int8_budget=int8_budget,
    )
    told, advanced = notify or (lambda line: None), progress or (lambda phase, done, steps: None)
    report = report_from_request(request, told, advanced, Uninterrupted())
    if not report.passed:
        raise VerificationFailed(report.failure_line)
    return report
