"""Planted faults: each makes the verdict fail, or the run refuse, in the stage that should see it, and names the stage.

Four places to plant them: between the steps of an export, in a file that is given to ``exporter.verify``, among the
files that a serving machine verifies, and in what a user says about images or network. Each place has its twin: the
same with the fault left out passes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import exporter
from engines.errors import InputRejected
from engines.markdown_text import escaped
from engines.verification import Verification
from exporter import onnxruntime_cpu, pipeline, processes, typed
from exporter import plain as plain_module
from exporter.checkpoint import checkpoint_from_path
from exporter.errors import ReportedError, VerificationFailed
from exporter.report import markdown_from_report
from exporter.repvgg import network_from_checkpoint
from exporter.request import Request
from exporter.verify import main as verify
from exporter.verify import verdict_of
from exporter.witness import CLEAR, SUSPICIOUS, WRONG, witness_from_images
from tests.families import Network
from tests.family_names import APPLE, OFFICIAL, PLUS, QAREPVGG
from tests.family_names import Shape as FamilyShape
from tests.networks import NaiveRepVGG, Shape, contiguous_float
from tests.reports import REPORT
from tests.unsimplified import Unsimplified

SIZE = 20
FUSED = "stage1.1.fused.weight"
BLOCKS, NETWORK = "fusion, block by block", "fusion, whole network in float64"
FP32, FP32_GRAPH = "fp32, ONNX Runtime against float64", "fp32, graph contract"
FP16, FP16_GRAPH = "fp16, explicit-cast twin against float64", "fp16, graph contract"
AUDIT = "fp16, engine audit"
WITNESS = "witness, batch norms against your images"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small spend more time on handing work over than on the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unchanged(value):
    return value


# --- between the steps of an export


def plant_fusion(monkeypatch, change):
    """``change`` gets (block, tensors, epsilon) before a block is fused."""
    right = plain_module.convolution_from_block
    monkeypatch.setattr(
        plain_module, "convolution_from_block", lambda block, own, eps: right(*change((block, dict(own), eps)))
    )


def plant_fused(monkeypatch, change):
    """``change`` gets the fused weights by name."""
    right = pipeline.plain_from_repvgg

    def wrong(*arguments):
        plain = right(*arguments)
        return dataclasses.replace(plain, tensors=change(dict(plain.tensors)))

    monkeypatch.setattr(pipeline, "plain_from_repvgg", wrong)


def plant_structure(monkeypatch, change):
    """``change`` gets the architecture before the graph is made."""
    right = pipeline.structure_from_architecture
    monkeypatch.setattr(pipeline, "structure_from_architecture", lambda a, size: right(change(a), size))


def plant_simplified(monkeypatch, change):
    """``change`` gets the model that comes back from the simplifier."""
    right = Unsimplified.result
    monkeypatch.setattr(
        Unsimplified, "result", lambda self: change(onnx.ModelProto.FromString(right(self))).SerializeToString()
    )


def plant_session(monkeypatch, change):
    """``change`` gets each output of every batch that ONNX Runtime computes."""
    right = onnxruntime_cpu.Session.run

    def wrong(self, batch):
        return {name: change(output) for name, output in right(self, batch).items()}

    monkeypatch.setattr(onnxruntime_cpu.Session, "run", wrong)


def plant_outputs(monkeypatch, change):
    """``change`` gets the images and the outputs by name of every batch that ONNX Runtime computes."""
    right = onnxruntime_cpu.Session.run
    monkeypatch.setattr(onnxruntime_cpu.Session, "run", lambda self, batch: change((batch, right(self, batch)))[1])


def plant_rewrite(monkeypatch, change):
    """``change`` gets (weights, peaks): what the float16 rewrite starts from."""
    float32, half, *others = pipeline.PRECISIONS

    def wrong(graph, peaks):
        weights, seen = change((dict(graph.weights), dict(peaks)))
        return half.rewrite(dataclasses.replace(graph, weights=weights), seen)

    monkeypatch.setattr(pipeline, "PRECISIONS", (float32, dataclasses.replace(half, rewrite=wrong), *others))


def plant_compiled(monkeypatch, change):
    """``change`` gets the path of the ONNX file that is handed to the compiler."""
    right = pipeline.submit
    monkeypatch.setattr(
        pipeline,
        "submit",
        lambda one, compiler, request: right(dataclasses.replace(one, onnx=change(one.onnx)), compiler, request),
    )


def with_weight(change, name=FUSED):
    return lambda tensors: {**tensors, name: change(tensors[name].clone())}


def nan_at_one(weight):
    weight.view(-1)[0] = float("nan")
    return weight


def with_stride_one(architecture):
    blocks = [dataclasses.replace(b, stride=1) if b.name == "stage3.0" else b for b in architecture.blocks]
    return dataclasses.replace(architecture, blocks=tuple(blocks))


def with_another_activation(model):
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type = "Sigmoid"
    return model


def without_an_activation(model):
    node = next(node for node in model.graph.node if node.name == "stage2.0/Relu")
    for reader in model.graph.node:
        reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
    model.graph.node.remove(node)
    return model


def stale(fusion):
    block, own, eps = fusion
    return block, {**own, "dense.bn.running_mean": own["dense.bn.running_mean"] * 0.9}, eps


def without_tensors(start):
    return lambda fusion: (
        fusion[0],
        {name: t for name, t in fusion[1].items() if not name.startswith(start)},
        fusion[2],
    )


def without_branch(branch):
    def change(fusion):
        block, *others = fusion
        return dataclasses.replace(block, branches=tuple(one for one in block.branches if one != branch)), *others

    return change


def with_se_on_the_other_side(architecture):
    blocks = [dataclasses.replace(b, se_after_activation=not b.se_after_activation) for b in architecture.blocks]
    return dataclasses.replace(architecture, blocks=tuple(blocks))


def with_a_wider_padding(model):
    node = next(node for node in model.graph.node if node.name == "stage4.1/Conv")
    next(attribute for attribute in node.attribute if attribute.name == "pads").ints[:] = [1] * 4
    return model


def with_one_output(name, change):
    return lambda run: (run[0], {**run[1], name: change(run[1][name])})


def exchanged(run):
    return run[0], {"stage1": run[1]["stage2"], "stage2": run[1]["stage1"]}


def wrong_at(size):
    def change(run):
        batch, outputs = run
        return batch, {name: value * (1.001 if batch.shape[2] == size else 1) for name, value in outputs.items()}

    return change


def loud_checkpoint(folder):
    """A network whose first block is a million times too loud and whose next one makes up for it."""
    state = contiguous_float(NaiveRepVGG(Shape()).state_dict())
    for name in state:
        if re.fullmatch(r"stage0\.rbr_\w+\.bn\.(weight|bias)", name):
            state[name] *= 1e6
        if re.fullmatch(r"stage1\.0\.rbr_(dense|1x1)\.conv\.weight", name):
            state[name] *= 1e-6
    torch.save(state, folder / "model.pt")


def other_onnx(_path):
    return OTHER["path"]


OTHER = {}

EXPORT_FAULTS = {
    "another epsilon in the fusion": (plant_fusion, lambda f: (f[0], f[1], 1e-3), [BLOCKS, NETWORK, FP32]),
    "a branch dropped": (
        plant_fusion,
        lambda f: (dataclasses.replace(f[0], branches=f[0].branches[:-1]), *f[1:]),
        [BLOCKS, NETWORK, FP32],
    ),
    "stale statistics": (plant_fusion, stale, [BLOCKS, NETWORK, FP32]),
    "swapped channels": (plant_fused, with_weight(lambda w: w[[1, 0, *range(2, len(w))]]), [FP32]),
    "a transposed kernel": (plant_fused, with_weight(lambda w: w.transpose(2, 3).contiguous()), [FP32]),
    "a NaN in one weight": (plant_fused, with_weight(nan_at_one), [FP32]),
    "a lost bias": (plant_fused, with_weight(torch.zeros_like, "stage2.0.fused.bias"), [FP32]),
    "a constant output": (plant_fused, with_weight(torch.zeros_like, "head.weight"), [FP32]),
    "colours in the other order": (plant_fused, with_weight(lambda w: w.flip(1), "stage0.0.fused.weight"), [FP32]),
    "another order of the classes": (plant_fused, with_weight(lambda w: w.roll(1, 0), "head.weight"), [FP32]),
    "one block's stride": (plant_structure, with_stride_one, [FP32_GRAPH, FP32]),
    "another activation": (plant_simplified, with_another_activation, [FP32_GRAPH, FP32]),
    "no activation": (plant_simplified, without_an_activation, [FP32_GRAPH, FP32]),
    "rows of a batch mixed up": (plant_session, lambda y: y[::-1], [FP32]),
    "rows of a large batch mixed up": (plant_session, lambda y: y[::-1] if len(y) > 3 else y, [FP32]),
    "a batch that loses a row": (plant_session, lambda y: y[:-1] if len(y) > 1 else y, [FP32]),
}
TYPED_FAULTS = {
    "another weight in half": (
        plant_rewrite,
        lambda f: (with_weight(lambda w: w * np.float32(1.5), "stage2.0.weight")(_cloning(f[0])), f[1]),
        [FP16_GRAPH, FP16],
    ),
    "saturated half": (plant_rewrite, lambda f: (f[0], {}), [FP16]),
    "an engine of another checkpoint": (plant_compiled, other_onnx, [AUDIT]),
}


SE_BEFORE = (OFFICIAL, FamilyShape(se=3))
SE_AFTER = (PLUS, FamilyShape(se=3))
MOBILE = (APPLE, FamilyShape(convs=2))
QA = (QAREPVGG, FamilyShape())
ALIKE = (OFFICIAL, FamilyShape(widths=(8, 8, 8, 16, 20), strides=(2, 2, 1, 2, 2)))
MAPS = ["--features", "1,2", "--strides", "2,2,1,2,2"]
RANGE = ["--size", "16:20:24"]
FAMILY_FAULTS = {
    "SE behind the ReLU": (SE_BEFORE, [], plant_structure, with_se_on_the_other_side, [FP32_GRAPH, FP32]),
    "SE before the ReLU": (SE_AFTER, [], plant_structure, with_se_on_the_other_side, [FP32_GRAPH, FP32]),
    "a lost batch norm behind the sum": (QA, [], plant_fusion, without_tensors("post."), [BLOCKS, NETWORK, FP32]),
    "a lost identity without tensors": (QA, [], plant_fusion, without_branch("bare_identity"), [BLOCKS, NETWORK, FP32]),
    "a lost branch of several": (MOBILE, [], plant_fusion, without_branch("dense1"), [BLOCKS, NETWORK, FP32]),
    "padding around a 1x1 kernel": (MOBILE, [], plant_simplified, with_a_wider_padding, [FP32_GRAPH, FP32]),
    "two feature maps exchanged": (ALIKE, MAPS, plant_outputs, exchanged, [FP32]),
    "one feature map of another scale": (
        ALIKE, MAPS, plant_outputs, with_one_output("stage1", lambda y: y * np.float32(1.001)), [FP32],
    ),
    "one feature map whose rows are mixed up": (
        ALIKE, MAPS, plant_outputs, with_one_output("stage2", lambda y: y[::-1]), [FP32],
    ),
    "a NaN in one feature map": (ALIKE, MAPS, plant_outputs, with_one_output("stage2", lambda y: y * np.nan), [FP32]),
    "the smallest size": (SE_BEFORE, RANGE, plant_outputs, wrong_at(16), [f"{FP32} at 16x16"]),
    "the largest size": (SE_AFTER, RANGE, plant_outputs, wrong_at(24), [f"{FP32} at 24x24"]),
    "the usual size": (QA, RANGE, plant_outputs, wrong_at(20), [FP32]),
}  # fmt: skip
FAMILY_TWINS = {
    (plant, network[0].name, tuple(said)): (network, said, plant)
    for network, said, plant, _, _ in FAMILY_FAULTS.values()
}


class _Cloned(np.ndarray):
    def clone(self):
        return self.copy()


def _cloning(weights):
    return {name: array.view(_Cloned) for name, array in weights.items()}


@pytest.fixture
def stages_that_fail(command, tmp_path, monkeypatch):
    """Exports model.pt; the stages that failed, after holding that JSON, Markdown, JUnit and error all name them."""

    def run(*arguments):
        monkeypatch.setattr(processes, "SimplifierProcess", Unsimplified)
        outcome = command("model.pt", "--size", SIZE, "--out", "out", "--junit", "junit.xml", *arguments)
        suffix = ".rejected" if outcome.code else ""
        report = json.loads((tmp_path / "out" / f"report.json{suffix}").read_text())
        failed = [check["stage"] for check in report["checks"] if check["passed"] is False]
        assert report["passed"] is not bool(failed)
        summary = (tmp_path / "out" / f"report.md{suffix}").read_text()
        assert re.findall(r"^\| (.*?) \| \*\*FAIL\*\* \|", summary, re.MULTILINE) == failed
        assert summary.splitlines()[0].startswith(f"# model.pt: {'FAIL' if failed else 'PASS'}: ")
        cases = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("testcase")
        assert [case.get("name") for case in cases if case.find("failure") is not None] == failed
        assert outcome.code == (1 if failed else 0)
        assert all(f"{stage}: " in outcome.error for stage in failed)
        return failed

    return run


@pytest.mark.parametrize(("plant", "change", "stages"), EXPORT_FAULTS.values(), ids=EXPORT_FAULTS)
def test_a_fault_in_an_export_fails_where_it_is(plant, change, stages, checkpoint, stages_that_fail, monkeypatch):
    plant(monkeypatch, change)
    assert stages_that_fail() == stages


@pytest.mark.parametrize(
    "plant", dict.fromkeys(plant for plant, _, _ in EXPORT_FAULTS.values()), ids=lambda p: p.__name__
)
def test_an_export_passes_with_nothing_planted_there(plant, checkpoint, stages_that_fail, monkeypatch):
    plant(monkeypatch, unchanged)
    assert stages_that_fail() == []


def save_network(network, folder):
    family, shape = network
    torch.save(Network(family, shape).state, folder / "model.pt")


@pytest.mark.parametrize(("network", "said", "plant", "change", "stages"), FAMILY_FAULTS.values(), ids=FAMILY_FAULTS)
def test_a_fault_in_an_export_of_another_family_output_or_size_fails_where_it_is(
    network, said, plant, change, stages, tmp_path, stages_that_fail, monkeypatch
):
    save_network(network, tmp_path)
    plant(monkeypatch, change)
    assert stages_that_fail(*said) == stages


@pytest.mark.parametrize(
    ("network", "said", "plant"), FAMILY_TWINS.values(), ids=[f"{p.__name__}-{name}" for p, name, _ in FAMILY_TWINS]
)
def test_an_export_of_another_family_passes_with_nothing_planted_there(
    network, said, plant, tmp_path, stages_that_fail, monkeypatch
):
    save_network(network, tmp_path)
    plant(monkeypatch, unchanged)
    assert stages_that_fail(*said) == []


@pytest.mark.parametrize(("plant", "change", "stages"), TYPED_FAULTS.values(), ids=TYPED_FAULTS)
def test_a_fault_in_half_precision_fails_where_it_is(
    plant, change, stages, tmp_path, exported, stages_that_fail, monkeypatch
):
    OTHER["path"] = exported / "other" / "other.fp16.onnx"
    loud_checkpoint(tmp_path)
    plant(monkeypatch, change)
    assert stages_that_fail("--trt", "fp16") == stages


@pytest.mark.parametrize("plant", [plant_rewrite, plant_compiled], ids=lambda plant: plant.__name__)
def test_half_precision_passes_with_nothing_planted_there(plant, tmp_path, stages_that_fail, monkeypatch):
    loud_checkpoint(tmp_path)
    plant(monkeypatch, unchanged)
    assert stages_that_fail("--trt", "fp16") == []


def test_a_truncated_engine_is_refused_and_nothing_is_left(checkpoint, command, tmp_path, monkeypatch):
    right = typed.audit_of_file

    def wrong(path, *expected):
        path.write_bytes(path.read_bytes()[:-64])
        return right(path, *expected)

    monkeypatch.setattr(typed, "audit_of_file", wrong)
    outcome = command("model.pt", "--size", SIZE, "--trt", "fp16", "--junit", "junit.xml")
    assert outcome.code == 3
    assert "model.fp16.engine" in outcome.error
    assert not (tmp_path / "model").exists()
    error = ElementTree.parse(tmp_path / "junit.xml").getroot().find(".//error")
    assert error.get("message") == outcome.error


# --- in a file that is given to exporter.verify


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports of three checkpoints: model, the averaged weights of a file that holds raw ones, too; one with the raw
    weights; and one of an earlier epoch."""
    folder = tmp_path_factory.mktemp("exported")
    state = contiguous_float(NaiveRepVGG(Shape()).state_dict())
    earlier = {name: t * 0.9 if name.endswith("running_mean") else t for name, t in state.items()}
    other = contiguous_float(NaiveRepVGG(Shape(), seed=9).state_dict())
    torch.save({"state_dict": other, "state_dict_ema": state}, folder / "model.pt")
    torch.save(earlier, folder / "earlier.pt")
    torch.save(other, folder / "other.pt")
    for name in ("model", "earlier", "other"):
        exporter.export(folder / f"{name}.pt", folder / name, size=SIZE, trt=() if name == "earlier" else ["fp16"])
    return folder


