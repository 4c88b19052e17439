"""Text from anywhere as Markdown: what Markdown, HTML or a table would read as its own shows as itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

LARGEST_CELL = 1000
"""Of one cell's text, in characters."""
_SPECIAL = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")


class Markup(str):
    """Text that is Markdown already."""

    __slots__ = ()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; empty without rows. Cells that are not ``Markup`` are escaped."""
    lines = [[_cell(cell) for cell in row] for row in rows]
    if not lines:
        return ""
    whole = [[_cell(column) for column in columns], ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in whole)


def escaped(text: str) -> Markup:
    """Text that shows as it is, in one line and outside of a code span."""
    return Markup(_SPECIAL.sub(_escape, _one_line(text)))


def code(text: str) -> Markup:
    """A code span of any text, also in a table."""
    line = _one_line(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return Markup(f"{fence}{space}{line}{space}{fence}")


def _cell(value: object) -> str:
    return str(value) if isinstance(value, Markup) else escaped(str(value))


def _one_line(text: str) -> str:
    """One line of bounded length, in which a character that cannot be seen, or would turn the text, is spelled out."""
    line = " ".join(text.split())
    line = line if len(line) <= LARGEST_CELL else line[: LARGEST_CELL - 3] + "..."
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in line
    )


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(char, f"\\{char}")


def around_markers(text: str, begin: str, end: str) -> tuple[str, str] | None:
    """What stands before and behind a place between two marks; None where they are not there once each, in order."""
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    return (before, after) if found and text.count(begin) == text.count(end) == 1 else None
