"""What every tensor of an ONNX graph is, its dtype and its extents, found with numpy alone.

An operation that ``shape_rules`` does not have, or operands that do not fit, is an error that names the node:
nothing is guessed, and nothing is taken for empty. A free batch is 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputRejected
from engines.onnx_file import NUMPY_DTYPES, Node, OnnxFile
from engines.roofline.shape_rules import LARGEST_EXTENT, RULES, Constants, Operation, TensorType
from engines.sizes import Size, text_of_size

OWN_DOMAINS = ("", "ai.onnx")


def constants_of_graph(file: OnnxFile) -> dict[str, NDArray[Any]]:
    """The stored tensors of a file: its weights, and what its Constants are.

    Raises:
        InputRejected: a Constant is neither numbers nor a tensor that numpy has.
    """
    constants = [node for node in file.nodes if node.op_type == "Constant"]
    return {**file.weights, **{name: _constant(file, node) for node in constants for name in node.outputs}}


def types_of_graph(file: OnnxFile, constants: Constants, size: Size | None = None) -> dict[str, TensorType]:
    """What each tensor is, by its name.

    Args:
        file: the graph.
        constants: see ``constants_of_graph``.
        size: height and width of the images, where the graph takes any.

    Raises:
        InputRejected: the graph has an operation that is not in RULES, or operands that do not fit one that is; an
            extent is free and not given; or ``size`` is given for images of another, fixed size.
    """
    types = {name: TensorType(array.dtype.name, array.shape) for name, array in constants.items()}
    types |= {value.name: _input_type(file, value.name, value.dtype, value.shape, size) for value in file.inputs}
    for node in file.nodes:
        if node.op_type == "Constant":
            continue
        rule = RULES.get(node.op_type) if node.domain in OWN_DOMAINS else None
        if rule is None:
            raise rejected(file, node, "an operation that is not counted here")
        missing = [name for name in node.inputs if name and name not in types]
        if missing:
            raise rejected(file, node, f"nothing before it makes {missing[0]}")
        try:
            result = rule(Operation(node, types, constants))
        except ValueError as error:
            raise rejected(file, node, str(error)) from error
        if not all(1 <= extent <= LARGEST_EXTENT for extent in result.shape):
            raise rejected(file, node, f"its result of {list(result.shape)} is no tensor")
        if not node.outputs or node.outputs[0] in types:
            raise rejected(file, node, "its result has no name of its own")
        types[node.outputs[0]] = result
    unmade = [value.name for value in file.outputs if value.name not in types]
    if unmade:
        raise InputRejected(f"{file.path}: nothing makes its output {unmade[0]}; export it again")
    return types


def rejected(file: OnnxFile, node: Node, problem: str) -> InputRejected:
    """The error that a node cannot be counted."""
    return InputRejected(f"{file.path}: {node.op_type} {title_of(node)}: {problem}; its work cannot be counted")


def title_of(node: Node) -> str:
    """Its name, or what it makes."""
    return node.name or next(iter(node.outputs), "without a name")


def _constant(file: OnnxFile, node: Node) -> NDArray[Any]:
    if node.constant is not None:
        return node.constant
    for name, dtype in (("value_int", np.int64), ("value_float", np.float32)):
        for form in (name, f"{name}s"):
            if form in node.attributes:
                return np.array(node.attributes[form], dtype)
    raise rejected(file, node, "neither numbers nor a tensor that numpy has")


def _input_type(file: OnnxFile, name: str, dtype: str, shape: tuple[int | None, ...], size: Size | None) -> TensorType:
    if dtype not in NUMPY_DTYPES:
        raise InputRejected(f"{file.path}: its input {name} is {dtype}, which numpy lacks; export it again")
    extents = [1 if axis == 0 and extent is None else extent for axis, extent in enumerate(shape)]
    if len(shape) == 4 and size is not None:
        if any(extent not in (None, given) for extent, given in zip(shape[2:], size, strict=True)):
            fixed = "x".join("?" if extent is None else str(extent) for extent in shape[2:])
            raise InputRejected(
                f"{file.path}: {name} takes images of {fixed}, not {text_of_size(size)}; leave out --size"
            )
        extents[2:] = size
    known = [extent for extent in extents if extent is not None and 0 < extent <= LARGEST_EXTENT]
    if len(known) < len(extents):
        shown = ", ".join("?" if extent is None else str(extent) for extent in shape)
        remedy = "give the size of images, as in --size 224x224" if len(shape) == 4 else "export it with fixed extents"
        raise InputRejected(f"{file.path}: {name} ({shown}) has extents that are not known; {remedy}")
    return TensorType(dtype, tuple(known))
