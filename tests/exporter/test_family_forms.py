"""Every family in the other forms that people have: partly deployed, with leftovers, in half precision."""

from __future__ import annotations

import pytest
import torch

from tests.families import Network
from tests.family_exports import SIZE, assert_answers, difference, export, operations_of
from tests.family_names import FAMILIES
from tests.family_states import narrowed, partly_deployed, with_wrong_fused

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_that_is_deployed_in_part_gives_its_own_answers(name, tmp_path):
    """In bfloat16 or half where the file is, so that rounding meets both kinds of blocks."""
    network = Network(*FAMILIES[name])
    state = narrowed(partly_deployed(network), HALVES[list(FAMILIES).index(name) % 2])
    made = export(tmp_path, state, *SIZE)
    assert made.report["checkpoint"]["form"] == "partly deployed"
    assert_answers(made, network, state)
    assert made.operations == operations_of(network, head=network.has_head)


@pytest.mark.parametrize("name", FAMILIES)
def test_live_branches_win_over_a_fused_kernel_that_is_not_theirs(name, tmp_path):
    """In the other half precision, so that branches are seen to be folded in wider numbers than they are kept in."""
    network = Network(*FAMILIES[name])
    state = narrowed(with_wrong_fused(network), HALVES[(list(FAMILIES).index(name) + 1) % 2])
    made = export(tmp_path, state, *SIZE)
    assert made.report["checkpoint"]["form"] == "training"
    assert_answers(made, network, state)
    assert made.operations == operations_of(network, head=network.has_head)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_oracle_sees_half_precision(dtype):
    """Another rounding is another network: the tests above would see weights that were rounded once more."""
    network = Network(*FAMILIES["official"])
    images = network.noise()
    rounded = network.answer(images, narrowed(network.state, dtype))
    assert difference(rounded, network.answer(images)) > 1e-4
