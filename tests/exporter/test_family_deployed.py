"""Every family as it is deployed, and the authors' files that have a batch norm behind each deployed kernel."""

from __future__ import annotations

import pytest
import torch

from tests.families import Network
from tests.family_exports import SIZE, assert_answers, export, operations_of
from tests.family_names import FAMILIES, FAST_REID, OFFICIAL, Shape
from tests.family_states import deployed, narrowed, with_batch_norm, without


@pytest.mark.parametrize("name", FAMILIES)
def test_a_deployed_network_gives_its_own_answers(name, tmp_path):
    network = Network(*FAMILIES[name])
    state = deployed(network)
    made = export(tmp_path, state, *SIZE)
    assert made.report["checkpoint"]["form"] == "deployed"
    assert_answers(made, network, state)
    assert made.operations == operations_of(network, head=network.has_head)


@pytest.mark.parametrize("form", [deployed, with_batch_norm])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_official_file_in_half_precision_gives_its_own_answers(form, dtype, tmp_path):
    network = Network(OFFICIAL, Shape(even_groups=2))
    state = narrowed(form(network), dtype)
    assert_answers(export(tmp_path, state, *SIZE), network, state)


def test_batch_norms_behind_the_deployed_kernels_are_folded(tmp_path):
    network = Network(OFFICIAL, Shape())
    state = with_batch_norm(network)
    assert any(name.endswith("rbr_reparam.bn.running_var") for name in state)
    made = export(tmp_path, state, *SIZE)
    assert_answers(made, network, state)
    assert made.operations == operations_of(network, head=True)


def test_a_batch_norm_behind_some_kernels_only_is_refused(tmp_path):
    """A block whose batch norm is lost would be computed without it."""
    network = Network(OFFICIAL, Shape())
    made = export(tmp_path, without(with_batch_norm(network), "stage2.1.rbr_reparam.bn"), *SIZE)
    assert made.outcome.code == 3
    assert "missing: stage2.1." in made.error
    assert not made.directory.exists()


def test_a_deployed_backbone_of_fast_reid_is_read_from_parameters_of_the_block_itself(tmp_path):
    network = Network(FAST_REID, Shape(even_groups=2))
    state = deployed(network)
    assert "backbone.stage1.0.fused_weight" in state
    assert_answers(export(tmp_path, state, *SIZE), network, state)
