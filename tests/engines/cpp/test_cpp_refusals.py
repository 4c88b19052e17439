"""engines/cpp: what is no engine for this machine is refused before it is deserialized, as Python refuses it."""

from __future__ import annotations

import dataclasses
import hashlib
import os

import numpy as np
import pytest

from engines.errors import InputRejected
from engines.integrity import checked_engine
from engines.manifest import sidecar_path
from tests.engines.cpp.programs import Network, engine_content, manifest_of, run, write_engine


@pytest.fixture
def load(probe):
    """Code and message for each engine."""

    def call(*engines, **environment):
        lines = [line.split(" ", 1) for line in probe("load", *engines, **environment).splitlines()]
        assert len(lines) == len(engines)
        assert all(message == "" or len(message) > 20 for _, message in lines)
        return [(int(code), message) for code, message in lines]

    return call


def is_taken(engine):
    try:
        checked_engine(engine)
    except InputRejected:
        return False
    return True


def hashed_again(folder, content, name):
    """An engine of other ``content``, with a sidecar that has its SHA-256."""
    engine = folder / name
    engine.write_bytes(content)
    sidecar_path(engine).write_text(manifest_of(Network(), content, name).to_json())
    return engine


def test_a_sound_engine_is_loaded(load, tmp_path):
    assert load(write_engine(tmp_path)) == [(0, "")]


def test_a_byte_changed_anywhere(load, tmp_path):
    content = engine_content(Network())
    places = [*range(70), *range(70, len(content), 9), len(content) - 1]
    engines = []
    for place in places:
        engine = write_engine(tmp_path, name=f"{place}.engine")
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        engine.write_bytes(changed)
        engines.append(engine)
    for code, message in load(*engines):
        assert code == 3
        assert "damaged, replaced, or the sidecar is another engine's; build it again" in message


def test_a_header_that_is_hashed_again_is_refused_where_python_refuses_it(load, tmp_path):
    content = engine_content(Network())
    engines = []
    for place in range(64):
        changed = bytearray(content)
        changed[place] ^= 0x10
        engines.append(hashed_again(tmp_path, bytes(changed), f"{place}.engine"))
    taken = [is_taken(engine) for engine in engines]
    assert [code == 0 for code, _ in load(*engines)] == taken
    assert taken.count(False) == 29  # tag, format, size, version, tag, cards; the rest may be anything


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[:-1], "the header says"),
        (lambda content: content + b"\0", "the header says"),
        (lambda content: content[:40], "40 bytes are too few for an engine"),
        (lambda _: b"", "0 bytes are too few for an engine"),
        (lambda content: b"ONNX" + content[4:], "not a TensorRT engine"),
        (lambda content: content[:8] + b"\3" + content[9:], "its header is of another format"),
        (lambda content: content[:27] + b"\7" + content[28:], "its header says version 1.7.1.7, its sidecar 1.7.1.116"),
        (lambda content: content[:32] + b"\4" + content[33:], "its header says cards sm86, its sidecar sm80, sm86"),
        (lambda content: b"ftrt" + content[4:], "its header says SDK tensorrt, its sidecar tensorrt_rtx"),
    ],
)
def test_a_file_that_is_hashed_again(load, tmp_path, change, said):
    engine = hashed_again(tmp_path, change(engine_content(Network())), "small.engine")
    ((code, message),) = load(engine)
    assert (code, said in message) == (3, True), message
    assert message.startswith(f"{engine}: ")
    assert not is_taken(engine)


def test_files_that_are_not_there(load, tmp_path):
    engine = write_engine(tmp_path)
    without, folder = write_engine(tmp_path, name="without.engine"), tmp_path / "folder.engine"
    sidecar_path(without).unlink()
    folder.mkdir()
    found = load(tmp_path / "none.engine", folder, without, engine)
    assert found[0] == (3, f"{tmp_path / 'none.engine'}: no such engine; check the path")
    assert found[1] == (3, f"{folder}: no such engine; check the path")
    assert found[2][0] == 3
    assert "its sidecar without.engine.json is missing, so nothing says what this engine is" in found[2][1]
    assert found[3] == (0, "")


