"""Tries one file as a user would, and says everything that is wrong with how that ends.

Whatever is accepted must hold the very tensors that torch reads without memory mapping, the ones that the mutation
knows of, and, once exported, give the answers of an independent network of those tensors. Whatever is refused must be a
reported error: one line, an exit code of the contract, and nothing left on the disk. Nothing in a file may run: an
audit hook listens for processes, for looked-up classes and for a module that must not be imported.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import signal
import sys
import tempfile
import traceback
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxsim
import torch

import exporter
from benchmarks.mutations import CANARY_FILE, CANARY_MODULE
from benchmarks.originals import Case, State
from exporter.checkpoint import Checkpoint, check_archive, checkpoint_from_path
from exporter.errors import ReportedError
from exporter.repvgg import network_from_checkpoint
from exporter.request import Request
from exporter.stand_ins import stand_ins

SIZE = (28, 28)
SECONDS = 60
"""For one mutation; more is a defect, too."""
LONGEST_LINE = 2000
EXIT_CODES = (1, 3)
"""What a file can be refused with: it fails a check, or it cannot be used."""
LOUD = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn",
    "subprocess.Popen", "pickle.find_class", "socket.connect", "runpy.run_path", "webbrowser.open",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one mutation ended: ``code`` is its exit code, ``what`` the kind of error, ``defects`` what is wrong."""

    kind: str
    whole: bool
    code: int | None
    what: str
    defects: tuple[str, ...]


class Canary:
    """Listens while a file is tried; what it hears are names of audit events."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self._listening = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._listening:
            return
        foreign = event == "import" and arguments[0] == CANARY_MODULE
        if foreign or event in LOUD or (event == "open" and str(arguments[0]).endswith(CANARY_FILE)):
            self.heard.append(f"{event} {arguments[:1]}")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, events are heard."""
        self.heard.clear()
        self._listening = True
        try:
            yield
        finally:
            self._listening = False


class SimplifierHere:
    """In place of ``exporter.processes.SimplifierProcess``: the same work without a process for each export."""

    def __enter__(self) -> SimplifierHere:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def submit(self, model: bytes) -> None:
        """Simplifies at once."""
        self._simplified, self._same = onnxsim.simplify(onnx.ModelProto.FromString(model))

    def result(self) -> bytes:
        """The simplified model."""
        if not self._same:
            raise RuntimeError("onnxsim says that its result differs")
        serialized: bytes = self._simplified.SerializeToString()
        return serialized


Entry = Callable[[pathlib.Path, pathlib.Path, Case, bool], Checkpoint]


def enter(path: pathlib.Path, out: pathlib.Path, case: Case, whole: bool) -> Checkpoint:  # noqa: FBT001
    """The real entry: as far as the architecture, or the whole export to ``out``; what the file was read as."""
    if whole:
        exporter.export(path, out, size=SIZE, weights=case.weights)
    checkpoint = checkpoint_from_path(path, case.weights)
    check_archive(path)
    network_from_checkpoint(checkpoint, Request(path=path, out=out, size=SIZE, weights=case.weights))
    return checkpoint


