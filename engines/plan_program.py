"""The text of a program inside a compiled plan (see ``engines.plan``), taken apart into descriptors and operations.

header { ... region = { name=... constant=true } }
descriptors { tensor={ name="a" type=half dims={ 1 8 } strides={ 8 1 } ... } ... }
main { label bb1: corrltn={ name="..." output={"b" } input={"a" "w" } ... layers="[ONNX Layer: stage0/Conv]" } ... }
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LITERALS = "_literal"  # ends the name of a region whose single numbers stand among the other constants
NUMPY_DTYPES = {"half": "float16", "float": "float32", "int8": "int8", "int32": "int32", "int64": "int64"}

_BRACES = r'\{(?:[^{}"]|"[^"]*")*\}'
for _ in range(3):  # a block holds lists, and a function's condition holds lists of its own
    _BRACES = rf'\{{(?:[^{{}}"]|"[^"]*"|{_BRACES})*\}}'
_FIELD = re.compile(rf'\b(\w+)\s*=\s*("[^"]*"|{_BRACES}|[^\s{{}}"]+)')
_OPERATION = re.compile(rf"^  (\w+)=({_BRACES})", re.MULTILINE)
_REGION = re.compile(r"^  region = \{ name=(\S+) .*constant=true", re.MULTILINE)
_TF32 = re.compile(r"^  tf32=1$", re.MULTILINE)
_QUOTED = re.compile(r'"([^"]*)"')
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]\[]*)\]")

Fields = Mapping[str, str]
"""A block's ``name=value`` pairs, the values as they are written."""


class Program:
    """One program's text: its descriptors by tensor name, and the operations of its main block in order."""

    def __init__(self, text: str) -> None:
        header, _, rest = text.partition("\ndescriptors {")
        descriptors, _, body = rest.partition("\nmain {")
        regions = _REGION.findall(header)
        self.constant_regions = frozenset(name + suffix for name in regions for suffix in ("", LITERALS))
        self.tf32 = _TF32.search(text) is not None
        self.descriptors: dict[str, Fields] = {}
        for _, block in _OPERATION.findall(descriptors):
            fields = _fields(block)
            self.descriptors[fields["name"].strip('"')] = fields
        self.operations = [(kind, _fields(block)) for kind, block in _OPERATION.findall(body.partition("\n}\n")[0])]

    def dtype(self, tensor: str) -> str:
        """The numpy name of a tensor's type, or the compiler's own name where numpy has none."""
        kind = self.descriptors[tensor]["type"]
        return NUMPY_DTYPES.get(kind, kind)

    def dims(self, tensor: str) -> tuple[int | str, ...]:
        """A tensor's extents; one that is free stands as the name of the tensor that has its value."""
        return tuple(
            int(word) if word.isdigit() else word.strip('"')
            for word in self.descriptors[tensor]["dims"].strip("{} ").split()
        )

    def is_outside(self, tensor: str) -> bool:
        """Whether a tensor stands in no memory of the engine's own, as its inputs and outputs do."""
        return self.descriptors.get(self.base(tensor), {}).get("region") == '""'

    def base(self, tensor: str) -> str:
        """The tensor that ``tensor`` is another view of, or itself."""
        return self.descriptors.get(tensor, {}).get("base", tensor).strip('"')

    def reads(self, launch: Fields) -> tuple[str, ...]:
        """The tensors that an operation is given, views and constants among them."""
        return tuple(names(launch.get("input_args") or launch.get("input") or ""))

    def writes(self, launch: Fields) -> tuple[str, ...]:
        """The tensors that an operation makes."""
        return tuple(names(launch.get("output_args") or launch.get("output") or ""))


def names(value: str) -> list[str]:
    """A list's quoted names."""
    return _QUOTED.findall(value)


def numbers(value: str) -> tuple[int, ...]:
    """A list's whole numbers."""
    return tuple(int(number) for number in value.strip("{} ").split())


def onnx_nodes(fields: Fields) -> tuple[str, ...]:
    """The ONNX nodes that an operation covers."""
    return tuple(_ONNX_LAYER.findall(fields.get("layers", "")))


def _fields(block: str) -> dict[str, str]:
    return dict(_FIELD.findall(block[1:-1]))