def test_a_name_with_a_line_break_stays_in_one_line(load, tmp_path):
    ((code, message),) = load(tmp_path / "two\nlines.engine")
    assert (code, message) == (3, f"{tmp_path}/two lines.engine: no such engine; check the path")


def test_a_sidecar_that_is_larger_than_any(load, tmp_path):
    engine = write_engine(tmp_path)
    os.truncate(sidecar_path(engine), (1 << 24) + 1)
    ((code, message),) = load(engine)
    assert (code, "too many for such a file" in message) == (3, True)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"STUB_VERSION": "1.7.1.117"}, "made by TensorRT for RTX 1.7.1.116, and 1.7.1.117 is installed here"),
        ({"STUB_VERSION": "1.7.0.116"}, "made by TensorRT for RTX 1.7.1.116, and 1.7.0.116 is installed here"),
        (
            {"STUB_VERSION": "1.8.1.116"},
            "1.8.1.116 is installed here, and this program was compiled with the headers of 1.7",
        ),
        ({"STUB_VERSION": "2.7.1.116"}, "compiled with the headers of 1.7"),
        ({"STUB_DEVICES": "0"}, "no GPU answers here (cudaErrorNoDevice)"),
        ({"STUB_DEVICES": "-1"}, "no GPU answers here (cudaErrorInsufficientDriver)"),
        ({"STUB_CARD": "75"}, "built for sm80, sm86, sm89, sm120, sm121, and this GPU is sm75"),
        ({"STUB_CARD": "90"}, "this GPU is sm90"),
    ],
)
def test_another_version_or_card(load, tmp_path, environment, said):
    ((code, message),) = load(write_engine(tmp_path), **environment)
    assert (code, said in message) == (4, True), message


def test_a_newer_card_is_admitted_where_the_header_does(load, tmp_path):
    newer, older = write_engine(tmp_path, name="a.engine"), write_engine(tmp_path, name="b.engine", mask=0x3E)
    found = load(newer, older, STUB_CARD=130)
    assert found[0] == (0, "")
    assert found[1][0] == 4
    assert "this GPU is sm130" in found[1][1]


def test_another_sdk(load, tmp_path):
    ((code, message),) = load(write_engine(tmp_path, sdk="tensorrt"))
    assert code == 4
    assert "needs TensorRT 10.13.3.9, and this program is linked with TensorRT for RTX" in message


def test_a_damaged_file_is_refused_before_sdk_and_gpu_are_asked(load, tmp_path):
    engine = write_engine(tmp_path)
    engine.write_bytes(engine.read_bytes()[:-1])
    for environment in ({"STUB_DEVICES": "0"}, {"STUB_VERSION": "9.9.9.9"}, {"STUB_FAIL_CALL": "1"}):
        ((code, message),) = load(engine, **environment)
        assert (code, "its SHA-256 is" in message) == (3, True)


def test_what_tensorrt_says_is_passed_on_without_its_warnings(load, tmp_path):
    engine = hashed_again(tmp_path, engine_content(Network()).replace(b"stub 1", b"stub 2"), "small.engine")
    assert load(engine) == [
        (
            4,
            "TensorRT for RTX: deserializeCudaEngine failed: this is no engine of the stub; check the GPU with "
            "nvidia-smi and start the process again",
        )
    ]


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [
        (10, 6, "cudaMalloc failed: cudaErrorMemoryAllocation (out of memory); free memory on the GPU, or build"),
        (11, 6, "createExecutionContext failed: planted in createExecutionContext; free memory on the GPU, or build"),
        (13, 5, "cudaMallocHost failed: cudaErrorMemoryAllocation (out of memory); free memory on this machine, or"),
    ],
)
def test_memory_that_does_not_suffice_has_codes_of_its_own(programs, tmp_path, call, code, said):
    """Also what TensorRT ran out of, which says no more than that it failed."""
    done = run(programs / "probe", "infer", write_engine(tmp_path), 3, STUB_FAIL_CALL=call)
    assert done.stdout.startswith(f"{code} "), done.stdout
    assert said in done.stdout


