"""Do two files compute the same network?

The more exact of the two is the reference: a checkpoint (its branches, in float64) before float32, fp16 and int8, and
the first of two equals. The other computes the same inputs, in batches of one, three and the largest that it is made
for, and must be as near as its precision allows. What a checkpoint does not tell comes from the other file.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.arguments import integers_from_text
from engines.golden import golden_from_file
from engines.parity import GATES, Gate
from exporter.checkpoint import checkpoint_from_path, is_checkpoint
from exporter.contenders import EXACTNESS, Contender, assumptions_of, contender_from_path
from exporter.dataset import dataset_from_path
from exporter.description import number_text
from exporter.errors import ArchitectureRejected, InputRejected, UsageError, VerificationFailed
from exporter.images import noise_images, normalisation
from exporter.ledger import IMAGES_AT_ONCE
from exporter.measured import FLOAT32_LOSS_FACTOR, Judge, Measured, at_least, fixed
from exporter.reference import Reference
from exporter.report import Check, LedgerRow
from exporter.repvgg import network_from_checkpoint, training_time_loss
from exporter.request import Request, Size, features_from_text, floats_from_text, sizes_from_text

LARGEST_COUNT = 256
"""Of a file of images, so many are compared."""
LARGEST_BATCH_PIXELS = 32 * 224 * 224
CALIBRATED = "an INT8 file is made for images like those that it was calibrated on, not for noise: give some (--inputs)"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was compared, on which inputs, and what was found; ``rows`` is the candidate's row of the ledger."""

    reference: str
    candidate: str
    inputs: str
    assumptions: dict[str, str]
    checks: tuple[Check, ...]
    rows: tuple[LedgerRow, ...]

    @property
    def passed(self) -> bool:
        """Whether they compute the same; inputs that a constant answer would satisfy, too, show nothing."""
        return all(check.passed for check in self.checks)

    @property
    def line(self) -> str:
        """The finding in one line."""
        return "; ".join(f"{check.stage}: {check.detail}" for check in self.checks)

    @property
    def failure_line(self) -> str:
        """What did not hold, in one line."""
        return "; ".join(f"{check.stage}: {check.detail}" for check in self.checks if not check.passed)


def verdict_from_files(
    first: pathlib.Path,
    second: pathlib.Path,
    told: Request,
    inputs: pathlib.Path | None,
    gate: Gate | None,
    size: Size | None = None,
) -> Verdict:
    """Compares two of checkpoint, ONNX file and engine.

    Args:
        first: a file.
        second: another.
        told: what is known about a checkpoint; where it is silent, the other file's assumptions are taken.
        inputs: an ``.npz`` with ``images``, or with ``input`` as in ``golden.npz``; None for seeded noise.
        gate: how near is near enough; None for the gate of the coarser precision.
        size: of the images, where both files take any; None for the one that a file was made for, or ``told``'s.

    Raises:
        InputRejected: a file cannot be read.
        VerificationFailed: one holds what no RepVGG does, or they do not take the same inputs.
        SdkMissing, DeviceFailed: an engine cannot be run here.
    """
    assumptions = _agreed_assumptions(first, second)
    request = _with_assumptions(told, assumptions)
    request = request if size is None else dataclasses.replace(request, size=size)
    try:
        contenders = _contenders(first, second, request)
    except (ArchitectureRejected, UsageError) as error:
        if not assumptions:
            raise
        raise VerificationFailed(f"the checkpoint is not what the other file was made from: {error}") from error
    reference, candidate = sorted(contenders, key=lambda contender: EXACTNESS.index(contender.precision))
    channels, size = _common_shape(reference, candidate, request)
    request = dataclasses.replace(request, size=size)
    images, source = _images(inputs, channels, request)
    translated = _same_outputs(reference, candidate)
    measured = Measured(_reference_from_contender(reference, images), _largest(candidate, size))
    judge = _judge(gate, reference, candidate, request, measured)
    with candidate.opened() as run:
        check = measured.check(
            candidate.title,
            f"{candidate.title} against {reference.title}",
            lambda: lambda batch: {translated[name]: value for name, value in run(batch).items()},
            judge,
            largest=True,
        )
    if not check.passed and inputs is None and candidate.precision == "int8":
        check = dataclasses.replace(check, detail=f"{check.detail}; {CALIBRATED}")
    used = _assumptions_used(request) if "checkpoint" in (reference.kind, candidate.kind) else assumptions
    return Verdict(reference.title, candidate.title, source, used, (check,), measured.ledger)


