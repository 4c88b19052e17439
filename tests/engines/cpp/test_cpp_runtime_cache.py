"""engines/cpp keeps what TensorRT for RTX compiles, in Python's file; one that is wrong is passed over."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess

import pytest

from engines.runtime_cache import RuntimeCacheFile
from tests.engines.cpp.programs import VERSIONS, Network, run, write_engine

KERNELS = b"stub kernels 116 1\n" + b"".join(b"kernel %d 3 4 4\n" % batch for batch in (2, 3, 4))


@pytest.fixture
def engine(tmp_path):
    return write_engine(tmp_path)


@pytest.fixture
def cache(engine, tmp_path):
    """Python's view of the file that the programs are given; alone in its folder."""
    (tmp_path / "cache").mkdir()
    digest = hashlib.sha256(engine.read_bytes()).hexdigest()
    return RuntimeCacheFile(tmp_path / "cache" / "kernels", digest, VERSIONS["tensorrt_rtx"], 86)


@pytest.fixture
def infer(probe, engine, cache):
    """How many kernels were compiled, why the file was passed over, and how saving ended."""

    def call(*batches, **environment):
        lines = probe("infer", engine, *(batches or (2, 3, 4)), **{"PROBE_CACHE": cache.path, **environment})
        compiled, saved = lines.splitlines()[-2:]
        number, refusal = re.fullmatch(r"compiled (\d+) (.*)", compiled).groups()
        return int(number), refusal, saved

    return call


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_kernels_are_compiled_once_and_then_taken_from_the_file(infer, cache):
    assert infer(2, 4) == (2, f"{cache.path}: is not there yet", "0 ")
    assert infer(2, 3, 4) == (1, "", "0 ")
    written = cache.path.stat().st_mtime_ns
    assert infer(2, 3, 4) == (0, "", "0 ")
    assert cache.path.stat().st_mtime_ns == written  # nothing new, so nothing was written
    assert cache.read() == KERNELS
    assert names_in(cache.path.parent) == ["kernels"]


def test_python_and_this_read_each_others_file(infer, cache):
    assert cache.write(KERNELS)
    assert infer() == (0, "", "0 ")


def damaged(content):
    yield from (bytes([*content[:place], content[place] ^ 1, *content[place + 1 :]]) for place in range(0, 230, 23))
    yield from (b"", b"\n", content[:100], content[:-1], content + b"\n", content[: -len(KERNELS)], b"\0" * 5000)


def test_a_damaged_file_is_passed_over_and_made_anew(infer, cache):
    assert cache.write(KERNELS)
    sound = cache.path.read_bytes()
    for content in damaged(sound):
        assert content != sound
        cache.path.write_bytes(content)
        assert infer() == (3, f"{cache.path}: damaged, or of another engine, version or card", "0 ")
        assert cache.path.read_bytes() == sound


@pytest.mark.parametrize(
    "foreign", [("0" * 64, "1.7.1.116", 86), (None, "1.7.1.115", 86), (None, "1.7.1.116", 89)], ids=str
)
def test_a_file_of_another_engine_version_or_card(infer, cache, foreign):
    digest, version, card = foreign
    assert RuntimeCacheFile(cache.path, digest or cache.engine_sha256, version, card).write(KERNELS)
    assert infer() == (3, f"{cache.path}: damaged, or of another engine, version or card", "0 ")
    assert cache.read() == KERNELS


def test_what_the_sdk_itself_refuses(infer, cache):
    """And its complaint is nobody else's: the next failure has its own."""
    assert cache.write(KERNELS)
    refused = f"{cache.path}: of another driver or GPU (the cache is of another environment)"
    assert infer(STUB_DRIVER=2) == (3, refused, "0 ")
    assert infer(STUB_DRIVER=2) == (0, "", "0 ")
    assert infer() == (3, refused, "0 ")