@pytest.mark.parametrize(
    ("network", "changes", "said"),
    [
        (Network(lines=("fault half output",)), {}, "output is not a plain array of float32 on the GPU"),
        (Network(lines=("fault host output",)), {}, "output is not a plain array of float32 on the GPU"),
        (Network(lines=("fault vector output",)), {}, "output is not a plain array of float32 on the GPU"),
        (Network(features=True), {"outputs": Network().outputs}, "it has 3 inputs and outputs, its sidecar 2"),
        (Network(), {"outputs": {"scores": ("N", 5)}}, "scores is not what its sidecar says"),
        (Network(), {"outputs": {"output": ("N", 6)}}, "output is not what its sidecar says"),
        (Network(), {"outputs": {"output": ("N", 5, 1)}}, "output is not what its sidecar says"),
        (Network(lines=("profile 2 3 4 4 4 3 4 4 3 3 4 4",)), {}, "its profile contradicts itself"),
        (Network(lines=("profile 2 3 4 4 4 3 4 4 4 3 5 4",)), {}, "its profile is not one of its input"),
        (Network(lines=("profile 0 3 4 4 4 3 4 4 4 3 4 4",)), {}, "its profile is not one of its input"),
    ],
)
def test_an_engine_that_is_not_what_its_sidecar_says(load, tmp_path, network, changes, said):
    described = {
        name: tuple({"name": output, "dtype": "float32", "shape": list(shape)} for output, shape in outputs.items())
        for name, outputs in changes.items()
    }
    ((code, message),) = load(write_engine(tmp_path, network, **described))
    assert (code, said in message) == (3, True), message


@pytest.mark.parametrize(
    ("made_by", "installed", "code"),
    [
        ("10.13.3.9", "10.13.3.9", 0),
        ("10.13.3.9.post1", "10.13.3.9", 0),
        ("10.13.3", "10.13.3.9", 4),
        ("10.13.3.99", "10.13.3.9", 4),
        ("10.13.2.9", "10.13.3.9", 4),
        ("10.14.0.1", "10.14.0.1", 0),  # newer than the headers, of the same major version
        ("10.12.0.1", "10.12.0.1", 4),
        ("11.0.0.1", "11.0.0.1", 4),
    ],
)
def test_versions_of_full_tensorrt(threaded, tmp_path, made_by, installed, code):
    engine = write_engine(tmp_path, sdk="tensorrt")
    manifest = manifest_of(Network(), engine.read_bytes(), engine.name, "tensorrt")
    manifest = dataclasses.replace(manifest, sdk={"name": "tensorrt", "version": made_by})
    sidecar_path(engine).write_text(manifest.to_json())
    done = run(threaded / "probe", "load", engine, STUB_VERSION=installed)
    assert int(done.stdout.split()[0]) == code, done.stdout + done.stderr


def test_the_other_card_and_device_are_used_throughout(programs, tmp_path):
    """Also that memory, streams and graphs are those of the device: the stub complains of any other."""
    engine = write_engine(tmp_path)
    done = run(programs / "repvgg_bench", engine, "--device", 1, "--duration", 0.01, STUB_DEVICES=2)
    assert (done.returncode, done.stderr) == (0, "")
    done = run(programs / "repvgg_bench", engine, "--device", 2, STUB_DEVICES=2)
    assert done.returncode == 4
    assert done.stderr == (
        f"error: {engine}: there is no GPU of index 2 here, but 2; check with nvidia-smi that this process may see it\n"
    )


def test_the_exporters_engine_passes_every_check_up_to_its_deserialization(programs, fashion, engines_command):
    from engines.golden_file import golden_file_from_vectors

    engine, golden = fashion / "fashion.fp16.engine", fashion / "golden.bin"
    golden.write_bytes(golden_file_from_vectors(fashion / "golden.npz").to_bytes())
    done = run(programs / "repvgg_verify", engine, golden)
    assert done.returncode == 4
    assert done.stderr.startswith(
        "error: TensorRT for RTX: deserializeCudaEngine failed: this is no engine of the stub"
    )
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    done = run(programs / "repvgg_verify", engine, golden)
    assert (done.returncode, hashlib.sha256(content).hexdigest()[:12] in done.stderr) == (3, True)
    assert np.load(fashion / "golden.npz")["input"].shape == (4, 1, 28, 28)
