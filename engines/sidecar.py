"""Writes what ``engines.manifest`` reads: an engine's sidecar, from the typed ONNX file that it was compiled from.

The exporter puts into that file's metadata what its tensors do not say: ``precision``, ``checkpoint_sha256``, and the
``assumptions`` as JSON, among them ``mean``, ``std`` (comma-separated, in units of 0..1) and ``size`` (HxW). A sidecar
needs nothing else, and a machine with a GPU makes the same one as the machine that exported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from engines.backends.backend import TensorDescription
from engines.compiler import Options
from engines.errors import InputRejected
from engines.golden import GOLDEN_NAME
from engines.manifest import Manifest
from engines.onnx_file import OnnxFile
from engines.parity import GATES
from engines.plan import Header
from engines.sdk import gpu_compute_capability

BATCH = "N"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a typed ONNX file comes from, by its metadata; ``size`` is (height, width), mean and std per channel."""

    precision: str
    checkpoint_sha256: str
    assumptions: dict[str, str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]


def origin_from_onnx(onnx: OnnxFile) -> Origin:
    """Reads and checks the metadata.

    Raises:
        InputRejected: the exporter did not write this file, or not as a network of images, or it has been changed.
    """

    def rejected(problem: str) -> InputRejected:
        return InputRejected(f"{onnx.path}: {problem}; export it again with python -m exporter")

    missing = [key for key in ("precision", "checkpoint_sha256", "assumptions") if key not in onnx.metadata]
    if missing:
        raise rejected(f"its metadata has no {', '.join(missing)}, so the exporter did not write it")
    precision, checkpoint = onnx.metadata["precision"], onnx.metadata["checkpoint_sha256"]
    if precision not in GATES:
        raise rejected(f"its precision is {precision!r}, not {' or '.join(GATES)}")
    if re.fullmatch("[0-9a-f]{64}", checkpoint) is None:
        raise rejected("its checkpoint_sha256 is not a SHA-256")
    assumptions = _assumptions(onnx.metadata["assumptions"])
    if assumptions is None:
        raise rejected("its assumptions are not JSON with mean, std and size")
    origin = Origin(precision, checkpoint, *assumptions)
    shapes = [value.shape for value in onnx.inputs]
    if shapes != [(None, len(origin.mean), *origin.size)] or len(origin.std) != len(origin.mean):
        raise rejected(f"its input {shapes} is not images as its assumptions have them")
    if not onnx.outputs or any(None in value.shape[1:] for value in onnx.outputs):
        raise rejected("its outputs have no fixed shape")
    return origin


_Assumed = tuple[dict[str, str], tuple[float, ...], tuple[float, ...], tuple[int, int]]


def _assumptions(text: str) -> _Assumed | None:
    """The assumptions as they stand, with mean, std and size as numbers; None where they cannot be."""
    try:
        values = {str(key): str(value) for key, value in json.loads(text).items()}
        mean, std = (tuple(float(number) for number in values[key].split(",")) for key in ("mean", "std"))
        height, width = (int(side) for side in values["size"].split("x"))
    except (ValueError, KeyError, AttributeError, RecursionError):
        return None
    if not all(math.isfinite(number) for number in (*mean, *std)) or min(std) <= 0:
        return None
    return values, mean, std, (height, width)


def compute_capabilities(header: Header, options: Options | None = None) -> tuple[int, ...]:
    """The cards that a fresh engine runs on: as its header says, else the one of this machine, which compiled it.

    Empty where only the runtime knows: for "ampere_plus", that is whatever comes after Ampere.
    """
    if header.compute_capabilities or (options is not None and options.hardware_compatibility == "ampere_plus"):
        return header.compute_capabilities
    capability = gpu_compute_capability()
    return () if capability is None else (capability,)


def manifest_from_build(
    onnx: OnnxFile,
    *,
    name: str,
    sha256: Mapping[str, str],
    sdk: Mapping[str, str],
    cards: tuple[int, ...],
    batch: tuple[int, int, int],
    audit: Mapping[str, Any],
) -> Manifest:
    """What stands in the sidecar of an engine.

    Args:
        onnx: the typed file that it was compiled from.
        name: the engine's file name.
        sha256: hexadecimal, of ``onnx`` and of ``engine``.
        sdk: ``name`` and ``version``.
        cards: see ``compute_capabilities``.
        batch: minimum, optimum and maximum of the profile.
        audit: of the engine against ``onnx``, as ``Audit.record`` gives it.

    Raises:
        InputRejected: see ``origin_from_onnx``.
    """
    origin = origin_from_onnx(onnx)
    return Manifest(
        name=name,
        precision=origin.precision,
        sha256={"checkpoint": origin.checkpoint_sha256, "onnx": sha256["onnx"], "engine": sha256["engine"]},
        sdk=dict(sdk),
        compute_capabilities=cards,
        inputs=tuple(_described(value) for value in onnx.inputs),
        outputs=tuple(_described(value) for value in onnx.outputs),
        profile={value.name: tuple((size, *_fixed(value)) for size in batch) for value in onnx.inputs},
        preprocessing={"mean": origin.mean, "std": origin.std, "size": origin.size, "channels": len(origin.mean)},
        assumptions=origin.assumptions,
        tolerance=GATES[origin.precision].max_relative_error,
        audit=dict(audit),
        golden=GOLDEN_NAME,
    )


def _described(value: TensorDescription) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype, "shape": [BATCH, *_fixed(value)]}


def _fixed(value: TensorDescription) -> tuple[int, ...]:
    """The shape of one image or one answer, without the batch."""
    return tuple(extent for extent in value.shape[1:] if extent is not None)
