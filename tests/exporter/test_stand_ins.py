"""Objects beside the weights: read as nothing, by no code of theirs, and never as weights; all others are refused."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from exporter.checkpoint import checkpoint_from_path
from exporter.errors import CheckpointRejected
from exporter.stand_ins import DICT_STAND_INS, LIST_STAND_INS, STAND_INS, StandIn, stand_in_name, stand_ins

WEIGHTS = {"stage0.weight": torch.arange(6.0).view(2, 3), "linear.bias": torch.ones(2)}
ALL = (*STAND_INS, *DICT_STAND_INS, *LIST_STAND_INS)


def assert_read(path):
    tensors = checkpoint_from_path(path).tensors
    assert tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in WEIGHTS.items())


def loaded(path):
    with stand_ins():
        return torch.load(path, weights_only=True)


class Made:
    """Pickled as a call with arguments and a state; the bytes of its name are replaced."""

    def __reduce__(self):
        return Made, (1, "two", [3]), {"lr": 0.1, "nested": {"a": (1, None)}}


class MadeByNew:
    """Pickled as an empty object with a state."""

    def __init__(self):
        self.settings = {"lr": 0.1}


class MadeDict(dict):
    """Pickled as a dict with a state."""


class MadeList(list):
    """Pickled as a call, since the reader gives no state to a list."""

    def __reduce__(self):
        return MadeList, ((), 3), None, iter([1, 2])


def saved_as(dotted, content, path):
    """``content`` with the classes above under the name ``dotted``, as if they had been saved by that one's module."""
    torch.save(content, path)
    module, _, name = dotted.rpartition(".")
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    for record, data in records.items():
        if record.endswith("/data.pkl"):
            for stood in (Made, MadeByNew, MadeDict, MadeList):
                old = f"c{stood.__module__}\n{stood.__qualname__}\n".encode()
                records[record] = records[record].replace(old, f"c{module}\n{name}\n".encode())
            assert dotted.encode() in records[record].replace(b"\n", b".")
            assert stood.__module__.encode() + b"\n" not in data or records[record] != data
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in records.items():
            archive.writestr(record, data)
    return path


def forms_of(dotted):
    if dotted in DICT_STAND_INS:
        settings = MadeDict(lr=0.1, inner=MadeDict(a=[1]))
        settings.frozen = True
        return [settings, Made(), MadeByNew()]
    return [MadeList()] if dotted in LIST_STAND_INS else [Made(), MadeByNew()]


@pytest.mark.parametrize("dotted", ALL)
def test_every_stand_in_is_read_in_every_form(dotted, tmp_path):
    for beside in forms_of(dotted):
        content = {"state_dict": WEIGHTS, "config": beside, "again": [beside, {"deep": beside}]}
        path = saved_as(dotted, content, tmp_path / "model.pt")
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
        assert_read(path)
        read = loaded(path)["config"]
        assert read == [1, 2] if dotted in LIST_STAND_INS else stand_in_name(read) == dotted
        assert not isinstance(read, StandIn) or not vars(read)


@pytest.mark.parametrize("dotted", [*DICT_STAND_INS, "argparse.Namespace", "numpy.ndarray"])
@pytest.mark.parametrize("key", ["state_dict", "model", "ema"])
def test_a_stand_in_is_never_taken_for_weights(key, dotted, tmp_path):
    holder = MadeDict(WEIGHTS) if dotted in DICT_STAND_INS else MadeByNew()
    vars(holder).update(WEIGHTS)
    path = saved_as(dotted, {key: holder}, tmp_path / "model.pt")
    with pytest.raises(CheckpointRejected, match=f"holds no weights .*{key} is a {dotted}"):
        checkpoint_from_path(path)
    path = saved_as(dotted, {"net": WEIGHTS, key: holder}, tmp_path / "model.pt")
    assert checkpoint_from_path(path).container == "net"


@pytest.mark.parametrize("dotted", [*DICT_STAND_INS[:2], "argparse.Namespace"])
def test_a_stand_in_alone_is_refused_by_its_name(dotted, tmp_path):
    path = saved_as(dotted, MadeDict(WEIGHTS) if dotted in DICT_STAND_INS else Made(), tmp_path / "model.pt")
    with pytest.raises(CheckpointRejected, match=f"holds {dotted}, not named weights"):
        checkpoint_from_path(path)


