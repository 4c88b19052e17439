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
from collections.abc import Iterator

from engines.files import reported_write_errors, synced

REPORT_NAME = "report.json"
REJECTED = ".rejected"


class Staging:
    """The hidden directory of one run. ``files`` are the names written so far, in order."""

    def __init__(self, out: pathlib.Path, folder: pathlib.Path) -> None:
        self.out, self.folder = out, folder

    def path(self, name: str) -> pathlib.Path:
        """Where to write the file that will be ``out / name``."""
        return self.folder / name

    @property
    def files(self) -> list[pathlib.Path]:
        """What has been written."""
        return sorted(self.folder.iterdir())

    def publish(self) -> list[pathlib.Path]:
        """Moves every file into place, and removes what an earlier run made and this one did not."""
        stale = _earlier_files(self.out)
        made = self._moved("")
        for name in stale - {path.name for path in made}:
            with contextlib.suppress(OSError):
                (self.out / name).unlink()
        return made

    def reject(self) -> list[pathlib.Path]:
        """Moves every file into place as ``*.rejected``."""
        return self._moved(REJECTED)

    def _moved(self, suffix: str) -> list[pathlib.Path]:
        with reported_write_errors(self.out):
            for path in self.files:
                synced(path)
            moved = []
            # The report goes last: it lists the others, so a reader who sees it sees them.
            for path in sorted(self.files, key=lambda path: path.name == REPORT_NAME):
                target = self.out / (path.name + suffix)
                path.replace(target)
                moved.append(target)
            return moved


@contextlib.contextmanager
def staging(out: pathlib.Path) -> Iterator[Staging]:
    """Makes ``out`` and a hidden directory in it; removes both again where nothing came of them.

    Raises:
        OutputFailed: the directory cannot be made or written.
    """
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    with reported_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=".export-", dir=out))
    try:
        yield Staging(out, folder)
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