@pytest.mark.parametrize("place", ["missing/kernels", "folder", "file/kernels"])
def test_what_cannot_be_written_stops_nothing(infer, cache, place):
    folder = cache.path.parent
    (folder / "folder").mkdir()
    (folder / "file").touch()
    compiled, refusal, saved = infer(PROBE_CACHE=folder / place)
    assert compiled == 3
    assert refusal.startswith(f"{folder / place}: ")
    assert re.fullmatch(rf"8 {folder / place}: cannot be written \(.+\); give a file in a writable directory .+", saved)
    assert names_in(folder) == ["file", "folder"]


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(programs, engine, cache):
    assert RuntimeCacheFile(cache.path, "0" * 64, "1.7.1.116", 86).write(KERNELS)
    before = cache.path.read_bytes()
    limited = ("bash", "-c", "trap '' XFSZ; ulimit -f 0; exec \"$@\"", "-", programs / "probe", "infer", engine, 3)
    done = run(*limited, PROBE_CACHE=cache.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"8 {cache.path}: cannot be written (File too large); give a file" in done.stdout
    assert cache.path.read_bytes() == before
    assert names_in(cache.path.parent) == ["kernels"]


def test_what_a_killed_process_left_is_in_nobodys_way(infer, cache):
    left = [f".kernels.partial-{number}" for number in range(3)]
    for name in left:
        (cache.path.parent / name).write_bytes(b"half")
    assert infer()[2] == "0 "
    assert names_in(cache.path.parent) == [*left, "kernels"]
    assert cache.read() == KERNELS


def test_processes_that_write_at_once_leave_a_whole_file(programs, engine, cache):
    commands = [(programs / "probe", "infer", engine, str(batch)) for batch in (2, 3, 4) * 3]
    environment = {**os.environ, "PROBE_CACHE": str(cache.path)}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(commands)
    assert all(lines.endswith("\n0 \n") for lines in said)
    kernels = cache.read()
    assert kernels is not None
    assert set(kernels.splitlines()) <= set(KERNELS.splitlines())
    assert names_in(cache.path.parent) == ["kernels"]


def test_it_is_saved_while_threads_run(probe, engine, cache):
    """The stub complains where kernels are compiled while it is serialized."""
    assert probe("saving", engine, PROBE_CACHE=cache.path) == "saved while two threads ran\n"
    assert cache.read() == KERNELS


def test_every_failing_call_is_an_error_or_changes_nothing_and_nothing_leaks(probe, engine, cache):
    """As without a runtime cache; the file is whole, or not there, after each, and nothing is beside it."""

    def counts(*arguments, **environment):
        return map(int, re.findall(r"\d+", probe("faults", engine, *arguments, **environment)))

    without, _, endured_without = counts()
    for miss, more in (((), 4), (("miss",), 3)):  # create, deserialize, set, serialize
        calls, refused, endured = counts(*miss, PROBE_CACHE=cache.path)
        assert calls == without + more + 1  # the device to save on
        assert refused + endured == 2 * calls
        assert endured >= endured_without + more
        assert names_in(cache.path.parent) == ["kernels"]


def test_every_failing_allocation(probe, engine, cache):
    without, refused = (
        int(probe("allocations", engine, **environment).split()[0]) for environment in ({}, {"PROBE_CACHE": cache.path})
    )
    assert refused > without  # those of saving
    assert names_in(cache.path.parent) == ["kernels"]


def test_full_tensorrt_refuses_one(threaded, tmp_path):
    engine = write_engine(tmp_path, sdk="tensorrt")
    said = "full TensorRT compiles no kernels at run time, so it keeps no runtime cache"
    done = run(threaded / "probe", "load", engine, PROBE_CACHE="kernels")
    assert done.stdout == f"2 kernels: {said}; load without one\n"
    done = run(threaded / "repvgg_bench", engine, "--runtime-cache", "kernels")
    assert (done.returncode, done.stderr) == (2, f"error: kernels: {said}; load without one\n")
    assert run(threaded / "probe", "load", engine, PROBE_CACHE="").stdout == "0 \n"


def test_verify_writes_it_where_every_check_holds(verify, cache):
    network = Network(lines=("fault nan output",))
    assert verify(network, "--runtime-cache", cache.path).returncode == 1
    assert names_in(cache.path.parent) == []
    for became in (f"made anew ({cache.path}: is not there yet)", "its kernels were used"):
        done = verify(None, "--runtime-cache", cache.path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-2:] == ["PASS: 4 of 4 checks hold", f"runtime cache: {became}"]
    done = verify(None, "--runtime-cache", cache.path.parent)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith(f"runtime cache: {cache.path.parent}: cannot be written")
    assert "runtime cache" not in verify().stdout


def test_bench_says_what_became_of_it(programs, engine, cache):
    command = (programs / "repvgg_bench", engine, "--duration", "0.01", "--runtime-cache", cache.path)
    assert f"\n  runtime cache   made anew ({cache.path}: is not there yet)\n" in run(*command).stdout
    assert json.loads(run(*command, "--json").stdout)["runtime_cache"] == "its kernels were used"
    assert json.loads(run(*command[:-2], "--json").stdout)["runtime_cache"] is None


@pytest.mark.parametrize("program", ["repvgg_bench", "repvgg_verify"])
def test_an_option_without_its_file(programs, program):
    done = run(programs / program, "engine", "--runtime-cache")
    assert (done.returncode, done.stderr) == (2, f"error: --runtime-cache: give a file; see {program} --help\n")
