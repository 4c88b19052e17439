"""The C++ programs, compiled twice a session, whatever the number of pytest's workers.

With CMake for TensorRT for RTX, under the sanitizers of addresses, leaks and undefined behaviour; and for full TensorRT
under that of threads. So both SDKs' forms are compiled and run, and what is tested is what CMake installs.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil

import pytest

from tests.engines.cpp.programs import (
    ADDRESS,
    THREAD,
    build,
    build_with_cmake,
    golden_file,
    run,
    write_engine,
)


def need(*tools: str) -> None:
    """Fails where a compiler is missing: skipping would leave the C++ library untested, and say that all is well."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)} not found: apt-get install g++ cmake make", pytrace=False)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory):
    """``built_once(name, build)``: a folder that ``build(folder)`` filled, by whichever worker came first."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def call(name, build):
        folder = shared / f"cpp-{name}"
        with open(shared / f"cpp-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                folder.mkdir(exist_ok=True)
                build(folder)
                (folder / "done").touch()
        return folder

    return call


@pytest.fixture(scope="session")
def installed(built_once) -> pathlib.Path:
    """Where CMake installed the library and its programs; the probe is beside them."""
    need("g++", "cmake", "make")
    return built_once("address", lambda folder: build_with_cmake(folder, ADDRESS)) / "prefix"


@pytest.fixture(scope="session")
def programs(installed) -> pathlib.Path:
    """All of them, for TensorRT for RTX."""
    return installed / "bin"


@pytest.fixture(scope="session")
def threaded(built_once) -> pathlib.Path:
    """Those with threads, for full TensorRT."""
    need("g++")
    return built_once("thread", lambda folder: build(folder, THREAD))


@pytest.fixture
def needs_gxx() -> None:
    """Fails without g++."""
    need("g++")


@pytest.fixture
def needs_cmake() -> None:
    """Fails without CMake and what it calls."""
    need("g++", "cmake", "make")


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