def _reference_from_contender(contender: Contender, images: NDArray[np.float32]) -> Reference:
    """What the more exact of the two answers to ``images``, in a batch of one and batches of the rest."""
    with contender.opened() as run:
        starts = [0, *range(1, len(images), IMAGES_AT_ONCE), len(images)]
        parts = []
        for start, stop in itertools.pairwise(starts):
            if start < stop:
                parts.append(run(np.ascontiguousarray(images[start:stop])))
                _check_rows(contender, parts[-1], stop - start)
    return Reference(
        images, {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in parts[0]}, {}
    )


def _check_rows(contender: Contender, outputs: Mapping[str, NDArray[Any]], count: int) -> None:
    for name, values in outputs.items():
        if values.ndim < 2:
            raise VerificationFailed(f"{contender.title}: {name} has no row for each image")
        if len(values) != count:
            raise VerificationFailed(f"{contender.title}: a batch of {count} came back as {len(values)} rows")


def _same_outputs(reference: Contender, candidate: Contender) -> dict[str, str]:
    """The reference's name of each of the candidate's outputs: the same, or where names differ, that in its place."""
    if set(reference.outputs) == set(candidate.outputs):
        return {name: name for name in candidate.outputs}
    if len(reference.outputs) != len(candidate.outputs):
        raise VerificationFailed(
            f"{reference.title} has the outputs {', '.join(reference.outputs)}, {candidate.title} has "
            f"{', '.join(candidate.outputs)}: not the same network; see --features"
        )
    return dict(zip(candidate.outputs, reference.outputs, strict=True))


def _contenders(first: pathlib.Path, second: pathlib.Path, request: Request) -> list[Contender]:
    """Both, in their order; a checkpoint is given images of the size that the other file takes."""
    opened: dict[pathlib.Path, Contender] = {}
    for path in sorted((first, second), key=is_checkpoint):
        opened[path] = contender_from_path(path, request)
        height, width = opened[path].shape[1:]
        request = dataclasses.replace(request, size=(height or request.size[0], width or request.size[1]))
    return [opened[first], opened[second]]


def _agreed_assumptions(first: pathlib.Path, second: pathlib.Path) -> dict[str, str]:
    """What the two files say they were made under."""
    ours, theirs = assumptions_of(first), assumptions_of(second)
    if ":" in ours.get("size", "") and "size" in theirs:  # a file of any size takes the other's
        ours["size"] = theirs["size"]
    elif ":" in theirs.get("size", "") and "size" in ours:
        theirs["size"] = ours["size"]
    different = sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])
    if different:
        listed = ", ".join(f"{name} {ours[name]} and {theirs[name]}" for name in different)
        raise VerificationFailed(f"{first.name} and {second.name} were made under different assumptions: {listed}")
    return ours | theirs


def _with_assumptions(told: Request, assumptions: dict[str, str]) -> Request:
    """``told``, and where it is silent, what the files say."""
    try:
        size = sizes_from_text(assumptions["size"])[0] if "size" in assumptions else told.size
        strides = integers_from_text("strides", assumptions["strides"], ",") if "strides" in assumptions else None
        features = features_from_text(assumptions["features"]) if "features" in assumptions else ()
        (resize,) = integers_from_text("resize", assumptions["resize"], ",") if "resize" in assumptions else (None,)
        eps, mean, std = (
            floats_from_text(name, assumptions[name]) if name in assumptions else None
            for name in ("eps", "mean", "std")
        )
        return dataclasses.replace(
            told,
            size=size,
            features=told.features or features,
            weights=told.weights or assumptions.get("weights"),
            strides=told.strides or strides,
            eps=told.eps if told.eps is not None or eps is None else eps[0],
            mean=told.mean or mean,
            std=told.std or std,
            resize=told.resize or resize,
        )
    except UsageError as error:
        raise InputRejected(f"the assumptions in the file's metadata make no sense: {error}") from error


