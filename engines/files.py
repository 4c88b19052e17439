"""Files that appear whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterator

from engines.errors import InputRejected, OutputFailed


@contextlib.contextmanager
def reported_write_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns an ``OSError`` inside the block into ``OutputFailed`` naming ``path``."""
    try:
        yield
    except OSError as error:
        raise OutputFailed(
            f"{path}: cannot be written ({error.strerror or error}); give --out a writable directory with space left"
        ) from error


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes ``content`` to ``path`` so that no reader ever sees a part of it.

    Raises:
        OutputFailed: the directory is missing, read-only or full; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    if path.exists() and not (path.is_file() or path.is_dir()):  # a device or a pipe would be replaced by a file
        raise OutputFailed(f"{path}: cannot be written (it is no plain file); give --out another name")
    with reported_write_errors(path):
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def synced(path: pathlib.Path) -> None:
    """Forces a finished file to the disk, before it gets its final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: pathlib.Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces.

    Raises:
        InputRejected: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
