"""The user's own model as a witness: its outputs for given inputs must come out of the reconstruction in float64.

Nothing else here knows what the user's code computes: its epsilon, strides, order of channels. Where the outputs
differ, the assumptions are varied one after the other until one explains them, or none does:

    assumption            what is computed instead
    --eps                 another epsilon in every batch norm
    --strides             every pattern that the tensors allow, up to LARGEST_WORK
    channels reversed     the images in BGR order
    training mode         batch norms with the statistics of the file's own images, as a model has without .eval()
    softmax and the like  a function of the logits
    order of the rows     the outputs of other images of the file

A second assumption is varied on top of the first that brings the outputs half of the way. The arithmetic of that search
is float32; what fits is confirmed in float64.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.outputs import Layout, layout_from_outputs
from engines.parity import GATES, Gate, compare
from exporter.architecture import Architecture, Block, joined
from exporter.errors import InputRejected, first_line
from exporter.measured import FLOAT32_LOSS_FACTOR
from exporter.model import (
    block_output,
    block_tensors,
    branch_convolution,
    branch_sum,
    joined_parts,
    outputs_of_blocks,
    outputs_of_network,
    unobserved,
)
from exporter.plain import relative_error
from exporter.report import Check
from exporter.strides import stride_choices, with_strides
from exporter.workload import multiply_accumulates

STAGE = "expectation, your outputs against float64"
EPSILONS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-2, 1e-7, 1e-8)
LARGEST_WORK = 100e9
"""Multiply-accumulates that a single other assumption may take."""
LARGEST_COUNT = 256
"""Of a file with more rows, so many are compared."""
TRIED_IMAGES = 8
REDUCED_PRECISION = 2e-2
"""Below this an unexplained difference may come from float16, bfloat16 or TF32."""
HALF_OF_THE_WAY = 0.5
"""What is left of the error where another assumption is varied on top of the first."""
SEARCH_GATE = 5e-5
"""What the search's float32 may lose. The nearest wrong epsilon gives 8e-5, and float64 has the last word."""

ROW_TOLERANCE = 1e-3

Outputs = NDArray[np.float64]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda scores: scores,
    "softmax": lambda scores: scores.softmax(dim=1),
    "log_softmax": lambda scores: scores.log_softmax(dim=1),
    "sigmoid": lambda scores: scores.sigmoid(),
}


@dataclasses.dataclass(frozen=True)
class Expectation:
    """``images`` (n, C, H, W) float32, normalised, and the user's outputs for them, joined: ``outputs`` (n, values)."""

    source: str
    images: NDArray[np.float32]
    outputs: Outputs
    layout: Layout

    def rows(self, outputs: Mapping[str, Tensor]) -> Outputs:
        """A network's outputs, joined as the user's are."""
        return np.asarray(self.layout.joined({name: value.numpy() for name, value in outputs.items()}), np.float64)


def expectation_from_npz(path: pathlib.Path, architecture: Architecture, size: tuple[int, int]) -> Expectation:
    """Reads ``input`` (n, C, H, W) float32 or float64 and each output, (n, classes) or (n, C, h, w), of floats.

    Raises:
        InputRejected: the file cannot be read, or its arrays do not fit the network, ``size`` or each other.
    """
    shapes = {
        output.name: (output.channels,)
        if output.block is None
        else (output.channels, *architecture.size_behind(output.block, size))
        for output in architecture.outputs
    }
    arrays = _arrays(path, ("input", *shapes))
    images, frame = arrays["input"], (architecture.in_channels, *size)
    if images.dtype not in (np.float32, np.float64) or images.shape[1:] != frame or images.ndim != 4:
        raise InputRejected(
            f"{path}: input is {images.dtype} {images.shape}; expected float32 (n, {_listed(frame)}), "
            f"normalised; save what your model was given, or set --size"
        )
    for name, shape in shapes.items():
        _check_output(path, name, arrays[name], (len(images), *shape))
    if not np.isfinite(images).all():
        raise InputRejected(f"{path}: input holds NaN or infinite values; make the file again")
    count = min(len(images), LARGEST_COUNT)
    source = path.name if count == len(images) else f"the first {count} of {len(images)} rows of {path.name}"
    outputs = {name: arrays[name][:count].astype(np.float64) for name in shapes}
    layout = layout_from_outputs(outputs)
    rows = np.asarray(layout.joined(outputs), np.float64)
    return Expectation(source, np.ascontiguousarray(images[:count], np.float32), rows, layout)


