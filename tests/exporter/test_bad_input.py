"""Whatever is wrong with a file, a flag or the machine: one line, the right exit code, nothing left on the disk."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import shlex
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engines import sdk
from tests.conftest import ROOT, run_process
from tests.networks import NaiveRepVGG, Shape, contiguous_float, renamed

QUIET_BY_DEFAULT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
SIZE = ("--size", "20")


def tree(folder):
    """Every path under ``folder``, hidden ones too, with the bytes of the files."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(command, tmp_path):
    """Runs a command that must fail with ``code``, in one line, and leave nothing; returns the line."""

    def run(code, *arguments):
        before = tree(tmp_path)
        with warnings.catch_warnings(record=True) as caught:  # each would be one more line on a user's stderr
            warnings.simplefilter("always")
            outcome = command(*arguments)
        assert outcome.code == code, outcome.stderr
        assert [str(w.message) for w in caught if not issubclass(w.category, QUIET_BY_DEFAULT)] == []
        assert tree(tmp_path) == before
        return outcome.error

    return run


def state_of(shape=None, seed=0):
    return contiguous_float(NaiveRepVGG(shape or Shape(), seed).state_dict())


def has(line, *words):
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in {line!r}"


# Files


def test_a_good_checkpoint_is_exported(command, checkpoint):
    assert command(checkpoint.name, *SIZE).code == 0


def test_a_missing_file_is_refused(refused):
    has(refused(3, "model.pt"), "model.pt", "no such file", "check the path")


