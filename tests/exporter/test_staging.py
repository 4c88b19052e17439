"""The output directory: everything or nothing, no stale file beside a new one, and nobody else's file touched."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import pathlib

import numpy as np
import onnxruntime
import pytest
import torch

from exporter.errors import OutputFailed, ReportedError
from exporter.onnx_file import write_onnx
from exporter.staging import staging
from tests.networks import contiguous_float

SIZE = ("--size", "20")


@contextlib.contextmanager
def staged(out):
    with concurrent.futures.ThreadPoolExecutor(2) as pool, staging(out, pool) as stage:
        yield stage


def write(stage, *names, text="new"):
    for name in names:
        stage.path(name).write_text(text)
        stage.seal(stage.path(name))


def report_of(*names):
    return json.dumps({"files": [{"name": name} for name in names]})


def run(out, *names, passed=True, text="new"):
    """A whole run that makes ``names`` and the report that lists them."""
    with staged(out) as stage:
        write(stage, *names, text=text)
        write(stage, "report.json", text=report_of(*names))
        stage.publish() if passed else stage.reject()


def tree(folder):
    """Every path under ``folder``, hidden ones too, with the bytes of the files."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# Everything or nothing


def test_nothing_is_seen_before_it_is_published(out):
    with staged(out) as stage:
        write(stage, "a.onnx", "b.onnx")
        assert [path.name for path in out.glob("[!.]*")] == []
        stage.publish()
        assert {path.name for path in out.glob("[!.]*")} == {"a.onnx", "b.onnx"}
    assert tree(out) == {"a.onnx": b"new", "b.onnx": b"new"}


def test_a_file_that_was_not_sealed_is_not_published(out):
    with staged(out) as stage:
        write(stage, "a.onnx")
        stage.path("scratch").write_text("half a file")
        assert [path.name for path in stage.files] == ["a.onnx"]
        stage.publish()
    assert tree(out) == {"a.onnx": b"new"}


def test_a_sealed_file_has_the_hash_of_its_content(out):
    with staged(out) as stage:
        write(stage, "a.onnx", text="weights")
        assert stage.sha256(stage.path("a.onnx")) == hashlib.sha256(b"weights").hexdigest()


def test_every_file_is_synced_before_any_is_moved_and_the_report_is_moved_last(out, monkeypatch):
    events = []
    replace = pathlib.Path.replace
    monkeypatch.setattr("exporter.staging.synced", lambda path: events.append(("synced", path.name)))
    monkeypatch.setattr(
        pathlib.Path, "replace", lambda path, target: events.append(("moved", path.name)) or replace(path, target)
    )
    run(out, "a.onnx", "z.engine")
    assert sorted(events[:3]) == [("synced", "a.onnx"), ("synced", "report.json"), ("synced", "z.engine")]
    assert events[3:] == [("moved", "a.onnx"), ("moved", "z.engine"), ("moved", "report.json")]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [OutputFailed("x: y; z"), RuntimeError("defect"), KeyboardInterrupt()])
def test_a_failure_leaves_things_as_they_were(error, existing, tmp_path):
    out = tmp_path / "new" / "deeper"
    if existing:
        run(out, "a.onnx", text="old")
    before = tree(tmp_path)

    def fail():
        with staged(out) as stage:
            write(stage, "a.onnx", "b.onnx")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert tree(tmp_path) == before


def test_an_empty_directory_that_was_there_stays(out):
    out.mkdir()
    with pytest.raises(RuntimeError), staged(out):
        raise RuntimeError
    assert out.is_dir()
    assert tree(out) == {}


