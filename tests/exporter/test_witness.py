"""The batch norms as witnesses: the figures by hand, a trained network's verdicts, and what cannot be seen."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import witness_table
from exporter.witness import (
    CLEAR,
    SUSPICIOUS,
    UNAVAILABLE,
    WRONG,
    agreements_from_tensors,
    layers_from_images,
    witness_from_images,
)
from tests.conftest import EXAMPLES
from tests.families import Network
from tests.family_names import APPLE, QAREPVGG, QAREPVGG_V1
from tests.family_names import Shape as FamilyShape
from tests.family_states import without
from tests.inference import network_from_state
from tests.networks import NaiveRepVGG, Shape, deployed_state

IDENTITY, DENSE, POINTWISE = "rbr_identity", "rbr_dense.bn", "rbr_1x1.bn"
BRANCHES = {IDENTITY: "identity", DENSE: "dense", POINTWISE: "pointwise"}


@pytest.fixture(scope="module")
def fashion_state():
    return torch.load(EXAMPLES / "fashion.pt", weights_only=True)


@pytest.fixture(scope="module")
def fashion(fashion_state):
    return network_from_state(fashion_state)


@pytest.fixture(scope="module")
def pixels():
    with np.load(EXAMPLES / "fashion_calibration.npz") as archive:
        return archive["images"][:256, None].astype(np.float32)


def normalised(pixels, mean=0.5, std=0.5):
    return (pixels / 255 - np.float32(mean)) / np.float32(std)


def taught(shape, images, momentum=None):
    """A network whose running statistics are those of ``images``."""
    model = NaiveRepVGG(shape)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = momentum
    with torch.no_grad():
        model.train()(torch.from_numpy(images))
    return model.eval()


def colour_images(count=64, size=32, seed=0):
    """Smooth noise whose channels have different means and deviations, as those of photographs have."""
    generator = np.random.default_rng(seed)
    coarse = generator.standard_normal((count, 3, size // 4, size // 4)).astype(np.float32)
    fine = generator.standard_normal((count, 3, size, size)).astype(np.float32)
    images = np.repeat(np.repeat(coarse, 4, axis=2), 4, axis=3) + 0.3 * fine
    return images * np.float32([1.0, 0.8, 0.6])[:, None, None] + np.float32([0.4, 0.0, -0.4])[:, None, None]


# The figures


@pytest.mark.parametrize(
    "shape",
    [Shape(), Shape(se=True, even_groups=2), Shape(pointwise=False), Shape(eps=1e-3, in_channels=1)],
    ids=["plain", "SE and groups", "no 1x1", "eps and grey"],
)
def test_every_figure_is_that_of_its_definition(shape):
    model = NaiveRepVGG(shape)
    images = colour_images(9)[:, : shape.in_channels]
    expected = figures_by_hand(model, images, shape.eps)
    count, layers = layers_from_images(
        *network_from_state(model.float().state_dict(), eps=shape.eps), [images[:4], images[4:]]
    )
    assert count == 9
    assert {layer.layer for layer in layers} == expected.keys()
    for layer in layers:
        found = (layer.drift, layer.spread, layer.drift_by_chance, layer.spread_by_chance)
        assert found == pytest.approx(expected[layer.layer], rel=2e-4, abs=1e-6), layer.layer
        excess = math.sqrt(max(0, layer.drift**2 - 2.25 * layer.drift_by_chance**2))
        assert layer.excess_drift == pytest.approx(excess)
        assert layer.distance == 2 * layer.drift + layer.spread


def figures_by_hand(model, images, eps):
    """drift, spread and their standard errors of each batch norm, from its very inputs in float64."""
    inputs = {}

    def keep(name):
        return lambda module, arguments: inputs.__setitem__(name, arguments[0].detach().double())

    for name, part in model.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_pre_hook(keep(name))
    model.answer(torch.from_numpy(images))
    figures = {}
    for name, x in inputs.items():
        block, _, branch = name.partition(".rbr_")
        part = model.get_submodule(name)
        mean, variance = part.running_mean.double(), part.running_var.double()
        observed_mean, observed = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
        of_mean = x.mean(dim=(2, 3)).std(dim=0) / math.sqrt(len(x))
        central = (x - observed_mean.reshape(-1, 1, 1)) ** 2
        of_variance = central.mean(dim=(2, 3)).std(dim=0) / math.sqrt(len(x))
        canonical = f"{block if '.' in block else block + '.0'}.{BRANCHES['rbr_' + branch]}"
        figures[canonical] = tuple(
            float(value.mean())
            for value in (
                (observed_mean - mean).abs() / (variance + eps).sqrt(),
                ((observed + eps) / (variance + eps)).log().abs(),
                of_mean / (variance + eps).sqrt(),
                of_variance / (observed + eps),
            )
        )
    return figures


def test_how_the_images_are_batched_changes_nothing(fashion, pixels):
    whole = layers_from_images(*fashion, [normalised(pixels)])
    parts = layers_from_images(*fashion, (normalised(pixels[start : start + 37]) for start in range(0, 256, 37)))
    assert whole[0] == parts[0] == 256
    for one, other in zip(whole[1], parts[1], strict=True):
        assert dataclasses.astuple(one)[1:] == pytest.approx(dataclasses.astuple(other)[1:], rel=1e-4, abs=1e-6)


def test_batches_are_taken_one_at_a_time(fashion, pixels):
    references = []
    alive = []

    class Batch(np.ndarray):
        """An array that can be followed."""

    def batches():
        for start in range(0, 256, 32):
            batch = normalised(pixels[start : start + 32]).view(Batch)
            references.append(weakref.ref(batch))
            yield batch
            del batch
            alive.append(sum(reference() is not None for reference in references))

    assert witness_from_images(*fashion, batches()).images == 256
    assert len(alive) == 8
    assert max(alive) <= 2


def test_only_the_first_blocks_are_asked_where_no_more_are_wanted(fashion, pixels):
    _, layers = layers_from_images(*fashion, [normalised(pixels[:32])], blocks=2)
    assert [layer.layer for layer in layers] == [
        "stage0.0.dense", "stage0.0.pointwise", "stage1.0.dense", "stage1.0.pointwise",
    ]  # fmt: skip


# Verdicts on a trained network


@pytest.mark.parametrize(("first", "count"), [(0, 256), (0, 128), (128, 128), (0, 64), (64, 64), (0, 32), (32, 32)])
def test_images_made_as_in_training_are_clear(fashion, pixels, first, count):
    witness = witness_from_images(*fashion, [normalised(pixels[first : first + count])])
    assert (witness.verdict, witness.first_departure, witness.images) == (CLEAR, None, count), witness.line
    assert witness.line.startswith(f"clear: {count} images reproduce the statistics of 28 batch norms (most off, stage")


WRONG_IMAGES = {
    "0 to 1": lambda x: x / 255,
    "0 to 255": lambda x: x,
    "mean and std on 0 to 255": lambda x: (x - 0.5) / 0.5,
    "no division by std": lambda x: normalised(x, 0.5, 1.0),
    "MNIST": lambda x: normalised(x, 0.1307, 0.3081),
    "Fashion-MNIST": lambda x: normalised(x, 0.286, 0.353),
    "inverted": lambda x: normalised(255 - x),
    "noise": lambda x: np.random.default_rng(0).standard_normal(x.shape, np.float32),
}


@pytest.mark.parametrize("prepare", WRONG_IMAGES.values(), ids=WRONG_IMAGES)
@pytest.mark.parametrize("count", [32, 128])
def test_images_made_otherwise_are_wrong_from_the_first_layer_on(fashion, pixels, prepare, count):
    witness = witness_from_images(*fashion, [prepare(pixels[:count])])
    assert witness.verdict == WRONG
    assert witness.first_departure == "stage0.0.dense"
    assert f"first in {witness.first_departure}, most in stage" in witness.line
    assert "check --mean, --std, --strides, --size" in witness.line


def test_a_deviation_that_is_a_tenth_too_large_is_not_clear(fashion, pixels):
    assert witness_from_images(*fashion, [normalised(pixels[:32], 0.5, 0.55)]).verdict != CLEAR
    assert witness_from_images(*fashion, [normalised(pixels[:128], 0.5, 0.55)]).verdict == WRONG


@pytest.mark.parametrize("factor", [0.75, 1.25, 2.0])
def test_images_of_another_size_are_wrong(fashion, pixels, factor):
    resized = nn.functional.interpolate(
        torch.from_numpy(normalised(pixels[:128])), scale_factor=factor, mode="bilinear"
    )
    assert witness_from_images(*fashion, [resized.numpy()]).verdict == WRONG


@pytest.mark.parametrize("stage", [0, 2])
def test_a_wrong_stride_is_wrong_and_departs_in_its_stage_or_just_after(fashion_state, pixels, stage):
    strides = tuple(1 if index == stage else 2 for index in range(5))
    witness = witness_from_images(*network_from_state(fashion_state, strides), [normalised(pixels[:128])])
    assert witness.verdict == WRONG
    assert int(witness.first_departure.removeprefix("stage")[0]) in (stage, stage + 1)


def test_another_epsilon_of_the_usual_ones_is_not_seen(fashion_state, pixels):
    """As the module's docstring says. ``--expect`` sees it."""
    assert (
        witness_from_images(*network_from_state(fashion_state, eps=1e-6), [normalised(pixels[:128])]).verdict == CLEAR
    )


