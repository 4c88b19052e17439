"""Files that appear whole or not at all, their hashes, and the sidecar that stands beside an engine."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import textwrap

import numpy as np
import onnx
import pytest

from engines import files
from engines.errors import InputRejected, OutputFailed
from engines.files import reported_write_errors, sha256_of, synced, write_whole
from engines.manifest import Manifest, sidecar_path
from engines.plan import header_from_file
from tests.conftest import run_process


@pytest.mark.parametrize("content", [b"", b"engine", os.urandom(1 << 20)], ids=["empty", "small", "a megabyte"])
def test_what_is_written_is_what_was_given(tmp_path, content):
    write_whole(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_older_file_is_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"older and longer")
    write_whole(tmp_path / "file", b"newer")
    assert (tmp_path / "file").read_bytes() == b"newer"


class Unwell(Exception):
    """Not an OSError."""


@pytest.mark.parametrize(
    ("step", "error", "reported"),
    [
        ("fsync", OSError(28, "No space left on device"), "No space left on device"),
        ("fsync", OSError("no number"), "no number"),
        ("replace", PermissionError(13, "Permission denied"), "Permission denied"),
        ("fsync", KeyboardInterrupt(), None),
        ("replace", Unwell(), None),
    ],
)
def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch, step, error, reported):
    (tmp_path / "file").write_bytes(b"older")

    def fail(*_):
        raise error

    monkeypatch.setattr(*((os, "fsync", fail) if step == "fsync" else (pathlib.Path, "replace", fail)))
    with pytest.raises(OutputFailed if reported else type(error)) as raised:
        write_whole(tmp_path / "file", b"newer")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"older"
    if reported:
        path = tmp_path / "file"
        assert (
            str(raised.value)
            == f"{path}: cannot be written ({reported}); give --out a writable directory with space left"
        )
        assert raised.value.exit_code == 5


@pytest.mark.parametrize("kind", ["no directory", "directory is a file", "target is a directory"])
def test_a_place_that_cannot_be_written_is_reported(tmp_path, kind):
    target = tmp_path / "out" / "file"
    if kind == "directory is a file":
        target.parent.write_text("")
    elif kind == "target is a directory":
        target.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputFailed) as raised:
        write_whole(target, b"content")
    assert str(raised.value).startswith(f"{target}: cannot be written (")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_the_older_file(tmp_path):
    (tmp_path / "file").write_bytes(b"older")
    script = """
        import pathlib, resource
        from engines.errors import OutputFailed
        from engines.files import write_whole
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_whole(pathlib.Path("file"), bytes(100_000))
        except OutputFailed as error:
            print(error)
    """
    done = run_process(["-c", textwrap.dedent(script)], tmp_path, timeout=60)
    assert done.stdout == "file: cannot be written (File too large); give --out a writable directory with space left\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"older"


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, pathlib.Path.replace

    def noted_fsync(descriptor):
        order.append(("synced", os.fstat(descriptor).st_size, (tmp_path / "file").exists()))
        fsync(descriptor)

    def noted_replace(source, target):
        order.append(("renamed", source.stat().st_size, target.exists()))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(pathlib.Path, "replace", noted_replace)
    write_whole(tmp_path / "file", b"12345")
    assert order == [("synced", 5, False), ("renamed", 5, False)]


def test_a_finished_file_is_synced(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(os.fstat(descriptor).st_ino))
    (tmp_path / "file").write_bytes(b"content")
    synced(tmp_path / "file")
    assert seen == [(tmp_path / "file").stat().st_ino]


def test_other_errors_than_those_of_the_disk_are_not_taken_for_one(tmp_path):
    with pytest.raises(Unwell), reported_write_errors(tmp_path):
        raise Unwell


@pytest.mark.parametrize("size", [0, 1, 64, 1 << 18, (1 << 20) + 7])
def test_the_hash_is_that_of_hashlib(tmp_path, size):
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_one_byte_makes_another_hash(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "b").write_bytes(bytes(999) + b"\x01")
    assert sha256_of(tmp_path / "a") != sha256_of(tmp_path / "b")


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_a_file_that_cannot_be_hashed_is_rejected_by_name(tmp_path, kind):
    path = tmp_path if kind == "directory" else tmp_path / "missing"
    with pytest.raises(InputRejected) as raised:
        sha256_of(path)
    assert str(raised.value).startswith(f"{path}: cannot be read (")
    assert str(raised.value).endswith("check the path")


# --- the sidecar

FIELDS = [
    "schema", "name", "precision", "sha256", "sdk", "compute_capabilities", "inputs", "outputs", "profile",
    "preprocessing", "assumptions", "tolerance", "audit", "golden",
]  # fmt: skip


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON")


def test_a_manifest_as_json_has_the_documented_fields_and_its_schema():
    manifest = Manifest(
        name="net.fp16.engine", precision="fp16", sha256={"engine": "00"}, sdk={"name": "tensorrt_rtx", "version": "1"},
        compute_capabilities=(86, 89), inputs=({"name": "input"},), outputs=({"name": "output"},),
        profile={"input": ((1, 3, 4, 4), (2, 3, 4, 4), (4, 3, 4, 4))}, preprocessing={"size": (4, 4)},
        assumptions={"size": "4x4"}, tolerance=5e-3, audit={"problems": ()}, golden="golden.npz",
    )  # fmt: skip
    text = manifest.to_json()
    fields = json.loads(text, parse_constant=refuse_constant)
    assert list(fields) == FIELDS
    assert fields["schema"] == 1
    assert fields["compute_capabilities"] == [86, 89]
    assert fields["profile"] == {"input": [[1, 3, 4, 4], [2, 3, 4, 4], [4, 3, 4, 4]]}
    assert fields["tolerance"] == 5e-3
    assert text.endswith("}\n")


def test_the_sidecar_stands_beside_the_engine():
    assert sidecar_path(pathlib.Path("out/net.fp16.engine")) == pathlib.Path("out/net.fp16.engine.json")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_the_sidecar_of_an_export_tells_the_truth_about_its_files(compiled, precision):
    network = compiled(precision=precision)
    fields = json.loads(network.sidecar.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    folder, header = network.engine.parent, header_from_file(network.engine)
    assert list(fields) == FIELDS
    assert (fields["schema"], fields["name"], fields["precision"]) == (1, network.engine.name, precision)
    assert fields["sha256"] == {
        kind: hashlib.sha256(path.read_bytes()).hexdigest()
        for kind, path in (("checkpoint", folder / "net.pt"), ("onnx", network.onnx), ("engine", network.engine))
    }
    assert fields["sdk"] == {"name": "tensorrt_rtx", "version": header.version_text}
    assert fields["compute_capabilities"] == list(header.compute_capabilities)
    for kind, values in (
        ("inputs", onnx.load(network.onnx).graph.input),
        ("outputs", onnx.load(network.onnx).graph.output),
    ):
        shapes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values]
        names = [value.name for value in values]
        assert [(one["name"], one["dtype"], one["shape"]) for one in fields[kind]] == [(names[0], "float32", shapes[0])]
    assert fields["profile"] == {"input": [[batch, 3, 32, 32] for batch in (1, 8, 32)]}
    assert fields["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert fields["preprocessing"]["std"] == [0.229, 0.224, 0.225]
    assert list(fields["preprocessing"]["size"]) == [32, 32]
    assert fields["preprocessing"]["channels"]
    assert fields["tolerance"] == {"fp16": 5e-3, "fp32": 5e-6}[precision]
    assert fields["audit"]["line"] == network.line
    assert fields["audit"]["problems"] == []
    golden = np.load(folder / fields["golden"])
    assert (golden["input"].shape, golden["output"].shape) == ((4, 3, 32, 32), (4, 8))


def test_a_file_descriptor_is_not_leaked_by_a_failed_sync(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    opened = []
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: opened.append(descriptor) or (_ for _ in ()).throw(OSError())
    )
    with pytest.raises(OSError):  # noqa: PT011 - any will do
        synced(tmp_path / "file")
    monkeypatch.undo()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputFailed, match=r"pipe: cannot be written \(it is no plain file\); give --out another name"):
        write_whole(pipe, b"content")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