def test_a_plain_dict_in_the_same_place_is_taken(tmp_path):
    torch.save({"state_dict": WEIGHTS}, tmp_path / "model.pt")
    assert_read(tmp_path / "model.pt")


# Real objects


REAL = {
    "a Namespace": argparse.Namespace(lr=0.1, data=pathlib.Path("/data"), inner=argparse.Namespace(a=[1])),
    "numbers of numpy": [np.float64(71.2), np.int64(3), np.bool_(1), np.float32(1), np.str_("a"), np.uint8(1)],
    "arrays": [np.arange(6).reshape(2, 3), np.asfortranarray(np.eye(3)), np.zeros(0), np.eye(2) > 0],
    "arrays of objects": np.array([None, {"a": 1}, [1, 2]], dtype=object),
    "arrays of texts": np.array(["a", "bc"]),
    "dtypes": [np.dtype("float64"), np.dtype([("a", "i4"), ("b", "f8", (2,))]), np.float32, np.int64],
    "a random state": np.random.RandomState(0).get_state(),
    "collections": [
        collections.defaultdict(list, {"a": [1]}),
        collections.defaultdict(float),
        collections.Counter("abca"),
        collections.OrderedDict(a=1),
        collections.deque([1, 2], maxlen=3),
    ],
    "dates": [datetime.datetime(2026, 1, 1, 12), datetime.timedelta(3), datetime.date(2026, 1, 1)],
    "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("a")],
    "plain things": [types.SimpleNamespace(a=1), slice(1, 2), range(3), frozenset([1]), {1, 2}, complex(1, 2)],
    "bytes": [b"", b"bytes", bytearray(b"bytes"), bytearray()],
    "the version of torch": torch.__version__,
    "tensors": {"rng": torch.get_rng_state(), "size": torch.Size([1, 2]), "dtype": torch.float16},
}  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("objects", REAL)
def test_real_objects_beside_the_weights_do_no_harm(objects, form, tmp_path):
    content = {"epoch": 3, "beside": REAL[objects], "state_dict": WEIGHTS, "after": REAL[objects]}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=form == "zip")
    assert_read(tmp_path / "model.pt")


def scheduler_states():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    schedulers = torch.optim.lr_scheduler
    yield schedulers.MultiStepLR(optimizer, [30, 60]).state_dict()
    yield schedulers.OneCycleLR(optimizer, 0.1, total_steps=10).state_dict()
    yield schedulers.CosineAnnealingWarmRestarts(optimizer, 5).state_dict()
    yield schedulers.ReduceLROnPlateau(optimizer).state_dict()
    yield torch.amp.GradScaler("cpu").state_dict()
    yield optimizer.state_dict()


def test_the_states_of_optimizers_and_schedulers_do_no_harm(tmp_path):
    torch.save({"model": WEIGHTS, "states": list(scheduler_states())}, tmp_path / "model.pt")
    assert_read(tmp_path / "model.pt")


@pytest.fixture
def watched(monkeypatch):
    """``watched(dotted, base)``: a class of that name in a module that can be imported, and a list of calls of it."""

    def install(dotted, base):
        calls = []
        module, _, name = dotted.rpartition(".")

        def new(cls, *args):
            calls.append("__new__")
            return base.__new__(cls, *args)

        def setstate(_, state):
            calls.append("__setstate__")

        made = type(name, (base,), {"__module__": module, "__new__": new, "__setstate__": setstate})
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            parent = types.ModuleType(".".join(parts[:depth]))
            monkeypatch.setitem(sys.modules, parent.__name__, parent)
        setattr(sys.modules[module], name, made)
        return made, calls

    return install


FOREIGN = [name for name in ALL if name.partition(".")[0] not in {*sys.stdlib_module_names, "numpy", "torch"}]


@pytest.mark.parametrize("dotted", FOREIGN)
def test_no_class_is_called_even_where_it_could_be_imported(dotted, watched, tmp_path):
    made, calls = watched(dotted, dict if dotted in DICT_STAND_INS else object)
    beside = made()
    vars(beside)["lr"] = 0.1
    torch.save({"state_dict": WEIGHTS, "config": beside}, tmp_path / "model.pt")
    calls.clear()
    assert_read(tmp_path / "model.pt")
    assert calls == []
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert calls == ["__new__", "__setstate__"]


class Importing:
    """Notes every module that is looked for."""

    def __init__(self):
        self.names = []

    def find_spec(self, name, path=None, target=None):
        self.names.append(name)


