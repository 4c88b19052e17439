"""A refused file: the line names the class, or its family, and holds one line of Python that gets the weights out."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from exporter.checkpoint import checkpoint_from_path
from exporter.errors import CheckpointRejected
from exporter.lineages.refused import refusal_from_class
from tests.conftest import ROOT
from tests.networks import NaiveRepVGG, Shape

ADVICE = "save its weights alone: python -c "


class Holder:
    """An object of training code around a network, as an averaging helper is."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Settings:
    """An object beside the weights whose class is not known."""


def network(seed, dtype=torch.float32):
    return NaiveRepVGG(Shape(), seed).to(dtype)


RAW, AVERAGED = 1, 2
LAYOUTS = {
    "a module": (lambda: network(RAW), None, "f.state_dict()"),
    "a module in data-parallel": (lambda: torch.nn.DataParallel(network(RAW)), None, "f.state_dict()"),
    "YOLO's": (
        lambda: {"epoch": 3, "model": network(RAW, torch.half), "ema": network(AVERAGED, torch.half), "updates": 9},
        "ema",
        '{"ema": f["ema"].state_dict(), "model": f["model"].state_dict()}',
    ),
    "YOLO's without an average": (
        lambda: {"model": network(RAW, torch.half), "ema": None, "optimizer": None},
        None,
        'f["model"].state_dict()',
    ),
    "weights beside an object": (
        lambda: {"state_dict": network(RAW).state_dict(), "args": Settings()},
        None,
        'f["state_dict"]',
    ),
    "weights and an average beside an object": (
        lambda: {
            "state_dict": network(RAW).state_dict(),
            "state_dict_ema": network(AVERAGED).state_dict(),
            "class": Settings,
        },
        "ema",
        '{"state_dict_ema": f["state_dict_ema"], "state_dict": f["state_dict"]}',
    ),
    "weights two levels deep": (
        lambda: {"model": {"state_dict": network(RAW).state_dict(), "hook": Settings()}},
        None,
        'f["model"]["state_dict"]',
    ),
    "weights at the top": (
        lambda: {**network(RAW).state_dict(), "args": Settings()},
        None,
        "{k: v for k, v in f.items() if torch.is_tensor(v)}",
    ),
    "a module beside its weights": (
        lambda: {"state_dict": network(RAW).state_dict(), "model": network(AVERAGED)},
        None,
        'f["state_dict"]',
    ),
    "an averaging object": (
        lambda: {"model": network(RAW), "ema": Holder(ema=network(AVERAGED), updates=3)},
        "ema",
        '{"ema": f["ema"].ema.state_dict(), "model": f["model"].state_dict()}',
    ),
    "an object around a module": (lambda: Holder(net=network(RAW), lr=0.1), None, "f.net.state_dict()"),
    "an average of mmengine beside an object": (
        lambda: {
            "message_hub": {"log": Settings()},
            "state_dict": network(AVERAGED).state_dict(),
            "ema_state_dict": {"steps": torch.tensor(3), **network(RAW).state_dict(prefix="module.")},
        },
        "ema",
        '{"ema_state_dict": f["ema_state_dict"], "state_dict": f["state_dict"]}',
    ),
}  # fmt: skip


def saved_form(content, path, form):
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


def advice_for(path):
    """The command line in the refusal, as its parts."""
    with pytest.raises(CheckpointRejected) as refused:
        checkpoint_from_path(path)
    line = str(refused.value)
    assert "\n" not in line
    assert "holds code (" in line
    assert ADVICE in line, line
    program, flag, script = shlex.split("python -c " + line.partition(ADVICE)[2])
    assert (program, flag) == ("python", "-c")
    return script


