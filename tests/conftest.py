"""What many tests share: a small network, its checkpoint file, and the command line in this process or its own."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import onnx
import pytest
import torch
from hypothesis import settings

from exporter import processes
from exporter.cli import main
from tests.networks import NaiveRepVGG, Shape, contiguous_float

settings.register_profile("steady", derandomize=True)
settings.register_profile("search", print_blob=True)
settings.load_profile("steady")

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Here and not in tests/gpu, since options are read before that directory is looked at."""
    parser.addoption("--gpu", action="store_true", help="run tests/gpu, which fail where no GPU answers")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # the order is made below


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Between workers: files with many tests first, as pytest-xdist does, but before them those that say LONG.

    A file that takes half a minute for three tests would otherwise come last, and one worker have nothing to do.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = collections.Counter(item.path for item in items)
        items.sort(key=lambda item: (not getattr(item.getparent(pytest.Module).obj, "LONG", False), -tests[item.path]))


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


class SimplifierHere:
    """In place of ``SimplifierProcess``: onnxsim in this process, as its import is most of what a small export costs.

    Whatever runs as a command of its own has the process; so have the tests that take ``simplifier_process``.
    """

    def __enter__(self) -> SimplifierHere:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def submit(self, model: bytes) -> None:
        import onnxsim

        self.simplified, self.same = onnxsim.simplify(onnx.ModelProto.FromString(model))

    def result(self) -> bytes:
        assert self.same
        return self.simplified.SerializeToString()


SimplifierProcess = processes.SimplifierProcess


@pytest.fixture(scope="session", autouse=True)
def _simplifier_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "SimplifierProcess", SimplifierHere)
        yield


@pytest.fixture
def simplifier_process(monkeypatch: pytest.MonkeyPatch) -> type[processes.SimplifierProcess]:
    """The simplifier's process as it is, in use for this test."""
    monkeypatch.setattr(processes, "SimplifierProcess", SimplifierProcess)
    return SimplifierProcess


@pytest.fixture
def small() -> NaiveRepVGG:
    """A fresh small network, to be changed at will."""
    return NaiveRepVGG(Shape())


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Saves an object with torch.save; returns the path."""

    def save(content: object, name: str = "model.pt") -> pathlib.Path:
        path = tmp_path / name
        torch.save(content, path)
        return path

    return save


@pytest.fixture
def checkpoint(small: NaiveRepVGG, saved: Callable[..., pathlib.Path]) -> pathlib.Path:
    """The small network's state dict, official naming, training form."""
    return saved(contiguous_float(small.state_dict()))


class Outcome:
    """What a command did."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr

    @property
    def error(self) -> str:
        """The one line on stderr, without its "error: "."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, f"expected one line on stderr, got {self.stderr!r}"
        assert lines[0].startswith("error: "), lines[0]
        return lines[0].removeprefix("error: ")


@pytest.fixture
def command(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the command line in this process, in an empty directory."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.chdir(tmp_path)
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = main([str(argument) for argument in arguments])
        return Outcome(code, stdout.getvalue(), stderr.getvalue())

    return run


def run_process(arguments: Sequence[object], cwd: pathlib.Path, **options: object) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` as a user would run it, with the checkout importable."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, **options)