def _assumptions_used(request: Request) -> dict[str, str]:
    """Those about a checkpoint that somebody, or the other file, made; the rest is inferred from its tensors."""
    eps = None if request.eps is None else (request.eps,)
    used = {"strides": request.strides, "eps": eps, "mean": request.mean, "std": request.std}
    texts = {name: ",".join(map(number_text, values)) for name, values in used.items() if values is not None}
    if request.features:
        texts["features"] = ",".join(map(str, request.features))
    if request.weights is not None:
        texts["weights"] = request.weights
    return {"size": f"{request.size[0]}x{request.size[1]}", **texts}


def _common_shape(reference: Contender, candidate: Contender, request: Request) -> tuple[int, tuple[int, int]]:
    """Channels and (height, width) that both take; where a graph leaves the size open, ``request`` says it.

    Where one leaves the channels open, the other says how many; where both do, nobody does.
    """
    known = reference.shape[0] or candidate.shape[0]
    if known is None:
        raise InputRejected(f"{reference.title} and {candidate.title}: neither says how many channels its images have")
    shapes = []
    for contender in (reference, candidate):
        channels, *size = contender.shape
        height, width = (side or wanted for side, wanted in zip(size, request.size, strict=True))
        shapes.append((channels or known, (height, width)))
    if shapes[0] != shapes[1]:
        described = " and ".join(f"{channels}x{height}x{width}" for channels, (height, width) in shapes)
        raise VerificationFailed(
            f"{reference.title} and {candidate.title} take different images: {described}; see --size"
        )
    return shapes[0]


def _images(path: pathlib.Path | None, channels: int, request: Request) -> tuple[NDArray[np.float32], str]:
    if path is None:
        return noise_images(channels, request.size), "seeded noise (no --inputs given)"
    if _is_golden(path):
        images = golden_from_file(path).images
        if images.shape[1:] != (channels, *request.size):
            raise InputRejected(
                f"{path}: input is {images.shape}, not (N, {channels}, {request.size[0]}, {request.size[1]})"
            )
        return images, f"the {len(images)} golden images of {path.name}"
    normalise = normalisation(channels, request.mean, request.std)
    dataset = dataset_from_path(path, channels, request.size, normalise, "--inputs", request.resize)
    images = dataset.first(LARGEST_COUNT)
    return images, f"the first {len(images)} images of {path.name}"


def _is_golden(path: pathlib.Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            return "input.npy" in names and "images.npy" not in names
    except (OSError, ValueError, zipfile.BadZipFile):
        return False  # the reader of images says what is wrong with it


def _largest(candidate: Contender, size: tuple[int, int]) -> int:
    """The largest batch of a candidate, as far as memory allows; 32 for a graph whose batch is open."""
    return min(candidate.largest or 32, max(4, LARGEST_BATCH_PIXELS // (size[0] * size[1])))


def _judge(
    gate: Gate | None, reference: Contender, candidate: Contender, request: Request, measured: Measured
) -> Judge:
    if gate is not None:
        return fixed(gate)
    if candidate.precision == "fp32" and reference.kind == "checkpoint":
        told = dataclasses.replace(request, path=reference.path)
        network = network_from_checkpoint(checkpoint_from_path(reference.path, told.weights), told)
        loss = functools.partial(training_time_loss, told, network.architecture, measured.source)
        return at_least(GATES["fp32"], loss, FLOAT32_LOSS_FACTOR)
    return fixed(GATES["fp32" if candidate.precision == "float64" else candidate.precision])
