"""Wrong assumptions about a family: each fails against the outputs of the naive network, and the right one is named."""

from __future__ import annotations

import dataclasses
import re

import pytest

import exporter.lineages
from tests.families import Network
from tests.family_exports import SIZE, export, save_expectation
from tests.family_names import FAMILIES
from tests.family_states import whole


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """``expected(name)``: the family's network, and the path of its own inputs and outputs; made once."""
    made = {}

    def get(name):
        if name not in made:
            network = Network(*FAMILIES[name])
            images = network.noise()
            path = save_expectation(tmp_path_factory.mktemp("expected"), images, network.answer(images))
            made[name] = network, path
        return made[name]

    return get


def failed_check(made):
    """The line of the check that failed."""
    assert made.outcome.code == 1, (made.outcome.stdout, made.outcome.stderr)
    assert not (made.directory / "model.onnx").exists()
    assert "as *.rejected" in made.error
    (line,) = [line for line in made.outcome.stdout.splitlines() if line.startswith("FAIL expectation")]
    return line


@pytest.mark.parametrize("name", ["official", "RepVGGplus", "QARepVGG", "MobileOne", "fast-reid"])
def test_the_networks_own_outputs_are_reproduced(expected, name, tmp_path):
    network, path = expected(name)
    made = export(tmp_path, whole(network), *SIZE, "--expect", path)
    assert made.outcome.code == 0, made.outcome.stdout + made.outcome.stderr
    assert re.search(r"^ok   expectation, your outputs against float64: ", made.outcome.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ["RepVGGplus", "QARepVGG", "MobileOne", "fast-reid"])
def test_a_wrong_epsilon_fails_and_the_right_one_is_named(expected, name, tmp_path):
    network, path = expected(name)
    line = failed_check(export(tmp_path, whole(network), *SIZE, "--eps", "1e-3", "--expect", path))
    assert "your outputs fit --eps 1e-5 to" in line


@pytest.mark.parametrize("name", ["QARepVGG", "MobileOne", "RepVGGplus"])
def test_a_wrong_stride_fails_and_the_right_one_is_named(expected, name, tmp_path):
    network, path = expected(name)
    line = failed_check(export(tmp_path, network.state, *SIZE, "--strides", "2,2,2,2,1", "--expect", path))
    assert "your outputs fit --strides 2,2,2,2,2 to" in line


def test_a_wrong_stride_of_a_backbone_gives_outputs_of_another_size(expected, tmp_path):
    network, path = expected("fast-reid")
    made = export(tmp_path, whole(network), *SIZE, "--strides", "2,2,2,2,2", "--expect", path)
    assert (made.outcome.code, made.directory.exists()) == (3, False)
    assert "output is float64 (3, 20, 3, 3); expected float32 (3, 20, 2, 2)" in made.error
    assert "--strides" in made.error


@pytest.mark.parametrize("name", ["official", "RepVGGplus", "MobileOne"])
def test_outputs_of_a_network_with_se_on_the_other_side_of_the_relu_fail(name, tmp_path):
    network = Network(*FAMILIES[name])
    images = network.noise()
    other = network.answer(images, se_after_relu=not network.family.se_after_relu)
    path = save_expectation(tmp_path, images, other)
    assert "nothing else fits" in failed_check(export(tmp_path, whole(network), *SIZE, "--expect", path))


@pytest.mark.parametrize("name", ["official", "RepVGGplus"])
def test_a_family_with_se_on_the_wrong_side_would_be_seen(expected, name, tmp_path, monkeypatch):
    network, path = expected(name)
    planted = tuple(
        dataclasses.replace(lineage, se_after_activation=not lineage.se_after_activation)
        for lineage in exporter.lineages.LINEAGES
    )
    monkeypatch.setattr(exporter.lineages, "LINEAGES", planted)
    failed_check(export(tmp_path, whole(network), *SIZE, "--expect", path))