@pytest.mark.parametrize("dotted", FOREIGN[::5])
def test_a_class_that_is_not_installed_is_not_looked_for(dotted, watched, tmp_path, monkeypatch):
    made, _ = watched(dotted, dict if dotted in DICT_STAND_INS else object)
    torch.save({"state_dict": WEIGHTS, "config": made()}, tmp_path / "model.pt")
    monkeypatch.undo()
    assert dotted.rpartition(".")[0] not in sys.modules
    importing = Importing()
    monkeypatch.setattr(sys, "meta_path", [importing, *sys.meta_path])
    assert_read(tmp_path / "model.pt")
    assert dotted.partition(".")[0] not in {name.partition(".")[0] for name in importing.names}
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "model.pt", weights_only=False)
    assert dotted.partition(".")[0] in importing.names


def test_no_function_of_numpy_is_called(tmp_path, monkeypatch):
    torch.save({"state_dict": WEIGHTS, "array": np.arange(3), "best": np.float64(1)}, tmp_path / "model.pt")

    def refuse(*_):
        raise AssertionError("numpy was called")

    for name in ("_reconstruct", "scalar"):
        monkeypatch.setattr(np._core.multiarray, name, refuse)
    assert_read(tmp_path / "model.pt")
    with pytest.raises(AssertionError, match="was called"):
        torch.load(tmp_path / "model.pt", weights_only=False)


def test_a_namespace_is_not_built(tmp_path, monkeypatch):
    torch.save({"state_dict": WEIGHTS, "args": argparse.Namespace(lr=0.1)}, tmp_path / "model.pt")

    def refuse(*_):
        raise AssertionError("a Namespace was built")

    monkeypatch.setattr(argparse.Namespace, "__setstate__", refuse, raising=False)
    assert_read(tmp_path / "model.pt")
    with pytest.raises(AssertionError, match="was built"):
        torch.load(tmp_path / "model.pt", weights_only=False)


# Everything else


def pickled_call(dotted, argument="mark"):
    module, _, name = dotted.rpartition(".")
    buffer = io.BytesIO()
    torch.save({"state_dict": WEIGHTS, "hook": None}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    pkl = next(name for name in records if name.endswith("data.pkl"))
    text = argument.encode()
    call = f"c{module}\n{name}\n".encode() + b"X" + len(text).to_bytes(4, "little") + text + b"\x85R"
    at = records[pkl].rindex(b"hook")
    at = records[pkl].index(b"N", at)
    records[pkl] = records[pkl][:at] + call + records[pkl][at + 1 :]
    return records


@pytest.mark.parametrize(
    "dotted",
    [
        "builtins.eval",
        "builtins.exec",
        "builtins.__import__",
        "builtins.open",
        "builtins.setattr",
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "argparse.ArgumentParser",
        "argparse.FileType",
        "pathlib.os.system",
        "numpy.load",
        "numpy.core.multiarray.fromfile",
        "collections.namedtuple",
        "torch.load",
        "torch.hub.load",
        "functools.partial",
        "operator.attrgetter",
        "yacs.config.load_cfg",
        "sys.exit",
        "importlib.import_module",
        "pickle.loads",
    ],
)
def test_a_name_that_is_not_listed_is_refused(dotted, tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        for name, data in pickled_call(dotted).items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointRejected, match=rf"holds code \({dotted}\), which is not run"):
        checkpoint_from_path(tmp_path / "model.pt")


def test_a_name_that_is_listed_is_called_in_no_other_sense_than_ours(tmp_path):
    """getattr with arguments of a file: nothing is read from anything."""
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        for name, data in pickled_call("builtins.getattr").items():
            archive.writestr(name, data)
    assert_read(tmp_path / "model.pt")
    assert stand_in_name(loaded(tmp_path / "model.pt")["hook"]) == "builtins.getattr"


def test_the_stand_ins_are_gone_afterwards(tmp_path):
    torch.save({"state_dict": WEIGHTS, "args": argparse.Namespace(lr=0.1)}, tmp_path / "model.pt")
    before = set(torch.serialization.get_safe_globals())
    assert_read(tmp_path / "model.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "model.pt", weights_only=True)


def test_no_stand_in_is_listed_twice_or_runs_when_called():
    assert len(set(ALL)) == len(ALL)
    assert all(name.count(".") and name.replace(".", "").replace("_", "").isalnum() for name in ALL)
