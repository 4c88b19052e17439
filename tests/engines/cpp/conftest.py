"""The C++ programs, compiled once a session, whatever the number of pytest's workers."""

from __future__ import annotations

import fcntl
import functools
import os
import pathlib
import shutil

import pytest

from tests.engines.cpp.programs import ADDRESS, BENCH, PROBE, THREAD, VERIFY, build, golden_file, run, write_engine


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """``built(name, flags, programs)``: the directory of the compiled programs."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    @functools.cache
    def once(name, flags, programs):
        folder = shared / f"cpp-{name}"
        with open(shared / f"cpp-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                folder.mkdir(exist_ok=True)
                build(folder, flags, programs)
                (folder / "done").touch()
        return folder

    return once


@pytest.fixture(scope="session")
def programs(built) -> pathlib.Path:
    """All of them, for TensorRT for RTX, with the sanitizers of addresses, leaks and undefined behaviour."""
    return built("address", ADDRESS, (VERIFY, BENCH, PROBE))


@pytest.fixture(scope="session")
def threaded(built) -> pathlib.Path:
    """Those with threads, for full TensorRT, with the sanitizer of threads."""
    return built("thread", THREAD, (BENCH, PROBE))


@pytest.fixture
def probe(programs):
    """Runs the probe, which must end well."""

    def call(*arguments, **environment):
        done = run(programs / "probe", *arguments, **environment)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        return done.stdout

    return call


@pytest.fixture
def verify(programs, tmp_path):
    """``verify(network)``: repvgg_verify on an engine and the golden vectors of the network as it should be."""

    def call(network=None, *arguments, golden=None, images=None, environment=None, **changes):
        engine = write_engine(tmp_path, network, **changes)
        vectors = golden_file(network) if images is None else golden_file(network, images)
        content = vectors.to_bytes() if golden is None else golden
        (tmp_path / "golden.bin").write_bytes(content)
        return run(programs / "repvgg_verify", engine, tmp_path / "golden.bin", *arguments, **(environment or {}))

    return call