def edited(change):
    """An edit of the ONNX model of the export."""

    def make(folder, out):
        model = onnx.load(folder / "model" / "model.onnx")
        model.graph.ClearField("value_info")  # shapes that an edit may change
        change(model.graph)
        onnx.save(model, out)

    return make


def weight_changed(name, change):
    def edit(graph):
        tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
        tensor.CopyFrom(
            numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor).copy())), name)
        )

    return edited(edit)


def node_changed(name, change):
    return edited(lambda graph: change(graph, next(node for node in graph.node if node.name == name)))


def with_attribute(name, value):
    def change(_graph, node):
        node.attribute.remove(next(attribute for attribute in node.attribute if attribute.name == name))
        node.attribute.append(helper.make_attribute(name, value))

    return change


def with_operation(operation):
    def change(_graph, node):
        node.op_type = operation

    return change


def before_the_output(*operations, **values):
    """Nodes between the classifier and the output: (operation, further inputs, attributes) each."""

    def edit(graph):
        source = "logits"
        maker = next(node for node in graph.node if "output" in node.output)
        maker.output[:] = [source]
        for number, (operation, more, attributes) in enumerate(operations):
            target = "output" if number == len(operations) - 1 else f"planted{number}"
            graph.node.append(helper.make_node(operation, [source, *more], [target], **attributes))
            source = target
        graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in values.items())

    return edited(edit)


