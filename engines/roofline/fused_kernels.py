"""The kernels that an ONNX graph comes down to at best, and what each computes and moves: arithmetic and bytes.

A compiler computes what is elementwise inside the kernel that makes, or reads, its operand. Counted here is what is
left when it always does so:

    kernel      a Conv, Gemm, MatMul, pooling or mean, with every elementwise operation that it can take in
    behind it   Relu, Clip, Sigmoid, BatchNormalization, Cast, QuantizeLinear, Add, Mul, ... of what the kernel makes,
                where all else that they read was made before; the kernel then writes their result instead of its own
    before it   DequantizeLinear, always; what is elementwise on an input of the network; and on a tensor that others
                read as well, so that it stands in memory anyway
    a kernel of its own   what is elementwise and can be neither: SE's product of a map and its factors, which come
                from that whole map, so that the map is written, read for the mean, and read again
    nothing     Flatten, Reshape, Squeeze, Unsqueeze, Identity: the same numbers

A kernel reads each tensor that it needs once, whole, and writes once each tensor that another kernel reads or that is
an output, in the dtype that the graph gives it: where a result is read through a QuantizeLinear alone, it is written as
codes of one byte. It reads its constants, as they stand in the file, once for a whole batch.

Arithmetic is 2 operations for each multiply-accumulate of Conv, Gemm and MatMul, in INT8 where both operands come from
a DequantizeLinear of 8-bit codes, else in the operands' dtype. All other arithmetic is counted as none; its bytes are
counted.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable

from engines.errors import InputRejected
from engines.onnx_file import Node, OnnxFile
from engines.roofline.shape_rules import TensorType
from engines.roofline.tensor_types import constants_of_graph, rejected, title_of, types_of_graph
from engines.sizes import Size

PRODUCTS = ("Conv", "Gemm", "MatMul")
VIEWS = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
ELEMENTWISE = (
    "Add", "BatchNormalization", "Cast", "Clip", "Div", "Max", "Mul", "QuantizeLinear", "Relu", "Sigmoid", "Sub",
)  # fmt: skip
CODES = ("int8", "uint8")
FP32, FP16, INT8 = "fp32", "fp16", "int8"
PRECISIONS = {"float32": FP32, "float16": FP16}
"""The precision in which products of numbers of a dtype are computed."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel has to do for one image; ``weight_bytes`` are shared by a batch.

    ``operations`` are additions and multiplications, in ``dtype``: "fp32", "fp16" or "int8".
    """

    name: str
    operations: int
    read_bytes: int
    written_bytes: int
    weight_bytes: int
    dtype: str


def works_from_onnx(file: OnnxFile, size: Size | None = None) -> tuple[Work, ...]:
    """The work of each kernel of a graph, in the graph's order.

    Args:
        file: any precision. Where its batch is fixed, the work is an image's share.
        size: height and width of the images, where the graph takes any.

    Raises:
        InputRejected: an operation is not known here or does not fit its operands, an extent is free and not given, or
            products are of numbers that are none of ``PRECISIONS``.
    """
    batches = {value.shape[0] or 1 for value in file.inputs if value.shape}
    if len(batches) != 1:
        raise InputRejected(f"{file.path}: its inputs are not one batch of images; its work cannot be counted")
    (images,) = batches
    fusion = _Fusion(file, size)
    for node in fusion.nodes:
        fusion.add(node)
    works = tuple(_share(work, images) for work in fusion.works())
    if not works:
        raise InputRejected(f"{file.path}: it computes nothing; export it again")
    return works


def _needed(file: OnnxFile) -> list[Node]:
    """The nodes that an output depends on, in order; a compiler drops the others."""
    names = {value.name for value in file.outputs}
    nodes = []
    for node in reversed(file.nodes):
        if not names.isdisjoint(node.outputs):
            names.update(node.inputs)
            nodes.append(node)
    return nodes[::-1]


def _share(work: Work, images: int) -> Work:
    """An image's, of the work for a batch of so many."""
    return dataclasses.replace(
        work,
        operations=work.operations // images,
        read_bytes=work.read_bytes // images,
        written_bytes=work.written_bytes // images,
    )


@dataclasses.dataclass(frozen=True)
class _Source:
    """What has to be read for a tensor: those that stand in memory, and constants; by their names."""

    tensors: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()


@dataclasses.dataclass
class _Kernel:
    """A kernel as it grows: names of tensors that it reads and makes, and of constants."""

    name: str
    dtype: str
    operations: int = 0
    reads: list[str] = dataclasses.field(default_factory=list)
    makes: list[str] = dataclasses.field(default_factory=list)
    constants: list[str] = dataclasses.field(default_factory=list)

    def take(self, sources: Iterable[_Source], result: str) -> None:
        """Adds an operation."""
        for source in sources:
            self.reads += source.tensors
            self.constants += source.constants
        self.makes.append(result)


