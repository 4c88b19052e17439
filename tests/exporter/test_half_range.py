"""Networks that reach beyond half: what is brought back, what stays in float32, and what the run says of it."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import onnxruntime
import pytest
import torch

import exporter
from exporter.checkpoint import checkpoint_from_path
from exporter.errors import VerificationFailed
from exporter.images import noise_images
from exporter.measured import Measured
from exporter.onnx_graph import onnx_from_plain, structure_from_architecture
from exporter.plain import plain_from_repvgg
from exporter.precisions import fp16
from exporter.precisions.rescaling import rescaled
from exporter.reference import reference_from_repvgg
from exporter.repvgg import network_from_checkpoint
from exporter.request import Request
from exporter.typed import contract_checks_of_typed, numeric_checks_of_typed, typed_from_graph
from tests.networks import NaiveRepVGG, Shape, contiguous_float

SIZE = (32, 32)
PRECISION, CONTRACT, TWIN = (
    f"fp16, {name}" for name in ("precision asked for", "graph contract", "explicit-cast twin against float64")
)


@pytest.fixture
def unscaled(monkeypatch):
    """Nothing is rescaled, so that everything beyond half must be kept."""
    monkeypatch.setattr(
        fp16, "rescaled", lambda graph, peaks: dataclasses.replace(rescaled(graph, {}), peaks=dict(peaks))
    )


def scaled(model, changes):
    """The model with the batch norms of named blocks scaled: (factor of the scale, factor of the shift)."""
    for block, (scale, shift) in changes.items():
        for part in model.get_submodule(block).modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.data *= scale
                part.bias.data *= shift
    return model


def saved_model(model, folder):
    torch.save(contiguous_float(model.state_dict()), folder / "net.pt")
    return folder / "net.pt"


def exported(model, folder, **options):
    return exporter.export(saved_model(model, folder), folder / "out", trt=("fp16",), size=SIZE[0], **options)


def typed_of(model, folder, features=()):
    """The typed file of a model, and the checks on it by their stage: a run's, but for the compiler."""
    request = Request(path=saved_model(model, folder), out=folder, size=SIZE, features=features)
    network = network_from_checkpoint(checkpoint_from_path(request.path), request)
    images = noise_images(3, SIZE)
    reference = reference_from_repvgg(network.architecture, network.tensors, images)
    plain = plain_from_repvgg(network.architecture, network.tensors, images)
    graph = onnx_from_plain(plain, structure_from_architecture(network.architecture, SIZE), {})
    typed = typed_from_graph(fp16.FP16, graph, reference, {}, folder / "net.fp16.onnx")
    checks = [*contract_checks_of_typed(typed, plain), *numeric_checks_of_typed(typed, Measured(reference, 8))]
    return typed, {check.stage: check for check in checks}


def exponents_of(typed):
    return {name: values.tolist() for name, values in typed.exponents.items()}


def assert_right(checks):
    """The file is the network's, and the twin is within its gate, whether or not the outputs of noise differ enough."""
    assert checks[CONTRACT].passed
    assert checks[PRECISION].passed
    assert checks[TWIN].passed is not False
    assert checks[TWIN].value < 5e-3


LOUD = [("stage0", "stage1.0"), ("stage1.0", "stage1.1"), ("stage2.1", "stage3.0"), ("stage3.0", "stage4.0")]


def loud(up="stage1.0", down="stage1.1", shape=None):
    """A network one block of which reaches far beyond half, the next one bringing it down again."""
    model = NaiveRepVGG(shape or Shape(classes=8), seed=1)
    if model.get_submodule(up).se is not None:
        model.get_submodule(up).se.down.weight.data *= 1e-5
    return scaled(model, {up: (1e5, 1e5), down: (1e-5, 1.0)})


# --- what is brought back


