"""Files that belong together appear together: all get their names, or none does."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import tempfile
from collections.abc import Mapping

from engines.files import reported_write_errors, write_whole


def write_together(folder: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    """Writes files into ``folder``, by name; all of them, or none.

    Raises:
        OutputFailed: one of them cannot be written.
    """
    with contextlib.ExitStack() as resources:
        with reported_write_errors(folder):
            made = pathlib.Path(resources.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".writing-")))
            earlier = made / "earlier"
            earlier.mkdir()
        for name, content in contents.items():
            write_whole(made / name, content)
        replace_together({made / name: folder / name for name in contents}, earlier)


def replace_together(moves: Mapping[pathlib.Path, pathlib.Path], earlier: pathlib.Path) -> None:
    """Renames each key of ``moves`` to its value; where one cannot be, or is interrupted, those before it are undone.

    Args:
        moves: from finished and synced files to their names, in this order, all on one file system.
        earlier: an empty directory on it, which keeps what was there before; the caller removes it.

    Raises:
        OutputFailed: a file cannot be put into its place.
    """
    moved: list[pathlib.Path] = []
    try:
        for source, target in moves.items():
            with reported_write_errors(target):
                if target.exists():
                    _keep(target, earlier / target.name)
                moved.append(target)
                source.replace(target)
    except BaseException:
        for target in moved:
            _put_back(earlier / target.name, target)
        raise


def _keep(target: pathlib.Path, earlier: pathlib.Path) -> None:
    """A second name for a file, so that it is never missing; on a file system without links, its only name."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a directory is in the place of a file", str(target))
    try:
        os.link(target, earlier)
    except OSError:
        target.replace(earlier)


def _put_back(earlier: pathlib.Path, target: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        if earlier.exists():
            earlier.replace(target)
        else:
            target.unlink()