def another_file(name):
    return lambda folder, out: shutil.copy(folder / name / f"{name}.onnx", out)


def nan_in(array):
    array.reshape(-1)[3] = np.nan
    return array


def infinite_in(array):
    array.reshape(-1)[3] = np.inf
    return array


AGAINST = "candidate.onnx (ONNX, fp32) against model.pt (checkpoint, float64): "
BEYOND = re.escape(AGAINST) + r"relative error \S+ exceeds 5.0e-06"
FIRST, CONV, HEAD = "stage0.0.weight", "stage1.1.weight", "head.weight"
FILE_FAULTS = {
    "swapped channels": (weight_changed(CONV, lambda w: w[[1, 0, *range(2, len(w))]]), BEYOND),
    "a transposed kernel": (weight_changed(CONV, lambda w: w.swapaxes(2, 3)), BEYOND),
    "a tenth of a percent": (weight_changed(CONV, lambda w: w * np.float32(1.001)), BEYOND),
    "BGR": (weight_changed(FIRST, lambda w: w[:, ::-1]), BEYOND),
    "another standard deviation of the images": (weight_changed(FIRST, lambda w: w * np.float32(0.9)), BEYOND),
    "a lost bias": (weight_changed("stage2.0.bias", np.zeros_like), BEYOND),
    "a constant output": (weight_changed(HEAD, np.zeros_like), BEYOND),
    "another order of the classes": (weight_changed(HEAD, lambda w: np.roll(w, 1, axis=0)), BEYOND),
    "saturated weights": (weight_changed(CONV, lambda w: np.clip(w, -0.1, 0.1)), BEYOND),
    "one block's stride": (node_changed("stage4.0/Conv", with_attribute("strides", [1, 1])), BEYOND),
    "one block's padding": (
        node_changed("stage2.1/Conv", with_attribute("pads", [0, 0, 2, 2])),
        BEYOND,
    ),
    "a ReLU replaced": (node_changed("stage2.0/Relu", with_operation("Sigmoid")), BEYOND),
    "a ReLU taken away": (node_changed("stage2.0/Relu", with_operation("Identity")), BEYOND),
    "weights of an earlier epoch, with stale statistics": (another_file("earlier"), BEYOND),
    "the raw twin's weights": (another_file("other"), BEYOND),
    "a NaN in one weight": (weight_changed(CONV, nan_in), rf"weight {CONV}: NaN or infinite"),
    "an infinite weight": (weight_changed(HEAD, infinite_in), rf"weight {HEAD}: NaN or infinite"),
    "a foreign operation": (
        node_changed("stage2.0/Relu", with_operation("Tanh")),
        r"foreign operation: Tanh stage2\.0/Relu",
    ),
    "rows of a batch turned round": (
        before_the_output(("Gather", ["rows"], {"axis": 0}), rows=np.array([0, 0, 0])),
        r"foreign operation: Gather",
    ),
    "a batch summed up": (
        before_the_output(("ReduceMean", [], {"axes": [0], "keepdims": 1})),
        re.escape(AGAINST) + r"output: .*: a batch of 3 came back as 1 rows",
    ),
}


