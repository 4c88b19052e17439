"""engines/cpp with CMake: what it needs is said in a line, and a server finds and links what was installed."""

from __future__ import annotations

import os
import re

import pytest

from tests.engines.cpp.conftest import need
from tests.engines.cpp.programs import ADDRESS, CPP, WARNINGS, Network, run, write_engine

CONSUMER = """\
cmake_minimum_required(VERSION 3.18)
project(server LANGUAGES CXX)
find_package(repvgg_engine REQUIRED)
add_executable(server server.cpp)
target_link_libraries(server PRIVATE repvgg::engine)
"""


def readme_example() -> str:
    return readme_examples()[0]


def readme_examples() -> list[str]:
    """A whole server, and what it adds to keep the runtime cache."""
    return re.findall(r"```cpp\n(.*?)```", (CPP / "README.md").read_text(), re.DOTALL)


def test_the_table_of_contents_is_that_of_the_sections():
    source = (CPP / "repvgg_engine.cpp").read_text()
    contents = re.findall(r"^//     (\S.*?)  +\S", source, re.MULTILINE)
    assert contents == re.findall(r"^// -{20,} (.+)$", source, re.MULTILINE)
    assert len(contents) == 12


def cmake(*arguments: object, **environment: object):
    return run("cmake", *arguments, **environment)


@pytest.mark.usefixtures("needs_cmake")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "TENSORRT_ROOT is not set: give the directory of TensorRT"),
        (("-DTENSORRT_ROOT=/nonexistent",), "TENSORRT_ROOT=/nonexistent has no include/NvInfer.h"),
    ],
)
def test_without_an_sdk_nothing_is_built(tmp_path, arguments, said):
    done = cmake("-S", CPP, "-B", tmp_path, *arguments, TENSORRT_ROOT="")
    assert done.returncode != 0
    assert said in " ".join(done.stderr.split())
    assert done.stderr.count("CMake Error") == 1


@pytest.mark.usefixtures("needs_cmake")
def test_an_sdk_without_its_library(tmp_path):
    """The headers of TensorRT for RTX want its own library, whatever other lies there."""
    sdk, _, library = write_sdk(tmp_path / "sdk", "tensorrt_rtx")
    library.rename(library.with_name("libnvinfer.so"))
    done = cmake("-S", CPP, "-B", tmp_path / "build", f"-DTENSORRT_ROOT={sdk}")
    assert done.returncode != 0
    assert "has no libtensorrt_rtx: give -DTENSORRT_LIBRARY" in " ".join(done.stderr.split())


def write_sdk(root, name, architecture=""):
    """What CMake looks for in an SDK."""
    include, lib = (root / folder / architecture for folder in ("include", "lib"))
    include.mkdir(parents=True)
    lib.mkdir(parents=True)
    (include / "NvInfer.h").touch()
    (include / "NvInferVersion.h").write_text("#define TRT_MAJOR_RTX 1\n" if name == "tensorrt_rtx" else "")
    (lib / f"lib{name}.so").touch()
    return root, include, lib / f"lib{name}.so"


@pytest.mark.usefixtures("needs_cmake")
def test_the_sdk_is_looked_for_in_the_root_of_now(tmp_path):
    """Also where a distribution puts it; and nothing of an earlier root is used together with another."""
    fake = tmp_path / "cmake"
    fake.mkdir()
    (fake / "FindCUDAToolkit.cmake").write_text(
        'if(NOT TARGET CUDA::cudart)\n  add_library(CUDA::cudart INTERFACE IMPORTED)\nendif()\nmessage(STATUS "with '
        '${found_headers} and ${TENSORRT_LIBRARY}.")\n'
    )
    architecture = run("g++", "-print-multiarch").stdout.strip()
    roots = [
        write_sdk(tmp_path / "first", "tensorrt_rtx"),
        write_sdk(tmp_path / "second", "nvinfer"),
        write_sdk(tmp_path / "usr", "tensorrt_rtx", architecture),
    ]
    for root, include, library in [*roots, roots[0]]:
        done = cmake("-S", CPP, "-B", tmp_path / "build", f"-DTENSORRT_ROOT={root}", f"-DCMAKE_MODULE_PATH={fake}")
        assert done.returncode == 0, done.stderr
        assert f"with {include} and {library}." in done.stdout


def test_what_is_installed(installed):
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {"include/repvgg_engine.h", "lib/librepvgg_engine.a", "bin/repvgg_verify", "bin/repvgg_bench"} < found
    assert run(installed / "bin/repvgg_verify", "--help").returncode == 0


def test_a_server_as_the_readme_has_it(installed, tmp_path):
    example = readme_example()
    assert example.count("\n") <= 24
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER)
    (tmp_path / "server.cpp").write_text(example)
    flags = " ".join(("-O0 -Wall -Wextra -Wpedantic -Werror", *ADDRESS))
    prefix = f"-DCMAKE_PREFIX_PATH={installed}"
    done = cmake("-S", tmp_path, "-B", tmp_path / "build", prefix, f"-DCMAKE_CXX_FLAGS={flags}")
    assert (done.returncode, done.stderr) == (0, "")
    done = cmake("--build", tmp_path / "build")
    assert done.returncode == 0, done.stdout + done.stderr
    engine = write_engine(tmp_path, Network(batch=(1, 8, 8)))
    done = run(tmp_path / "build" / "server", engine)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n0\n0\n", "")  # the stub's scores of zeros
    done = run(tmp_path / "build" / "server", tmp_path / "none.engine")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"error: {tmp_path / 'none.engine'}: no such engine; check the path\n"


@pytest.mark.usefixtures("needs_gxx")
def test_the_header_needs_no_sdk(tmp_path):
    source = tmp_path / "server.cpp"
    whole, caching = readme_examples()
    source.write_text(
        f"{whole}\nvoid serve(repvgg::Engine& engine);\nvoid serve(repvgg::Engine& engine) {{\n{caching}}}\n"
    )
    done = run("g++", "-std=c++17", "-fsyntax-only", *WARNINGS, f"-I{CPP}", source)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif("TENSORRT_ROOT" not in os.environ, reason="TENSORRT_ROOT names no SDK to compile against")
@pytest.mark.usefixtures("needs_cmake")
def test_against_the_sdk(tmp_path):
    done = cmake("-S", CPP, "-B", tmp_path, f"-DCMAKE_CXX_FLAGS={' '.join(WARNINGS)}")
    assert done.returncode == 0, done.stderr
    done = cmake("--build", tmp_path, "-j", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert run(tmp_path / "repvgg_verify", "--help").returncode == 0


def test_without_a_compiler_the_tests_fail_and_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"^g\+\+, cmake not found: apt-get install g\+\+ cmake make$"):
        need("g++", "cmake")