class _Fusion:
    """A walk over a graph's nodes, each behind what it reads."""

    def __init__(self, file: OnnxFile, size: Size | None) -> None:
        self._file = file
        self._constants = constants_of_graph(file)
        self._types = types_of_graph(file, self._constants, size)
        self._outputs = {value.name for value in file.outputs}
        self.nodes = [node for node in _needed(file) if node.op_type != "Constant"]
        self._readers = collections.Counter(name for node in self.nodes for name in node.inputs)
        self._kernels: list[_Kernel] = []
        self._maker: dict[str, int] = {}
        self._folded: dict[str, _Source] = {}
        self._codes: set[str] = set()
        """Tensors that are codes times a scale, which products can be computed of in INT8."""

    def add(self, node: Node) -> None:
        """Puts a node where it is computed."""
        result = node.outputs[0]
        operands = node.inputs[:1] if node.op_type in VIEWS or node.op_type == "ReduceMean" else node.inputs
        sources = [self._source(name) for name in operands if name]
        if self._is_code(node):
            self._codes.add(result)
        if node.op_type in VIEWS or node.op_type == "DequantizeLinear" or self._is_done_by_readers(node, sources):
            self._folded[result] = _Source(
                tensors=tuple(name for source in sources for name in source.tensors),
                constants=tuple(name for source in sources for name in source.constants),
            )
            return
        index = self._joined(node, sources) if node.op_type in ELEMENTWISE else None
        if index is None:
            index = len(self._kernels)
            self._kernels.append(_Kernel(title_of(node), *self._arithmetic(node)))
        self._kernels[index].take(sources, result)
        self._maker[result] = index

    def works(self) -> Iterable[Work]:
        """Of each kernel."""
        needed = {name for output in self._outputs for name in self._source(output).tensors}
        for index, kernel in enumerate(self._kernels):
            needed.update(name for name in kernel.reads if self._maker.get(name) != index)
        for index, kernel in enumerate(self._kernels):
            outside = {name for name in kernel.reads if self._maker.get(name) != index}
            yield Work(
                name=kernel.name,
                operations=kernel.operations,
                read_bytes=self._bytes(outside),
                written_bytes=self._bytes(needed.intersection(kernel.makes)),
                weight_bytes=self._bytes(set(kernel.constants)),
                dtype=kernel.dtype,
            )

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(self._types[name].bytes for name in names)

    def _source(self, name: str) -> _Source:
        if name in self._constants:
            return _Source(constants=(name,))
        return self._folded.get(name, _Source(tensors=(name,)))

    def _is_code(self, node: Node) -> bool:
        if node.op_type == "DequantizeLinear":
            return self._types[node.inputs[0]].dtype in CODES
        return node.op_type in VIEWS and node.inputs[0] in self._codes

    def _is_done_by_readers(self, node: Node, sources: list[_Source]) -> bool:
        """Whether what is elementwise is computed anew by each kernel that reads it."""
        tensors = [name for source in sources for name in source.tensors]
        if node.op_type not in ELEMENTWISE or node.outputs[0] in self._outputs:
            return False
        if not any(name in self._maker for name in tensors):
            return True
        operands = [name for name, source in zip(filter(None, node.inputs), sources, strict=True) if source.tensors]
        stands = self._readers[operands[0]] > 1 or operands[0] in self._outputs
        return len(operands) == 1 and stands and node.op_type != "QuantizeLinear"

    def _joined(self, node: Node, sources: list[_Source]) -> int | None:
        """The kernel that can compute an elementwise node on what it makes: the last of those that it needs."""
        made = [[self._maker[name] for name in source.tensors if name in self._maker] for source in sources]
        last = max((index for indices in made for index in indices), default=None)
        numbers = self._types[node.outputs[0]].numbers
        for name, indices in zip(filter(None, node.inputs), made, strict=True):
            if last in indices and self._types[name].numbers == numbers:
                return last
        return None

    def _arithmetic(self, node: Node) -> tuple[str, int]:
        """In which precision a node computes, and how many operations."""
        first = self._types[node.inputs[0]]
        precision = PRECISIONS.get(first.dtype, first.dtype)
        if node.op_type not in PRODUCTS:
            return precision, 0
        if self._codes.issuperset(node.inputs[:2]):
            precision = INT8
        elif first.dtype not in PRECISIONS:
            raise rejected(self._file, node, f"products of {first.dtype}")
        return precision, 2 * self._types[node.outputs[0]].numbers * _inner(node, first, self._types[node.inputs[1]])


def _inner(node: Node, first: TensorType, second: TensorType) -> int:
    """How many products are summed up for each number of the result."""
    if node.op_type == "Conv":
        return math.prod(second.shape[1:])
    return first.shape[0 if node.op_type == "Gemm" and node.attributes.get("transA") else -1]
