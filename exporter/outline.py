"""What a pickle would build, read from its opcodes: nothing in it is executed, looked up or imported.

Two things are asked of it. Before a file is loaded: that no loader can be brought down by it, since a tuple of a
million tuples ends the process that hashes it, and one of forty doubled ones never ends. And once a file was refused:
which classes it names, and where in it the weights are, so that the advice fits that very file.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import pickletools
import zipfile
from collections.abc import Callable
from typing import IO

_LARGEST_TUPLE = 100_000
"""Members of a tuple and of the tuples in it, counted as often as they occur."""
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PARTS, _LEGACY_CONTENT = 4, 2
"""Pickles behind the magic number in a file of torch.save that is no archive: protocol, system, content, storages."""


class Malformed(Exception):
    """No pickle that a trusted writer makes."""


@dataclasses.dataclass(frozen=True)
class Named:
    """A class or function, by the dotted name that the pickle gives to it."""

    dotted: str


@dataclasses.dataclass
class Instance:
    """Something made by a class or function; ``state`` is what it is given afterwards."""

    dotted: str
    state: object = None

    @property
    def is_module(self) -> bool:
        """Whether it has the state of a torch.nn.Module."""
        return isinstance(self.state, dict) and "_modules" in self.state

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor or a parameter."""
        return self.dotted.startswith("torch._utils._rebuild_") or self.dotted == "torch._tensor._rebuild_from_type_v2"


@dataclasses.dataclass(frozen=True)
class Group:
    """A tuple, with the number of its members and of theirs."""

    members: tuple[object, ...]
    weight: int


@dataclasses.dataclass(frozen=True)
class Outline:
    """What one file would build.

    Attributes:
        root: a dict, an ``Instance``, a ``Group``, a ``Named``, a plain value, or ``OTHER``.
        classes: the dotted names in it, in the order in which they first occur.
        storages: the bytes of each storage that tensors lie in, as its reference says, by its key.
        protocol: of the pickle.
        of_torch: whether torch.save wrote it; else it is a plain pickle.
    """

    root: object
    classes: tuple[str, ...]
    storages: dict[str, int]
    protocol: int
    of_torch: bool


OTHER = object()
"""What is neither followed nor told apart: lists, sets, storages."""


