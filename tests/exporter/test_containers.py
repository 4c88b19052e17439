"""Averaged and raw weights: which of the two a file gives, what is told about it, and when neither is guessed."""

from __future__ import annotations

import pathlib
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.checkpoint import checkpoint_from_path
from exporter.containers import AVERAGES, CONTAINERS, KINDS, weights_from_content, without_prefixes
from exporter.errors import CheckpointRejected

PATH = pathlib.Path("model.pt")
RAW, AVERAGED = 1.0, 2.0


def weights(value, prefix=""):
    """A state dict that can be told from others by the number in it."""
    return {f"{prefix}stage0.weight": torch.full((2, 3), value), f"{prefix}linear.bias": torch.full((2,), value)}


def steps():
    return torch.tensor(1200)


def value_of(state):
    """The one number that a state dict is full of."""
    values = {float(number) for tensor in state.values() if tensor.is_floating_point() for number in tensor.view(-1)}
    assert len(values) == 1
    return values.pop()


BOTH = {
    "timm": ({"state_dict": weights(RAW), "state_dict_ema": weights(AVERAGED)}, "state_dict", "state_dict_ema"),
    "timm, compiled and parallel": (
        {"state_dict": weights(RAW, "_orig_mod.module."), "state_dict_ema": weights(AVERAGED, "module._orig_mod.")},
        "state_dict",
        "state_dict_ema",
    ),
    "official": ({"model": weights(RAW), "ema": weights(AVERAGED)}, "model", "ema"),
    "RT-DETR": ({"model": weights(RAW), "ema": {"module": weights(AVERAGED), "updates": 3}}, "model", "ema.module"),
    "super-gradients": ({"net": weights(RAW), "ema_net": weights(AVERAGED), "acc": 0.7}, "net", "ema_net"),
    "a model's": ({"model": weights(RAW), "model_ema": weights(AVERAGED)}, "model", "model_ema"),
    "BasicSR": ({"params": weights(RAW), "params_ema": weights(AVERAGED)}, "params", "params_ema"),
    "not mmengine": (
        {"state_dict": weights(RAW), "ema_state_dict": weights(AVERAGED), "meta": {"lr": 0.1}},
        "state_dict",
        "ema_state_dict",
    ),
    "an average of torch": (
        {"model": weights(RAW), "ema": {**weights(AVERAGED, "module."), "n_averaged": steps()}},
        "model",
        "ema",
    ),
    "a wrapper in the average": (
        {"model": weights(RAW), "ema": {"state_dict": weights(AVERAGED), "decay": 0.9999}},
        "model",
        "ema.state_dict",
    ),
    "both inside": (
        {"model": {"state_dict": weights(RAW), "state_dict_ema": weights(AVERAGED)}, "epoch": 3},
        "model.state_dict",
        "model.state_dict_ema",
    ),
    "raw inside": (
        {"model": {"state_dict": weights(RAW)}, "ema": weights(AVERAGED)},
        "model.state_dict",
        "ema",
    ),
    "raw at the top": ({**weights(RAW), "ema": weights(AVERAGED)}, "", "ema"),
}  # fmt: skip
MMENGINE = {
    "marked by all": {"message_hub": {}, "meta": {"mmengine_version": "0.10.7"}, "steps": True},
    "marked by its hub": {"message_hub": {}, "steps": False},
    "marked by its version": {"meta": {"mmengine_version": "0.10.7"}, "steps": False},
    "marked by its counter": {"meta": {"lr": 0.1}, "steps": True},
}


def of_mmengine(marks):
    """As mmengine's EMAHook saves: the average under ``state_dict``, the raw weights under ``ema_state_dict``."""
    beside = {key: value for key, value in marks.items() if key != "steps"}
    counter = {"steps": steps()} if marks["steps"] else {}
    return {"state_dict": weights(AVERAGED), "ema_state_dict": {**weights(RAW, "module."), **counter}, **beside}


CASES = {**BOTH, **{name: (of_mmengine(m), "ema_state_dict", "state_dict") for name, m in MMENGINE.items()}}


@pytest.mark.parametrize("case", CASES)
def test_of_both_kinds_the_average_is_taken_and_told(case, saved):
    content, raw, averaged = CASES[case]
    checkpoint = checkpoint_from_path(saved(content))
    assert value_of(checkpoint.tensors) == AVERAGED
    assert checkpoint.tensors.keys() == {"stage0.weight", "linear.bias"}
    assert (checkpoint.container, checkpoint.weights) == (averaged, "ema")
    assert (raw.split(".")[-1] or "the weights at the top") in checkpoint.others or raw.split(".")[
        0
    ] in checkpoint.others


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_can_be_asked_for(kind, case, saved):
    content, raw, averaged = CASES[case]
    checkpoint = checkpoint_from_path(saved(content), kind)
    assert value_of(checkpoint.tensors) == (AVERAGED if kind == "ema" else RAW)
    assert checkpoint.tensors.keys() == {"stage0.weight", "linear.bias"}
    assert (checkpoint.container, checkpoint.weights) == (averaged if kind == "ema" else raw, kind)
    other = raw if kind == "ema" else averaged
    assert {other.split(".")[0] or "the weights at the top", other.split(".")[-1]} & set(checkpoint.others)


def test_taken_the_wrong_way_round_mmengine_would_give_the_other_network():
    """What recognising it is for: the same containers without a mark are read as they are called."""
    content = of_mmengine({"steps": False})
    assert value_of(weights_from_content(content, PATH).state) == RAW


