"""The user's own outputs: the file as it is read, and every difference that the check must see and explain."""

from __future__ import annotations

import copy
import dataclasses
import io
import re
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from engines.outputs import layout_from_outputs
from exporter.architecture import with_features
from exporter.errors import InputRejected
from exporter.expectation import LARGEST_COUNT, STAGE, Expectation, expectation_check, expectation_from_npz
from tests.families import Network
from tests.family_names import APPLE, PLUS, QAREPVGG, QAREPVGG_V1
from tests.family_names import Shape as FamilyShape
from tests.inference import network_from_state
from tests.networks import NaiveRepVGG, Shape, deployed_state

SIZE = (32, 32)
INPUT = np.random.default_rng(3).standard_normal((6, 3, *SIZE), np.float32)
OUTPUT = np.random.default_rng(4).standard_normal((6, 7), np.float32)


CLASSIFIER, _ = network_from_state(NaiveRepVGG(Shape()).state_dict())


def expectation(images, outputs):
    """As ``expectation_from_npz`` reads the outputs of a classifier."""
    return Expectation("io.npz", images, outputs, layout_from_outputs({"output": outputs}))


# The file


@pytest.fixture
def npz(tmp_path):
    """Saves arrays by name; returns the path."""

    def save(**arrays):
        np.savez(tmp_path / "io.npz", **arrays)
        return tmp_path / "io.npz"

    return save


def rejected(path, architecture=CLASSIFIER):
    with pytest.raises(InputRejected) as caught:
        expectation_from_npz(path, architecture, SIZE)
    line = str(caught.value)
    assert caught.value.exit_code == 3
    assert line.startswith(f"{path}: ")
    assert len(line.splitlines()) == 1
    return line


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("output_dtype", [np.float16, np.float32, np.float64])
def test_the_arrays_are_read_as_they_are(npz, dtype, output_dtype):
    found = expectation_from_npz(npz(input=INPUT.astype(dtype), output=OUTPUT.astype(output_dtype)), CLASSIFIER, SIZE)
    assert found.source == "io.npz"
    assert (found.images.dtype, found.outputs.dtype) == (np.float32, np.float64)
    assert np.array_equal(found.images, INPUT)
    assert np.array_equal(found.outputs, OUTPUT.astype(output_dtype))


def test_of_many_rows_the_first_are_taken_and_said(npz):
    images = np.zeros((LARGEST_COUNT + 3, 3, *SIZE), np.float32)
    outputs = np.arange(len(images) * 7, dtype=np.float32).reshape(-1, 7)
    found = expectation_from_npz(npz(input=images, output=outputs), CLASSIFIER, SIZE)
    assert len(found.images) == len(found.outputs) == LARGEST_COUNT
    assert found.source == f"the first {LARGEST_COUNT} of {LARGEST_COUNT + 3} rows of io.npz"
    assert np.array_equal(found.outputs, outputs[:LARGEST_COUNT])


NAN = np.where(np.arange(7) == 2, np.nan, OUTPUT)
BAD_ARRAYS = {
    "no output": ({"input": INPUT}, "does not hold both input and output"),
    "no input": ({"output": OUTPUT}, "does not hold both input and output"),
    "bytes": ({"input": INPUT.astype(np.uint8), "output": OUTPUT}, "input is uint8"),
    "another size": ({"input": INPUT[..., :31], "output": OUTPUT}, "set --size"),
    "channels last": ({"input": INPUT.transpose(0, 2, 3, 1), "output": OUTPUT}, "expected float32 (n, 3, 32, 32)"),
    "one image": ({"input": INPUT[0], "output": OUTPUT}, "input is float32 (3, 32, 32)"),
    "other rows": ({"input": INPUT, "output": OUTPUT[:5]}, "output is float32 (5, 7); expected float32 (6, 7)"),
    "other classes": ({"input": INPUT, "output": OUTPUT[:, :6]}, "output is float32 (6, 6)"),
    "classes": ({"input": INPUT, "output": OUTPUT.argmax(1)}, "output is int64 (6,)"),
    "integers": ({"input": INPUT, "output": OUTPUT.astype(int)}, "output is int64 (6, 7)"),
    "no rows": ({"input": INPUT[:0], "output": OUTPUT[:0]}, "at least one"),
    "NaN out": ({"input": INPUT, "output": NAN}, "output holds NaN or infinite values"),
    "infinite in": ({"input": np.full_like(INPUT, np.inf), "output": OUTPUT}, "input holds NaN or infinite values"),
    "zero": ({"input": INPUT, "output": 0 * OUTPUT}, "output is zero everywhere"),
}


