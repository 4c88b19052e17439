"""Writes what ``engines.manifest`` reads: an engine's sidecar, from the typed ONNX file that it was compiled from.

The exporter puts into that file's metadata what its tensors do not say: ``precision``, ``checkpoint_sha256``, and the
``assumptions`` as JSON, among them ``mean``, ``std`` (comma-separated, in units of 0..1) and ``size`` (HxW, or three of
them where height and width are free), and ``resize`` where the shorter side of images is scaled to so many pixels. A
sidecar needs nothing else, and a machine with a GPU makes the same one as the machine that exported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from engines.backends.backend import TensorDescription
from engines.compiler import Options, profile_shapes
from engines.errors import InputRejected
from engines.golden import GOLDEN_NAME
from engines.manifest import Manifest
from engines.onnx_file import OnnxFile
from engines.parity import GATES
from engines.plan import Header
from engines.preprocessing import resize_from_assumptions
from engines.sdk import gpu_compute_capability
from engines.sizes import Size, Sizes, size_and_range_from_text, text_of_sizes

BATCH, HEIGHT, WIDTH = "N", "height", "width"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a typed ONNX file comes from, by its metadata; mean and std are per channel.

    ``sizes`` has minimum, optimum and maximum where height and width are free; ``size`` is then the optimum. ``resize``
    is what the shorter side of images is scaled to; None for the usual of ``engines.preprocessing``.
    """

    precision: str
    checkpoint_sha256: str
    assumptions: dict[str, str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: Size
    sizes: Sizes | None
    resize: int | None


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
    size = origin.size if origin.sizes is None else (None, None)
    if shapes != [(None, len(origin.mean), *size)] or len(origin.std) != len(origin.mean):
        raise rejected(f"its input {shapes} is not images as its assumptions have them")
    if not onnx.outputs or not all(_is_known(value.shape, origin.sizes) for value in onnx.outputs):
        raise rejected("its outputs have no fixed shape")
    return origin


def _is_known(shape: tuple[int | None, ...], sizes: Sizes | None) -> bool:
    """Whether only the batch of an output is free, and, where images are of any size, a feature map's size."""
    return None not in (shape[1:] if sizes is None or len(shape) != 4 else shape[1:2])


_Assumed = tuple[dict[str, str], tuple[float, ...], tuple[float, ...], Size, Sizes | None, int | None]


def _assumptions(text: str) -> _Assumed | None:
    """The assumptions as they stand, with mean, std and size as numbers; None where they cannot be."""
    try:
        values = {str(key): str(value) for key, value in json.loads(text).items()}
        mean, std = (tuple(float(number) for number in values[key].split(",")) for key in ("mean", "std"))
        size, sizes = size_and_range_from_text(values["size"])
        resize = resize_from_assumptions(values)
    except (ValueError, KeyError, AttributeError, RecursionError):
        return None
    if not all(math.isfinite(number) for number in (*mean, *std)) or min(std) <= 0:
        return None
    return values, mean, std, size, sizes, resize


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
    sizes: Sizes | None = None,
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
        sizes: minimum, optimum and maximum of the profile; None for what the file says.

    Raises:
        InputRejected: see ``origin_from_onnx``; or ``sizes`` are given for a file of a fixed size.
    """
    origin = origin_from_onnx(onnx)
    sizes = sizes or origin.sizes
    size = origin.size if sizes is None else sizes[1]
    assumptions = origin.assumptions if sizes is None else {**origin.assumptions, "size": text_of_sizes(sizes)}
    try:
        profile = {value.name: tuple(profile_shapes(value.name, value.shape, batch, sizes)) for value in onnx.inputs}
    except ValueError as error:
        raise InputRejected(f"{onnx.path}: {error}") from error
    if origin.resize is not None and origin.resize < max(size):
        raise InputRejected(
            f"{onnx.path}: images scaled to {origin.resize}, as its assumptions say, do not cover "
            f"{size[0]}x{size[1]}; build it for a smaller --size, or export it again with a larger --resize"
        )
    resized = {} if origin.resize is None else {"resize": origin.resize}
    return Manifest(
        name=name,
        precision=origin.precision,
        sha256={"checkpoint": origin.checkpoint_sha256, "onnx": sha256["onnx"], "engine": sha256["engine"]},
        sdk=dict(sdk),
        compute_capabilities=cards,
        inputs=tuple(_described(value, (BATCH, "", HEIGHT, WIDTH)) for value in onnx.inputs),
        outputs=tuple(
            _described(value, (BATCH, "", f"{value.name}_{HEIGHT}", f"{value.name}_{WIDTH}")) for value in onnx.outputs
        ),
        profile=profile,
        preprocessing={
            "mean": origin.mean,
            "std": origin.std,
            "size": size,
            "channels": len(origin.mean),
            **resized,
        },
        assumptions=assumptions,
        tolerance=GATES[origin.precision].max_relative_error,
        audit=dict(audit),
        golden=GOLDEN_NAME,
    )


def _described(value: TensorDescription, symbols: tuple[str, ...]) -> dict[str, Any]:
    """An input or output; a free extent is told by its name among ``symbols``, which are of a feature map's axes."""
    shape = [symbols[axis] if extent is None else extent for axis, extent in enumerate(value.shape)]
    return {"name": value.name, "dtype": value.dtype, "shape": shape}