def _check_output(path: pathlib.Path, name: str, array: NDArray[Any], expected: tuple[int, ...]) -> None:
    if array.dtype.kind != "f" or array.shape != expected or not len(array):
        rows = "a row of logits for each image" if len(expected) == 2 else "a feature map for each image"
        sized = len(expected) == 4 and array.ndim == 4 and array.shape[:2] == expected[:2]
        remedy = "; its height and width would be others with other --strides, or another --size" if sized else ""
        raise InputRejected(
            f"{path}: {name} is {array.dtype} {array.shape}; expected float32 ({_listed(expected)}), "
            f"{rows}, and at least one{remedy}"
        )
    if not np.isfinite(array).all():
        raise InputRejected(f"{path}: {name} holds NaN or infinite values; make the file again")
    if not array.any():
        raise InputRejected(f"{path}: {name} is zero everywhere; save what your model returned")


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def expectation_check(architecture: Architecture, tensors: Mapping[str, Tensor], expectation: Expectation) -> Check:
    """The reconstruction in float64 against the user's outputs; where they differ, the detail says what would fit.

    The gate is the larger of float32's and four times what the training-time network itself loses in float32.
    """
    images = torch.from_numpy(expectation.images)
    parts = [outputs_of_network(architecture, tensors, part.double()) for part in torch.split(images, TRIED_IMAGES)]
    reference = expectation.rows(joined_parts(parts))
    comparison = compare(reference, expectation.outputs)
    gate = expectation.layout.gate(GATES["fp32"])
    failure = gate.failure(comparison)
    if failure is not None and not comparison.non_finite:
        rounded = expectation.rows(outputs_of_network(architecture, tensors, images))
        loss = relative_error(torch.from_numpy(reference), torch.from_numpy(rounded))
        gate = Gate(max(gate.max_relative_error, FLOAT32_LOSS_FACTOR * loss), gate.top1)
        failure = gate.failure(comparison)
    error = comparison.relative_error
    agreed = f"{comparison.rows} of {expectation.source}"
    if expectation.layout.ranked:
        agreed = f"top-1 agrees on {comparison.rows - len(comparison.flips)} of {agreed}"
    detail = f"relative error {error:.1e} (gate {gate.max_relative_error:.1e}), {agreed}"
    if failure is not None:
        reason = failure
        if not comparison.non_finite:
            reason = _explanation(architecture, tensors, expectation, reference, gate)
        detail = f"{detail}; {reason}"
    return Check(STAGE, failure is None, error, gate.max_relative_error, detail)