def test_the_order_of_colours_is_suspicious_and_the_right_one_clear():
    shape = Shape(se=True, even_groups=2)
    images = colour_images(128)
    network = network_from_state(taught(shape, images).state_dict())
    fresh = colour_images(128, seed=1)
    assert witness_from_images(*network, [fresh]).verdict == CLEAR
    reversed_colours = witness_from_images(*network, [np.ascontiguousarray(fresh[:, ::-1])])
    assert reversed_colours.verdict in (SUSPICIOUS, WRONG)
    assert reversed_colours.first_departure == "stage0.0.dense"


# Too little to go by


@pytest.mark.parametrize("count", [1, 4, 8, 31])
def test_fewer_than_32_images_are_said_to_be_too_few(fashion, pixels, count):
    witness = witness_from_images(*fashion, [normalised(pixels[:count])])
    assert witness.verdict == UNAVAILABLE
    assert f"{count} images are too few" in witness.line


def test_what_is_wrong_beyond_doubt_is_wrong_with_few_images_too(fashion, pixels):
    assert witness_from_images(*fashion, [pixels[:8]]).verdict == WRONG


def test_without_images_only_the_branches_are_held_against_each_other(fashion):
    witness = witness_from_images(*fashion, [])
    assert (witness.verdict, witness.images, witness.layers) == (UNAVAILABLE, 0, ())
    assert "no images were given" in witness.line
    assert max(one.disagreement for one in witness.agreements) < 1e-3


