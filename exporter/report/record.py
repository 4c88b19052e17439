"""The report's data."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from engines.parity import Comparison

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Check:
    """One postcondition: the stage it belongs to, whether it held, what was measured against which gate, in words.

    ``passed`` is None where the check could not be run here; that is neither a pass nor a failure.
    """

    stage: str
    passed: bool | None
    value: float | None
    gate: float | None
    detail: str


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """One stage of the ledger: its outputs against the float64 reference, on the same inputs as every other stage.

    ``added`` is max|this stage - the stage before| / max|reference|. ``batches`` are the sizes that the inputs were
    computed in. ``ranked`` says whether an output is a row of scores, so that its top-1 means something.
    """

    stage: str
    comparison: Comparison
    added: float
    batches: tuple[int, ...]
    ranked: bool = True


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer: the relative error of its output in each stage of the ledger, by the stage's name."""

    layer: str
    errors: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Headroom:
    """The largest absolute value of a convolution's results, the channel it is in, and how far it is from overflow.

    ``factor`` is the largest number in half over ``peak``, ``bits`` its logarithm to base 2.
    """

    peak: float
    channel: int
    factor: float
    bits: float


@dataclasses.dataclass(frozen=True)
class HeadroomRow:
    """One convolution: its headroom in half as the network is, and with its channels rescaled.

    ``exponents`` has for each channel the power of two that it was multiplied by; it is empty where none was.
    ``fixed`` says why its channels cannot be rescaled, where they cannot.
    """

    convolution: str
    before: Headroom
    after: Headroom
    exponents: tuple[int, ...]
    fixed: str | None


@dataclasses.dataclass(frozen=True)
class QuantizedLayerRow:
    """One layer in INT8.

    ``input_range`` is the largest absolute value that the codes of its input stand for, ``method`` how it was chosen
    ("mse", "kl" or "max"), ``clipped`` the part of the input's values beyond it. SQNRs are against float32:
    ``sqnr_db`` of the layer's output in the quantized network, ``alone_db`` of the network's output with this layer
    alone in INT8, ``without_db`` with all layers but it; None where the two were not asked for.
    """

    layer: str
    input_range: float
    method: str
    clipped: float
    sqnr_db: float
    alone_db: float | None
    without_db: float | None


@dataclasses.dataclass(frozen=True)
class QuantizationRecord:
    """One INT8 file: how it was made, and how far it is from float32.

    ``form`` is the name of one of ``exporter.quantization.form.FORMS``, ``file`` the ONNX file's. ``sqnr_db`` and
    ``agreement`` (the part with the same top-1; None without a classifier) are of the network's output over all
    ``images``. ``equalized_db`` and ``plain_db`` decided on equalization, on the ``fitted_images``; None where it was
    not tried. ``simulation_db`` is ONNX Runtime without optimizations, and ``kernels_db`` with its INT8 kernels,
    against this software's own simulation. ``budget_db`` is what was to be reached; ``kept`` names the layers that are
    not in INT8, with the reason; ``traffic`` predicts the memory traffic of the engine, in one line.
    """

    form: str
    file: str
    effort: str
    weight_bits: int
    activation_bits: int
    equalized: bool
    equalized_db: float | None
    plain_db: float | None
    images: int
    fitted_images: int
    sqnr_db: float
    agreement: float | None
    simulation_db: float
    kernels_db: float | None
    budget_db: float | None
    layers: tuple[QuantizedLayerRow, ...]
    kept: dict[str, str]
    seconds: float
    traffic: str | None


@dataclasses.dataclass(frozen=True)
class AccuracyRow:
    """Top-1 of one precision on labelled images, as fractions of ``images``.

    ``drop`` is float32's top-1 minus this one's, ``standard_error`` that of the paired difference, ``agreement`` the
    part of the images on which the two name the same class; on ``non_finite`` images its outputs are NaN or infinite.
    """

    precision: str
    images: int
    top1: float
    drop: float
    standard_error: float
    agreement: float
    non_finite: int


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file of the run, by its name in the output directory."""

    name: str
    bytes: int
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class EngineRecord:
    """A compiled engine: who made it, for which cards, and what the audit of the file found."""

    name: str
    precision: str
    sdk: str
    sdk_version: str
    compute_capabilities: tuple[int, ...]
    seconds: float
    kept_in_float32: dict[str, str]
    audit: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a run found. ``passed`` is the verdict: no check failed.

    ``first_departing_layer`` and ``layers`` are there where a run was asked for layers, ``witness`` where it had
    images, ``accuracy`` where it had labels, ``headroom`` where half was asked for, ``quantization`` where INT8 was.
    ``gates`` has the largest relative error allowed in each precision.
    """

    version: str
    checkpoint: dict[str, Any]
    architecture: dict[str, Any]
    assumptions: dict[str, str]
    inputs: str
    certificates: tuple[dict[str, Any], ...]
    checks: tuple[Check, ...]
    ledger: tuple[LedgerRow, ...]
    layers: tuple[LayerRow, ...]
    first_departing_layer: str | None
    accuracy: tuple[AccuracyRow, ...]
    headroom: tuple[HeadroomRow, ...]
    quantization: tuple[QuantizationRecord, ...]
    witness: dict[str, Any] | None
    gates: dict[str, float]
    engines: tuple[EngineRecord, ...]
    files: tuple[FileRecord, ...]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether no check failed, and one held."""
        return any(check.passed for check in self.checks) and not self.failures

    @property
    def failures(self) -> list[Check]:
        """The checks that did not hold."""
        return [check for check in self.checks if check.passed is False]

    @property
    def not_run(self) -> list[Check]:
        """The checks that this machine could not run."""
        return [check for check in self.checks if check.passed is None]

    @property
    def verdict(self) -> str:
        """``PASS`` or ``FAIL`` with the counts."""
        run = [check for check in self.checks if check.passed is not None]
        left = f", {len(self.not_run)} not run" if self.not_run else ""
        held = len(run) - len(self.failures)
        return f"{'PASS' if self.passed else 'FAIL'}: {held} of {len(run)} checks hold{left}"

    @property
    def failure_line(self) -> str:
        """The checks that did not hold, in one line."""
        return "; ".join(f"{check.stage}: {check.detail}" for check in self.failures)

    def to_json(self) -> str:
        """``report.json``. Numbers that JSON has no word for (NaN, infinity) become null."""
        fields = {"schema": SCHEMA, "passed": self.passed, "verdict": self.verdict, **dataclasses.asdict(self)}
        return json.dumps(plain_json(fields), indent=2, allow_nan=False) + "\n"


def plain_json(value: Any) -> Any:
    """``value`` for ``json.dumps``: dataclasses as objects; NaN and infinity, for which JSON has no word, as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_json(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: plain_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