def assert_weights(path, kind):
    """The re-saved file gives the raw weights, and where there was an average, that by default."""
    by_kind = {None: [(None, RAW)], "ema": [(None, AVERAGED), ("ema", AVERAGED), ("raw", RAW)]}
    for weights, seed in by_kind[kind]:
        checkpoint = checkpoint_from_path(path, weights)
        first = checkpoint.tensors["stage0.rbr_dense.conv.weight"]
        expected = network(seed, first.dtype).state_dict()
        assert all(torch.equal(checkpoint.tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_line_that_is_advised_saves_the_weights(layout, form, tmp_path):
    make, kind, expression = LAYOUTS[layout]
    saved_form(make(), tmp_path / "model.pt", form)
    script = advice_for(tmp_path / "model.pt")
    assert f"torch.save({expression}, " in script
    exec(script, {})
    assert_weights(tmp_path / "model.weights.pt", kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.pt", 'it\'s "deux  espaces" in $HOME `é`\u2028😀.pt'])
def test_the_line_works_in_a_shell_and_what_it_saves_is_exported(name, command, tmp_path):
    torch.save({"model": network(RAW), "ema": network(AVERAGED)}, tmp_path / name)
    outcome = command(name, "--size", "20", "--out", "out")
    assert outcome.code == 3
    line = outcome.error.partition(ADVICE.removesuffix("python -c "))[2]
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (made,) = [path for path in tmp_path.iterdir() if path.name.endswith(".weights.pt")]
    assert made.name == pathlib.Path(name).stem + ".weights.pt"
    assert_weights(made, "ema")
    assert command(made.name, "--size", "20", "--out", "out").code == 0
    with np.load(tmp_path / "out" / "golden.npz") as golden:
        expected = network(AVERAGED).answer(torch.from_numpy(golden["input"])).numpy()
        assert np.abs(golden["output"] - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("of_torch", [True, False], ids=["torch.save", "pickle"])
def test_a_file_of_a_newer_protocol_is_told_from_a_damaged_one(of_torch, protocol, tmp_path):
    content = {"state_dict": network(RAW).state_dict(), "model": {}, "epoch": 3}
    path = tmp_path / "model.pt"
    if of_torch:
        torch.save(content, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(CheckpointRejected) as refused:
        checkpoint_from_path(path)
    assert f"a pickle of protocol {protocol}, which torch reads only with the code in it" in str(refused.value)
    exec(shlex.split("python -c " + str(refused.value).partition(ADVICE)[2])[2], {})
    assert_weights(tmp_path / "model.weights.pt", None)


def test_the_file_itself_is_not_written_over(tmp_path):
    torch.save(network(RAW), tmp_path / "weights.pt")
    before = (tmp_path / "weights.pt").read_bytes()
    exec(advice_for(tmp_path / "weights.pt"), {})
    assert (tmp_path / "weights.pt").read_bytes() == before
    assert_weights(tmp_path / "weights.weights.pt", None)


@pytest.mark.parametrize(
    "content",
    [Settings(), [Settings()], {"teacher": network(RAW)}, {"model": Settings()}, {"model": [network(RAW)]}],
    ids=["an object", "a list", "an unknown key", "an object for a model", "a list for a model"],
)
def test_where_no_weights_are_found_no_line_is_made_up(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointRejected) as refused:
        checkpoint_from_path(tmp_path / "model.pt")
    assert ADVICE not in str(refused.value)
    assert "holds code (" in str(refused.value)
    assert "save model.state_dict() where the model was made" in str(refused.value)


# Families that are known by a class


def saved_by(dotted, content_of, path, monkeypatch):
    """A file with a module whose class has that name, saved where its code is and read where it is not."""
    module, _, name = dotted.rpartition(".")
    made = type(name, (torch.nn.Module,), {"__module__": module})
    with monkeypatch.context() as context:
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            parent = types.ModuleType(".".join(parts[:depth]))
            context.setitem(sys.modules, parent.__name__, parent)
        setattr(sys.modules[module], name, made)
        torch.save(content_of(made()), path)


@pytest.mark.parametrize(
    ("dotted", "family"),
    [
        ("yolov6.models.yolo.Model", "YOLOv6"),
        ("models.yolo.Model", "YOLOv7"),
        ("models.yolo.DetectionModel", "YOLOv9"),
        ("ultralytics.nn.tasks.DetectionModel", "ultralytics"),
        ("super_gradients.training.models.detection_models.yolo_nas.YoloNAS", "YOLO-NAS"),
        ("dbb.diversebranchblock.DiverseBranchBlock", "DBB"),
    ],
)
@pytest.mark.parametrize(
    "content_of",
    [
        lambda module: module,
        lambda module: {"model": module, "ema": module, "args": argparse.Namespace()},
        lambda module: {"a": Settings(), "model": module},
    ],
    ids=["alone", "in a wrapper", "behind another object"],
)
def test_a_pickled_network_of_a_refused_family_is_refused_by_its_name(
    dotted, family, content_of, tmp_path, monkeypatch
):
    saved_by(dotted, content_of, tmp_path / "model.pt", monkeypatch)
    with pytest.raises(CheckpointRejected) as refused:
        checkpoint_from_path(tmp_path / "model.pt")
    line = str(refused.value)
    refusal = refusal_from_class(dotted)
    assert line.endswith(
        f"model.pt: a pickled {refusal.name} network ({dotted}), which is not exported; {refusal.remedy}"
    )
    assert "\n" not in line
    assert family in refusal.name


def test_a_pickled_network_of_no_known_family_is_not_given_a_name(tmp_path, monkeypatch):
    saved_by("nets.repvgg.RepVGG", lambda module: {"model": module}, tmp_path / "model.pt", monkeypatch)
    with pytest.raises(CheckpointRejected, match=r"model\.pt: holds code \(nets\.repvgg\.RepVGG\)"):
        checkpoint_from_path(tmp_path / "model.pt")


def test_the_record_of_names_is_the_pickles_own(tmp_path):
    """A class of a refused family that only occurs as a text is no reason to name it."""
    torch.save({"a": "models.yolo.Model", "b": Settings()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointRejected) as refused:
        checkpoint_from_path(tmp_path / "model.pt")
    assert "YOLO" not in str(refused.value)
