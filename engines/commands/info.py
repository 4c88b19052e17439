"""``python -m engines info FILE``: what a file is and what is in it, on any machine."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import TYPE_CHECKING

from engines.errors import printable
from engines.interrupts import Uninterrupted

if TYPE_CHECKING:
    from engines.inspection import Facts

NAME = "info"
HELP = "say what an engine, ONNX file, sidecar or golden.npz is and holds; needs no GPU and no SDK"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("file", type=pathlib.Path, metavar="FILE", help="an engine, an ONNX file, or what lies beside")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(arguments: argparse.Namespace, _interrupts: Uninterrupted) -> int:
    """Prints what there is to say of the file.

    Raises:
        InputRejected: it is nothing that can be read, or its sidecar does not hold.
        VerificationFailed: an engine is not what the typed ONNX file beside it says.
    """
    from engines.inspection import facts_of_file

    path: pathlib.Path = arguments.file
    facts = facts_of_file(path)
    print(_json(path, facts) if arguments.json else _text(path, facts))
    if facts.refusal is not None:
        raise facts.refusal
    return 0


def _text(path: pathlib.Path, facts: Facts) -> str:
    """One fact a line, the keys in a column; further lines of a fact stand below its first.

    A file may hold any characters; those that a terminal would act on are shown as escapes.
    """
    width = max(len(fact.key) for fact in facts.facts) + 2
    lines = [f"{path}: {facts.kind}"]
    for fact in facts.facts:
        first, *others = fact.text.splitlines() or [""]
        lines.append(f"  {fact.key:<{width}}{first}")
        lines += [f"  {'':<{width}}{other}" for other in others]
    return "\n".join(printable(line.rstrip()) for line in lines)


def _json(path: pathlib.Path, facts: Facts) -> str:
    """One object; ``refusal`` is null for a file that can be used."""
    values = {fact.key.replace(" ", "_"): fact.value for fact in facts.facts}
    refusal = None if facts.refusal is None else str(facts.refusal)
    return json.dumps({"file": str(path), "kind": facts.kind, **values, "refusal": refusal}, indent=2)
