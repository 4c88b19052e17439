"""Pickles read by their opcodes: what they would build, and which of them no loader is given."""

from __future__ import annotations

import argparse
import collections
import pickle
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.checkpoint import checkpoint_from_path
from exporter.errors import CheckpointRejected
from exporter.outline import OTHER, Group, Instance, Malformed, Named, outline_from_file
from tests.conftest import run_process

WEIGHTS = {"stage0.weight": torch.ones(2, 3)}


def packed(pkl, path):
    """A checkpoint with this pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", pkl), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"model/{name}", content)
    return path


def outlined(content, path, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return outline_from_file(path)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values_are_outlined_as_they_are(protocol, tmp_path):
    content = {"a": None, "b": 3, "c": "text", "d": {"e": "f"}, "g": -1, "h": 2**70}
    outline = outlined(content, tmp_path / "model.pt", protocol)
    assert outline.root == content
    assert (outline.classes, outline.of_torch) == ((), False)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_objects_are_outlined_by_their_names_and_states(protocol, tmp_path):
    shared = argparse.Namespace(lr=3)
    content = {"args": shared, "again": shared, "ordered": collections.OrderedDict(a=1), "list": [1], "pair": (1, "b")}
    outline = outlined(content, tmp_path / "model.pt", protocol)
    root = outline.root
    assert isinstance(root, dict)
    assert root["args"] == Instance("argparse.Namespace", {"lr": 3})
    assert root["again"] is root["args"]
    assert root["ordered"] == {"a": 1}
    assert root["list"] is OTHER
    assert root["pair"] == Group((1, "b"), 3)
    assert outline.classes == ("argparse.Namespace", "collections.OrderedDict")


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_checkpoint_is_outlined_in_both_of_its_forms(form, tmp_path):
    module = torch.nn.Linear(2, 2)
    content = {"model": module, "state_dict": WEIGHTS, "kind": argparse.Namespace}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=form == "zip")
    outline = outline_from_file(tmp_path / "model.pt")
    root = outline.root
    assert outline.of_torch
    assert isinstance(root, dict)
    assert root["model"].dotted == "torch.nn.modules.linear.Linear"
    assert root["model"].is_module
    assert not root["model"].is_tensor
    assert root["state_dict"]["stage0.weight"].is_tensor
    assert root["kind"] == Named("argparse.Namespace")
    assert "torch.nn.modules.linear.Linear" in outline.classes


HEAD = b"\x80\x02"
BOMBS = {
    "a deep tuple as a key": HEAD + b"})" + b"\x85" * 1_000_000 + b"K\x01s.",
    "a tuple doubled sixty times as a key": HEAD + b"})q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s.",
    "a tuple of one hundred thousand": HEAD + b"})q\x00" + b"(" + b"h\x00" * 100_000 + b"tK\x01s.",
    "a list that is called": HEAD + b"]q\x00" + b"]q\x01(h\x00h\x00eq\x00" * 60 + b"h\x00)R.",
    "a list that is made": HEAD + b"]q\x00" + b"]q\x01(h\x00h\x00eq\x00" * 60 + b"h\x00)\x81.",
    "a list as a storage": HEAD + b"(X\x07\x00\x00\x00storage]K\x01tQ.",
    "a tuple of tuples as a storage": HEAD + b"(X\x07\x00\x00\x00storage)\x85\x85K\x01tQ.",
    "marks": HEAD + b"(" * 1_000_000 + b".",
    "no end": HEAD + b"}",
    "an empty stack": HEAD + b".",
    "a memo that is not there": HEAD + b"h\x07.",
    "a mark that is not there": HEAD + b"t.",
    "an unknown opcode": HEAD + b"\xff.",
    "a text longer than the file": HEAD + b"X\xff\xff\xff\x7fabc.",
    "a name that is no ASCII": HEAD + b"c\xc3\xa9\nf\n.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_would_bring_down_a_loader_is_refused_in_one_line(bomb, tmp_path):
    path = packed(BOMBS[bomb], tmp_path / "model.pt")
    began = time.monotonic()
    with pytest.raises(CheckpointRejected, match=r"model\.pt: cannot be read \(.*\); copy the file again") as refused:
        checkpoint_from_path(path)
    assert "\n" not in str(refused.value)
    assert time.monotonic() - began < 60
    with pytest.raises(Malformed):
        outline_from_file(path)


@pytest.mark.parametrize("at", range(5))
def test_every_pickle_of_a_file_that_is_no_archive_is_looked_at(at, tmp_path):
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, []]
    pickles = [pickle.dumps(part, protocol=2) for part in parts]
    (tmp_path / "model.pt").write_bytes(b"".join(pickles))
    with pytest.raises(CheckpointRejected, match="holds no weights"):
        checkpoint_from_path(tmp_path / "model.pt")
    pickles[at] = BOMBS["a deep tuple as a key"]
    (tmp_path / "model.pt").write_bytes(b"".join(pickles))
    with pytest.raises(CheckpointRejected, match="cannot be read"):
        checkpoint_from_path(tmp_path / "model.pt")


@pytest.mark.slow
def test_without_looking_first_the_process_would_be_gone(tmp_path):
    packed(BOMBS["a deep tuple as a key"], tmp_path / "model.pt")
    done = run_process(["-c", "import torch; torch.load('model.pt', weights_only=True)"], tmp_path)
    assert done.returncode < 0, done.stderr


DEEP = {
    "lists": HEAD + b"]" * 200_000 + b"a" * 199_999 + b".",
    "dicts": HEAD + b"}K\x01" * 200_000 + b"N" + b"s" * 200_000 + b".",
    "tuples within reason": HEAD + b"})" + b"\x85" * 900 + b"K\x01s.",
}


@pytest.mark.parametrize("deep", DEEP)
def test_what_is_deep_and_does_no_harm_holds_no_weights(deep, tmp_path):
    with pytest.raises(CheckpointRejected, match=r"holds (a list|no weights)"):
        checkpoint_from_path(packed(DEEP[deep], tmp_path / "model.pt"))


def test_two_pickles_in_one_archive_are_none(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        for folder in ("a", "b"):
            archive.writestr(f"{folder}/data.pkl", HEAD + b"}.")
    with pytest.raises(Malformed, match="2 records"):
        outline_from_file(tmp_path / "model.pt")


OPCODES = st.sampled_from([bytes([code]) for code in b"}]()tq.\x85\x86\x87NsueaRb\x81Q0h2K\x8c\x94\x93cX"])


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.binary(max_size=60), st.lists(st.one_of(OPCODES, st.binary(max_size=4)), max_size=40).map(b"".join))
)
def test_any_bytes_are_outlined_or_malformed(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.pt"
    path.write_bytes(HEAD + content)
    try:
        outline = outline_from_file(path)
    except Malformed:
        return
    assert all("." in name for name in outline.classes)


VALUES = st.recursive(
    st.one_of(st.none(), st.text(max_size=4), st.integers(-(2**40), 2**40)),
    lambda inner: st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.integers(2, 5))
def test_what_is_outlined_is_what_would_be_built(tmp_path_factory, value, protocol):
    path = tmp_path_factory.getbasetemp() / "value.pt"
    assert outlined({"root": value}, path, protocol).root == pickle.loads(path.read_bytes())