@dataclasses.dataclass(frozen=True)
class _Assumption:
    """Something that the user's code may have done; ``words`` say what."""

    architecture: Architecture
    words: tuple[str, ...] = ()
    reversed_channels: bool = False
    training_mode: bool = False
    function: str = "logits"

    def varied(self, words: str, **changes: Any) -> _Assumption:
        """This one with ``changes`` to its fields, which ``words`` describe."""
        return dataclasses.replace(self, words=(*self.words, words), **changes)

    def outputs(self, tensors: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """The outputs in float64, computed in the dtype of ``images``."""
        ordered = images.flip(1) if self.reversed_channels else images
        run = _training_mode_outputs if self.training_mode else outputs_of_network
        found = run(self.architecture, tensors, ordered)
        return {name: FUNCTIONS[self.function](value.double()) for name, value in found.items()}

    def error(self, tensors: Mapping[str, Tensor], expectation: Expectation, dtype: torch.dtype, count: int) -> float:
        """How far the user's first ``count`` outputs are from these; all of them where they depend on each other."""
        count = len(expectation.images) if self.training_mode else count
        images = torch.from_numpy(expectation.images[:count]).to(dtype)
        rows = expectation.rows(self.outputs(tensors, images))
        if rows.shape != expectation.outputs[:count].shape:  # other strides make feature maps of other sizes
            return math.inf
        error = compare(rows, expectation.outputs[:count]).relative_error
        return math.inf if math.isnan(error) else error


def _explanation(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    expectation: Expectation,
    reference: Outputs,
    gate: Gate,
) -> str:
    """What fits the user's outputs, or that nothing does."""
    count, size = len(expectation.images), expectation.images.shape[2:]
    nearest = _Assumption(architecture)
    error = nearest.error(tensors, expectation, torch.float32, TRIED_IMAGES)
    tried = 0
    for _ in range(2):
        begin, begin_error = nearest, error
        for other, work in _others(begin, size, count):
            found = other.error(
                tensors, expectation, torch.float32, max(1, min(TRIED_IMAGES, int(LARGEST_WORK / work)))
            )
            tried += 1
            if found < error:
                nearest, error = other, found
        if error <= SEARCH_GATE:
            exact = nearest.error(tensors, expectation, torch.float64, count)
            if exact <= gate.max_relative_error:
                return f"your outputs fit {' and '.join(nearest.words)} to {exact:.0e}"
        if nearest is begin or error > HALF_OF_THE_WAY * begin_error:
            break
    if _rows_are_mixed_up(reference, expectation.outputs):
        return "your outputs fit other rows of the input: input and output are not in the same order"
    nothing = f"nothing else fits ({tried} epsilons, strides, orders and functions were tried)"
    if float(np.abs(reference - expectation.outputs).max()) <= REDUCED_PRECISION * float(np.abs(reference).max()):
        return f"{nothing}; float16, bfloat16 or TF32 may do this: make the file in float32 on a CPU"
    return f"{nothing}; are these the weights of the model that made {expectation.source}?"


def _others(begin: _Assumption, size: tuple[int, int], count: int) -> Iterator[tuple[_Assumption, int]]:
    """Each single change to ``begin`` that does not cost too much, and the multiply-accumulates of one image."""
    architecture = begin.architecture
    work = multiply_accumulates(architecture, size)
    if architecture.form != "deployed":
        for eps in EPSILONS:
            if eps != architecture.bn_eps:
                words = f"--eps {eps:.0e}".replace("e-0", "e-")
                yield begin.varied(words, architecture=dataclasses.replace(architecture, bn_eps=eps)), work
        if not begin.training_mode and count * work <= LARGEST_WORK:
            words = "a model in training mode (call .eval() before you make the file)"
            yield begin.varied(words, training_mode=True), work
    if architecture.in_channels == 3 and not begin.reversed_channels:
        yield begin.varied("an input with its channels reversed (BGR)", reversed_channels=True), work
    for function in FUNCTIONS if architecture.classes is not None else ():
        if begin.function == "logits" != function:
            yield begin.varied(f"{function} of the logits (save the logits themselves)", function=function), work
    for strides in itertools.product(*stride_choices(architecture)):
        other = with_strides(architecture, strides)
        work = multiply_accumulates(other, size)
        if strides != architecture.stage_strides and work <= LARGEST_WORK:
            yield begin.varied(f"--strides {joined(strides)}", architecture=other), work


def _training_mode_outputs(
    architecture: Architecture, tensors: Mapping[str, Tensor], images: Tensor
) -> dict[str, Tensor]:
    """The network whose batch norms take the statistics of ``images``, all at once, instead of their own."""

    def results(x: Tensor) -> Iterator[tuple[Block, Tensor]]:
        for block in architecture.blocks:
            own = block_tensors(tensors, block, x.dtype)
            for branch in block.branches:
                _take_statistics(own, branch, branch_convolution(block, branch, own, x))
            if block.post_batch_norm:
                before = {name: tensor for name, tensor in own.items() if not name.startswith("post.")}
                _take_statistics(own, "post", branch_sum(block, before, x, architecture.bn_eps))
            x = block_output(block, own, branch_sum(block, own, x, architecture.bn_eps))
            yield block, x

    with torch.inference_mode():
        return outputs_of_blocks(architecture, tensors, results(images), unobserved)


def _take_statistics(own: dict[str, Tensor], owner: str, y: Tensor) -> None:
    """Gives the batch norm of ``owner``, where it has one, the statistics of what goes into it."""
    if f"{owner}.bn.weight" in own:
        own[f"{owner}.bn.running_var"], own[f"{owner}.bn.running_mean"] = torch.var_mean(y, dim=(0, 2, 3), correction=0)


def _rows_are_mixed_up(reference: Outputs, outputs: Outputs) -> bool:
    """Whether every row of ``outputs`` is some row of ``reference``, and not always its own."""
    near = ROW_TOLERANCE * np.abs(reference).max()
    matches = [np.abs(reference - row).max(axis=1) <= near for row in outputs]
    return all(match.any() for match in matches) and not all(match[row] for row, match in enumerate(matches))


def _arrays(path: pathlib.Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    if path.is_dir():
        raise InputRejected(f"{path}: a folder; --expect takes an .npz with {' and '.join(names)}")
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # about old headers, which are either read or refused
            with np.load(file, allow_pickle=False) as archive:
                return {name: np.asarray(archive[name]) for name in names}
    except FileNotFoundError:
        raise InputRejected(f"{path}: no such file; check --expect") from None
    except KeyError:
        both = "both input and output" if len(names) == 2 else " and ".join(names)
        raise InputRejected(f"{path}: does not hold {both}; np.savez them under these names") from None
    except Exception as error:  # damaged archives raise from zipfile, zlib and numpy alike
        raise InputRejected(
            f"{path}: not an .npz of arrays ({first_line(error)}); np.savez {' and '.join(names)}"
        ) from error