class Harness:
    """Tries files in a directory of its own, which must be empty again after each."""

    def __init__(self, directory: pathlib.Path, canary: Canary, entry: Entry = enter) -> None:
        self._directory, self._canary, self._entry = directory, canary, entry
        self._temporary = directory / "tmp"
        self._temporary.mkdir()

    def attempt(self, case: Case, *, whole: bool) -> Outcome:
        """Tries one file; everything that is wrong with how it ends is in ``defects``."""
        path, out = self._directory / f"model{case.suffix}", self._directory / "out"
        path.write_bytes(case.content)
        defects: list[str] = []
        code, what = None, "raw exception"
        try:
            with self._watched(defects):
                checkpoint = self._entry(path, out, case, whole)
                code, what = 0, "accepted"
                defects += _problems_of(checkpoint, case, out if whole else None)
        except ReportedError as error:
            code, what = error.exit_code, type(error).__name__
            defects += _problems_of_line(str(error), code)
        except Exception:
            defects.append(traceback.format_exc(limit=-3))
        if code != 0 and out.exists() and not (code == 1 and all(p.suffix == ".rejected" for p in out.iterdir())):
            defects.append(f"left in the output directory: {sorted(p.name for p in out.iterdir())}")
        shutil.rmtree(out, ignore_errors=True)
        path.unlink()
        left = [p for p in (*self._directory.iterdir(), *self._temporary.iterdir()) if p != self._temporary]
        defects += [f"left behind: {p.name}" for p in left]
        for p in left:
            shutil.rmtree(p) if p.is_dir() else p.unlink()
        return Outcome(case.kind, whole, code, what, tuple(defects))

    @contextmanager
    def _watched(self, defects: list[str]) -> Iterator[None]:
        """With a time limit, warnings and the canary heard, temporary files here."""
        with (
            warnings.catch_warnings(record=True) as caught,
            unittest.mock.patch("exporter.processes.SimplifierProcess", SimplifierHere),
            unittest.mock.patch.object(tempfile, "tempdir", str(self._temporary)),
            _time_limit(),
            self._canary.listening(),
        ):
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", category=ResourceWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            try:
                yield
            finally:
                defects += [f"ran code: {heard}" for heard in self._canary.heard]
                defects += [f"warned: {warning.message}" for warning in caught]


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _problems_of_line(line: str, code: int) -> list[str]:
    problems = [] if code in EXIT_CODES else [f"exit code {code}: {line}"]
    if not line.strip() or len(line.splitlines()) != 1 or "Traceback" in line or len(line) > LONGEST_LINE:
        problems.append(f"not one good line: {line[:LONGEST_LINE]!r}")
    return problems


def _problems_of(checkpoint: Checkpoint, case: Case, out: pathlib.Path | None) -> list[str]:
    """What is wrong with a file that was accepted."""
    problems = ["accepted, which is wrong"] if case.must_fail else []
    if case.state is not None and not _same(checkpoint.tensors, case.state):
        problems.append("other tensors than the file was made of")
    of_safetensors = case.content[8:9] == b"{" and (case.suffix == ".safetensors" or case.content[:1] != b"\x80")
    if not of_safetensors and not _same(checkpoint.tensors, _read_again(checkpoint)):
        problems.append("other tensors than torch reads")
    if out is not None:
        with np.load(out / "golden.npz") as golden:
            images, outputs = torch.from_numpy(golden["input"]), torch.from_numpy(golden["output"])
        expected = _answer(case, images, checkpoint.tensors)
        if expected is not None and not bool((outputs - expected).abs().max() <= 1e-9 * expected.abs().max()):
            problems.append("another network than the tensors make")
    return problems


def _same(found: State, expected: State) -> bool:
    """Bit for bit, under the names without wrappers; a counter of averages may be left out."""
    if found.keys() - expected.keys() or any(expected[name].numel() > 1 for name in expected.keys() - found.keys()):
        return False
    return all(
        tensor.dtype == expected[name].dtype
        and tensor.shape == expected[name].shape
        and torch.equal(_bits(tensor), _bits(expected[name]))
        for name, tensor in found.items()
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _read_again(checkpoint: Checkpoint) -> State:
    """The tensors at the container that the checkpoint names, read without memory mapping."""
    with stand_ins(), open(checkpoint.path, "rb") as file:  # torch.load believes the ending of a path
        content = torch.load(file, weights_only=True, map_location="cpu")
    for key in checkpoint.container.split(".") if checkpoint.container else ():
        content = content[key]
    unwrapped = ((str(name).replace("_orig_mod.", "").replace("module.", ""), t) for name, t in content.items())
    return {name: tensor for name, tensor in unwrapped if isinstance(tensor, torch.Tensor)}


def _answer(case: Case, images: torch.Tensor, tensors: State) -> torch.Tensor | None:
    """What an independent network of these tensors answers; None where they are not those of its family's blocks."""
    try:
        return case.network.answer(images, tensors)
    except (KeyError, RuntimeError):
        return None
