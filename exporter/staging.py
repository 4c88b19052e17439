"""The output directory: all files of a run appear together, or none does.

Everything is written into a hidden directory inside the output directory, then synced and renamed into place. A run
that fails a check leaves its files as ``*.rejected`` and touches nothing else; any other failure leaves nothing.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future

from engines.files import reported_write_errors, sha256_of, synced
from engines.replacement import replace_together
from exporter.errors import OutputFailed

REPORT_NAME, SUMMARY_NAME = "report.json", "report.md"
REJECTED = ".rejected"


class Staging:
    """The hidden directory of one run. A finished file is sealed: ``pool`` hashes and syncs it meanwhile."""

    def __init__(
        self, out: pathlib.Path, folder: pathlib.Path, pool: Executor, protected: frozenset[pathlib.Path]
    ) -> None:
        self.out = out
        self._protected = protected
        self._folder = folder
        self._pool = pool
        self._sealed: dict[str, Future[str]] = {}

    def path(self, name: str) -> pathlib.Path:
        """Where to write the file that will be ``out / name``.

        Raises:
            OutputFailed: it would take the place of a file that the run reads.
        """
        if (self.out / name).resolve() in self._protected:
            raise OutputFailed(f"{self.out / name}: would overwrite the run's own input; give another --out")
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
        stale = _earlier_files(self.out, ("", REJECTED)) - set(self._sealed)
        self._move("")
        self._remove(stale)

    def reject(self) -> None:
        """Moves every sealed file into place as ``*.rejected``, in the place of earlier ones."""
        stale = _earlier_files(self.out, (REJECTED,)) - {name + REJECTED for name in self._sealed}
        self._move(REJECTED)
        self._remove(stale)

    def _move(self, suffix: str) -> None:
        """All or none: where a rename fails or is interrupted, those before it are undone."""
        with reported_write_errors(self.out):
            for sealed in self._sealed.values():
                sealed.result()
            earlier = self._folder / ".earlier"
            earlier.mkdir()
            # The report goes last: it lists the others, so a reader who sees it sees them.
            files = sorted(self.files, key=lambda path: path.name == REPORT_NAME)
            replace_together({path: self.out / (path.name + suffix) for path in files}, earlier)

    def _remove(self, names: set[str]) -> None:
        for name in names:
            path = self.out / name
            with contextlib.suppress(OSError, ValueError):
                if path.resolve() not in self._protected:
                    path.unlink()


def _synced_sha256(path: pathlib.Path) -> str:
    with reported_write_errors(path):
        synced(path)
    return sha256_of(path)


@contextlib.contextmanager
def staging(out: pathlib.Path, pool: Executor, protected: Iterable[pathlib.Path] = ()) -> Iterator[Staging]:
    """Makes ``out`` and a hidden directory in it; removes both again where nothing came of them.

    Args:
        out: the output directory.
        pool: hashes and syncs finished files.
        protected: files that the run reads, which are neither overwritten nor removed.

    Raises:
        OutputFailed: the directory cannot be made or written.
    """
    created: list[pathlib.Path] = []
    folder: pathlib.Path | None = None
    try:
        with reported_write_errors(out):
            created = [directory for directory in (out, *out.parents) if not directory.exists()]
            out.mkdir(parents=True, exist_ok=True)
            folder = pathlib.Path(tempfile.mkdtemp(prefix=".export-", dir=out))
        yield Staging(out, folder, pool, frozenset(path.resolve() for path in protected))
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for directory in created:
            with contextlib.suppress(OSError):  # not empty: something came of it
                directory.rmdir()


def _earlier_files(out: pathlib.Path, suffixes: Iterable[str]) -> set[str]:
    """Plain file names that earlier reports in ``out`` list: with the suffix "" and, or, of rejected ones."""
    names: set[str] = set()
    for suffix in suffixes:
        try:
            files = json.loads((out / (REPORT_NAME + suffix)).read_text(encoding="utf-8"))["files"]
            listed = [*(str(file["name"]) for file in files), REPORT_NAME, SUMMARY_NAME]
        except Exception:  # whatever stands there, it is no report of ours
            listed = []
        names |= {name + suffix for name in listed if pathlib.PurePath(name).name == name != ".."}
    return names