@pytest.mark.parametrize("container", [*CONTAINERS, *AVERAGES])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_of_one_kind_nothing_is_told_and_the_other_is_refused(kind, container, saved):
    path = saved({container: weights(RAW), "epoch": 3})
    held = "ema" if container in AVERAGES else "raw"
    if kind in (None, held):
        checkpoint = checkpoint_from_path(path, kind)
        assert (checkpoint.container, checkpoint.others, checkpoint.weights) == (container, ("epoch",), None)
        return
    word = "averaged" if held == "ema" else "raw"
    with pytest.raises(
        CheckpointRejected, match=rf"--weights {kind}: the file holds only the {word} weights \({container}\); leave"
    ):
        checkpoint_from_path(path, kind)


@pytest.mark.parametrize("nothing", [None, {}, {"updates": 0}, 0.999, [1], {"module": None}, {"shadow": {"a": 1}}])
def test_an_average_of_nothing_is_no_average(nothing, saved):
    path = saved({"model": weights(RAW), "ema": nothing})
    checkpoint = checkpoint_from_path(path)
    assert (value_of(checkpoint.tensors), checkpoint.weights) == (RAW, None)
    with pytest.raises(CheckpointRejected, match=r"--weights ema: the file holds only the raw weights \(model\)"):
        checkpoint_from_path(path, "ema")


@pytest.mark.parametrize(
    "score", [torch.tensor(71.2), torch.tensor([71.2]), torch.ones(5056, dtype=torch.uint8)], ids=["0d", "1d", "rng"]
)
@pytest.mark.parametrize("container", ["state_dict", "model", "ema"])
def test_a_tensor_beside_the_container_does_not_make_the_top_the_weights(container, score, saved):
    """A best accuracy and the state of a random generator are tensors in many files."""
    checkpoint = checkpoint_from_path(saved({"best_acc1": score, container: weights(RAW)}))
    assert (checkpoint.container, checkpoint.others, checkpoint.weights) == (container, ("best_acc1",), None)


def test_an_average_of_the_parameters_alone_is_not_taken_unasked(saved):
    raw = {**weights(RAW), "stage0.bn.running_mean": torch.full((2,), RAW)}
    path = saved({"model": {**raw, "stage0.bn.num_batches_tracked": steps()}, "ema": weights(AVERAGED)})
    words = r"averaged weights \(ema\) lack stage0\.bn\.running_mean, which the raw weights have; choose --weights raw"
    with pytest.raises(CheckpointRejected, match=words):
        checkpoint_from_path(path)
    assert value_of(checkpoint_from_path(path, "raw").tensors) == RAW
    assert value_of(checkpoint_from_path(path, "ema").tensors) == AVERAGED


def test_an_average_that_has_more_is_taken(saved):
    more = {**weights(AVERAGED), "stage0.bn.running_mean": torch.full((2,), AVERAGED)}
    assert value_of(checkpoint_from_path(saved({"model": weights(RAW), "ema": more})).tensors) == AVERAGED


@pytest.mark.parametrize("name", ["steps", "n_averaged", "module.steps"])
def test_only_the_counter_of_an_average_is_dropped(name):
    counters = {name: steps(), "stage0.steps": steps()}
    assert without_prefixes({**weights(RAW), **counters}, PATH).keys() == {*weights(RAW), "stage0.steps"}
    kept = without_prefixes({**weights(RAW), name: torch.ones(2)}, PATH)
    assert kept.keys() == {*weights(RAW), name.removeprefix("module.")}


# Contents that no training code writes


@pytest.mark.parametrize("attribute", ["get", "items", "values", "keys", "__iter__", "pop"])
def test_attributes_of_an_ordered_dict_do_not_stand_in_for_its_methods(attribute):
    content = OrderedDict(state_dict=OrderedDict(weights(RAW)))
    for entries in (content, content["state_dict"]):
        vars(entries)[attribute] = len
    assert value_of(weights_from_content(content, PATH).state) == RAW


@pytest.mark.parametrize("attribute", ["numel", "detach", "is_floating_point", "dim"])
def test_attributes_of_a_tensor_do_not_stand_in_for_its_methods(attribute):
    tensor = torch.full((2, 3), RAW)
    setattr(tensor, attribute, len)
    tensors = without_prefixes(weights_from_content({"model": {"a.weight": tensor}}, PATH).state, PATH)
    assert not vars(tensors["a.weight"])
    assert value_of(tensors) == RAW


KEYS = st.one_of(
    st.sampled_from([*CONTAINERS, *AVERAGES, "module", "epoch", "stage0.weight", "module.stage0.weight", "a\nb" * 40]),
    st.integers(),
    st.tuples(st.integers(), st.none()),
    st.none(),
)
LEAVES = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=5),
    st.sampled_from([torch.ones(2, 2), torch.ones(1), torch.tensor(3), torch.zeros(0), torch.ones(2).bool()]),
)
CONTENTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.dictionaries(KEYS, inner, max_size=4), st.lists(inner, max_size=3)),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(CONTENTS, st.sampled_from([None, *KINDS]))
def test_any_content_gives_weights_or_one_line(content, kind):
    line, tensors = "", {}
    try:
        contained = weights_from_content(content, PATH, kind)
        tensors = without_prefixes(contained.state, PATH)
    except CheckpointRejected as error:
        line = str(error)
    if line:
        assert line.startswith("model.pt: ")
        assert "\n" not in line
        return
    assert kind is None or contained.weights in (None, kind)
    assert all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items())
    assert all("\n" not in other and len(other) <= 80 for other in contained.others)
    at = content
    for key in contained.container.split(".") if contained.container else ():
        at = at[key]
    assert at == contained.state or contained.state.keys() == at.keys()
