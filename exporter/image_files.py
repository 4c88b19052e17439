"""Which images a folder holds, and in which order they are taken.

    images    names that end in .jpg, .jpeg, .png or .webp, in any case, at any depth; links are followed
    order     by name where all are in one folder. Where there are many, in an order that mixes them and depends on the
              names alone: by the hash of each. The first images stand for all of them (the compared four, the witness,
              the fit of a layer), and those of the first class would not
    classes   a folder for each, right below the top

Hidden files and folders are passed over, and so is everything else. A folder that is met twice, through a link, would
count its images twice or never end, and is an error.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import pathlib
import stat
from collections.abc import Sequence

from exporter.errors import InputRejected, listed

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The images below ``root``.

    Attributes:
        root: the folder.
        names: the paths below it, with slashes, in the order in which they are taken.
        folders: the names of the folders right below it, sorted.
    """

    root: pathlib.Path
    names: tuple[str, ...]
    folders: tuple[str, ...]

    def classes(self, count: int) -> dict[str, int]:
        """The class that each folder stands for, in a network of ``count``.

        Raises:
            InputRejected: images stand beside the folders, or the folders do not say which class each is.
        """
        if not self.folders:
            raise InputRejected(f"{shown(self.root)}: has no folders; labels need one for each class, with its images")
        beside = [shown(name) for name in self.names if "/" not in name]
        if beside:
            raise InputRejected(
                f"{shown(self.root)}: {listed(sorted(beside))} beside the folders of the classes; labels need every "
                f"image in the folder of its class"
            )
        numbered = all(name.isascii() and name.isdigit() for name in self.folders)
        found = len(self.folders)
        if found > count or (found < count and not numbered):
            few = "; which is which? Make an empty one for each missing class, or call them 0, 1, ..."
            many = "; give a folder with one for each class"
            raise InputRejected(
                f"{shown(self.root)}: {found} folders ({listed([shown(name) for name in self.folders])}) for the "
                f"network's {count} classes{many if found > count else few}"
            )
        classes = {name: int(name) if numbered else index for index, name in enumerate(self.folders)}
        if len(set(classes.values())) < found or max(classes.values()) >= count:
            raise InputRejected(
                f"{shown(self.root)}: its folders {listed(list(self.folders))} are not classes 0 to {count - 1}, each "
                f"at most once"
            )
        return classes


def image_files_from_folder(root: pathlib.Path) -> ImageFiles:
    """Looks through a folder and all below it.

    Raises:
        InputRejected: a folder cannot be read or is met twice, or there is no image.
    """
    names: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    met: dict[tuple[int, int], str] = {}
    waiting, top = [""], []
    while waiting:
        folder = waiting.pop()
        inner = _entries(root, folder, met)
        if not folder:
            top = sorted(name for name, is_folder in inner if is_folder and not name.startswith("."))
        for name, is_folder in inner:
            path = f"{folder}/{name}" if folder else name
            if name.startswith("."):
                others["hidden"] += 1
            elif is_folder:
                waiting.append(path)
            elif name.lower().endswith(SUFFIXES):
                names.append(path)
            else:
                others[shown(pathlib.PurePosixPath(name).suffix.lower()) or "without a suffix"] += 1
    if not names:
        raise InputRejected(f"{shown(root)}: holds no JPEG, PNG or WebP image; found {_told(others, len(met) - 1)}")
    return ImageFiles(root, tuple(_ordered(names)), tuple(top))


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text that every terminal takes: bytes that are no UTF-8, and control characters, are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _entries(root: pathlib.Path, folder: str, met: dict[tuple[int, int], str]) -> list[tuple[str, bool]]:
    """The names in a folder, and whether each is a folder itself."""
    path = root / folder
    try:
        identity = path.stat()
        with os.scandir(path) as entries:
            inner = [(entry.name, _is_folder(entry)) for entry in entries]
    except OSError as error:
        raise InputRejected(f"{shown(path)}: the folder cannot be read ({error.strerror}); check it") from error
    first = met.setdefault((identity.st_dev, identity.st_ino), folder)
    if first != folder:
        raise InputRejected(
            f"{shown(path)}: is the folder {shown(root / first)} once more; remove the link, or the images count twice"
        )
    return inner


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISDIR(entry.stat().st_mode)
    except OSError:  # a link that leads nowhere, or in a circle
        return False


def _ordered(names: Sequence[str]) -> list[str]:
    if len({name.rpartition("/")[0] for name in names}) == 1:
        return sorted(names)
    return sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())


def _told(others: collections.Counter[str], folders: int) -> str:
    kinds = [f"{count} {kind}" for kind, count in others.most_common()]
    if folders:
        kinds.append(f"{folders} more folder{'s' if folders > 1 else ''}")
    return listed(kinds) if kinds else "nothing: the folder is empty"
