"""What makes a compiled INT8 node the graph's, beyond its codes: the scales, the bias, and the quantizer of its input.

With codes w of the weight and x = clip(round(y / input_scale)) of the input y the graph says

    input_scale * weight_scale * (w * x) + bias

and of that an engine holds, bit for bit:

    float32(input_scale) * float32(weight_scale)    as the kernel's factor; or, behind a factor of 1, as a constant of
                                                    the generated code that reads the result
    bias                                            as the kernel's operand, in float32; or in that generated code
    1 / input_scale, rounded to the scale's type    as a factor in the generated code of the input's QuantizeLinear

So the product of two scales is never rounded to half, however small it is. The reciprocal is: a scale below 1 / 65504
has none there, and the engine is not the graph's. A product or bias of one number may become part of the code, where it
cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.expected import ExpectedConvolution, ExpectedMatrix, Scales
from engines.plan import Plan
from engines.plan_kernels import WeightedKernel
from engines.plan_weights import arrays_of, vector_stands


def scale_problems(
    plan: Plan, kernel: WeightedKernel, expected: ExpectedConvolution | ExpectedMatrix, scales: Scales
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What of scales, bias and quantizer is not in the engine as the graph has it.

    Args:
        plan: the engine's.
        kernel: the one that computes the node.
        expected: the node.
        scales: its own.

    Returns:
        Problems, and what is only unread.
    """
    node = expected.node
    generated = [constant for kernel in plan.functions if node in kernel.onnx_nodes for constant in kernel.constants]
    around = arrays_of(plan, [*generated, *plan.constants_behind(node)])
    found = {
        "scales do": _product_stands(plan, kernel, scales, around),
        "bias does": _bias_stands(plan, kernel, expected.bias, around),
        "input's scale does": _reciprocal_stands(plan, scales),
    }
    problems = [
        f"{node}: its {what} not stand in the engine bit for bit"
        for what, is_there in found.items()
        if is_there is False
    ]
    unread = [
        f"{node}: its {what.rpartition(' ')[0]} of one number" for what, is_there in found.items() if is_there is None
    ]
    return tuple(problems), tuple(unread)


def _product_stands(plan: Plan, kernel: WeightedKernel, scales: Scales, around: Sequence[NDArray[Any]]) -> bool | None:
    """Whether the kernel multiplies by the product of the scales, or what reads its result does; None if unreadable."""
    product = scales.of_input.astype(np.float32) * scales.of_weight.astype(np.float32)
    factor = np.float32(kernel.factor)
    operand = np.array(factor) if kernel.factors is None else plan.array(kernel.factors).reshape(-1)
    if factor != 1 and (operand != factor).any():
        return False  # the two say different things
    if (operand != 1).any() or (product == 1).all():
        return operand.dtype == np.float32 and bool((operand == product).all())
    if vector_stands(around, np.atleast_1d(product)):
        return True
    return None if product.size == 1 else False


def _bias_stands(plan: Plan, kernel: WeightedKernel, bias: NDArray[Any], around: Sequence[NDArray[Any]]) -> bool | None:
    """Whether the bias is the kernel's own, or that of what reads its result; None where it cannot be read."""
    stored = around if kernel.bias is None else arrays_of(plan, [kernel.bias])
    if vector_stands(stored, bias) or vector_stands(stored, bias.astype(np.float32)):
        return True
    return None if kernel.bias is None and bias.size == 1 else False


def _reciprocal_stands(plan: Plan, scales: Scales) -> bool | None:
    """Whether the input's QuantizeLinear multiplies by 1 / scale; None for a scale of 1 where nothing is multiplied."""
    quantizers = [kernel for kernel in plan.functions if scales.quantizer in kernel.onnx_nodes]
    read = arrays_of(plan, [constant for kernel in quantizers for constant in kernel.constants])
    literals = [array for array in read if array.size == 1 and array.dtype == scales.of_input.dtype]
    if scales.of_input == 1 and not literals:
        return None
    with np.errstate(over="ignore"):
        reciprocal = (np.float32(1) / scales.of_input.astype(np.float32)).astype(scales.of_input.dtype)
    return any(bool(literal == reciprocal) for literal in literals)