@pytest.fixture
def compared(exported, tmp_path, capsys):
    """Runs ``exporter.verify model.pt candidate.onnx``; exit code, error line, and the JSON."""

    def run(make, *arguments):
        shutil.copy(exported / "model.pt", tmp_path)
        make(exported, tmp_path / "candidate.onnx")
        code = verify([str(tmp_path / "model.pt"), str(tmp_path / "candidate.onnx"), "--json", *arguments])
        captured = capsys.readouterr()
        return code, captured.err, json.loads(captured.out) if captured.out else None

    return run


@pytest.mark.parametrize(("make", "expected"), FILE_FAULTS.values(), ids=FILE_FAULTS)
def test_a_fault_in_an_onnx_file_fails_its_comparison(make, expected, compared):
    code, error, verdict = compared(make)
    assert code == 1
    assert re.search(expected, error), error
    assert len(error.splitlines()) == 1
    if verdict is not None:
        assert verdict["passed"] is False
        assert [check["passed"] for check in verdict["checks"]] == [False]
        assert AGAINST.startswith(verdict["checks"][0]["stage"])


@pytest.mark.parametrize("make", [another_file("model"), edited(unchanged)], ids=["the file", "the file saved again"])
def test_the_onnx_file_passes_with_nothing_planted(make, compared):
    code, error, verdict = compared(make)
    assert (code, error) == (0, "")
    assert verdict["passed"] is True
    assert verdict["rows"][0]["comparison"]["relative_error"] < 5e-6