def test_a_deployed_file_has_no_witness(pixels):
    model = NaiveRepVGG(Shape(in_channels=1))
    witness = witness_from_images(*network_from_state(deployed_state(model)), [normalised(pixels[:32])])
    assert (witness.verdict, witness.layers) == (UNAVAILABLE, ())
    assert "no batch norm is left" in witness.line


def test_fused_blocks_of_a_partly_deployed_file_compute_and_say_nothing():
    images = colour_images(128)
    model = taught(Shape(), images)
    fused = deployed_state(model)
    state = {name: tensor for name, tensor in model.float().state_dict().items() if not name.startswith("stage1.0.")}
    partly = network_from_state({**state, **{name: fused[name] for name in fused if name.startswith("stage1.0.")}})
    assert partly[0].form == "partly deployed"
    whole = witness_from_images(*network_from_state(model.state_dict()), [images])
    found = witness_from_images(*partly, [images])
    assert found.verdict == CLEAR
    others = [layer for layer in whole.layers if not layer.layer.startswith("stage1.0.")]
    assert [layer.layer for layer in found.layers] == [layer.layer for layer in others]
    for one, other in zip(found.layers, others, strict=True):
        assert one.drift == pytest.approx(other.drift, abs=1e-4)


# The branches among themselves


def test_the_branches_of_a_taught_network_agree():
    architecture, tensors = network_from_state(taught(Shape(even_groups=2), colour_images()).state_dict())
    agreements = agreements_from_tensors(architecture, tensors)
    assert [one.block for one in agreements] == ["stage1.1", "stage2.1"]
    assert max(one.disagreement for one in agreements) < 1e-4


def stale(tensors, block):
    tensors[f"{block}.identity.bn.running_mean"] += 1


def swapped(tensors, block):
    tensors[f"{block}.pointwise.bn.running_mean"] = tensors[f"{block}.pointwise.bn.running_mean"].flip(0)


