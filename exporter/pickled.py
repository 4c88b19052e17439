"""What to say about a file that is refused because of the objects in it, and how to get its weights out.

A file that holds a whole network as Python objects needs that network's code to be read, which is then run: never here.
The line that says so names the class. Where the class is one of a known family, it says what that family is exported
with; else it gives the one line of Python that saves the weights alone, made from where they are in that very file.
"""

from __future__ import annotations

import pathlib
import re
import shlex

from exporter.containers import AVERAGES, CONTAINERS
from exporter.errors import CheckpointRejected, first_line
from exporter.lineages.refused import refusal_from_class
from exporter.outline import Instance, Outline

_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")
_NEWEST_PROTOCOL = 3
"""Of pickle, that torch reads without running code."""
_DEPTH = 3
"""How many containers and objects the advice looks into."""


def refused_file(path: pathlib.Path, outline: Outline, error: Exception) -> CheckpointRejected:
    """The error for a file that torch refused with ``error``: because of a class, or else because it is damaged."""
    found = _REFUSED_GLOBAL.search(str(error))
    classes = list(outline.classes)
    if found is not None:
        dotted = f"builtins.{found[1]}" if f"builtins.{found[1]}" in classes else found[1]
        classes.insert(0, dotted)
    for name in classes:
        family = refusal_from_class(name)
        if family is not None:
            what = f"a pickled {family.name} network ({name}), which is not exported"
            return CheckpointRejected(f"{path}: {what}; {family.remedy}")
    if found is not None:
        return CheckpointRejected(f"{path}: holds code ({dotted}), which is not run; {_advice(path, outline)}")
    if outline.protocol > _NEWEST_PROTOCOL:
        what = f"a pickle of protocol {outline.protocol}, which torch reads only with the code in it"
        return CheckpointRejected(f"{path}: {what}; {_advice(path, outline)}")
    return CheckpointRejected(f"{path}: damaged ({first_line(error)}); copy the file again")


def _advice(path: pathlib.Path, outline: Outline) -> str:
    expression = _weights_in_root(outline.root)
    if expression is None:
        return "save model.state_dict() where the model was made, and export that (torch.load: weights_only=False)"
    file, target = _literal(str(path)), _literal(str(path.with_name(f"{path.stem}.weights.pt")))
    load = f'import torch; f = torch.load({file}, map_location="cpu", weights_only=False)'
    if not outline.of_torch:
        load = f"import pathlib, pickle, torch; f = pickle.loads(pathlib.Path({file}).read_bytes())"
    line = shlex.quote(f"{load}; torch.save({expression}, {target})")
    return f"where you trust the file and its code can be imported, save its weights alone: python -c {line}"


def _weights_in_root(root: object) -> str | None:
    """An expression for the weights in ``f``: both kinds in a dict where there are an average and raw weights."""
    if not isinstance(root, dict):
        return _weights(root, "f", _DEPTH)
    kinds: list[tuple[str, str]] = []
    for names in (AVERAGES, CONTAINERS):
        tried = ((name, _weights(root.get(name), f"f[{_literal(name)}]", _DEPTH - 1)) for name in names)
        kinds += [(name, found) for name, found in tried if found is not None][:1]
    if len(kinds) == 2:
        return "{" + ", ".join(f"{_literal(name)}: {found}" for name, found in kinds) + "}"
    return kinds[0][1] if kinds else _weights(root, "f", _DEPTH)


def _weights(node: object, code: str, depth: int) -> str | None:
    """An expression for the state dict in ``node``, which ``code`` gives; None where none is found."""
    names = (*AVERAGES, "module", *CONTAINERS)
    if isinstance(node, Instance) and node.is_module:
        return f"{code}.state_dict()"
    made = [value for value in node.values() if isinstance(value, Instance)] if isinstance(node, dict) else []
    if any(value.is_tensor for value in made):
        alone = all(value.is_tensor for value in made)
        return code if alone else f"{{k: v for k, v in {code}.items() if torch.is_tensor(v)}}"
    inside, member = (node, "{}[{}]") if isinstance(node, dict) else (getattr(node, "state", None), "{}.{}")
    if not isinstance(inside, dict) or depth == 0:
        return None
    tried = (
        _weights(inside.get(name), member.format(code, _literal(name) if inside is node else name), depth - 1)
        for name in names
    )
    return next((found for found in tried if found is not None), None)


def _literal(text: str) -> str:
    """A string of Python in double quotes, of printable ASCII, without a run of blanks that a line would lose."""
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return '"' + escaped.replace("  ", " \\x20") + '"'