def test_a_directory_is_refused(refused, tmp_path):
    (tmp_path / "weights.pt").mkdir()
    has(refused(3, "weights.pt"), "weights.pt", "directory", "name the file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("empty", "copy")),
        (b"a", ("not a checkpoint", ".safetensors")),
        (b"accuracy 71.2\nepoch 120\n", ("not a checkpoint", "accurac", ".pt")),
        (b"version {https://git-lfs.github.com/spec/v1}\n", ("copy it again",)),
        (b"PK\x05\x06" + bytes(18), ("not a checkpoint",)),
        (b"\x08\x08\x12\x07pytorch", ("not a checkpoint",)),
        (bytes(64), ("not a checkpoint",)),
        (b"\x80\x02}q\x00.", ("copy",)),
    ],
    ids=["empty", "one byte", "text", "text with a brace", "empty zip", "an ONNX file", "zeros", "empty pickle"],
)
def test_a_file_that_is_no_checkpoint_is_refused(content, words, refused, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    has(refused(3, "model.pt", *SIZE), "model.pt", *words)


@pytest.mark.parametrize("part", [1, 4, 30, 0.1, 0.5, 0.9, -2000, -22, -1])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_that_was_cut_is_refused(form, part, refused, tmp_path):
    path = tmp_path / "model.pt"
    if form == "safetensors":
        save_file(state_of(), path)
    else:
        torch.save(state_of(), path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    length = int(part * len(whole)) if isinstance(part, float) else part
    path.write_bytes(whole[:length])
    line = refused(3, "model.pt", *SIZE)
    has(line, "model.pt")
    assert "cop" in line or "not a checkpoint" in line


class Planted:
    """Unpickling it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def plant(form, content, path):
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_not_run(form, refused, tmp_path):
    mark = tmp_path / "mark"
    weights = {} if form == "pickle" else {"state_dict": state_of()}
    plant(form, {"hook": Planted(mark), **weights}, tmp_path / "model.pt")
    line = refused(3, "model.pt", *SIZE)
    has(line, "model.pt", "code", "mkdir", "not run", "save")
    assert not mark.exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_the_planted_code_would_run_in_an_unsafe_loader(form, tmp_path):
    mark = tmp_path / "mark"
    plant(form, {"hook": Planted(mark)}, tmp_path / "model.pt")
    if form == "pickle":
        pickle.loads((tmp_path / "model.pt").read_bytes())
    else:
        torch.load(tmp_path / "model.pt", weights_only=False)
    assert mark.is_dir()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_pickle_of_a_newer_protocol_is_refused_in_one_line(protocol, refused, tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"hook": Planted(mark)}, protocol=protocol))
    has(refused(3, "model.pt"), "model.pt")
    assert not mark.exists()


@pytest.mark.parametrize(
    "content", [NaiveRepVGG(Shape()), {"state_dict": {}, "args": argparse.Action([], "lr")}], ids=["module", "args"]
)
def test_a_pickled_object_is_refused_by_its_class(content, refused, saved):
    saved(content)
    name = "argparse.Action" if isinstance(content, dict) else "NaiveRepVGG"
    has(refused(3, "model.pt"), "model.pt", "holds code", name, "weights_only=False")


@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_torchscript_archive_is_refused(how, refused, tmp_path):
    module = nn.Linear(2, 2).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.ones(1, 2))
        torch.jit.save(program, tmp_path / "model.pt")
    has(refused(3, "model.pt"), "model.pt", "TorchScript", "state_dict()")


def test_an_archive_of_something_else_is_refused(refused, tmp_path):
    with open(tmp_path / "model.pt", "wb") as file:
        np.savez(file, images=np.zeros(3))
    has(refused(3, "model.pt"), "model.pt", "cannot be read")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(kind, tmp_path):
    if kind == "fifo":
        os.mkfifo(tmp_path / "model.pt")
    path = tmp_path / "model.pt" if kind == "fifo" else pathlib.Path("/dev/zero")
    done = run_process(["-m", "exporter", path], tmp_path, timeout=15)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    has(done.stderr, str(path))


# What a file holds


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, "epoch": 3}, ("epoch, optim",)),
        ({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, ("param_groups, state",)),
        ({}, ("no weights",)),
        ({"model": {}}, ("no weights", "model")),
        ([torch.ones(3)], ("a list", "state_dict")),
        (torch.ones(3), ("a Tensor", "state_dict")),
        ({"state_dict": {"model": {"net": {"linear.weight": torch.ones(1)}}}}, ("no weights", "net")),
    ],
    ids=["optimizer of a checkpoint", "optimizer", "nothing", "empty model", "list", "tensor", "too deep"],
)
def test_a_file_without_weights_is_refused(content, words, refused, saved):
    saved(content)
    has(refused(3, "model.pt"), "model.pt", *words)


def spoilt(name, value, shape=None):
    state = state_of(shape)
    assert name in state
    return {**state, name: value(state[name])}


def with_element(value):
    def spoil(tensor):
        spoiled = tensor.clone()
        spoiled.view(-1)[-1] = value
        return spoiled

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["stage1.0.rbr_dense.conv.weight", "stage2.1.rbr_identity.running_var", "linear.bias"])
def test_a_weight_that_is_not_finite_is_refused(name, value, refused, saved):
    saved(spoilt(name, with_element(value)))
    has(refused(3, "model.pt", *SIZE), "model.pt", name, "NaN or infinite", "diverged")


def test_every_weight_that_is_not_finite_is_named(refused, saved):
    weights = {name: tensor for name, tensor in state_of().items() if tensor.is_floating_point()}
    saved({name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()})
    has(refused(3, "model.pt", *SIZE), "stage0.rbr_dense.conv.weight, ", f"and {len(weights) - 6} more")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(dtype, refused, saved):
    saved(spoilt("stage1.0.rbr_dense.conv.weight", lambda t: t.to(dtype)))
    words = ("stage1.0.rbr_dense.conv.weight", str(dtype).removeprefix("torch."), "float")
    has(refused(3, "model.pt", *SIZE), "model.pt", *words)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to_sparse(),
        lambda t: t.to_sparse_csr(),
        lambda t: t.to("meta"),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "sparse CSR", "meta", "quantized"],
)
def test_a_tensor_that_is_not_plain_is_refused(change, refused, saved):
    saved(spoilt("linear.weight", change))
    has(refused(3, "model.pt", *SIZE), "model.pt", "linear.weight")


def test_a_negative_variance_is_refused(refused, saved):
    name = "stage3.0.rbr_1x1.bn.running_var"
    saved(spoilt(name, with_element(-0.1)))
    has(refused(3, "model.pt", *SIZE), "model.pt", name, "negative variance", "copy")


def test_weights_that_do_not_fit_float32_once_fused_are_refused(refused, saved):
    saved(spoilt("stage1.0.rbr_dense.conv.weight", lambda t: t.double() * 1e300))
    has(refused(3, "model.pt", *SIZE), "stage1.0", "too large for float32", "--eps")


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_classifier_that_does_not_fit_float32_is_not_published(part, command, saved, tmp_path):
    saved(spoilt(f"linear.{part}", lambda t: t.double() * 1e300))
    outcome = command("model.pt", *SIZE)
    assert outcome.code in (1, 3)
    assert "infinite" in outcome.error or "too large for float32" in outcome.error
    assert not (tmp_path / "model" / "model.onnx").exists()


SE_SHAPE = Shape(se=True)
CONTRADICTIONS = [
    ("stage1.0.rbr_1x1.conv.weight", (9, 8, 1, 1), Shape()),
    ("stage1.0.rbr_1x1.conv.weight", (8, 7, 1, 1), Shape()),
    ("stage1.0.rbr_1x1.conv.weight", (8, 8, 3, 3), Shape()),
    ("stage2.0.rbr_dense.bn.running_mean", (11,), Shape()),
    ("stage2.0.rbr_1x1.bn.weight", (1,), Shape()),
    ("stage2.1.rbr_identity.bias", (13,), Shape()),
    ("stage1.0.rbr_dense.conv.weight", (8, 8, 5, 5), Shape()),
    ("stage1.0.rbr_dense.conv.weight", (8, 8, 3), Shape()),
    ("stage1.0.rbr_dense.conv.weight", (), Shape()),
    ("stage1.0.rbr_dense.conv.weight", (0, 8, 3, 3), Shape()),
    ("stage1.0.rbr_dense.conv.weight", (8, 0, 3, 3), Shape()),
    ("stage2.0.rbr_dense.conv.weight", (12, 5, 3, 3), Shape()),
    ("stage2.0.rbr_dense.conv.weight", (12, 16, 3, 3), Shape()),
    ("stage0.rbr_dense.conv.weight", (8, 4, 3, 3), Shape()),
    ("linear.weight", (7, 15), Shape()),
    ("linear.weight", (7, 16, 1), Shape()),
    ("linear.weight", (0, 16), Shape()),
    ("linear.bias", (6,), Shape()),
    ("linear.bias", (), Shape()),
    ("stage1.0.se.down.weight", (1, 9, 1, 1), SE_SHAPE),
    ("stage1.0.se.down.bias", (2,), SE_SHAPE),
    ("stage1.0.se.up.weight", (8, 2, 1, 1), SE_SHAPE),
    ("stage1.0.se.up.bias", (7,), SE_SHAPE),
]


@pytest.mark.parametrize(("name", "wrong", "shape"), CONTRADICTIONS)
def test_a_shape_that_contradicts_the_others_is_refused(name, wrong, shape, refused, saved):
    saved(spoilt(name, lambda t: torch.ones(wrong), shape))
    has(refused(3, "model.pt", *SIZE), "model.pt", "has shape", "contradict", name.rpartition(".")[0].split(".bn")[0])


def test_squeeze_and_excitation_without_channels_is_refused(refused, saved):
    empty = {"down.weight": (0, 8, 1, 1), "down.bias": (0,), "up.weight": (8, 0, 1, 1)}
    saved({**state_of(SE_SHAPE), **{f"stage1.0.se.{name}": torch.ones(size) for name, size in empty.items()}})
    has(refused(3, "model.pt", *SIZE), "model.pt", "stage1.0.se.down.weight")


def resnet_state():
    state = {"conv1.weight": torch.ones(4, 3, 7, 7), "fc.weight": torch.ones(3, 4), "fc.bias": torch.ones(3)}
    for block in ("layer1.0", "layer1.1", "layer2.0"):
        state |= {f"{block}.conv1.weight": torch.ones(4, 4, 3, 3), f"{block}.bn1.running_var": torch.ones(4)}
    return state


def test_another_network_is_refused_with_what_is_known(refused, saved):
    saved(resnet_state())
    has(
        refused(3, "model.pt", *SIZE), "model.pt", "not a RepVGG", "conv1.weight", "nearest lineage", "official", "timm"
    )


def test_names_of_two_lineages_in_one_file_are_refused(refused, saved):
    saved({**state_of(), **renamed(state_of(), "timm")})
    has(refused(3, "model.pt", *SIZE), "model.pt", "more than one lineage", "official (", "timm (", "apart")


def test_two_names_that_are_one_without_its_prefix_are_refused(refused, saved):
    saved({**state_of(), "module.linear.bias": torch.zeros(7)})
    has(refused(3, "model.pt", *SIZE), "model.pt", "two tensors", "linear.bias", "remove")


def test_two_names_for_one_block_are_refused(refused, saved):
    state = renamed(state_of(), "mmpretrain")
    stem = {name: tensor for name, tensor in state.items() if name.startswith("backbone.stem.")}
    twice = {name.replace("stem", "stage_0.0"): tensor * 0.5 for name, tensor in stem.items()}
    saved({**state, **twice})
    has(refused(3, "model.pt", *SIZE), "model.pt", "backbone.stage_0.0.")


def test_missing_and_unexpected_tensors_are_reported_at_once(refused, saved):
    state = state_of()
    del state["stage1.0.rbr_1x1.conv.weight"], state["linear.bias"]
    saved({**state, "ema.decay": torch.ones(2), "head.extra": torch.ones(2)})
    words = ("missing: linear.bias, stage1.0.rbr_1x1.conv.weight", "unexpected: ema.decay, head.extra", "--ignore-keys")
    has(refused(3, "model.pt", *SIZE), "model.pt", *words)


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--ignore-keys", "ema.*"), 0),
        (("--ignore-keys", "ema.a", "--ignore-keys", "*.b"), 0),
        (("--ignore-keys", "ema.a"), 3),
        (("--ignore-keys", "EMA.*"), 3),
        (("--ignore-keys", "ema"), 3),
        ((), 3),
    ],
)
def test_ignore_keys_lets_tensors_go_unused(flags, code, command, saved, tmp_path):
    saved({**state_of(), "ema.a": torch.ones(2), "ema.b": torch.ones(2)})
    outcome = command("model.pt", *SIZE, *flags)
    assert outcome.code == code
    if code:
        has(outcome.error, "ema.b")


def test_ignore_keys_does_not_stand_in_for_what_is_missing(refused, saved):
    saved(state_of())
    has(refused(3, "model.pt", *SIZE, "--ignore-keys", "*rbr_1x1.conv*"), "missing", "stage0.rbr_1x1.conv.weight")


def test_a_name_with_control_characters_stays_on_one_line(refused, saved):
    saved({**state_of(), "a\nb\r\x0bc\x85d\u2028e": torch.ones(2)})
    has(refused(3, "model.pt", *SIZE), "unexpected: a b c d e")


# Flags


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        *(("--size", text) for text in ("1000000", "0", "4097", "0x224", "224x", "1x2x3", "-1", "2e2", "٢٢٤", "", "a")),
        *(("--batch", text) for text in ("1:8", "8:1:32", "0:1:2", "1:8:32:64", "a:b:c", "1:8:100000", "", "1,8,32")),
        *(("--strides", text) for text in ("2,2,2,2", "3,2,2,2,2", "0,2,2,2,2", "2;2;2;2;2", "2,2,2,2,x", "")),
        *(("--eps", text) for text in ("0", "1", "nan", "inf", "1e-5,1e-5", "small", "-1e-5", "")),
        *(("--mean", text) for text in ("a,b,c", "nan,0,0", "1e9,0,0", "0.4;0.4;0.4", "", "0.5,0.5", "0.5")),
        *(("--std", text) for text in ("0,1,1", "-1,1,1", "inf,1,1", "0.2,0.2", "")),
        *(("--gpu", text) for text in ("ampere", "8.6", "sm8", "sm86,", "sm86 sm89", "")),
        *(("--trt", text) for text in ("fp8", "FP16", "fp16,fp16", "fp16,", "")),
        ("--sdk", "onnxruntime"),
        ("--sdk", ""),
        ("--arch", ""),
    ],
)
def test_a_malformed_flag_is_a_usage_error(flag, text, refused, checkpoint):
    with_engine = ("--trt", "fp16") if flag in ("--gpu", "--sdk") else ()
    has(refused(2, checkpoint.name, *with_engine, f"{flag}={text}"), flag)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--size", "1000000"), ("1000000", "4096")),
        (("--batch", "8:1:32"), ("8:1:32", "MIN:OPT:MAX")),
        (("--strides", "2,2"), ("'2,2'", "2 numbers", "five", "2,2,2,2,2")),
        (("--eps", "1"), ("1.0", "1e-5")),
        (("--mean", "0.5,0.5"), ("2 values", "3 channels")),
        (("--trt", "fp8"), ("fp8", "unknown precision", "fp32", "fp16")),
        (("--trt", "int8"), ("int8", "needs --calib", "wrong network")),
        (("--trt", "fp16", "--sdk", "trt"), ("--sdk trt", "tensorrt_rtx")),
        (("--trt", "fp16", "--gpu", "ampere"), ("'ampere'", "sm86")),
        (("--arch", "A9"), ("A9", "did you mean A2?", "B3g4", "D2se")),
        (("--arch", "RepVGG-B1g5"), ("did you mean B1g", "Known")),
        (("--nonsense",), ("--nonsense", "--help")),
        (("--siz", "20"), ("--siz", "--help")),
        (("--size",), ("--size", "--help")),
        (("other.pt",), ("other.pt", "--help")),
    ],
)
def test_a_usage_error_says_what_to_write_instead(flags, words, refused, checkpoint):
    has(refused(2, checkpoint.name, *flags), *words)


def test_no_argument_at_all_is_a_usage_error(refused):
    has(refused(2), "checkpoint", "--help")


def test_an_sdk_of_an_unknown_name_is_refused_also_where_no_engine_is_made(refused, checkpoint):
    has(refused(2, checkpoint.name, *SIZE, "--sdk", "trt"), "--sdk trt", "tensorrt_rtx")


def test_flags_are_checked_before_the_file(refused):
    has(refused(2, "missing.pt", "--size", "0"), "--size")


@pytest.mark.parametrize(
    ("arch", "words"), [("A0", ("not RepVGG-A0", "48,48,96,192,1280", "8,8,12,16,16")), ("repvgg_b1g4", ("B1g4",))]
)
def test_another_arch_than_the_tensors_make_is_refused(arch, words, refused, checkpoint):
    has(refused(3, checkpoint.name, *SIZE, "--arch", arch), "model.pt", "leave --arch out", *words)


def test_a_stride_that_an_identity_branch_forbids_is_refused(refused, saved):
    saved(state_of(Shape(widths=(8, 8, 12, 16, 16), strides=(2, 1, 2, 2, 2))))
    has(refused(3, "model.pt", *SIZE, "--strides", "2,2,2,2,2"), "model.pt", "stage1.0", "stride 2", "identity", "1")


def test_the_stride_that_the_identity_branch_allows_is_taken(command, saved):
    saved(state_of(Shape(widths=(8, 8, 12, 16, 16), strides=(2, 1, 2, 2, 2))))
    assert command("model.pt", *SIZE, "--strides", "2,1,2,2,2").code == 0


# The machine


def one_sdk(monkeypatch, module, capability):
    monkeypatch.setattr(sdk, "is_installed", lambda candidate: candidate.module == module)
    monkeypatch.setattr(sdk, "gpu_compute_capability", lambda: capability)


@pytest.mark.parametrize(
    ("installed", "capability", "flags", "code", "words"),
    [
        ("tensorrt_rtx", None, ("--sdk", "tensorrt"), 4, ("TensorRT is not installed", "pip install", "[tensorrt]")),
        ("tensorrt", None, ("--sdk", "tensorrt"), 4, ("TensorRT needs a GPU", "--sdk tensorrt_rtx")),
        ("tensorrt", 86, ("--sdk", "tensorrt", "--gpu", "sm89"), 4, ("--gpu sm89", "sm86")),
        ("tensorrt", None, (), 4, ("TensorRT for RTX is not installed", "[rtx]")),
        ("tensorrt_rtx", None, ("--gpu", "sm90"), 4, ("--gpu sm90", "no such target", "sm89", "--sdk tensorrt")),
        ("tensorrt_rtx", None, ("--gpu", "sm75,sm86"), 2, ("sm75", "engine of its own", "another --out")),
    ],
)
def test_what_this_machine_cannot_compile_is_refused(
    installed, capability, flags, code, words, refused, checkpoint, monkeypatch
):
    one_sdk(monkeypatch, installed, capability)
    has(refused(code, checkpoint.name, *SIZE, "--trt", "fp16", *flags), *words)


def test_an_out_directory_that_is_a_file_is_refused(refused, checkpoint, tmp_path):
    (tmp_path / "taken").write_text("mine")
    has(refused(5, checkpoint.name, *SIZE, "--out", "taken"), "taken", "cannot be written", "--out")


@pytest.mark.parametrize(
    "out", ["taken/below", "n" * 300, "new/" + "n" * 300, "/proc/out"], ids=["in a file", "long", "long below", "proc"]
)
def test_an_out_directory_that_cannot_be_made_is_refused(out, refused, checkpoint, tmp_path):
    (tmp_path / "taken").write_text("mine")
    has(refused(5, checkpoint.name, *SIZE, "--out", out), out, "cannot be written", "--out")


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "report.md", "report.json"])
def test_a_directory_in_the_place_of_a_file_is_refused(name, refused, checkpoint, tmp_path):
    (tmp_path / "model" / name).mkdir(parents=True)
    has(refused(5, checkpoint.name, *SIZE), "model", "cannot be written")


def test_a_checkpoint_without_a_suffix_is_told_about_out(refused, saved):
    saved(state_of(), "model")
    has(refused(5, "model", *SIZE), "model", "--out")


LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from exporter.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "flags"),
    [(3_000, ()), (60_000, ("--size", "64")), (10_000, ("--trt", "fp16")), (100_000, ("--trt", "fp16"))],
    ids=["the ONNX file", "the golden vectors", "the typed ONNX file", "the engine"],
)
def test_a_disk_that_is_full_is_reported_and_left_clean(limit, flags, checkpoint, tmp_path):
    before = tree(tmp_path)
    done = run_process(["-c", LIMITED, limit, checkpoint.name, *SIZE, *flags], tmp_path)
    assert done.returncode == 5, done.stderr
    assert len(done.stderr.splitlines()) == 1
    has(done.stderr, "error: model", "cannot be written", "File too large", "space left")
    assert tree(tmp_path) == before


STARVED = """
import resource, sys
import exporter.pipeline
limit = int(sys.argv.pop(1)) + 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from exporter.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "room"), [(4096, 500_000_000), (1500, 350_000_000)], ids=["numpy", "torch"])
def test_too_little_memory_is_reported_in_one_line(size, room, saved, tmp_path):
    saved(state_of(Shape(widths=(64, 64, 12, 16, 16))))
    before = tree(tmp_path)
    done = run_process(["-c", STARVED, room, "model.pt", "--size", size], tmp_path)
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.splitlines()) == 1
    has(done.stderr, "error: out of memory", "smaller --size")
    assert tree(tmp_path) == before


