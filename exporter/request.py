"""What a user asks for, checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re

from engines.arguments import LARGEST_BATCH, batch_from_text, cards_from_text, check_batch, integers_from_text
from engines.sdk import SDKS
from exporter.errors import UsageError
from exporter.variants import variant_from_name

Size = tuple[int, int]

__all__ = [
    "EFFORTS",
    "LARGEST_BATCH",
    "LARGEST_MEAN",
    "LARGEST_SIZE",
    "PRECISION_NAMES",
    "SDK_NAMES",
    "SMALLEST_STD",
    "Request",
    "Size",
    "batch_from_text",
    "cards_from_text",
    "features_from_text",
    "floats_from_text",
    "size_text",
    "sizes_from_text",
    "strides_from_text",
]

LARGEST_SIZE = 4096
LARGEST_MEAN = 1e6
SMALLEST_STD = 1e-30
LARGEST_BUDGET = 120
SDK_NAMES = tuple(sdk.module for sdk in SDKS)
EFFORTS = ("default", "high")
"""How hard INT8 is tried for; those in ``exporter.quantization.layerwise``, held equal by a test."""
WEIGHTS = ("ema", "raw")
"""Of a file that holds two sets: those averaged over the training, or the last ones."""
REQUIREMENTS = ("trt",)
"""What ``--require`` can turn from "not run" into an error: ``trt``, each engine on a GPU."""
PRECISION_NAMES = ("fp32", "fp16", "int8")
"""The names in ``exporter.precisions.PRECISIONS``, held equal by a test; reading them there would import onnx."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One export. None means the default: inferred from the tensors, from the channels, or chosen for this machine.

    ``size`` is (height, width) in pixels, and ``size_range`` the smallest and the largest where both are dynamic;
    ``features`` are stages, from 0; ``weights`` is one of WEIGHTS; ``mean`` and ``std`` are per channel, in units of
    pixels scaled to 0..1; ``resize`` is what the shorter side of an image in a folder is scaled to, in pixels;
    ``int8_effort`` is one of EFFORTS, and ``int8_budget`` the SQNR in dB that INT8 must reach; ``max_drop`` is in
    percentage points of top-1; ``require`` names what must not be left out,
    of REQUIREMENTS.
    """

    path: pathlib.Path
    out: pathlib.Path
    onnx: bool = True
    trt: tuple[str, ...] = ()
    size: Size = (224, 224)
    size_range: tuple[Size, Size] | None = None
    features: tuple[int, ...] = ()
    weights: str | None = None
    batch: tuple[int, int, int] = (1, 8, 32)
    strides: tuple[int, ...] | None = None
    eps: float | None = None
    arch: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    calibration: pathlib.Path | None = None
    labels: pathlib.Path | None = None
    max_drop: float | None = None
    expect: pathlib.Path | None = None
    resize: int | None = None
    int8_effort: str = "default"
    int8_report: bool = False
    int8_budget: float | None = None
    ignore_witness: bool = False
    layers: bool = False
    require: tuple[str, ...] = ()
    sdk: str | None = None
    gpu: tuple[int, ...] = ()
    ignore_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ``UsageError`` for values that no checkpoint could make right."""
        for precision in self.trt:
            _check_precision(precision, self.calibration)
        if len(set(self.trt)) != len(self.trt):
            raise UsageError("--trt: a precision is named twice; name each once")
        self._check_network()
        check_batch(self.batch)
        if self.strides is not None and not all(stride in (1, 2) for stride in self.strides):
            raise UsageError("--strides: each stage's stride is 1 or 2, as in 2,2,2,2,2")
        if self.eps is not None and not 0 < self.eps < 1:
            raise UsageError(f"--eps: {self.eps} is not between 0 and 1; RepVGG uses 1e-5")
        if self.mean is not None and not all(abs(value) < LARGEST_MEAN for value in self.mean):
            raise UsageError(f"--mean: every value must be a number below {LARGEST_MEAN:g}, in units of pixels in 0..1")
        if self.std is not None and not all(SMALLEST_STD <= value < LARGEST_MEAN for value in self.std):
            raise UsageError(f"--std: every value must be from {SMALLEST_STD:g} on, in units of pixels in 0..1")
        self._check_proof()
        self._check_int8()
        if self.sdk is not None and self.sdk not in SDK_NAMES:
            raise UsageError(f"--sdk {self.sdk}: unknown; choose from {', '.join(SDK_NAMES)}")
        for path in (self.path, self.out):
            try:
                str(path).encode()
            except UnicodeEncodeError:
                raise UsageError(
                    f"{str(path)!r}: not UTF-8, which ONNX Runtime needs; rename it or give --out"
                ) from None
        if self.arch is not None:
            variant_from_name(self.arch)

    def _check_network(self) -> None:
        sizes = self.sizes
        for height, width in sizes:
            if not 1 <= min(height, width) <= max(height, width) <= LARGEST_SIZE:
                raise UsageError(f"--size: {height}x{width} is outside 1 to {LARGEST_SIZE} pixels")
        for smaller, larger in itertools.pairwise(sizes):
            if smaller[0] > larger[0] or smaller[1] > larger[1]:
                raise UsageError(f"--size: {size_text(self)}: not in the order MIN:OPT:MAX, as in 160:224:320")
        if self.weights is not None and self.weights not in WEIGHTS:
            raise UsageError(f"--weights {self.weights}: unknown; choose from {', '.join(WEIGHTS)}")
        if any(stage < 0 for stage in self.features) or len(set(self.features)) != len(self.features):
            raise UsageError("--features: each stage once, from 0, as in 1,2,3,4")
        if list(self.features) != sorted(self.features):
            raise UsageError("--features: stages in their order, as in 1,2,3,4")
        if self.features and self.labels is not None:
            raise UsageError("--labels: needs a classifier's outputs; leave --features out")

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The one size, or the smallest, the usual and the largest."""
        return self.profile or (self.size,)

    @property
    def profile(self) -> tuple[Size, Size, Size] | None:
        """The sizes that an engine is built for, where they are dynamic."""
        return None if self.size_range is None else (self.size_range[0], self.size, self.size_range[1])

    def _check_proof(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise UsageError(f"--max-drop: {self.max_drop} is not a number of percentage points from 0 to 100")
        if self.max_drop is not None and self.labels is None:
            raise UsageError("--max-drop: needs --labels with images to count right answers on")
        for name in self.require:
            if name not in REQUIREMENTS:
                raise UsageError(f"--require {name}: unknown; choose from {', '.join(REQUIREMENTS)}")
        if "trt" in self.require and not self.trt:
            raise UsageError("--require trt: no engine is asked for; name its precision with --trt")

    def _check_int8(self) -> None:
        if self.resize is not None and not max(self.size) <= self.resize <= LARGEST_SIZE:
            raise UsageError(
                f"--resize {self.resize}: is outside {max(self.size)} to {LARGEST_SIZE} pixels; the shorter side is "
                f"scaled to it before --size is cut out"
            )
        if self.int8_effort not in EFFORTS:
            raise UsageError(f"--int8-effort {self.int8_effort}: unknown; choose from {', '.join(EFFORTS)}")
        if self.int8_budget is not None and not 0 < self.int8_budget <= LARGEST_BUDGET:
            raise UsageError(f"--int8-budget: {self.int8_budget:g} is not a number of decibels up to {LARGEST_BUDGET}")
        asked = (self.int8_effort != "default", self.int8_report, self.int8_budget is not None)
        if any(asked) and "int8" not in self.trt:
            flag = ("--int8-effort", "--int8-report", "--int8-budget")[asked.index(True)]
            raise UsageError(f"{flag}: no INT8 is asked for; add --trt int8")


def _check_precision(name: str, calibration: pathlib.Path | None) -> None:
    if name == "int8" and calibration is None:
        raise UsageError(
            "--trt int8: needs --calib with images to calibrate on; random data would give a wrong network"
        )
    if name not in PRECISION_NAMES:
        raise UsageError(f"--trt {name}: unknown precision; choose from {', '.join(PRECISION_NAMES)}")


def sizes_from_text(text: str) -> tuple[Size, tuple[Size, Size] | None]:
    """``"224"``, ``"224x320"`` (height x width) or ``"MIN:OPT:MAX"`` of such to ``Request.size`` and ``size_range``."""
    sizes = []
    for part in text.split(":"):
        found = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", part, re.ASCII)
        if found is None:
            raise UsageError(f"--size: {text!r} is not a number, HxW or MIN:OPT:MAX, as in 224, 224x320 or 160:224:320")
        sizes.append((int(found[1]), int(found[2] or found[1])))
    if len(sizes) == 1:
        return sizes[0], None
    if len(sizes) != 3:
        raise UsageError(f"--size: {text!r} has {len(sizes)} sizes; give one, or three as MIN:OPT:MAX")
    return sizes[1], (sizes[0], sizes[2])


def size_text(request: Request) -> str:
    """As in 224x224, or 160x160:224x224:320x320: what ``sizes_from_text`` reads."""
    return ":".join(f"{height}x{width}" for height, width in request.sizes)


def features_from_text(text: str) -> tuple[int, ...]:
    """``"1,2,3,4"`` to (1, 2, 3, 4)."""
    return integers_from_text("--features", text, ",")


def strides_from_text(text: str) -> tuple[int, ...]:
    """``"2,1,2,2,2"`` to (2, 1, 2, 2, 2): the first block's stride of stage0 to stage4."""
    strides = integers_from_text("--strides", text, ",")
    if len(strides) != 5:
        raise UsageError(
            f"--strides: {text!r} has {len(strides)} numbers; give five, for stage0 to stage4, as in 2,2,2,2,2"
        )
    return strides


def floats_from_text(flag: str, text: str) -> tuple[float, ...]:
    """Comma-separated finite numbers, for ``flag``."""
    parts = [part.strip() for part in text.split(",")]
    decimal = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
    values = tuple(float(part) if decimal.fullmatch(part) else float("nan") for part in parts)
    if not all(abs(value) < LARGEST_MEAN for value in values):
        raise UsageError(f"{flag}: {text!r} is not a list of numbers such as 0.485,0.456,0.406")
    return values
