"""The sides of the INT8 benchmark are comparable, and it runs from end to end."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from benchmarks import int8, int8_exporter, int8_figures, int8_onnxruntime, int8_timing, int8_worker
from benchmarks.int8_table import OURS, THEIRS
from benchmarks.int8_worker import Cost
from exporter import export
from tests.networks import NaiveRepVGG, Shape, contiguous_float


def cost(seconds: float = 2.0, peak: float = 300.0, digest: str = "a", images: int = 4) -> Cost:
    return Cost(seconds, 2 * seconds, 100.0, peak, images, digest)


def test_both_sides_make_both_forms_and_the_stress_has_4_bits():
    assert len(list(int8.cases(stress=False))) == 10
    found = {(c.form, c.bits, c.side, c.what): c.arguments() for c in int8.cases(stress=True)}
    assert len(found) == 15
    assert found["int8.rtx", 8, THEIRS, "Entropy"] == ["--weight-bits", "8", "--method", "Entropy", "--per-tensor"]
    assert found["int8", 4, THEIRS, "MinMax"] == ["--weight-bits", "4", "--method", "MinMax"]
    assert found["int8.rtx", 8, OURS, "high"] == ["--weight-bits", "8", "--form", "int8.rtx", "--effort", "high"]


def test_the_sides_take_turns_and_the_warm_up_is_not_counted(capsys):
    order = []

    def side(name: str, seconds: list[float]):
        def once() -> Cost:
            order.append(name)
            return cost(seconds.pop(0))

        return once

    sides = {(THEIRS, "MinMax"): side("A", [9.0, 1.0, 2.0]), (OURS, "default"): side("B", [8.0, 3.0, 4.0])}
    theirs, ours = int8_timing.in_turns(512, sides, 2, warm_up=True)
    assert "".join(order) == "ABABAB"
    assert [run.seconds for run in theirs.runs] == [1.0, 2.0]
    assert [run.seconds for run in ours.runs] == [3.0, 4.0]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("other", [{"digest": "b"}, {"images": 3}])
def test_sides_that_saw_other_images_end_the_benchmark(other):
    int8_worker.check_same_images([cost(), cost(5.0, 900.0)])
    with pytest.raises(SystemExit, match="did not calibrate on the same images"):
        int8_worker.check_same_images([cost(), cost(**other)])


def test_the_made_up_images_do_not_depend_on_their_number_and_neighbours_are_alike():
    images = int8_timing.structured_images(6, size=64)
    assert (images.shape, images.dtype) == ((6, 64, 64, 3), np.uint8)
    np.testing.assert_array_equal(images[:2], int8_timing.structured_images(2, size=64))
    assert len({image.tobytes() for image in images}) == 6
    columns = images.reshape(-1, 64, 3).astype(float)
    assert np.corrcoef(columns[:, :-1].ravel(), columns[:, 1:].ravel())[0, 1] > 0.9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A checkpoint, its float32 ONNX file, and 12 calibration and 30 labelled images."""
    directory = tmp_path_factory.mktemp("tiny")
    network = NaiveRepVGG(Shape())
    torch.save(contiguous_float(network.state_dict()), directory / "tiny.pt")
    images = int8_timing.structured_images(42, size=32)
    labels = network.answer(torch.from_numpy(images / 127.5 - 1).permute(0, 3, 1, 2)).argmax(dim=1).numpy()
    np.savez(directory / "calib.npz", images=images[:12])
    np.savez(directory / "test.npz", images=images[12:], labels=labels[12:])
    export(directory / "tiny.pt", directory / "out", size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    return {name: directory / name for name in ("tiny.pt", "calib.npz", "test.npz")} | {
        "float32": directory / "out" / "tiny.onnx"
    }


def in_this_process(module: str, arguments: list[object]) -> Cost:
    """``cost_of_worker`` without a process, which would import torch once more for each file."""
    worker = {"benchmarks.int8_onnxruntime": int8_onnxruntime, "benchmarks.int8_exporter": int8_exporter}[module]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        worker.main([str(argument) for argument in arguments])
    return Cost(**json.loads(int8_worker.last_line(output.getvalue())))


def arguments_for(tiny: dict[str, pathlib.Path], **others: object) -> list[str]:
    given = {"checkpoint": tiny["tiny.pt"], "calib": tiny["calib.npz"], "labels": tiny["test.npz"], "size": 32}
    given |= {"mean": "0.5,0.5,0.5", "std": "0.5,0.5,0.5", "parts": "figures", **others}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_the_benchmark_from_end_to_end(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(int8, "cost_of_worker", in_this_process)
    int8.main(arguments_for(tiny, json=tmp_path / "figures.json"))
    content = json.loads((tmp_path / "figures.json").read_text())
    rows = content["figures"]
    assert [sum(r["side"] == side for r in rows) for side in (THEIRS, OURS)] == [15, 10]
    assert {(r["network"], r["form"], r["bits"]) for r in rows} == {
        *(("trained", form, 8) for form in int8.FORMS),
        *(("rescaled", form, 8) for form in int8.FORMS),
        ("trained", "int8", 4),
    }
    assert {r["cost"]["images"] for r in rows} == {12}
    assert {r["figures"]["float32_top1"] for r in rows} == {100.0}
    found = {(r["network"], r["form"], r["bits"], r["side"], r["what"]): r["figures"]["sqnr_db"] for r in rows}
    assert found["trained", "int8", 8, OURS, "default"] > 20
    assert found["rescaled", "int8", 8, OURS, "default"] > found["rescaled", "int8", 8, THEIRS, "MinMax"] + 3
    assert found["trained", "int8", 4, THEIRS, "MinMax"] < found["trained", "int8", 8, THEIRS, "MinMax"] - 6
    assert all((r["gain"] is None) == (r["side"] == THEIRS) for r in rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 25 + 1 + 1
    assert lines[-1] == content["machine"]


def test_a_side_that_is_given_other_images_is_noticed_by_the_benchmark(tiny, tmp_path, monkeypatch):
    with np.load(tiny["calib.npz"]) as archive:
        images = archive["images"].copy()
    images[5, 3, 3, 1] ^= 1
    np.savez(tmp_path / "other.npz", images=images)

    def deceived(module: str, arguments: list[object]) -> Cost:
        swapped = [arguments[0], tmp_path / "other.npz", *arguments[2:]] if "MinMax" in arguments else arguments
        return in_this_process(module, swapped)

    monkeypatch.setattr(int8, "cost_of_worker", deceived)
    monkeypatch.setattr(
        int8, "cases", lambda *, stress: [int8.Case("int8", 8, THEIRS, m) for m in ("MinMax", "Entropy")]
    )
    network = int8.Network("trained", tiny["float32"], tiny["calib.npz"], tiny["test.npz"])
    with pytest.raises(SystemExit, match="did not calibrate on the same images"):
        int8.rows_of_network(network, tmp_path, stress=False)
    monkeypatch.setattr(int8, "cost_of_worker", in_this_process)
    assert [found.what for found in int8.rows_of_network(network, tmp_path, stress=False)] == ["MinMax", "Entropy"]


def test_nothing_is_judged_on_images_that_it_was_calibrated_on(tiny, tmp_path):
    with np.load(tiny["test.npz"]) as labelled, np.load(tiny["calib.npz"]) as calibration:
        images = np.concatenate([labelled["images"][:7], calibration["images"][3:4]])
        np.savez(tmp_path / "leak.npz", images=images, labels=np.zeros(8, np.int64))
    network = int8.Network("trained", tiny["float32"], tiny["calib.npz"], tmp_path / "leak.npz")
    with pytest.raises(SystemExit, match="judge on other ones"):
        int8.rows_of_network(network, tmp_path, stress=False)


@pytest.mark.parametrize(
    ("flags", "scales", "codes"),
    [
        ([], {1}, onnx.TensorProto.INT8),
        (["--per-tensor"], {0}, onnx.TensorProto.INT8),
        (["--weight-bits", "4"], {1}, onnx.TensorProto.INT4),
    ],
    ids=["per channel", "per tensor", "4 bits"],
)
def test_the_other_sides_weights_are_signed_and_symmetric(tiny, tmp_path, flags, scales, codes):
    out = tmp_path / "int8.onnx"
    in_this_process("benchmarks.int8_onnxruntime", [tiny["float32"], tiny["calib.npz"], out, *flags])
    model = onnx.load(str(out))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantized = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights]
    kernels = [node for node in dequantized if len(weights[node.input[0]].dims) == 4]
    assert len(kernels) == 7
    assert {len(weights[node.input[1]].dims) for node in kernels} == scales
    assert {weights[node.input[0]].data_type for node in kernels} == {codes}
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    zero_points = [onnx.numpy_helper.to_array(weights[node.input[2]]) for node in quantizers]
    assert len(quantizers) > 7
    assert all(zero_point.dtype == np.int8 and not zero_point.any() for zero_point in zero_points)


def test_the_other_side_is_given_every_image_once_and_in_order(tiny):
    dataset = int8_worker.watched_dataset(tiny["calib.npz"], tiny["float32"])
    reader = int8_onnxruntime.Reader(dataset, size=5)
    batches = []
    while (batch := reader.get_next()) is not None:
        batches.append(batch["input"])
    assert [len(batch) for batch in batches] == [5, 5, 2]
    with np.load(tiny["calib.npz"]) as archive:
        expected = archive["images"].transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(np.concatenate(batches), expected, atol=1e-6)
    assert len(dataset.given) == 12


def test_files_are_run_without_optimizations(tiny, monkeypatch):
    levels, session = [], onnxruntime.InferenceSession

    def opened(path: str, options: onnxruntime.SessionOptions, **others: object) -> onnxruntime.InferenceSession:
        levels.append(options.graph_optimization_level)
        return session(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    images = int8_worker.dataset_of(tiny["test.npz"], tiny["float32"])
    assert int8_figures.logits_of_file(tiny["float32"], images).shape == (30, 7)
    assert levels == [onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL]


def test_a_process_measures_itself_and_says_which_images_it_saw(tiny, tmp_path):
    arguments = [tiny["float32"], tiny["calib.npz"], tmp_path / "int8.onnx"]
    found = int8_worker.cost_of_worker("benchmarks.int8_onnxruntime", arguments)
    assert 0 < found.seconds < 60
    assert found.cpu_seconds > 0
    assert 50 < found.loaded_mb <= found.peak_mb
    assert found.above_mb == found.peak_mb - found.loaded_mb
    here = in_this_process("benchmarks.int8_onnxruntime", arguments)
    assert (found.images, found.digest) == (here.images, here.digest) == (12, here.digest)


def test_memory_that_a_quantization_needs_is_in_its_peak(tiny):
    images = int8_worker.watched_dataset(tiny["calib.npz"], tiny["float32"])
    before = int8_worker.cost_of(lambda: None, images)
    held = int8_worker.cost_of(lambda: np.ones(200 << 17).sum(), images)
    room = before.peak_mb - held.loaded_mb  # what this process has once had and given back
    assert held.above_mb >= max(room, 195)
    assert held.above_mb <= room + 205


def test_a_worker_that_fails_ends_the_benchmark_with_its_last_line():
    with pytest.raises(SystemExit, match=r"^error: .* -m benchmarks.no_such x ended with status 1: .*No module named"):
        int8_worker.cost_of_worker("benchmarks.no_such", ["x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "figures,speed"], "unknown part 'speed'; choose from figures, timing"),
        (["--rounds", "0"], "'0' is not a whole number above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        int8.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