@pytest.mark.parametrize(("arrays", "reason"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_refused_in_one_line(npz, arrays, reason):
    assert reason in rejected(npz(**arrays))


def test_what_is_no_archive_of_arrays_is_refused_in_one_line(tmp_path):
    assert "no such file; check --expect" in rejected(tmp_path / "missing.npz")
    assert "a folder" in rejected(tmp_path)
    single = tmp_path / "single.npy"
    np.save(single, INPUT)
    assert "not an .npz of arrays" in rejected(single)


class Pickled:
    """Would be seen if it were ever loaded."""

    loaded = 0

    def __reduce__(self):
        return setattr, (Pickled, "loaded", 1)


@pytest.mark.parametrize("name", ["input", "output"])
def test_a_pickle_is_never_loaded(npz, name):
    arrays = {"input": INPUT, "output": OUTPUT, name: np.array([Pickled()], object)}
    assert "not an .npz of arrays" in rejected(npz(**arrays))
    assert Pickled.loaded == 0


# The file of a network with feature maps


TWO_STAGES = with_features(CLASSIFIER, (1, 3))
MAPS = {
    "stage1": np.random.default_rng(5).standard_normal((6, 8, 8, 8), np.float32),
    "stage3": 1e5 * np.random.default_rng(6).standard_normal((6, 16, 2, 2), np.float32),
}


def test_feature_maps_are_read_by_name_and_joined_each_in_its_own_scale(npz):
    path = npz(input=INPUT, stage3=MAPS["stage3"], output=OUTPUT, stage1=MAPS["stage1"])
    found = expectation_from_npz(path, TWO_STAGES, SIZE)
    assert (found.layout.names, found.layout.ranked) == (("stage1", "stage3"), False)
    expected = np.concatenate([(maps / np.abs(maps).max()).reshape(6, -1) for maps in MAPS.values()], axis=1)
    assert found.outputs == pytest.approx(expected, rel=1e-6, abs=1e-9)
    rows = found.rows({name: torch.from_numpy(maps) for name, maps in MAPS.items()})
    assert rows == pytest.approx(found.outputs, rel=1e-6, abs=1e-9)


BAD_MAPS = {
    "one is missing": ({"stage3": None}, "does not hold input and stage1 and stage3; np.savez them"),
    "the classifier's": ({"stage1": OUTPUT}, "stage1 is float32 (6, 7); expected float32 (6, 8, 8, 8), a feature map"),
    "other channels": ({"stage3": MAPS["stage3"][:, :8]}, "stage3 is float32 (6, 8, 2, 2); expected float32 (6, 16"),
    "another size": ({"stage1": MAPS["stage1"][..., :7]}, "would be others with other --strides, or another --size"),
    "channels last": ({"stage1": MAPS["stage1"][:, :, 0]}, "stage1 is float32 (6, 8, 8); expected"),
    "other rows": ({"stage3": MAPS["stage3"][:5]}, "stage3 is float32 (5, 16, 2, 2); expected float32 (6, 16, 2, 2)"),
    "zero": ({"stage3": 0 * MAPS["stage3"]}, "stage3 is zero everywhere"),
    "NaN": ({"stage1": np.full_like(MAPS["stage1"], np.nan)}, "stage1 holds NaN or infinite values"),
}


@pytest.mark.parametrize(("changes", "reason"), BAD_MAPS.values(), ids=BAD_MAPS)
def test_feature_maps_that_do_not_fit_are_refused_in_one_line(npz, changes, reason):
    arrays = {name: value for name, value in {"input": INPUT, **MAPS, **changes}.items() if value is not None}
    line = rejected(npz(**arrays), TWO_STAGES)
    assert reason in line


def archive():
    buffer = io.BytesIO()
    np.savez(buffer, input=INPUT[:1, :, :4, :4], output=OUTPUT[:1])
    return buffer.getvalue()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(archive()) - 1), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path, position, value, cut):
    data = bytearray(archive())
    data[position] = value
    (tmp_path / "io.npz").write_bytes(data[:position] if cut else data)
    try:
        found = expectation_from_npz(tmp_path / "io.npz", CLASSIFIER, (4, 4))
    except InputRejected:
        return
    assert np.isfinite(found.outputs).all()
    assert found.images.shape == (1, 3, 4, 4)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(member=st.binary(max_size=200))
def test_a_member_of_any_bytes_is_refused(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "io.npz", "w") as file:
        file.writestr("input.npy", member)
        file.writestr("output.npy", member)
    rejected(tmp_path / "io.npz")


# The check