def exported_into(stdout, tmp_path, *arguments):
    """``python -m exporter`` with a standard output of the test's own."""
    command = [sys.executable, "-m", "exporter", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["lines", "json"])
def test_a_standard_output_that_is_full_is_reported(flags, checkpoint, tmp_path):
    with open("/dev/full", "w") as full:
        done = exported_into(full, tmp_path, checkpoint.name, *SIZE, *flags)
    assert done.returncode == 5, done.stderr
    assert len(done.stderr.splitlines()) == 1
    has(done.stderr, "error: ", "standard output")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["lines", "json"])
def test_a_reader_that_goes_away_gets_no_traceback(flags, checkpoint, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = exported_into(writer, tmp_path, checkpoint.name, *SIZE, *flags)
    os.close(writer)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) <= 1, done.stderr


@pytest.mark.slow
def test_a_name_that_the_terminal_cannot_show_is_no_obstacle(saved, tmp_path, monkeypatch):
    saved(state_of(), "modèle.pt")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run_process(["-m", "exporter", "modèle.pt", *SIZE], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "modèle" / "modèle.onnx").is_file()


def test_an_out_directory_that_is_not_unicode_is_taken_or_refused(command, checkpoint, tmp_path):
    out = os.fsdecode(b"o\xff")
    outcome = command(checkpoint.name, *SIZE, "--quiet", "--out", out)
    assert outcome.code in (0, 2, 5), outcome.stderr
    assert not list(tmp_path.rglob("*.rejected"))


@pytest.mark.parametrize("wrapped", [False, True], ids=["a module", "a module beside its weights"])
def test_the_advice_for_a_file_with_code_in_it_works(wrapped, command, small, tmp_path, monkeypatch):
    """What the error says to run is run, and makes a checkpoint that exports."""
    module = small.float()
    torch.save({"state_dict": module.state_dict(), "network": module} if wrapped else module, tmp_path / "model.pt")
    outcome = command("model.pt", *SIZE)
    assert outcome.code == 3
    advice = outcome.error.partition("save its weights alone: ")[2]
    monkeypatch.chdir(tmp_path)
    exec(shlex.split(advice)[2], {})
    assert command("model.weights.pt", *SIZE).code == 0