def test_a_directory_that_was_made_is_removed_where_the_hidden_one_cannot_be(tmp_path, monkeypatch):
    def full(**_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exporter.staging.tempfile.mkdtemp", full)
    with pytest.raises(OutputFailed, match="No space left on device"), staged(tmp_path / "new" / "deeper"):
        pass
    assert tree(tmp_path) == {}


def test_a_file_that_cannot_be_synced_is_reported_and_nothing_is_published(out, monkeypatch):
    def broken(path):
        if path.name == "b.onnx":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("exporter.staging.synced", broken)
    with pytest.raises(OutputFailed, match=r"Input/output error.*--out"):
        run(out, "a.onnx", "b.onnx")
    assert not out.exists()


@pytest.mark.parametrize("earlier", [False, True], ids=["first run", "second run"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_through_publishing_leaves_things_as_they_were(error, earlier, out, monkeypatch):
    if earlier:
        run(out, "a.onnx", "b.onnx", text="old")
    before = tree(out.parent)
    replace, moved = pathlib.Path.replace, []

    def fail_once(path, target):
        moved.append(path.name)
        if len(moved) == 2:
            raise error
        return replace(path, target)

    monkeypatch.setattr(pathlib.Path, "replace", fail_once)
    with pytest.raises(ReportedError if isinstance(error, OSError) else KeyboardInterrupt):
        run(out, "a.onnx", "b.onnx", text="new")
    assert len(moved) >= 2
    assert tree(out.parent) == before


def test_a_file_system_without_hard_links_is_no_obstacle(out, monkeypatch):
    def refuse(*_arguments, **_options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    run(out, "a.onnx", "b.onnx", text="old")
    run(out, "a.onnx")
    assert tree(out) == {"a.onnx": b"new", "report.json": report_of("a.onnx").encode()}


def test_two_runs_into_one_directory_do_not_see_each_other(out):
    with staged(out) as first, staged(out) as second:
        write(first, "a.onnx", text="first")
        write(second, "a.onnx", text="second")
        second.publish()
        assert (out / "a.onnx").read_text() == "second"
        first.publish()
    assert tree(out) == {"a.onnx": b"first"}


# Stale files


def test_a_second_run_replaces_its_files_and_removes_those_it_no_longer_makes(out):
    run(out, "m.onnx", "m.fp16.onnx", "m.fp16.engine", text="old")
    (out / "notes.txt").write_text("mine")
    run(out, "m.onnx", "golden.npz")
    names = {"m.onnx": b"new", "golden.npz": b"new", "notes.txt": b"mine"}
    assert tree(out) == {**names, "report.json": report_of("m.onnx", "golden.npz").encode()}


def test_what_no_report_lists_is_left_alone_whatever_its_name(out):
    out.mkdir()
    (out / "m.fp16.engine").write_text("mine")
    run(out, "m.onnx")
    assert (out / "m.fp16.engine").read_text() == "mine"


def test_a_rejected_run_touches_no_earlier_file(out):
    run(out, "m.onnx", "m.fp16.engine", text="old")
    before = tree(out)
    run(out, "m.onnx", passed=False, text="bad")
    rejected = {"m.onnx.rejected": b"bad", "report.json.rejected": report_of("m.onnx").encode()}
    assert tree(out) == {**before, **rejected}


def test_a_good_run_removes_what_a_rejected_one_left(out):
    run(out, "m.onnx", "m.fp16.engine", passed=False)
    assert sorted(tree(out)) == ["m.fp16.engine.rejected", "m.onnx.rejected", "report.json.rejected"]
    run(out, "m.onnx")
    assert sorted(tree(out)) == ["m.onnx", "report.json"]


def test_a_good_run_removes_what_two_rejected_ones_left(out):
    run(out, "m.onnx", "m.fp16.engine", passed=False)
    run(out, "m.onnx", passed=False)
    run(out, "m.onnx")
    assert sorted(tree(out)) == ["m.onnx", "report.json"]


def outside(tmp_path):
    """A small world around ``out``, none of which belongs to an export."""
    for folder in ("out/sub", "out/sub.onnx", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("x", "elsewhere/x", "out/sub/x", "out/sub.onnx/x", "out/mine"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere" / "x")
    return {name: content for name, content in tree(tmp_path).items() if name != "out/link"}


EVIL = ["../x", "sub/x", "./sub/x", "sub/../../x", "..", ".", "", "/", "sub", "sub.onnx", "sub/", "a" * 300, "link"]


@pytest.mark.parametrize("name", [*EVIL, "x\0y", "\ud800", "mine\0", 5, None, True, {"a": 1}, ["../x"]])
@pytest.mark.parametrize("report", ["report.json", "report.json.rejected"])
def test_a_name_in_a_report_removes_nothing_outside(name, report, tmp_path, out):
    before = outside(tmp_path)
    (out / report).write_text(report_of(name))
    run(out, "m.onnx")
    after = {path: content for path, content in tree(tmp_path).items() if path != "out/link"}
    new = {"out/m.onnx": b"new", "out/report.json": report_of("m.onnx").encode()}
    assert after == {**before, **new}


def test_an_absolute_name_in_a_report_removes_nothing(tmp_path, out):
    before = outside(tmp_path)
    (out / "report.json").write_text(report_of(str(tmp_path / "x"), str(out / "mine"), "/etc/passwd"))
    run(out, "m.onnx")
    assert {path: tree(tmp_path)[path] for path in before} == before
    assert pathlib.Path("/etc/passwd").exists()


def test_a_plain_name_in_a_report_is_removed(tmp_path, out):
    outside(tmp_path)
    (out / "report.json").write_text(report_of("mine"))
    run(out, "m.onnx")
    assert not (out / "mine").exists()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"null",
        b'{"files": 3}',
        b'{"files": null}',
        b'{"files": [3, {"name": "mine"}]}',
        b'{"files": {"mine": 1}}',
        b'{"files": [{"size": 3}]}',
        b'{"files": "mine"}',
        b"[" * 100_000,
        b'{"files":' + b"[" * 100_000,
        b"9" * 5000,
    ],
    ids=lambda text: repr(text[:24]),
)
def test_a_report_that_is_no_report_is_replaced_and_removes_nothing(text, out):
    out.mkdir()
    (out / "mine").write_text("mine")
    (out / "report.json").write_bytes(text)
    run(out, "m.onnx")
    assert tree(out) == {"m.onnx": b"new", "mine": b"mine", "report.json": report_of("m.onnx").encode()}


# The command


@pytest.mark.slow
def test_no_engine_of_an_earlier_export_stays_beside_a_new_graph(command, checkpoint, small, tmp_path):
    out = tmp_path / "model"
    assert command(checkpoint.name, *SIZE, "--onnx", "--trt", "fp16").code == 0
    always = {"golden.npz", "report.json", "report.md"}
    engine = {"model.fp16.onnx", "model.fp16.engine", "model.fp16.engine.json"}
    assert set(tree(out)) == {"model.onnx", *engine, *always}
    (out / "notes.txt").write_text("mine")
    old = (out / "model.onnx").read_bytes()

    torch.save(contiguous_float({name: t * 1.01 for name, t in small.state_dict().items()}), checkpoint)
    assert command(checkpoint.name, *SIZE, "--onnx").code == 0
    assert set(tree(out)) == {"model.onnx", "notes.txt", *always}
    assert (out / "model.onnx").read_bytes() != old
    listed = {record["name"] for record in json.loads((out / "report.json").read_text())["files"]}
    assert listed == {"model.onnx", "golden.npz"}


def test_the_report_lists_every_file_with_its_size_and_hash(command, checkpoint, tmp_path):
    assert command(checkpoint.name, *SIZE).code == 0
    out = tmp_path / "model"
    records = json.loads((out / "report.json").read_text())["files"]
    assert {record["name"] for record in records} == set(tree(out)) - {"report.json", "report.md"}
    for record in records:
        content = (out / record["name"]).read_bytes()
        assert (record["bytes"], record["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_weights_in_a_file_of_their_own_are_published_with_the_graph(command, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.pipeline.write_onnx", functools.partial(write_onnx, limit=1000))
    assert command(checkpoint.name, *SIZE).code == 0
    out = tmp_path / "model"
    assert {"model.onnx", "model.onnx.data"} <= set(tree(out))
    assert onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"]).get_inputs()
    listed = {record["name"] for record in json.loads((out / "report.json").read_text())["files"]}
    assert "model.onnx.data" in listed


def wrong(monkeypatch):
    """Makes the float32 check fail."""

    class Wrong:
        def run(self, batch):
            return batch.sum((2, 3)) @ np.ones((3, 7))

    monkeypatch.setattr("exporter.pipeline.session_from_file", lambda path: Wrong())


def test_a_failed_check_keeps_rejected_files_until_the_next_good_run(command, checkpoint, tmp_path, monkeypatch):
    assert command(checkpoint.name, *SIZE).code == 0
    good = tree(tmp_path)
    with monkeypatch.context() as patch:
        wrong(patch)
        outcome = command(checkpoint.name, *SIZE)
    assert outcome.code == 1
    assert "*.rejected" in outcome.error
    rejected = {f"model/{name}.rejected" for name in ("model.onnx", "golden.npz", "report.json", "report.md")}
    assert {name: content for name, content in tree(tmp_path).items() if name not in rejected} == good
    assert rejected <= set(tree(tmp_path))
    assert command(checkpoint.name, *SIZE).code == 0
    assert set(tree(tmp_path)) == set(good)


def test_a_rejected_report_says_that_it_failed(command, checkpoint, tmp_path, monkeypatch):
    wrong(monkeypatch)
    assert command(checkpoint.name, *SIZE).code == 1
    report = json.loads((tmp_path / "model" / "report.json.rejected").read_text())
    assert report["passed"] is False
    assert [check["stage"] for check in report["checks"] if not check["passed"]] == [
        "fp32, ONNX Runtime against float64"
    ]


def test_the_checkpoint_is_never_removed_whatever_a_report_says(command, checkpoint, tmp_path):
    (tmp_path / "report.json").write_text(report_of(checkpoint.name, "old.onnx"))
    (tmp_path / "old.onnx").write_text("stale")
    assert command(checkpoint.name, *SIZE, "--out", ".").code == 0
    assert checkpoint.exists()
    assert not (tmp_path / "old.onnx").exists()


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "report.md"])
def test_a_checkpoint_of_the_name_of_a_product_is_not_overwritten(name, command, small, saved):
    path = saved(contiguous_float(small.state_dict()), name)
    content = path.read_bytes()
    outcome = command(name, *SIZE, "--out", ".")
    assert path.read_bytes() == content
    assert outcome.code in (2, 5)
    assert name in outcome.error


def no_links(_source, _target):
    raise OSError(95, "Operation not supported")


def test_a_file_system_without_links_is_no_obstacle(out, monkeypatch):
    monkeypatch.setattr("engines.replacement.os.link", no_links)
    run(out, "a.onnx", text="old")
    run(out, "a.onnx", text="new")
    assert (out / "a.onnx").read_text() == "new"
    assert sorted(tree(out)) == ["a.onnx", "report.json"]


def test_without_links_a_directory_in_the_place_of_a_file_stays(out, monkeypatch):
    monkeypatch.setattr("engines.replacement.os.link", no_links)
    (out / "b.onnx").mkdir(parents=True)
    (out / "b.onnx" / "mine").write_text("mine")
    run_before = tree(out)
    with pytest.raises(OutputFailed, match="a directory is in the place of a file"):
        run(out, "a.onnx", "b.onnx")
    assert tree(out) == run_before
