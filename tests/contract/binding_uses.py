"""What a module uses of a foreign Python interface, read off its source, so that nobody has to keep a list.

A use is an attribute chain that begins at the foreign module, ``trt.ILogger.Severity.ERROR``, or at a variable that
holds one of its objects, ``builder.create_network``. Which variable holds what follows from assignments and from the
return types that the interface's docstrings state; ``self._engine`` and ``engine`` count as one variable. Calls say how
many arguments are given, also in the form ``answer(engine.get_tensor_name, index)``; so do methods of a subclass.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

INDIRECT = {"answer": 0, "command": 0, "_told": 0, "checked": 1}
"""Functions that are given another function and its arguments; the position of that function."""


@dataclasses.dataclass(frozen=True)
class Use:
    """A dotted name, and how many arguments it is called with; None where it is not called."""

    name: str
    arguments: int | None
    line: int


def uses_of(source: str, variables: Mapping[str, str], returns: Callable[[str], str | None]) -> list[Use]:
    """Every use in ``source``.

    Args:
        source: of a module.
        variables: the dotted name that each variable holds; "" is the foreign module itself.
        returns: the type that a function of that dotted name returns; None if it is not known.
    """
    tree = ast.parse(source)
    known = dict(variables)
    for _ in range(4):  # an assignment may come from another one
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, held = variable(node.targets[0]), held_by(node.value, known, returns)
                if target is not None and held is not None and target not in variables:
                    known[target] = held
    return list(dict.fromkeys(found(tree, known)))


def variable(node: ast.expr) -> str | None:
    """``engine`` and ``self._engine`` are ``engine``."""
    if isinstance(node, ast.Name):
        return node.id.lstrip("_")
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr.lstrip("_")
    return None


def held_by(node: ast.expr, known: Mapping[str, str], returns: Callable[[str], str | None]) -> str | None:
    """The dotted name of what an expression gives: of the object itself, or of a returned object's type."""
    if not isinstance(node, ast.Call):
        return dotted(node, known)
    called, _ = target_of(node)
    name = None if called is None else dotted(called, known)
    if name is None:
        return None
    return name if name[:1].isupper() and "." not in name else returns(name)


def target_of(call: ast.Call) -> tuple[ast.expr | None, int | None]:
    """The function that a call calls in the end, and with how many arguments; None for a number that is not fixed."""
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    count = len(call.args) + len(call.keywords)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in INDIRECT:
        position = INDIRECT[name]
        if len(call.args) <= position:
            return None, None
        return call.args[position], None if starred else count - position - 1
    return call.func, None if starred else count


def dotted(node: ast.expr, known: Mapping[str, str]) -> str | None:
    """The dotted name of an attribute chain that begins at something known."""
    own = variable(node)
    if own is not None and own in known and (isinstance(node, ast.Name) or is_module_or_own(node, known)):
        return known[own]
    if isinstance(node, ast.Attribute):
        prefix = dotted(node.value, known)
        if prefix is not None:
            return f"{prefix}.{node.attr}" if prefix else node.attr
    return None


def is_module_or_own(node: ast.Attribute, known: Mapping[str, str]) -> bool:
    """``self._engine`` or ``calls.trt``, not an attribute of the foreign object itself."""
    return isinstance(node.value, ast.Name) and node.value.id.lstrip("_") not in known


def found(tree: ast.AST, known: Mapping[str, str]) -> Iterator[Use]:
    called: set[int] = set()
    inner: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            target, count = target_of(node)
            name = None if target is None else dotted(target, known)
            if name:
                called.add(id(target))
                explicit_self = name.endswith(".__init__") and count is not None
                yield Use(name, count - 1 if explicit_self else count, node.lineno)
            if isinstance(node.func, ast.Name) and node.func.id == "hasattr":
                held = dotted(node.args[0], known)
                if held is not None and isinstance(node.args[1], ast.Constant):
                    yield Use(f"{held}.{node.args[1].value}".lstrip("."), None, node.lineno)
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                held = dotted(base, known)
                if held:
                    yield from overridden(node, held)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            inner.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in called | inner:
            name = dotted(node, known)
            if (name and "." in name) or (name and variable(node) not in known):
                yield Use(name, None, node.lineno)


def overridden(node: ast.ClassDef, base: str) -> Iterator[Use]:
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            yield Use(f"{base}.{method.name}", len(method.args.args) - 1, method.lineno)


def returned_type(docstring: str) -> str | None:
    """The class in pybind11's ``f(self: A) -> package.B``, without its package; None for Python's own types."""
    match = re.search(r"\) -> (?:[\w.]+[.:]+)?([A-Z]\w+)$", docstring, re.MULTILINE)
    return match[1] if match else None
