"""Planted faults in an INT8 run: each fails the run in the check that should see it, by name; the files are kept aside.

A fault is planted between two steps. Its twin, the same place with nothing changed, passes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import exporter
from exporter import int8, processes
from exporter.quantization import calibration, equivalence, layerwise
from tests.small_int8 import SIZE, network, save_images, save_network
from tests.unsimplified import Unsimplified

FORMS = ("int8", "int8.rtx")
CONTRACT, ASKED = "contract", "precision asked for"
SIMULATION, QUALITY = "ONNX Runtime against the simulation", "all of --calib against float32"
FLOAT64 = "as it is written against float64"
EQUAL = "equalization in float32"
AUDIT = "int8, engine audit"


def both(*stages):
    """The same checks of both forms."""
    return {f"{form}, {stage}" for form in FORMS for stage in stages}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small spend more time on handing work over than on the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_simplifier(monkeypatch):
    monkeypatch.setattr(processes, "SimplifierProcess", Unsimplified)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """model.pt with its images, and what a run makes of them in FP32 and INT8."""
    folder = tmp_path_factory.mktemp("exported")
    model, images = save_network(folder / "model.pt"), save_images(folder / "images.npz")
    exporter.export(model, folder / "out", trt=("int8",), size=SIZE, calibration=images)
    return folder


@pytest.fixture
def failed_in(exported, command, tmp_path):
    """``failed_in(reused=...)``: the names of the checks that fail, after holding what such a run leaves behind.

    With ``reused`` it starts from the calibration of ``exported``, and so ends sooner.
    """

    def run(*, reused=True):
        if reused:
            (tmp_path / "out").mkdir()
            shutil.copy(exported / "out" / "model.int8.calib.json", tmp_path / "out")
        before = {path.name for path in tmp_path.glob("out/*")}
        images = ("--calib", exported / "images.npz")
        outcome = command(exported / "model.pt", "--size", SIZE, "--trt", "int8", *images, "--out", "out")
        suffix = ".rejected" if outcome.code else ""
        report = json.loads((tmp_path / "out" / f"report.json{suffix}").read_text())
        failed = {check["stage"] for check in report["checks"] if check["passed"] is False}
        assert (outcome.code, report["passed"]) == ((1, False) if failed else (0, True))
        if failed:
            assert all(f"{stage}: " in outcome.error for stage in failed)
            assert all(f"FAIL {stage}: " in outcome.stdout for stage in failed)
            names = {file["name"] for file in report["files"]} | {"report.json", "report.md"}
            assert {path.name for path in (tmp_path / "out").iterdir()} == before | {
                f"{name}.rejected" for name in names
            }
        return failed

    return run


# Where faults are planted


def plant_file(monkeypatch, change):
    """``change`` gets each INT8 model after it was written."""
    right = int8.write_onnx

    def wrong(graph, path):
        files = right(graph, path)
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)
        return files

    monkeypatch.setattr(int8, "write_onnx", wrong)


def plant_graph(monkeypatch, change):
    """``change`` gets the quantized network before it becomes a graph."""
    right = int8.graph_from_quantized
    monkeypatch.setattr(int8, "graph_from_quantized", lambda quantized: right(change(quantized)))


def plant_simulation(monkeypatch, change):
    """``change`` gets what each step is simulated to give, for the comparison with the file."""

    class Simulation(equivalence.Simulation):
        def computed(self, step, given):
            return change(super().computed(step, given))

    monkeypatch.setattr(equivalence, "Simulation", Simulation)


def plant_calibrated(monkeypatch, change):
    """``change`` gets what was calibrated, form by form."""
    right = int8.calibrated_forms
    monkeypatch.setattr(int8, "calibrated_forms", lambda *arguments: [change(one) for one in right(*arguments)])


def plant_ranges(monkeypatch, change):
    """``change`` gets the range of each layer's input."""
    right = layerwise.range_from_histogram
    monkeypatch.setattr(layerwise, "range_from_histogram", lambda *arguments: change(right(*arguments)))


def plant_factors(monkeypatch, change):
    """``change`` gets the factors of equalization."""
    right = calibration.factors_from_images
    monkeypatch.setattr(calibration, "factors_from_images", lambda *arguments: change(right(*arguments)))


def plant_equalized(monkeypatch, change):
    """``change`` gets the weights of the graph that is taken for the float network from then on."""
    right = calibration.with_factors

    def wrong(graph, factors):
        found = right(graph, factors)
        return dataclasses.replace(found, weights=change(dict(found.weights)))

    monkeypatch.setattr(calibration, "with_factors", wrong)


def plant_known(monkeypatch, change):
    """``change`` gets what an earlier run is said to have found."""
    right = int8.known_calibration

    def wrong(*arguments):
        return {form: change(known) for form, known in right(*arguments).items()}

    monkeypatch.setattr(int8, "known_calibration", wrong)


def plant_compiled(monkeypatch, change):
    """``change`` gets the path of the ONNX file that is handed to the compiler."""
    right = int8.submit
    monkeypatch.setattr(
        int8,
        "submit",
        lambda one, compiler, request: right(dataclasses.replace(one, onnx=change(one.onnx)), compiler, request),
    )


# The faults


def unchanged(value):
    return value


def initializer(model, end):
    return next(tensor for tensor in model.graph.initializer if tensor.name.endswith(end))


def with_one_other_code(model):
    tensor = next(
        tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims
    )
    codes = numpy_helper.to_array(tensor).copy()
    codes.flat[3] += 1 if codes.flat[3] < 0 else -1
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))