def of_other_weights(tensors, block):
    tensors[f"{block}.pointwise.weight"] = tensors[f"{block}.pointwise.weight"].flip(0)


@pytest.mark.parametrize("fault", [stale, swapped, of_other_weights])
def test_branches_that_saw_different_inputs_are_seen_without_images(fashion, fault):
    architecture, tensors = fashion
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    fault(tensors, "stage1.2")
    witness = witness_from_images(architecture, tensors, [])
    assert (witness.verdict, witness.first_departure) == (WRONG, "stage1.2")
    assert "the branches of stage1.2 contradict each other" in witness.line


# Batch norms behind a sum of branches, and several 1x1 branches


def without_identity(block):
    branches = tuple(branch for branch in block.branches if branch != "bare_identity")
    return dataclasses.replace(block, branches=branches)


def with_block(architecture, name, change):
    blocks = tuple(change(block) if block.name == name else block for block in architecture.blocks)
    assert blocks != architecture.blocks
    return dataclasses.replace(architecture, blocks=blocks)


@pytest.fixture(scope="module")
def qarepvgg():
    """A small QARepVGG of which stages 1 and 2 keep the size, with the statistics of its images."""
    images = colour_images(128)
    shape = FamilyShape(depths=(1, 2, 3, 2, 1), strides=(2, 1, 2, 2, 2))
    network = Network(QAREPVGG, shape, seen=torch.from_numpy(images))
    return network_from_state(network.state, strides=shape.strides), images


@pytest.mark.parametrize("family", [QAREPVGG, QAREPVGG_V1], ids=["V2", "V1"])
def test_a_batch_norm_behind_the_sum_is_asked_and_knows_its_images(family):
    images = colour_images(128)
    network = Network(family, FamilyShape(), seen=torch.from_numpy(images))
    witness = witness_from_images(*network_from_state(network.state), [images])
    assert witness.verdict == CLEAR, witness.line
    asked = [layer.layer for layer in witness.layers]
    dense = [name for name in asked if name.endswith(".dense")]
    assert len(dense) == len(network.blocks)
    assert [name for name in asked if name.endswith(".post")] == [name.replace(".dense", ".post") for name in dense]
    assert max(layer.drift for layer in witness.layers) < 1e-4


def test_the_figures_of_a_batch_norm_behind_the_sum_are_those_of_its_definition(qarepvgg):
    (architecture, tensors), images = qarepvgg
    off = {**tensors, "stage1.0.post.bn.running_mean": tensors["stage1.0.post.bn.running_mean"] + 0.1}
    _, layers = layers_from_images(architecture, off, [images])
    (layer,) = [layer for layer in layers if layer.layer == "stage1.0.post"]
    deviation = (tensors["stage1.0.post.bn.running_var"].double() + architecture.bn_eps).sqrt()
    assert layer.drift == pytest.approx(float((0.1 / deviation).mean()), rel=1e-3)
    assert layer.spread < 1e-3


@pytest.mark.parametrize("block", ["stage1.0", "stage1.1", "stage2.1", "stage2.2", "stage3.1"])
def test_an_identity_without_tensors_that_is_assumed_absent_departs_behind_its_own_sum(qarepvgg, block):
    (architecture, tensors), images = qarepvgg
    assert witness_from_images(architecture, tensors, [images]).verdict == CLEAR
    witness = witness_from_images(with_block(architecture, block, without_identity), tensors, [images])
    assert (witness.verdict, witness.first_departure) == (WRONG, f"{block}.post")


def test_an_identity_that_was_never_there_is_seen():
    """The network was trained with stride 2, where its block keeps the channels; stride 1 brings an identity along."""
    images = colour_images(128)
    network = Network(QAREPVGG, FamilyShape(), seen=torch.from_numpy(images))
    right = network_from_state(network.state)
    assert [b.name for b in right[0].blocks if "bare_identity" in b.branches] == ["stage1.1", "stage2.1", "stage3.1"]
    assert witness_from_images(*right, [images]).verdict == CLEAR
    wrong = network_from_state(network.state, strides=(2, 1, 2, 2, 2))
    assert "bare_identity" in wrong[0].blocks[1].branches
    witness = witness_from_images(*wrong, [images])
    assert (witness.verdict, witness.first_departure.rpartition(".")[0]) == (WRONG, "stage1.0")


