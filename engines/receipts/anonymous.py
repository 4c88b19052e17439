"""Texts without the directories of the machine that they were written on, which name its user as a rule.

Errors name files by the paths that they were given, or with the directory before them. What is left of such a path is
the file's own name, which is what says something elsewhere.
"""

from __future__ import annotations

import pathlib
import re
import tempfile
from collections.abc import Iterable
from typing import Any

from engines.errors import printable

HERE = "."
"""In the place of a directory."""

_BEFORE = r"(?<![\w.~/-])"
_DEEPER = r"(?:[^\s/'\":;,()|]+/)*"
_ABSOLUTE = re.compile(rf"{_BEFORE}~?/(?=[^\s/]){_DEEPER}")
"""The directories that a path begins with, from a slash that stands behind no other letter of a path."""


def without_directories(text: str, folders: Iterable[pathlib.Path] = ()) -> str:
    """The text with bare file names in the place of paths, on one line.

    Args:
        text: for people to read.
        folders: directories that are left out also where they are relative, or their names have spaces.
    """
    relative = {str(folder) for folder in folders if not folder.is_absolute()} - {HERE}
    absolute = _places(folders)
    absolute |= {_inside_quotes(folder) for folder in absolute}
    relative |= {_inside_quotes(folder) for folder in relative}
    for folder in sorted(relative | absolute, key=len, reverse=True):
        anywhere = folder in absolute and folder.count("/") > 1  # as in -I/home/me, and not as in images/s
        before = "" if anywhere else _BEFORE
        text = re.sub(f"{before}{re.escape(folder)}/{_DEEPER}", "", text)
        if folder in absolute:
            text = re.sub(rf"{before}{re.escape(folder)}(?![\w-])", HERE, text)
    return printable(_ABSOLUTE.sub("", text))


def directory_in(value: object, folders: Iterable[pathlib.Path] = ()) -> str | None:
    """The longest name of a directory of this machine's that a text of the value has; None where none has any."""
    text = repr(value)
    return max((place for place in _places(folders) if place in text), key=len, default=None)


def _places(folders: Iterable[pathlib.Path]) -> set[str]:
    """Directories that say where this machine's user works."""
    told = {str(form) for folder in folders for form in (folder.absolute(), folder.resolve())}
    return (told | {str(pathlib.Path.home()), str(pathlib.Path.cwd()), tempfile.gettempdir()}) - {"/"}


def _inside_quotes(text: str) -> str:
    """As ``shlex.quote`` writes it in a command."""
    return text.replace("'", "'\"'\"'")


def anonymous(value: Any, folders: Iterable[pathlib.Path] = (), *, kept: frozenset[str] = frozenset()) -> Any:
    """A JSON value with every text of it ``without_directories``, but for what stands under the names ``kept``."""
    if isinstance(value, str):
        return without_directories(value, folders)
    if isinstance(value, dict):
        return {name: inner if name in kept else anonymous(inner, folders, kept=kept) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [anonymous(inner, folders, kept=kept) for inner in value]
    return value