def layer_changed(change, layer="stage2.0/Conv"):
    def wrong(quantized):
        layers = dict(quantized.layers)
        layers[layer] = change(layers[layer])
        return dataclasses.replace(quantized, layers=layers)

    return wrong


with_another_input_scale = layer_changed(lambda one: dataclasses.replace(one, input_scale=one.input_scale * 2))
with_mixed_channels = layer_changed(lambda one: dataclasses.replace(one, weight=one.weight[::-1].copy()))
without_bias = layer_changed(lambda one: dataclasses.replace(one, bias=np.zeros_like(one.bias)))


def calibrated_without_bias(calibrated):
    return dataclasses.replace(calibrated, quantized=without_bias(calibrated.quantized))


def with_every_layer_kept(calibrated):
    quantized = calibrated.quantized
    kept = {**quantized.kept, **dict.fromkeys(quantized.layers, "a fault")}
    return dataclasses.replace(calibrated, quantized=dataclasses.replace(quantized, layers={}, kept=kept))


def scaled_by(factor):
    return lambda weights: {**weights, "stage3.0.weight": weights["stage3.0.weight"] * np.float32(factor)}


def with_ranges_of_another_network(known):
    return dataclasses.replace(known, ranges={name: value / 12 for name, value in known.ranges.items()})


FAULTS = {
    "another scale of an input": (plant_graph, with_another_input_scale, both(CONTRACT, SIMULATION)),
    "channels in another order": (plant_graph, with_mixed_channels, both(CONTRACT, SIMULATION, FLOAT64)),
    "no bias": (plant_graph, without_bias, both(CONTRACT, SIMULATION, FLOAT64)),
    "another simulation": (plant_simulation, lambda y: y * 1.01, both(SIMULATION)),
    "no bias in what was calibrated": (plant_calibrated, calibrated_without_bias, both(FLOAT64)),
    "no layer in INT8": (plant_calibrated, with_every_layer_kept, both(ASKED)),
    "ranges that clip": (plant_ranges, lambda limit: limit / 12, both(QUALITY, FLOAT64)),
    "equalization that is not exact": (plant_equalized, scaled_by(1.5), both(EQUAL, FLOAT64)),
    "equalization that is hardly inexact": (plant_equalized, scaled_by(1.001), both(EQUAL)),
    "a stale calibration": (plant_known, with_ranges_of_another_network, both(QUALITY, FLOAT64)),
}
CALIBRATED_ANEW = (plant_ranges, plant_factors, plant_equalized)


@pytest.mark.parametrize(("plant", "change", "stages"), FAULTS.values(), ids=FAULTS)
def test_a_fault_fails_where_it_is(plant, change, stages, failed_in, monkeypatch):
    plant(monkeypatch, change)
    assert failed_in(reused=plant not in CALIBRATED_ANEW) == stages


@pytest.mark.parametrize(
    "plant", [*dict.fromkeys(plant for plant, _, _ in FAULTS.values()), plant_file, plant_compiled]
)
def test_nothing_fails_with_nothing_planted_there(plant, failed_in, monkeypatch):
    def changed_nothing(model):
        return None if plant is plant_file else model

    plant(monkeypatch, changed_nothing)
    assert failed_in(reused=plant not in CALIBRATED_ANEW) == set()


def test_one_code_that_is_another_by_one_is_seen(failed_in, monkeypatch):
    """In the file itself; whether so little can be seen in what it computes is another matter."""
    plant_file(monkeypatch, with_one_other_code)
    assert both(CONTRACT) <= failed_in() <= both(CONTRACT, SIMULATION)


@pytest.mark.parametrize("other", ["model.onnx", "model.int8.onnx"])
def test_an_engine_of_another_file_fails_the_audit(other, exported, failed_in, monkeypatch):
    plant_compiled(monkeypatch, lambda _: exported / "out" / other)
    assert failed_in() == {AUDIT}


def test_factors_that_make_it_worse_are_left_out(failed_in, tmp_path, monkeypatch):
    """Whatever equalization finds, the network as it is stays to be compared with."""

    def far_apart(factors):
        return {name: factor * np.exp(np.linspace(-3, 3, len(factor))) for name, factor in factors.items()}

    plant_factors(monkeypatch, far_apart)
    assert failed_in(reused=False) == set()
    records = json.loads((tmp_path / "out" / "report.json").read_text())["quantization"]
    assert [record["equalized"] for record in records] == [False, False]
    assert all(record["equalized_db"] < record["plain_db"] for record in records)


def test_a_file_that_says_that_it_is_from_the_same_is_held_to_its_figures(exported, failed_in, command, tmp_path):
    """A calibration of a louder network, under the hashes of this one."""
    state = {name: tensor.clone() for name, tensor in network().state.items()}
    for name in state:
        if re.fullmatch(r"stage2\.0\.rbr_\w+\.bn\.(weight|bias)", name):
            state[name] *= 100
    torch.save(state, tmp_path / "loud.pt")
    flags = ("--size", SIZE, "--trt", "int8", "--calib", exported / "images.npz", "--ignore-witness")
    assert command("loud.pt", *flags, "--out", "loud").code == 0
    loud = json.loads((tmp_path / "loud" / "loud.int8.calib.json").read_text())
    path = tmp_path / "out" / "model.int8.calib.json"
    own = json.loads((exported / "out" / path.name).read_text())
    path.parent.mkdir()
    path.write_text(json.dumps({**loud, "binding": own["binding"]}))
    outcome = command(exported / "model.pt", *flags[:-1], "--out", "out")
    assert outcome.code == 1
    assert f"int8, {QUALITY}: SQNR " in outcome.error
    assert path.read_text() == json.dumps({**loud, "binding": own["binding"]})
