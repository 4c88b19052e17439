"""The rescaled twin of a checkpoint is the same network with other weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.rescaled_checkpoint import blocks_of, main, rescaled
from tests.networks import NaiveBlock, NaiveRepVGG, Shape

SHAPES = {
    "plain": Shape(),
    "grey, more than nine blocks in a stage": Shape(depths=(1, 1, 2, 11, 1), in_channels=1),
    "grouped, with squeeze-and-excitation": Shape(even_groups=2, se=True),
    "without identity": Shape(identity=False),
    "without 1x1": Shape(pointwise=False),
}


def twin_of(network: NaiveRepVGG, **options: float) -> NaiveRepVGG:
    twin = NaiveRepVGG(network.shape, seed=99).double()
    twin.load_state_dict(rescaled(network.state_dict(), **options))
    return twin


def images_for(shape: Shape, size: int = 64) -> torch.Tensor:
    return torch.randn(
        3, shape.in_channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def relative_error(reference: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - reference).abs().max() / reference.abs().max())


def block_outputs(network: NaiveRepVGG, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What goes into each block, and what comes out."""
    seen = []
    blocks = [module for module in network.modules() if isinstance(module, NaiveBlock)]
    hooks = [
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output))) for block in blocks
    ]
    network.answer(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_twin_is_the_same_function_with_other_weights(shape):
    network, images = NaiveRepVGG(shape).double(), images_for(shape)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    reference = network.answer(images)
    twin = twin_of(network)
    assert relative_error(reference, twin.answer(images)) < 1e-12
    changed = {name for name, tensor in twin.state_dict().items() if not torch.equal(tensor, before[name])}
    first = {"stage0.rbr_dense.conv.weight", "stage0.rbr_1x1.conv.weight"}  # their input is the image
    weights = {
        n for n in before if n.endswith(("conv.weight", "bn.weight", "bn.bias", "linear.weight", "se.down.weight"))
    }
    identity = {name for name in before if "identity" in name and not name.endswith("tracked")}
    assert changed == (weights | identity) - first
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_twin_without_spread_is_the_network_itself(shape):
    network = NaiveRepVGG(shape).double()
    twin = twin_of(network, sigma=0.0)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], tensor, rtol=1e-15, atol=0)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_every_channel_of_every_block_is_multiplied_by_a_factor_of_its_own(sigma):
    shape = Shape(depths=(1, 2, 2, 3, 2), widths=(64, 64, 64, 64, 64))
    network, images = NaiveRepVGG(shape).double(), images_for(shape)
    logarithms = []
    for (_, plain), (_, moved) in zip(
        block_outputs(network, images), block_outputs(twin_of(network, sigma=sigma), images), strict=True
    ):
        factors = moved.amax(dim=(0, 2, 3)) / plain.amax(dim=(0, 2, 3))
        live = plain.amax(dim=(0, 2, 3)) > 0
        torch.testing.assert_close(moved[:, live], plain[:, live] * factors[live][:, None, None], rtol=1e-9, atol=1e-12)
        logarithms += factors[live].log().tolist()
    assert abs(np.mean(logarithms)) < 0.15 * sigma
    assert 0.85 * sigma < np.std(logarithms) < 1.15 * sigma
    assert len({round(value, 9) for value in logarithms}) == len(logarithms)


def test_the_statistics_of_an_identity_are_those_of_the_input_that_it_now_has():
    network = NaiveRepVGG(Shape()).double()
    images = images_for(network.shape)
    twin = twin_of(network)
    plain, moved = block_outputs(network, images)[2][0], block_outputs(twin, images)[2][0]  # stage1.1
    old, new = network.stage1[1].rbr_identity, twin.stage1[1].rbr_identity
    live = plain.amax(dim=(0, 2, 3)) > 0
    factors = (moved.amax(dim=(0, 2, 3)) / plain.amax(dim=(0, 2, 3)))[live]
    torch.testing.assert_close(new.running_mean[live], factors * old.running_mean[live])
    torch.testing.assert_close(new.running_var[live], factors.square() * old.running_var[live])


def test_an_epsilon_that_is_not_the_networks_own_is_noticed():
    network = NaiveRepVGG(Shape(eps=1e-3)).double()
    images = images_for(network.shape)
    assert relative_error(network.answer(images), twin_of(network, eps=1e-3).answer(images)) < 1e-12
    assert relative_error(network.answer(images), twin_of(network).answer(images)) > 1e-6


def test_blocks_come_in_the_order_of_the_data():
    state = NaiveRepVGG(SHAPES["grey, more than nine blocks in a stage"]).state_dict()
    assert blocks_of(dict(reversed(state.items())))[:3] == ["stage0", "stage1.0", "stage2.0"]
    assert blocks_of(state)[4:7] + blocks_of(state)[-3:] == [
        *("stage3.0", "stage3.1", "stage3.2", "stage3.9", "stage3.10", "stage4.0")
    ]


def test_the_twin_is_written_in_the_dtypes_of_the_checkpoint(checkpoint, tmp_path):
    main([str(checkpoint), str(tmp_path / "twin.pt"), "--seed", "3"])
    made, state = torch.load(tmp_path / "twin.pt", weights_only=True), torch.load(checkpoint, weights_only=True)
    assert {name: t.dtype for name, t in made.items()} == {name: t.dtype for name, t in state.items()}
    expected = rescaled(state, seed=3)
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in made.items())
    assert not torch.equal(made["linear.weight"], rescaled(state, seed=4)["linear.weight"].float())


def test_what_is_not_in_training_form_has_no_twin(saved, tmp_path):
    path = saved({"linear.weight": torch.ones(2, 2)})
    with pytest.raises(SystemExit, match="not a training-form RepVGG"):
        main([str(path), str(tmp_path / "twin.pt")])
    assert not (tmp_path / "twin.pt").exists()