SHAPES = {
    "plain": Shape(classes=8),
    "grouped": Shape(classes=8, even_groups=4),
    "SE": Shape(classes=8, se=True, widths=(16, 16, 16, 32, 32)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("up", "down"), LOUD)
def test_a_block_beyond_half_is_rescaled_and_all_of_the_network_is_half(shape, up, down, tmp_path):
    typed, checks = typed_of(loud(up, down, shape), tmp_path)
    name = up if "." in up else f"{up}.0"
    assert typed.kept == {}
    assert max(typed.exponents[f"{name}/Conv"]) <= 0
    assert_right(checks)
    convs = len(typed.headroom)
    said = rf"{convs} of {convs} convs; (.*, )?{re.escape(name)}: \d+ channels scaled by 2\^-\d+(\.\.2\^-\d+)?"
    assert re.fullmatch(said, checks[PRECISION].detail)
    assert checks[CONTRACT].detail.endswith(" weights bit-equal times powers of two")
    row = next(row for row in typed.headroom if row.convolution == f"{name}/Conv")
    assert row.before.peak > 65504
    assert row.before.factor == 65504 / row.before.peak
    assert row.after.factor >= 4
    assert row.exponents == tuple(typed.exponents[f"{name}/Conv"].tolist())
    for other in typed.headroom:
        assert (other.convolution in typed.exponents) == bool(other.exponents)
        assert other.exponents or other.before == other.after


@pytest.mark.usefixtures("unscaled")
@pytest.mark.parametrize(("up", "down"), LOUD)
def test_without_rescaling_the_same_block_is_kept_by_name(up, down, tmp_path):
    typed, checks = typed_of(loud(up, down), tmp_path)
    name, after = (block if "." in block else f"{block}.0" for block in (up, down))
    assert set(typed.kept) >= {f"{name}/Conv", f"{name}/Relu", f"{after}/Conv"}
    assert_right(checks)
    assert checks[PRECISION].detail.startswith("5 of 7 convs; ")
    assert all(f"{node} kept in float32: {reason}" in checks[PRECISION].detail for node, reason in typed.kept.items())
    assert checks[CONTRACT].detail.endswith("; all 16 weights bit-equal")


LOUD_CHANNELS = [2, 5]


def loud_channels():
    """A network two channels of which reach 180,000, the next block bringing them down again."""
    model = NaiveRepVGG(Shape(classes=8), seed=1)
    block, after = model.get_submodule("stage1.1"), model.get_submodule("stage2.0")
    found = []
    block.register_forward_hook(lambda _block, _inputs, output: found.append(output))
    model.answer(torch.from_numpy(noise_images(3, SIZE)))
    factors = 180_000 / found[0].amax(dim=(0, 2, 3))[LOUD_CHANNELS]
    block._forward_hooks.clear()
    for part in block.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.weight.data[LOUD_CHANNELS] *= factors
            part.bias.data[LOUD_CHANNELS] *= factors
    for branch in (after.rbr_dense, after.rbr_1x1):
        branch.conv.weight.data[:, LOUD_CHANNELS] /= factors[:, None, None]
    return model


def test_channels_that_reach_180_000_are_rescaled_and_no_others(tmp_path):
    typed, checks = typed_of(loud_channels(), tmp_path)
    assert typed.kept == {}
    assert list(typed.exponents) == ["stage1.1/Conv"]
    assert np.flatnonzero(typed.exponents["stage1.1/Conv"]).tolist() == LOUD_CHANNELS
    row = next(row for row in typed.headroom if row.convolution == "stage1.1/Conv")
    assert row.before.peak > 179_999
    assert row.before.channel in LOUD_CHANNELS
    assert "7 of 7 convs; stage1.1: 2 channels scaled by 2^-" in checks[PRECISION].detail
    assert_right(checks)


@pytest.mark.usefixtures("unscaled")
def test_without_rescaling_two_channels_keep_two_convolutions_in_float32(tmp_path):
    typed, checks = typed_of(loud_channels(), tmp_path)
    assert set(typed.kept) >= {"stage1.1/Conv", "stage1.1/Relu", "stage2.0/Conv"}
    assert "; stage2.0/Conv kept in float32: activation stage1.1 reaches 1.8e+05; " in checks[PRECISION].detail
    assert_right(checks)


def heavy():
    """A network whose second block has weights beyond half, for an input that is a thousand times too quiet."""
    model = scaled(NaiveRepVGG(Shape(classes=8), seed=1), {"stage0": (1e-3, 1e-3), "stage1.0": (3e5, 1.0)})
    for part in model.get_submodule("stage1.0").modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.zero_()
    return model


def test_weights_alone_beyond_half_are_made_smaller_by_the_block_before_where_that_has_room(tmp_path):
    typed, checks = typed_of(heavy(), tmp_path)
    assert typed.kept == {}
    assert list(typed.exponents) == ["stage0.0/Conv"]
    assert min(exponents_of(typed)["stage0.0/Conv"]) >= 0
    assert_right(checks)


@pytest.mark.usefixtures("unscaled")
def test_without_rescaling_weights_alone_beyond_half_are_kept(tmp_path):
    """What goes in and what comes out fits half."""
    typed, checks = typed_of(heavy(), tmp_path)
    assert typed.kept["stage1.0/Conv"].startswith("weight stage1.0.weight reaches ")
    assert checks[PRECISION].detail.startswith("6 of 7 convs; ")
    assert_right(checks)


def loud_end():
    model = scaled(NaiveRepVGG(Shape(classes=8), seed=1), {"stage4.0": (1e5, 1e5)})
    model.linear.weight.data *= 1e-5
    return model


def test_a_last_block_beyond_half_is_brought_back_by_the_classifier(tmp_path):
    typed, checks = typed_of(loud_end(), tmp_path)
    assert typed.kept == {}
    assert list(typed.exponents) == ["stage4.0/Conv"]
    assert_right(checks)


@pytest.mark.usefixtures("unscaled")
def test_without_rescaling_a_last_block_is_kept_with_the_head_that_reads_it(tmp_path):
    """The mean of what is beyond half is beyond half too, and so is what the classifier reads."""
    typed, checks = typed_of(loud_end(), tmp_path)
    assert set(typed.kept) == {"stage4.0/Conv", "stage4.0/Relu", "head/Pool", "head/Flatten", "head/Gemm"}
    assert_right(checks)


def squeezed(factor=4e5):
    """A network with SE whose squeezed tensor in one block is so many times too loud."""
    model = NaiveRepVGG(Shape(classes=8, se=True, depths=(1, 1, 1, 1, 1), widths=(128,) * 5), seed=1)
    se = model.get_submodule("stage1.0").se
    se.down.weight.data *= factor
    se.down.bias.data.fill_(factor / 4)
    se.up.weight.data /= factor
    return model


def test_squeeze_and_excitation_beyond_half_inside_is_brought_back(tmp_path):
    """The squeezed tensor has a range of its own, which the block's input and output do not show."""
    typed, checks = typed_of(squeezed(), tmp_path)
    assert typed.kept == {}
    assert list(typed.exponents) == ["stage1.0/se/reduce/Conv"]
    assert "; stage1.0/se/reduce: 8 channels scaled by 2^-" in checks[PRECISION].detail
    assert_right(checks)


@pytest.mark.usefixtures("unscaled")
def test_without_rescaling_squeeze_and_excitation_beyond_half_inside_is_kept(tmp_path):
    typed, checks = typed_of(squeezed(), tmp_path)
    inside = {"stage1.0/se/reduce/Conv", "stage1.0/se/Relu", "stage1.0/se/expand/Conv"}
    assert inside <= set(typed.kept)
    assert_right(checks)


def loud_everywhere():
    model = scaled(NaiveRepVGG(Shape(classes=8), seed=1), {"stage0": (1e7, 1e7)})
    model.linear.weight.data *= 1e-6
    return model


def test_a_network_beyond_half_from_end_to_end_is_rescaled_as_a_whole(tmp_path):
    typed, checks = typed_of(loud_everywhere(), tmp_path)
    assert typed.kept == {}
    assert len(typed.exponents) == 7
    assert checks[PRECISION].detail.endswith(" and 2 more")
    assert_right(checks)


# --- what is not


def test_scores_beyond_half_stay_in_float32_by_name(tmp_path):
    model = NaiveRepVGG(Shape(classes=8), seed=1)
    model.linear.bias.data += 1e5
    typed, checks = typed_of(model, tmp_path)
    assert typed.kept["head/Gemm"].startswith("weight head.bias reaches 1e+05")
    assert len(typed.kept) == 1
    assert typed.exponents == {}
    assert_right(checks)


def test_a_feature_map_beyond_half_stays_in_float32_by_name(tmp_path):
    """Nothing behind an output can make up for a power of two; what is not an output is rescaled all the same."""
    model = NaiveRepVGG(Shape(classes=8), seed=1)
    scaled(model, {"stage1.0": (1e5, 1e5), "stage2.0": (1e-5, 1.0)})
    typed, checks = typed_of(model, tmp_path, features=(1, 2))
    assert list(typed.kept) == ["stage1.1/Conv", "stage1.1/Relu", "stage2.0/Conv", "stage2.0/Relu"]
    assert typed.kept["stage1.1/Relu"].startswith("activation ")
    assert list(typed.exponents) == ["stage1.0/Conv"]
    said = r"3 of 5 convs; stage1\.0: \d+ channels scaled by [^;]*; stage1\.1/Conv kept in float32: .*"
    assert re.fullmatch(said, checks[PRECISION].detail)
    rows = {row.convolution: row for row in typed.headroom}
    assert (rows["stage1.1/Conv"].fixed, rows["stage1.0/Conv"].fixed) == ("stage1 is an output", None)
    assert rows["stage1.1/Conv"].after == rows["stage1.1/Conv"].before
    assert_right(checks)


# --- the whole export


def check_of(report, stage):
    return next(check for check in report.checks if check.stage == stage)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The export of a network one block of which is beyond half: model, report, folder."""
    folder = tmp_path_factory.mktemp("whole")
    model = loud()
    return model, exported(model, folder), folder / "out"


def test_the_export_of_a_block_beyond_half_passes_with_every_convolution_in_half(whole):
    model, report, out = whole
    assert report.engines[0].kept_in_float32 == {}
    line = report.engines[0].audit["line"]
    assert line == "7 of 7 convs in FP16, Conv+ReLU in one kernel each, all 8 weights bit-equal"
    assert check_of(report, "fp32, graph contract").detail.endswith("; all 16 weights bit-equal")
    x = np.load(out / "golden.npz")["input"]
    typed = onnxruntime.InferenceSession(out / "net.fp16.onnx", providers=["CPUExecutionProvider"])
    answer = model.answer(torch.from_numpy(x)).numpy()
    assert np.abs(typed.run(None, {"input": x})[0] - answer).max() < 5e-3 * np.abs(answer).max()


def test_the_float32_file_is_the_same_with_and_without_half_and_rescaling(whole, tmp_path):
    model, _, out = whole
    exporter.export(saved_model(model.float(), tmp_path), tmp_path / "without", size=SIZE[0])
    assert (tmp_path / "without" / "net.onnx").read_bytes() == (out / "net.onnx").read_bytes()


def test_the_report_has_the_headroom_of_every_convolution_and_where_it_was_seen(whole):
    _, _, out = whole
    rows = json.loads((out / "report.json").read_text())["headroom"]
    assert [row["convolution"] for row in rows] == [
        f"stage{stage}.{index}/Conv" for stage, depth in enumerate((1, 2, 2, 1, 1)) for index in range(depth)
    ]
    scaled_rows = [row for row in rows if row["exponents"]]
    assert [row["convolution"] for row in scaled_rows] == ["stage1.0/Conv"]
    (row,) = scaled_rows
    assert row["before"]["factor"] < 1 < 4 <= row["after"]["factor"]
    assert row["before"]["bits"] == pytest.approx(np.log2(row["before"]["factor"]))
    summary = (out / "report.md").read_text()
    assert "## Headroom in half" in summary
    assert "Peaks on seeded noise (no --calib given); the least of 7 convolutions" in summary


def test_a_network_with_room_has_the_file_that_it_would_have_without_rescaling(tmp_path, monkeypatch):
    model = NaiveRepVGG(Shape(classes=8), seed=1)
    one, _ = typed_of(model, tmp_path)
    first = one.onnx.read_bytes()
    monkeypatch.setattr(fp16, "rescaled", lambda graph, peaks: rescaled(graph, {}))
    assert typed_of(model.float(), tmp_path)[0].onnx.read_bytes() == first


@pytest.mark.usefixtures("unscaled")
def test_fp16_never_silently_stays_float32(tmp_path):
    """Where every convolution would have to be kept the verdict is a failure, whatever the numbers say."""
    with pytest.raises(VerificationFailed) as raised:
        exported(loud_everywhere(), tmp_path)
    assert str(raised.value).startswith("fp16, precision asked for: 0 of 7 convs; stage0.0/Conv kept in float32: ")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "net.fp16.engine.rejected" in left
    assert all(name.endswith(".rejected") for name in left)


@pytest.mark.usefixtures("unscaled")
def test_one_convolution_in_half_is_enough_to_be_called_half_and_the_others_are_named(tmp_path):
    model = scaled(NaiveRepVGG(Shape(classes=8), seed=1), {"stage0": (1e7, 1e7), "stage3.0": (1e-7, 1.0)})
    report = exported(model, tmp_path)
    assert check_of(report, PRECISION).detail.startswith("1 of 7 convs; ")
    assert "1 of 7 convs in FP16, 6 of 7 convs in FP32, " in report.engines[0].audit["line"]


def test_the_layers_of_a_rescaled_network_are_compared_as_they_were(tmp_path):
    report = exported(loud(), tmp_path, layers=True)
    assert report.first_departing_layer is None
    errors = {row.layer: row.errors["fp16, explicit-cast twin"] for row in report.layers}
    assert 0 < errors["stage1.0"] < 5e-3


# --- planted faults


def forgotten(fitted):
    return dataclasses.replace(fitted, exponents={})


def one_off(fitted):
    return dataclasses.replace(fitted, exponents={name: values - 1 for name, values in fitted.exponents.items()})


def one_reader_wrong(fitted):
    weight = np.ldexp(fitted.graph.weights["stage1.1.weight"], -3)
    graph = dataclasses.replace(fitted.graph, weights={**fitted.graph.weights, "stage1.1.weight": weight})
    return dataclasses.replace(fitted, graph=graph)


def one_channel_of_another(fitted):
    """Channels 0 and 1 of the reader have each other's powers of two, in the file and in the record of the maker."""
    weights = dict(fitted.graph.weights)
    weights["stage1.1.weight"] = weights["stage1.1.weight"].copy()
    weights["stage1.1.weight"][:, :2] = np.ldexp(weights["stage1.1.weight"][:, :2], np.array([1, -1])[:, None, None])
    return dataclasses.replace(fitted, graph=dataclasses.replace(fitted.graph, weights=weights))


@pytest.mark.parametrize("change", [forgotten, one_off, one_reader_wrong, one_channel_of_another])
def test_a_wrong_power_of_two_fails_the_contract(change, tmp_path, monkeypatch):
    monkeypatch.setattr(fp16, "rescaled", lambda graph, peaks: change(rescaled(graph, peaks)))
    _, checks = typed_of(loud(), tmp_path)
    assert checks[CONTRACT].passed is False
    assert re.match(r"weight stage1\.\d\.\w+ differs from the fused one", checks[CONTRACT].detail)


def both_wrong(fitted):
    """A maker and its record, without its readers: the contract looks at the readers, and the twin sees it, too."""
    weights = dict(fitted.graph.weights)
    for part in ("weight", "bias"):
        weights[f"stage1.0.{part}"] = weights[f"stage1.0.{part}"] / 2
    exponents = {name: values - 1 for name, values in fitted.exponents.items()}
    return dataclasses.replace(fitted, graph=dataclasses.replace(fitted.graph, weights=weights), exponents=exponents)


def test_a_maker_without_its_readers_fails_contract_and_twin(tmp_path, monkeypatch):
    monkeypatch.setattr(fp16, "rescaled", lambda graph, peaks: both_wrong(rescaled(graph, peaks)))
    _, checks = typed_of(loud(), tmp_path)
    assert (
        checks[CONTRACT].detail == "weight stage1.1.weight differs from the fused one times its channels' powers of two"
    )
    assert checks[TWIN].passed is False
