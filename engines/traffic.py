"""How many bytes an engine moves for an image, by its file: the prediction of what INT8 is worth on a card.

Every kernel reads what it is given and writes what it makes, once, and reads its constants once for a whole batch:

    bytes per image  =  sum over kernels (activations read + activations written)  +  constants / batch

Caches are left out, and so is arithmetic: where memory is the limit, as in small networks, time goes with these bytes.
Nothing is measured. TensorRT for RTX gives an INT8 convolution a half or float32 result and makes codes of that in a
kernel beside it, so that INT8 may well move more than FP16, whose convolutions are one kernel each.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from engines.plan import Plan, PlanRejected, plan_from_file
from engines.plan_constants import Constant
from engines.plan_kernels import Activation, ConvolutionKernel, FunctionKernel, Kernel
from engines.plan_program import NUMPY_DTYPES

INT8, HALF_BYTES, MEGABYTE = "int8", 2, 1e6
SAME = 0.1
"""Ratios that differ from 1 by no more than this are called the same."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes: ``activations`` of one image, and ``constants``, which a whole ``batch`` shares.

    ``convolutions`` is the part of the activations that convolutions and the kernels between them move.
    """

    batch: int
    activations: int
    convolutions: int
    constants: int

    @property
    def per_image(self) -> float:
        """Activations, and an image's share of the constants."""
        return self.activations + self.constants / self.batch


def traffic_of_plan(plan: Plan, batch: int, size: tuple[int, int] | None = None) -> Traffic:
    """What the engine moves.

    Args:
        plan: the engine's.
        batch: images at once.
        size: height and width of the images, where the engine takes any.

    Raises:
        ValueError: an extent is free and does not follow from ``size``, or a dtype has no known width.
    """
    return _traffic(plan, plan.launched, batch, size, _bytes_each, _constant_bytes)


def half_traffic_of_plan(plan: Plan, batch: int, size: tuple[int, int] | None = None) -> Traffic:
    """What an FP16 engine of the network in an INT8 one would move: a kernel for each convolution, half in, half out.

    It is computed from the shapes in the INT8 engine, without the kernels that only rescale; see ``traffic_of_plan``.
    """
    kernels = [kernel for kernel in plan.launched if not (isinstance(kernel, FunctionKernel) and kernel.rescales)]
    return _traffic(plan, kernels, batch, size, _half_bytes_each, _half_constant_bytes)


def prediction(int8: Traffic, fp16: Traffic) -> str:
    """What to expect of INT8 beside FP16, in one line, with the figures that it follows from."""
    ratio = int8.per_image / fp16.per_image
    figures = (
        f"INT8 moves {ratio:.1f}x the bytes of FP16 on TensorRT for RTX: {int8.per_image / MEGABYTE:.3g} MB against "
        f"{fp16.per_image / MEGABYTE:.3g} MB an image in a batch of {int8.batch}"
    )
    if ratio > 1 + SAME:
        expected = "expect no speed-up on small networks, which memory bounds"
    elif ratio >= 1 - SAME:
        expected = "expect a speed-up only where arithmetic is the limit"
    else:
        expected = f"expect up to {1 / ratio:.1f}x the speed where memory is the limit"
    return f"{figures}; {expected} (predicted from the file, not measured)"


def prediction_of_file(
    path: pathlib.Path, batch: int, size: tuple[int, int] | None = None, fp16: pathlib.Path | None = None
) -> str | None:
    """The prediction for the engine at ``path``; None where nothing in it is INT8, or its layout is not known.

    Args:
        path: of the engine.
        batch: images at once.
        size: height and width of the images, where the engine takes any.
        fp16: an FP16 engine of the same network; without one, what that would move follows from the shapes.
    """
    try:
        plan = plan_from_file(path)
        if all(kernel.weight_dtype != INT8 for kernel in plan.convolutions):
            return None
        other = half_traffic_of_plan(plan, batch, size)
        if fp16 is not None:
            other = traffic_of_plan(plan_from_file(fp16), batch, size)
        return prediction(traffic_of_plan(plan, batch, size), other)
    except (PlanRejected, ValueError):
        return None


def _traffic(
    plan: Plan,
    kernels: Sequence[Kernel],
    batch: int,
    size: tuple[int, int] | None,
    width: Callable[[Activation], int],
    stored: Callable[[Kernel], int],
) -> Traffic:
    """``width`` gives the bytes of one number of an activation, ``stored`` those of a kernel's constants."""
    extents = _extents(plan, size)
    moved = [
        sum(width(tensor) * _numbers(tensor, extents) for tensor in (*kernel.reads, *kernel.writes))
        for kernel in kernels
    ]
    near = [isinstance(kernel, ConvolutionKernel) or _is_between(kernel) for kernel in kernels]
    return Traffic(
        batch=batch,
        activations=sum(moved),
        convolutions=sum(count for count, counts in zip(moved, near, strict=True) if counts),
        constants=sum(stored(kernel) for kernel in kernels),
    )


def _is_between(kernel: Kernel) -> bool:
    """Whether it rescales feature maps."""
    return isinstance(kernel, FunctionKernel) and kernel.rescales and len(kernel.reads[0].dims) == 4


def _extents(plan: Plan, size: tuple[int, int] | None) -> Mapping[str, int]:
    """Free heights and widths by their names in the program, each from that of the image before the convolution."""
    known: dict[str, int] = {}
    images = [tensor for kernel in plan.launched for tensor in kernel.reads if tensor.outside and len(tensor.dims) == 4]
    if size is not None:
        for image in images:
            known |= {name: extent for name, extent in zip(image.dims[2:], size, strict=True) if isinstance(name, str)}
    for kernel in plan.convolutions:
        if kernel.weight is None or not kernel.reads or not kernel.writes:
            continue
        sides = zip(kernel.reads[0].dims[2:], kernel.writes[0].dims[2:], kernel.weight.dims[2:], strict=True)
        for axis, (source, result, reach) in enumerate(sides):
            extent = known.get(str(source))
            if isinstance(result, str) and extent is not None:
                known[result] = kernel.window.results(axis, extent, reach)
    return known


def _numbers(tensor: Activation, extents: Mapping[str, int]) -> int:
    """Of one image: its extents without the first, which is the batch."""
    missing = [extent for extent in tensor.dims[1:] if isinstance(extent, str) and extent not in extents]
    if missing:
        raise ValueError(f"the extent {missing[0]} is free")
    return math.prod(extent if isinstance(extent, int) else extents[extent] for extent in tensor.dims[1:])


def _bytes_each(numbers: Activation | Constant) -> int:
    if numbers.dtype not in NUMPY_DTYPES.values():
        raise ValueError(f"numbers of type {numbers.dtype} have no known width")
    return np.dtype(numbers.dtype).itemsize


def _half_bytes_each(tensor: Activation) -> int:
    return _bytes_each(tensor) if tensor.outside else HALF_BYTES


def _constant_bytes(kernel: Kernel) -> int:
    return sum(constant.size for constant in kernel.constants)


def _half_constant_bytes(kernel: Kernel) -> int:
    """Weight and bias in half; generated code has no constants to speak of."""
    weight = None if isinstance(kernel, FunctionKernel) else kernel.weight
    return 0 if weight is None else HALF_BYTES * (weight.size // _bytes_each(weight) + weight.dims[0])