def outline_from_file(path: pathlib.Path) -> Outline:
    """The outline of a checkpoint of torch.save, in either of its forms, or of a plain pickle.

    Raises:
        Malformed: it is no pickle, or one that no loader may be given.
        OSError: it cannot be read.
        zipfile.BadZipFile: the archive is damaged.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            records = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(records) != 1:
                raise Malformed(f"{len(records)} records data.pkl")
            return _outline(io.BytesIO(archive.read(records[0])), of_torch=True)
    with open(path, "rb") as file:
        first = _outline(file, of_torch=False)
        if first.root != _TORCH_MAGIC:
            return first
        parts = [_outline(file, of_torch=True) for _ in range(_LEGACY_PARTS)]
        return parts[_LEGACY_CONTENT]


def _outline(file: IO[bytes], *, of_torch: bool) -> Outline:
    reading = _Reading()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            _ACTIONS[opcode.name](reading, argument)
        return Outline(reading.root, tuple(reading.classes), reading.storages, reading.protocol, of_torch)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise Malformed(f"no whole pickle: {error}") from error


class _Reading:
    """The stack and the memo of a pickle while its opcodes go by."""

    def __init__(self) -> None:
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # the stacks under the marks
        self.memo: dict[int, object] = {}
        self.classes: dict[str, None] = {}
        self.storages: dict[str, int] = {}
        self.protocol = 0
        self.root: object = OTHER

    def remember(self, argument: object) -> None:
        self.memo[argument if isinstance(argument, int) else len(self.memo)] = self.stack[-1]

    def by_effect(self, opcode: pickletools.OpcodeInfo) -> None:
        """What the opcode takes is gone, and what it leaves is not told apart."""
        for taken in reversed(opcode.stack_before):
            if taken is pickletools.markobject:
                self.marked()
            elif taken is not pickletools.stackslice:
                self.stack.pop()
        self.stack += [OTHER] * len(opcode.stack_after)

    def marked(self) -> list[object]:
        """What stands above the last mark, which is removed with it."""
        members = self.stack
        self.stack = self.below.pop()
        return members

    def mark(self, _: object) -> None:
        self.below.append(self.stack)
        self.stack = []

    def recall(self, argument: object) -> None:
        if not isinstance(argument, int):
            raise Malformed("a memo without a number")
        self.stack.append(self.memo[argument])

    def plain(self, value: object) -> None:
        self.stack.append(value)

    def group(self, count: int | None) -> None:
        members = self.marked() if count is None else [self.stack.pop() for _ in range(count)][::-1]
        weight = 1 + sum(member.weight if isinstance(member, Group) else 1 for member in members)
        if weight > _LARGEST_TUPLE:
            raise Malformed(f"a tuple of {weight} members")
        self.stack.append(Group(tuple(members), weight))

    def fill(self, pairs: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(
                (key, value) for key, value in zip(pairs[::2], pairs[1::2], strict=False) if isinstance(key, str)
            )

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key, value])

    def name(self, argument: object) -> None:
        module, _, name = str(argument).partition(" ")
        dotted = f"{_MODULES_OF_PYTHON_2.get(module, module)}.{name}"
        self.classes[dotted] = None
        self.stack.append(Named(dotted))

    def name_from_stack(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(f"{module} {name}")

    def make(self, arguments: int) -> None:
        """A call: the function must have been named, or be what a call gave."""
        del self.stack[len(self.stack) - arguments :]
        maker = self.stack.pop()
        if not isinstance(maker, Named | Instance):
            raise Malformed("a call of what is no class")
        self.stack.append({} if maker.dotted == "collections.OrderedDict" else Instance(maker.dotted))

    def build(self, _: object) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Instance):
            target.state = state

    def reference(self, _: object) -> None:
        """A flat tuple of names and numbers, which errors may repeat: of a storage, or of a class with its source."""
        reference = self.stack.pop()
        members = reference.members if isinstance(reference, Group) else (reference,)
        inner = [part for member in members for part in (member.members if isinstance(member, Group) else (member,))]
        if any(part is OTHER or isinstance(part, dict | Group | Instance) for part in inner):
            raise Malformed("a storage without a name")
        named = members[1] if len(members) > 1 else None
        if isinstance(named, Named) and len(members) > 4 and isinstance(members[4], int):
            width = _STORAGE_WIDTHS.get(named.dotted.rpartition(".")[2].removesuffix("Storage"), 1)
            self.storages[str(members[2])] = max(members[4] * width, self.storages.get(str(members[2]), 0))
        self.stack.append(named if members[0] == "module" and isinstance(named, Named) else OTHER)

    def version(self, argument: object) -> None:
        self.protocol = argument if isinstance(argument, int) else 0

    def stop(self, _: object) -> None:
        self.root = self.stack.pop()


_STORAGE_WIDTHS = {
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
"""Bytes of an element by the kind of storage; of the others, which count in bytes, 1."""
_MODULES_OF_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_CONSTANTS = [
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg is not None
    and not opcode.stack_before
    and opcode.stack_after
    and opcode.stack_after[0] is not pickletools.anyobject
]


def _other(opcode: pickletools.OpcodeInfo) -> Callable[[_Reading, object], None]:
    return lambda reading, _: reading.by_effect(opcode)


_ACTIONS: dict[str, Callable[[_Reading, object], None]] = {
    **{opcode.name: _other(opcode) for opcode in pickletools.opcodes},
    **dict.fromkeys(_CONSTANTS, _Reading.plain),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Reading.remember),
    "MARK": _Reading.mark,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Reading.recall),
    "NONE": lambda reading, _: reading.plain(None),
    "EMPTY_DICT": lambda reading, _: reading.plain({}),
    "EMPTY_TUPLE": lambda reading, _: reading.group(0),
    "TUPLE": lambda reading, _: reading.group(None),
    "TUPLE1": lambda reading, _: reading.group(1),
    "TUPLE2": lambda reading, _: reading.group(2),
    "TUPLE3": lambda reading, _: reading.group(3),
    "SETITEM": _Reading.set_item,
    "SETITEMS": lambda reading, _: reading.fill(reading.marked()),
    "GLOBAL": _Reading.name,
    "STACK_GLOBAL": _Reading.name_from_stack,
    "REDUCE": lambda reading, _: reading.make(1),
    "NEWOBJ": lambda reading, _: reading.make(1),
    "NEWOBJ_EX": lambda reading, _: reading.make(2),
    "BUILD": _Reading.build,
    "BINPERSID": _Reading.reference,
    "PROTO": _Reading.version,
    "STOP": _Reading.stop,
}
