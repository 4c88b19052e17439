"""What follows from the raw data of a receipt: made when it is written, and made again when it is replayed.

an engine   figures and verdict from its answers, the golden reference and the gate   ``engines.judgement``
a layer     whether it is within the gate, top-1 left aside
the whole   the checks that were made, how many hold, and whether a GPU ran anything
the digest  SHA-256 of everything else in the receipt: what no other figure depends on cannot change unseen
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.golden import Golden
from engines.judgement import Judgement, gate_of_engine, judgement
from engines.manifest import Manifest
from engines.outputs import layout_from_outputs
from engines.parity import Comparison, Gate

SCHEMA = 1
DIGEST = "sha256"
FIGURES = ("passed", "detail", "relative_error", "sqnr_db", "cosine", "top1_agreement", "non_finite")
"""Of an engine, as ``figures_of_judgement`` makes them."""
NO_GPU_RAN = "no GPU ran anything"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's result: how far the engine's is from ONNX Runtime's, and whether that is within the gate.

    ``relative_error`` and ``sqnr_db`` are those of ``engines.parity``; ``non_finite`` numbers are counted in both.
    """

    name: str
    relative_error: float
    sqnr_db: float
    non_finite: int
    passed: bool


def first_departure(layers: Sequence[Layer]) -> Layer | None:
    """The first layer beyond its gate; None where none is."""
    return next((layer for layer in layers if not layer.passed), None)


def golden_from_reference(images: Sequence[str], outputs: Mapping[str, NDArray[np.float64]]) -> Golden:
    """Golden vectors without their images: judging answers takes no more than which of them are the same.

    Args:
        images: a digest of each.
        outputs: the reference's, (n, ...) by name.
    """
    stand_ins = np.array([images.index(image) for image in images], np.float32).reshape(-1, 1, 1, 1)
    layout = layout_from_outputs(outputs)
    shapes = {name: output.shape[1:] for name, output in outputs.items()}
    return Golden(stand_ins, layout.joined(outputs), layout, shapes)


def engine_figures(golden: Golden, manifest: Manifest, answers: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """What stands in a receipt beside an engine's answers.

    Raises:
        ValueError: the answers are not those of the golden vectors, by name or shape.
    """
    return figures_of_judgement(judgement(golden, answers, gate_of_engine(manifest.precision, manifest.tolerance)))


def figures_of_judgement(judged: Judgement) -> dict[str, Any]:
    """As JSON; a figure that is not finite is null."""
    comparison = judged.comparison
    return {
        "passed": judged.failure is None,
        "detail": judged.line,
        "relative_error": finite(comparison.relative_error),
        "sqnr_db": finite(comparison.sqnr_db),
        "cosine": finite(comparison.cosine),
        "top1_agreement": comparison.top1_agreement,
        "non_finite": comparison.non_finite,
    }


def layer_passes(gate: Gate, relative_error: float, sqnr_db: float, non_finite: int) -> bool:
    """Whether a layer is within the gate."""
    comparison = Comparison(relative_error, 0.0, 0.0, sqnr_db, 1.0, 1.0, (), 0, non_finite, 1)
    return dataclasses.replace(gate, top1=False).failure(comparison) is None


def finite(number: float) -> float | None:
    """The number, or None where JSON has no such."""
    return number if math.isfinite(number) else None


def ran_on_gpu(exports: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any engine answered."""
    return any(engine["answers"] is not None for export in exports for engine in export["engines"])


def verdict_of(exports: Sequence[Mapping[str, Any]]) -> tuple[bool, str]:
    """Whether nothing failed, also in the timed batches, and that in one line; without a GPU it says so first."""
    made = [check["passed"] for export in exports for check in (*export["findings"], *export["engines"])]
    made += [False for export in exports if export["throughput_problem"] is not None]
    records = [export["throughput"] for export in exports if export["throughput"] is not None]
    made += [file["parity"]["passed"] for record in records for file in record["files"]]
    held, failed = made.count(True), made.count(False)
    left = f", {len(made) - held - failed} not run" if held + failed < len(made) else ""
    said = f"{'FAIL' if failed else 'PASS'}: {held} of {held + failed} checks hold{left}"
    return failed == 0, said if ran_on_gpu(exports) else f"{NO_GPU_RAN}; {said}"


def digest_of(receipt: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the digest itself, however the file is laid out."""
    rest = {name: value for name, value in receipt.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()