@pytest.fixture(scope="module")
def taught():
    """A network whose outputs depend on its images, and its normalised images (8, 3, 32, 32)."""
    model = NaiveRepVGG(Shape(strides=(2, 1, 2, 2, 2), even_groups=2, se=True))
    generator = np.random.default_rng(0)
    coarse = np.kron(generator.standard_normal((8, 3, 8, 8)), np.ones((4, 4)))
    images = (coarse * np.array([1.5, 1.0, 0.5])[:, None, None] + np.array([0.5, 0, -0.5])[:, None, None]).astype("f")
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
        elif isinstance(part, nn.Conv2d) and part.bias is None:
            part.weight.data *= 0.1  # as small as trained ones are, so that an epsilon makes a difference
    with torch.no_grad():
        model.train()(torch.from_numpy(images) * 1.3 + 0.1)
    return model.eval(), images


def outputs_of(model, images, dtype=torch.float32):
    with torch.no_grad():
        return copy.deepcopy(model).to(dtype)(torch.from_numpy(np.ascontiguousarray(images)).to(dtype)).double().numpy()


def with_eps(model, eps):
    other = copy.deepcopy(model)
    for part in other.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = eps
    return other


def checked(taught, outputs, strides=(2, 1, 2, 2, 2), eps=None):
    model, images = taught
    network = network_from_state(model.state_dict(), strides, eps)
    return expectation_check(*network, expectation(images, outputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_users_own_outputs_are_reproduced(taught, dtype):
    check = checked(taught, outputs_of(*taught, dtype))
    assert (check.stage, check.passed, check.gate) == (STAGE, True, 5e-6)
    assert check.stage == "expectation, your outputs against float64"
    assert check.value <= 2e-6
    assert check.detail == f"relative error {check.value:.1e} (gate 5.0e-06), top-1 agrees on 8 of 8 of io.npz"


@pytest.mark.parametrize("eps", [1e-2, 1e-3, 1e-4, 1e-6])
def test_another_epsilon_fails_and_is_named(taught, eps):
    model, images = taught
    check = checked(taught, outputs_of(with_eps(model, eps), images))
    assert check.passed is False
    assert check.value > 5e-5
    assert re.search(rf"; your outputs fit --eps 1e-{round(-np.log10(eps))} to \de-0[789]$", check.detail), check.detail


def test_an_epsilon_that_was_given_wrongly_fails_and_the_right_one_is_named(taught):
    check = checked(taught, outputs_of(*taught), eps=1e-3)
    assert "your outputs fit --eps 1e-5 to" in check.detail


def test_other_strides_fail_and_are_named(taught):
    check = checked(taught, outputs_of(*taught), strides=(1, 1, 2, 1, 2))
    assert check.passed is False
    assert "your outputs fit --strides 2,1,2,2,2 to" in check.detail


def test_two_wrong_assumptions_are_named_together(taught):
    model, images = taught
    outputs = outputs_of(with_eps(model, 1e-6), images)
    assert "your outputs fit --strides 2,1,2,2,2 and --eps 1e-6 to" in checked(taught, outputs, (2, 1, 2, 1, 2)).detail


def in_training_mode(model, images):
    """What a model without .eval() answers."""
    return outputs_of(copy.deepcopy(model).train(), images)


EXPLAINED = {
    "BGR": (lambda model, x: outputs_of(model, x[:, ::-1]), "an input with its channels reversed (BGR)"),
    "training mode": (in_training_mode, r"a model in training mode (call .eval() before you make the file)"),
    "softmax": (lambda model, x: softmax(outputs_of(model, x)), "softmax of the logits (save the logits themselves)"),
    "log-softmax": (lambda model, x: np.log(softmax(outputs_of(model, x))), "log_softmax of the logits"),
    "sigmoid": (lambda model, x: 1 / (1 + np.exp(-outputs_of(model, x))), "sigmoid of the logits"),
    "another order": (lambda model, x: outputs_of(model, x)[::-1], "other rows of the input"),
}


def softmax(scores):
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("answer", "words"), EXPLAINED.values(), ids=EXPLAINED)
def test_what_users_get_wrong_fails_and_is_named(taught, answer, words):
    check = checked(taught, answer(*taught))
    assert check.passed is False
    assert f"; your outputs fit {words}" in check.detail


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_fails_and_is_told_from_a_wrong_network(taught, dtype):
    check = checked(taught, outputs_of(*taught, dtype))
    assert check.passed is False
    assert "nothing else fits" in check.detail
    assert "float16, bfloat16 or TF32 may do this" in check.detail


def test_another_network_fails_and_nothing_is_said_to_fit(taught):
    other = NaiveRepVGG(taught[0].shape, seed=5)
    check = checked(taught, outputs_of(other.float(), taught[1]))
    assert check.passed is False
    assert "are these the weights of the model that made io.npz?" in check.detail
    assert "fit " not in check.detail.replace("nothing else fits", "")


def test_one_weight_that_is_another_fails(taught):
    model, images = taught
    other = copy.deepcopy(model)
    other.linear.bias.data[3] += 1e-3 * np.abs(outputs_of(model, images)).max()
    check = checked(taught, outputs_of(other, images))
    assert check.passed is False
    assert check.value == pytest.approx(1e-3, rel=0.01)


def test_a_network_with_nan_in_it_fails(taught):
    model, images = taught
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["linear.weight"][0, 0] = float("nan")
    network = network_from_state(state, (2, 1, 2, 2, 2))
    check = expectation_check(*network, expectation(images, outputs_of(*taught)))
    assert check.passed is False
    assert "8 outputs are NaN or infinite" in check.detail


def test_a_deployed_file_is_checked_and_no_epsilon_is_tried(taught):
    model, images = taught
    network = network_from_state(deployed_state(copy.deepcopy(model)), (2, 1, 2, 2, 2))
    outputs = outputs_of(model, images)
    assert expectation_check(*network, expectation(images, outputs)).passed is True
    wrong = expectation_check(*network, expectation(images, outputs_of(with_eps(model, 1e-3), images)))
    assert wrong.passed is False
    assert "--eps" not in wrong.detail


def test_one_image_is_enough(taught):
    model, images = taught
    network = network_from_state(model.state_dict(), (2, 1, 2, 2, 2))
    one = expectation(images[:1], outputs_of(with_eps(model, 1e-3), images[:1]))
    assert expectation_check(*network, dataclasses.replace(one, outputs=outputs_of(model, images[:1]))).passed is True
    assert "your outputs fit --eps 1e-3 to" in expectation_check(*network, one).detail


# Other families, and feature maps


class InTrainingMode(Network):
    """The same weights; each batch norm takes the statistics of the very images that are answered."""

    def _set_statistics(self, name, y, generator, spread):
        self.state[f"{name}.running_mean"] = y.mean(dim=(0, 2, 3))
        self.state[f"{name}.running_var"] = y.var(dim=(0, 2, 3), correction=0)


def images_of(count=8):
    return torch.from_numpy(np.random.default_rng(8).standard_normal((count, 3, *SIZE), np.float32))


FAMILIES = {
    "QARepVGG": (QAREPVGG, FamilyShape()),
    "QARepVGG V1": (QAREPVGG_V1, FamilyShape()),
    "MobileOne": (APPLE, FamilyShape(depths=(1, 1, 2, 1, 1), convs=2)),
    "RepVGGplus": (PLUS, FamilyShape(se=3)),
}


@pytest.mark.parametrize(("family", "shape"), FAMILIES.values(), ids=FAMILIES)
def test_what_users_of_other_families_get_wrong_is_named_too(family, shape):
    images = images_of()
    network = network_from_state(Network(family, shape).state)
    naive = Network(family, shape)
    said = {
        "": naive.answer(images),
        "--eps 1e-3 to": naive.answer(images, eps=1e-3),
        "a model in training mode (call .eval() before": InTrainingMode(family, shape, seen=images).answer(images),
        "an input with its channels reversed (BGR)": naive.answer(images.flip(1)),
    }
    for words, outputs in said.items():
        check = expectation_check(*network, expectation(images.numpy(), outputs.numpy()))
        assert check.passed is (words == ""), check.detail
        assert words == "" or f"; your outputs fit {words}" in check.detail, check.detail


def check_of_maps(change):
    """Of the feature maps of stages 1 and 3, of which the user has ``change`` of the right ones."""
    naive, images = Network(QAREPVGG, FamilyShape()), images_of(3)
    architecture, tensors = network_from_state(naive.state)
    stages = naive.stages(images)
    right = {"stage1": stages[1], "stage3": stages[3]}
    outputs = {name: maps.numpy() for name, maps in change(right).items()}
    layout = layout_from_outputs(outputs)
    found = Expectation("io.npz", images.numpy(), np.asarray(layout.joined(outputs)), layout)
    return expectation_check(with_features(architecture, (1, 3)), tensors, found)


def test_the_users_own_feature_maps_are_reproduced_without_talk_of_top_1():
    check = check_of_maps(lambda maps: maps)
    assert (check.passed, check.gate) == (True, 5e-6)
    assert check.detail == f"relative error {check.value:.1e} (gate 5.0e-06), 3 of io.npz"


def test_another_feature_map_fails_and_no_function_of_logits_is_tried():
    check = check_of_maps(lambda maps: {**maps, "stage3": maps["stage3"] * 1.01})
    assert check.passed is False
    assert check.value == pytest.approx(0.01, rel=0.02)
    assert "nothing else fits" in check.detail
    softmax_of_maps = check_of_maps(lambda maps: {name: values.softmax(dim=1) for name, values in maps.items()})
    assert softmax_of_maps.passed is False
    assert "softmax" not in softmax_of_maps.detail