def test_without_the_batch_norm_behind_the_sum_nothing_tells_of_the_identity_there(qarepvgg):
    """What makes "post" worth asking: the block's other batch norm sees the same input either way."""
    (architecture, tensors), images = qarepvgg
    wrong = with_block(architecture, "stage3.1", without_identity)
    _, layers = layers_from_images(wrong, tensors, [images])
    (dense,) = [layer for layer in layers if layer.layer == "stage3.1.dense"]
    (post,) = [layer for layer in layers if layer.layer == "stage3.1.post"]
    assert dense.drift < 1e-3 < 0.1 < post.drift


@pytest.fixture(scope="module")
def mobileone():
    """Its stage 4 keeps its channels, so that pointwise blocks of two branches have an identity, too."""
    images = torch.from_numpy(colour_images(64))
    shape = FamilyShape(depths=(1, 2, 2, 2, 2), convs=2)
    return network_from_state(Network(APPLE, shape, seen=images).state)


def test_every_1x1_branch_agrees_with_its_identity(mobileone):
    architecture, tensors = mobileone
    expected = []
    for block in architecture.blocks:
        if "identity" in block.branches:
            expected += [block.name] * (2 if block.kernel == 1 else 1)
    agreements = agreements_from_tensors(architecture, tensors)
    assert [one.block for one in agreements] == expected
    assert {block.kernel for block in architecture.blocks if block.name in expected} == {1, 3}
    assert max(one.disagreement for one in agreements) < 1e-4


@pytest.mark.parametrize("branch", ["dense", "dense1"])
@pytest.mark.parametrize("part", ["weight", "bn.running_mean"])
def test_a_1x1_branch_that_saw_another_input_is_seen_without_images(mobileone, branch, part):
    architecture, tensors = mobileone
    block = next(b.name for b in architecture.blocks if b.kernel == 1 and "identity" in b.branches)
    wrong = {**tensors, f"{block}.{branch}.{part}": tensors[f"{block}.{branch}.{part}"].flip(0)}
    witness = witness_from_images(architecture, wrong, [])
    assert (witness.verdict, witness.first_departure) == (WRONG, block)
    assert f"the branches of {block} contradict each other" in witness.line


def test_a_network_without_identities_has_nothing_to_hold_against_each_other():
    state = without(Network(APPLE, FamilyShape(convs=2)).state, "rbr_skip.")
    assert agreements_from_tensors(*network_from_state(state)) == ()


# What goes into the report


def test_the_record_is_json_and_has_what_was_found(fashion, pixels):
    witness = witness_from_images(*fashion, [normalised(pixels[:64])])
    record = json.loads(json.dumps(witness.record(), allow_nan=False))
    assert record["verdict"] == CLEAR
    assert record["images"] == 64
    assert [row["layer"] for row in record["layers"]] == [layer.layer for layer in witness.layers]
    assert record["layers"][3]["excess_drift"] == witness.layers[3].excess_drift
    assert len(record["agreements"]) == 6


def test_what_is_not_finite_is_wrong_and_null_in_the_record(fashion, pixels):
    architecture, tensors = fashion
    tensors = {**tensors, "stage2.0.dense.weight": torch.full_like(tensors["stage2.0.dense.weight"], math.nan)}
    witness = witness_from_images(architecture, tensors, [normalised(pixels[:64])])
    assert (witness.verdict, witness.first_departure) == (WRONG, "stage2.0.dense")
    record = json.loads(json.dumps(witness.record(), allow_nan=False))
    assert next(row for row in record["layers"] if row["layer"] == "stage2.0.dense")["drift"] is None


# The table that the thresholds stand on


def test_the_benchmark_makes_a_row_for_every_case_and_only_the_right_one_is_clear(capsys):
    witness_table.main(["--images", "64"])
    heading, rule, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert heading == list(witness_table.HEADINGS)
    assert set(rule) == {"---"}
    verdicts = {cells[0]: cells[3] for cells in rows}
    assert verdicts.pop("right") == CLEAR
    assert set(verdicts.values()) == {WRONG}
    assert {"normalised as MNIST", "mean, but no std", "noise", "2 times the size", "strides 2,2,1,2,2"} <= set(
        verdicts
    )
    assert {cells[5] for cells in rows if cells[0].startswith("normalised")} == {"--mean 0.5 --std 0.5"}