TOLD = {
    "another epsilon": (["--eps", "1e-3"], r"relative error \S+ exceeds 5.0e-06"),
    "other strides": (["--strides", "2,2,2,2,1"], r"relative error \S+ exceeds 5.0e-06"),
    "the other twin's weights": (["--weights", "raw"], r"relative error \S+ exceeds 5.0e-06"),
}


@pytest.mark.parametrize(("arguments", "expected"), TOLD.values(), ids=TOLD)
def test_another_assumption_than_the_files_fails(arguments, expected, compared):
    code, error, _ = compared(another_file("model"), *arguments)
    assert code == 1
    assert re.search(expected, error), error


def test_the_assumptions_that_the_file_was_made_under_pass(compared):
    told = ["--eps", "1e-5", "--strides", "2,2,2,2,2", "--weights", "ema"]
    assert compared(another_file("model"), *told)[0] == 0
    assert compared(another_file("other"), "--weights", "raw")[0] == 0


def half_edited(change):
    def make(folder, out):
        model = onnx.load(folder / "model" / "model.fp16.onnx")
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == CONV)
        array = change(numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), CONV))
        onnx.save(model, out)

    return make


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.0, None), (2.0, r"relative error \S+ exceeds 5.0e-03"), (1e9, r"\d+ outputs are NaN or infinite")],
    ids=["none", "a scale", "a scale beyond half"],
)
def test_a_half_file_is_held_to_the_gate_and_range_of_half(scale, expected, compared):
    code, error, _ = compared(half_edited(lambda w: np.clip(w.astype(np.float64) * scale, -65504, 65504)))
    assert code == (1 if expected else 0)
    assert re.search(expected or "^$", error), error
    assert not expected or "candidate.onnx (ONNX, fp16) against model.pt (checkpoint, float64): " in error


