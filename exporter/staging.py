"""The output directory: all files of a run appear together, or none does.

Everything is written into a hidden directory inside the output directory, then synced and renamed into place. A run
that fails a check leaves its files as ``*.rejected`` and touches nothing else; any other failure leaves nothing.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, Future

from engines.files import reported_write_errors, sha256_of, synced

REPORT_NAME = "report.json"
REJECTED = ".rejected"


class Staging:
    """The hidden directory of one run. A finished file is sealed: ``pool`` hashes and syncs it meanwhile."""

    def __init__(self, out: pathlib.Path, folder: pathlib.Path, pool: Executor) -> None:
        self.out = out
        self._folder = folder
        self._pool = pool
        self._sealed: dict[str, Future[str]] = {}

    def path(self, name: str) -> pathlib.Path:
        """Where to write the file that will be ``out / name``."""
        return self._folder / name

    def seal(self, *paths: pathlib.Path) -> None:
        """Says that files are written and will not change."""
        for path in paths:
            self._sealed[path.name] = self._pool.submit(_synced_sha256, path)

    def sha256(self, path: pathlib.Path) -> str:
        """The hexadecimal SHA-256 of a sealed file."""
        return self._sealed[path.name].result()

    @property
    def files(self) -> list[pathlib.Path]:
        """What has been sealed, by name."""
        return [self._folder / name for name in sorted(self._sealed)]

    def publish(self) -> None:
        """Moves every sealed file into place, and removes what an earlier run made and this one did not."""
        stale = _earlier_files(self.out) - set(self._sealed)
        self._move("")
        for name in stale:
            with contextlib.suppress(OSError):
                (self.out / name).unlink()

    def reject(self) -> None:
        """Moves every sealed file into place as ``*.rejected``."""
        self._move(REJECTED)

    def _move(self, suffix: str) -> None:
        with reported_write_errors(self.out):
            concurrent.futures.wait(self._sealed.values())
            # The report goes last: it lists the others, so a reader who sees it sees them.
            for path in sorted(self.files, key=lambda path: path.name == REPORT_NAME):
                self.sha256(path)
                path.replace(self.out / (path.name + suffix))


def _synced_sha256(path: pathlib.Path) -> str:
    with reported_write_errors(path):
        synced(path)
    return sha256_of(path)


@contextlib.contextmanager
def staging(out: pathlib.Path, pool: Executor) -> Iterator[Staging]:
    """Makes ``out`` and a hidden directory in it; removes both again where nothing came of them.

    Raises:
        OutputFailed: the directory cannot be made or written.
    """
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    with reported_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=".export-", dir=out))
    try:
        yield Staging(out, folder, pool)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for directory in created:
            with contextlib.suppress(OSError):  # not empty: something came of it
                directory.rmdir()


def _earlier_files(out: pathlib.Path) -> set[str]:
    """Plain file names that earlier reports in ``out`` list, the rejected ones included."""
    names: set[str] = set()
    for report, suffix in ((REPORT_NAME, ""), (REPORT_NAME + REJECTED, REJECTED)):
        try:
            files = json.loads((out / report).read_text(encoding="utf-8"))["files"]
            listed = [str(file["name"]) for file in files] + [REPORT_NAME]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        names |= {
            name + suffix for name in listed if name == pathlib.PurePath(name).name and name not in ("", ".", "..")
        }
    return names