def test_files_that_were_made_under_different_normalisations_are_not_compared(exported, tmp_path):
    model = onnx.load(exported / "model" / "model.onnx")
    entry = next(entry for entry in model.metadata_props if entry.key == "assumptions")
    entry.value = json.dumps({**json.loads(entry.value), "mean": "0.5,0.5,0.5"})
    onnx.save(model, tmp_path / "candidate.onnx")
    with pytest.raises(
        VerificationFailed, match=r"under different assumptions: mean 0\.485,0\.456,0\.406 and 0\.5,0\.5"
    ):
        verdict_of(exported / "model" / "model.onnx", tmp_path / "candidate.onnx")
    assert verdict_of(exported / "model" / "model.onnx", exported / "model" / "model.fp16.onnx").passed


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_onnx_file_is_refused(share, exported, tmp_path):
    content = (exported / "model" / "model.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputRejected, match=r"cut\.onnx"):
        verdict_of(exported / "model.pt", tmp_path / "cut.onnx")


# --- among the files that a serving machine verifies


def truncated(folder):
    path = folder / "model.fp16.engine"
    path.write_bytes(path.read_bytes()[:-1])


def replaced(folder):
    shutil.copy(folder.parent / "source" / "other" / "other.fp16.engine", folder / "model.fp16.engine")


def replaced_with_its_sidecar(folder):
    """Engine and sidecar agree with one another, and are those of another checkpoint."""
    replaced(folder)
    text = (folder.parent / "source" / "other" / "other.fp16.engine.json").read_text()
    (folder / "model.fp16.engine.json").write_text(text.replace("other.fp16", "model.fp16"))


def sidecar_field(**fields):
    def edit(folder):
        path = folder / "model.fp16.engine.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def sidecar_without_normalisation(folder):
    path = folder / "model.fp16.engine.json"
    sidecar = json.loads(path.read_text())
    sidecar["preprocessing"].update(mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    path.write_text(json.dumps(sidecar))


def golden_edited(change):
    def edit(folder):
        with np.load(folder / "golden.npz") as archive:
            arrays = change({name: archive[name] for name in archive})
        np.savez(folder / "golden.npz", **arrays)

    return edit


def golden_constant(arrays):
    return {**arrays, "output": np.ones_like(arrays["output"])}


def onnx_of_another(folder):
    shutil.copy(folder.parent / "source" / "other" / "other.onnx", folder / "model.onnx")


def removed(name):
    return lambda folder: (folder / name).unlink()


SERVED_FAULTS = {
    "a truncated engine": (truncated, "model.fp16.engine, integrity"),
    "an engine of another checkpoint": (replaced, "model.fp16.engine, integrity"),
    "an engine of another checkpoint with its sidecar": (replaced_with_its_sidecar, "model.fp16.engine, audit"),
    "a sidecar that lost its tolerance": (sidecar_field(tolerance=0.5), "report.json, listed"),
    "a sidecar for another card": (sidecar_field(compute_capabilities=[90]), "model.fp16.engine, integrity"),
    "a sidecar without normalisation": (sidecar_without_normalisation, "model.fp16.engine, integrity"),
    "a missing sidecar": (removed("model.fp16.engine.json"), "model.fp16.engine, integrity"),
    "golden vectors edited": (
        golden_edited(lambda arrays: {**arrays, "output": arrays["output"] * 1.01}),
        "report.json, listed",
    ),
    "golden vectors edited, seen by what is run": (
        golden_edited(lambda arrays: {**arrays, "output": arrays["output"] * 1.01}),
        "model.onnx, run",
    ),
    "golden answers that are all the same": (golden_edited(golden_constant), "golden.npz, golden"),
    "golden vectors lost": (removed("golden.npz"), "golden.npz, golden"),
    "the graph of another checkpoint": (onnx_of_another, "model.onnx, run"),
}


@pytest.fixture
def served(exported, tmp_path):
    """The export's directory, to be spoilt, beside the exports it came from."""
    (tmp_path / "source").symlink_to(exported)
    return shutil.copytree(exported / "model", tmp_path / "model")


def failed_findings(folder):
    return {
        finding.stage: finding.detail
        for finding in Verification(static=True).findings_of_folder(folder)
        if finding.passed is False
    }


@pytest.mark.parametrize(("spoil", "stage"), SERVED_FAULTS.values(), ids=SERVED_FAULTS)
def test_a_fault_among_the_served_files_is_found_where_it_is(spoil, stage, served):
    spoil(served)
    found = failed_findings(served)
    assert stage in found, found
    assert "\n" not in found[stage]


def test_the_served_files_have_no_fault_when_nothing_is_planted(served):
    assert failed_findings(served) == {}


def test_a_report_that_cannot_be_read_is_a_fault(served):
    (served / "report.json").write_text("{}")
    assert "report.json, listed" in failed_findings(served)


# --- in what a user says about images or network

IMAGES = 96


def colour_images():
    """(96, 3, SIZE, SIZE) in 0..1: each channel has its own brightness and contrast, and a coarse pattern."""
    generator = np.random.default_rng(5)
    coarse = np.kron(generator.random((IMAGES, 3, 5, 5)), np.ones((1, 1, SIZE // 5, SIZE // 5)))
    fine = generator.random((IMAGES, 3, SIZE, SIZE))
    return (
        np.array([0.5, 0.3, 0.1])[:, None, None] + np.array([0.4, 0.3, 0.2])[:, None, None] * (coarse + fine) / 2
    ).astype(np.float32)


def normalised(images, mean=(0.7, 0.45, 0.2), std=(0.14, 0.1, 0.07)):
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    return (images - mean) / std


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A checkpoint whose batch norms have seen ``normalised(colour_images())``, and its own model."""
    model = NaiveRepVGG(Shape()).float().train()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # the plain average
    with torch.no_grad():
        model(torch.from_numpy(normalised(colour_images())))
    path = tmp_path_factory.mktemp("taught") / "model.pt"
    torch.save(contiguous_float(model.state_dict()), path)
    return path, model.eval()


SAID_FAULTS = {
    "the order of the colours": ({}, lambda x: normalised(x[:, ::-1])),
    "no normalisation": ({}, unchanged),
    "another mean": ({}, lambda x: normalised(x, mean=(0.485, 0.456, 0.406))),
    "another standard deviation": ({}, lambda x: normalised(x, std=(0.229, 0.224, 0.225))),
    "pixels of 0 to 255": ({}, lambda x: 255 * x),
    "noise": ({}, lambda x: np.random.default_rng(0).standard_normal(x.shape, np.float32)),
    "one block's stride": ({"strides": (2, 1, 2, 2, 2)}, normalised),
}


def witness_of(path, images, **said):
    request = Request(path=path, out=path.parent, size=(SIZE, SIZE), **said)
    network = network_from_checkpoint(checkpoint_from_path(path), request)
    return witness_from_images(network.architecture, network.tensors, [np.ascontiguousarray(images)])


@pytest.mark.parametrize(("said", "prepare"), SAID_FAULTS.values(), ids=SAID_FAULTS)
def test_what_the_batch_norms_did_not_see_is_wrong_or_suspicious_and_the_report_names_the_layer(said, prepare, taught):
    witness = witness_of(taught[0], prepare(colour_images()), **said)
    assert witness.verdict in {SUSPICIOUS, WRONG}
    assert witness.first_departure is not None
    report = dataclasses.replace(REPORT, witness={**witness.record(), "proposal": None})
    assert json.loads(report.to_json())["witness"]["first_departure"] == witness.first_departure
    assert escaped(witness.line) in markdown_from_report(report)
    assert f"| {witness.first_departure} |" in markdown_from_report(report)


def test_what_the_batch_norms_saw_is_clear(taught):
    witness = witness_of(taught[0], normalised(colour_images()))
    assert (witness.verdict, witness.first_departure) == (CLEAR, None)
    assert len(witness.layers) == 16


COMMAND_FAULTS = {
    "nothing": (unchanged, [], []),
    "the order of the colours": (lambda x: x[:, ::-1], [], [WITNESS]),
    "no normalisation": (unchanged, ["--mean", "0,0,0", "--std", "1,1,1"], [WITNESS]),
    "another mean": (unchanged, ["--mean", "0.485,0.456,0.406"], [WITNESS]),
    "one block's stride": (unchanged, ["--strides", "2,1,2,2,2"], [WITNESS]),
}


@pytest.mark.parametrize(("prepare", "said", "stages"), COMMAND_FAULTS.values(), ids=COMMAND_FAULTS)
def test_an_export_with_images_fails_where_the_batch_norms_did_not_see_them(
    prepare, said, stages, taught, tmp_path, stages_that_fail
):
    shutil.copy(taught[0], tmp_path)
    pixels = np.round(255 * prepare(colour_images())).astype(np.uint8).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "images.npz", images=pixels)
    right = ["--mean", "0.7,0.45,0.2", "--std", "0.14,0.1,0.07"]
    assert stages_that_fail("--calib", "images.npz", *right, *said) == stages


EXPECTED_FAULTS = {
    "another epsilon": ["--eps", "0.1"],
    "another stride": ["--strides", "2,2,2,2,1"],
}


@pytest.fixture
def expect(taught, tmp_path):
    """What the user's own model answers; and its checkpoint."""
    path, model = taught
    shutil.copy(path, tmp_path)
    images = torch.from_numpy(normalised(colour_images())[:8])
    with torch.no_grad():
        np.savez(tmp_path / "io.npz", input=images.numpy(), output=model(images).numpy())


@pytest.mark.parametrize("said", EXPECTED_FAULTS.values(), ids=EXPECTED_FAULTS)
def test_another_network_than_the_users_own_fails_and_nothing_else_sees_it(said, expect, stages_that_fail):
    (stage,) = stages_that_fail("--expect", "io.npz", *said)
    assert "expect" in stage
    assert stages_that_fail(*said) == []


def test_the_users_own_network_passes(expect, stages_that_fail):
    assert stages_that_fail("--expect", "io.npz") == []


def test_there_are_more_than_twenty_faults():
    assert (
        len(EXPORT_FAULTS) + len(TYPED_FAULTS) + len(FILE_FAULTS) + len(SERVED_FAULTS) + len(TOLD) + len(SAID_FAULTS)
        >= 50
    )
    assert issubclass(VerificationFailed, ReportedError)
