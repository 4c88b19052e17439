"""python -m exporter.verify: two files of any kind, equal and not, and everything that is no RepVGG."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import exporter
from engines.parity import Gate
from exporter.errors import InputRejected, UsageError, VerificationFailed
from exporter.request import Request
from exporter.verify import main, verdict_of
from tests.conftest import EXAMPLES, run_process
from tests.networks import NaiveRepVGG, Shape, contiguous_float, deployed_state

CHECKPOINT = EXAMPLES / "fashion.pt"
IMAGES = EXAMPLES / "fashion_test.npz"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """fashion.pt as ONNX and FP16 engine."""
    out = tmp_path_factory.mktemp("verify") / "out"
    exporter.export(CHECKPOINT, out, size=28, trt=["fp16"])
    return out


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of an exported file, with its model changed."""

    def make(name, change):
        path = tmp_path / name
        model = onnx.load(exported / name)
        change(model)
        onnx.save(model, path)
        return path

    return make


def tensor(model, name):
    return next(t for t in model.graph.initializer if t.name == name)


def replaced(model, name, change):
    old = tensor(model, name)
    old.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(old).copy())), name))


def mean_of_outputs(**attributes):
    """A mean between every output and what makes it; of all axes but those that are kept, without ``axes``."""

    def change(model):
        model.graph.ClearField("value_info")
        for output in model.graph.output:
            maker = next(node for node in model.graph.node if output.name in node.output)
            maker.output[0] = f"{output.name}/before"
            for node in model.graph.node:
                node.input[:] = [f"{output.name}/before" if name == output.name else name for name in node.input]
            model.graph.node.append(
                helper.make_node("ReduceMean", [f"{output.name}/before"], [output.name], **attributes)
            )
            if not attributes["keepdims"]:
                output.type.tensor_type.ClearField("shape")
                output.type.tensor_type.shape.SetInParent()

    return change


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """Two feature maps of fashion.pt."""
    out = tmp_path_factory.mktemp("mapped") / "out"
    exporter.export(CHECKPOINT, out, size=28, features=(1, 2))
    return out / "fashion.onnx"


@pytest.fixture(params=["scores", "maps"])
def spoilt(request, copy, exported, mapped, tmp_path):
    """``spoilt(change)``: an ONNX file and the same one changed; of one output, and of two."""

    def make(change):
        if request.param == "scores":
            return exported / "fashion.onnx", copy("fashion.onnx", change)
        model = onnx.load(mapped)
        change(model)
        onnx.save(model, tmp_path / "maps.onnx")
        return mapped, tmp_path / "maps.onnx"

    return make


# --- equal


@pytest.mark.parametrize(
    ("a", "b", "reference", "gate"),
    [
        ("fashion.pt", "fashion.onnx", "fashion.pt (checkpoint, float64)", 5e-6),
        ("fashion.onnx", "fashion.pt", "fashion.pt (checkpoint, float64)", 5e-6),
        ("fashion.fp16.onnx", "fashion.pt", "fashion.pt (checkpoint, float64)", 5e-3),
        ("fashion.fp16.onnx", "fashion.onnx", "fashion.onnx (ONNX, fp32)", 5e-3),
        ("fashion.onnx", "fashion.onnx", "fashion.onnx (ONNX, fp32)", 5e-6),
        ("fashion.pt", "fashion.pt", "fashion.pt (checkpoint, float64)", 5e-6),
    ],
)
@pytest.mark.parametrize("inputs", [None, IMAGES], ids=["noise", "images"])
def test_files_of_one_network_agree_without_any_flag(a, b, reference, gate, inputs, exported):
    paths = [CHECKPOINT if name == "fashion.pt" else exported / name for name in (a, b)]
    told = Request(path=CHECKPOINT, out=exported, size=(28, 28)) if a == b == "fashion.pt" else None
    verdict = verdict_of(*paths, inputs=inputs, told=told)
    assert verdict.passed
    assert verdict.reference == reference
    assert verdict.checks[0].gate == gate
    assert verdict.rows[0].batches[:1] == (1,)
    assert verdict.rows[0].comparison.rows == (256 if inputs else 4 + 32)
    assert (verdict.inputs == "the first 256 images of fashion_test.npz") is (inputs is not None)


def test_a_training_and_a_deployed_checkpoint_agree(saved, tmp_path):
    model = NaiveRepVGG(Shape(), seed=4)
    trained = saved(contiguous_float(model.state_dict()), "trained.pt")
    deployed = saved(deployed_state(model), "deployed.pt")
    told = Request(path=trained, out=tmp_path, size=(20, 20))
    assert verdict_of(trained, deployed, told=told).passed
    other = saved(deployed_state(NaiveRepVGG(Shape(), seed=5)), "other.pt")
    assert not verdict_of(trained, other, told=told).passed


def test_the_command_says_what_it_compared(exported, capsys):
    assert main([str(CHECKPOINT), str(exported / "fashion.onnx")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reference: fashion.pt (checkpoint, float64); inputs: seeded noise (no --inputs given)"
    assert "assumed: strides 2,2,2,2,2" in lines
    assert any(line.startswith("ok   fashion.onnx (ONNX, fp32) against fashion.pt") for line in lines)
    assert lines[-1].split()[:3] == ["fashion.onnx", "(ONNX,", "fp32)"]


def test_the_command_as_json(exported, capsys):
    assert main([str(CHECKPOINT), str(exported / "fashion.fp16.onnx"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert found["rows"][0]["comparison"]["rows"] == 36
    assert found["assumptions"]["size"] == "28x28"


def test_an_onnx_file_of_another_exporter_is_compared_too(tmp_path):
    """Other tensor names, no metadata, and a batch that is fixed."""
    model = NaiveRepVGG(Shape(), seed=4)
    torch.save(contiguous_float(model.state_dict()), tmp_path / "model.pt")
    exporter.export(tmp_path / "model.pt", tmp_path / "out", size=20)
    foreign = onnx.load(tmp_path / "out" / "model.onnx")
    del foreign.metadata_props[:]
    for node in foreign.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"input": "x", "output": "y"}.get(name, name) for name in names]
    foreign.graph.input[0].name, foreign.graph.output[0].name = "x", "y"
    foreign.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(foreign, tmp_path / "foreign.onnx")
    verdict = verdict_of(tmp_path / "model.pt", tmp_path / "foreign.onnx")
    assert verdict.passed
    assert verdict.assumptions["size"] == "20x20"


# --- not equal


CHANGES = {
    "swapped channels": ("stage1.1.weight", lambda w: w[[1, 0, *range(2, len(w))]]),
    "a transposed kernel": ("stage1.1.weight", lambda w: w.transpose(0, 1, 3, 2)),
    "a lost bias": ("stage2.0.bias", np.zeros_like),
    "a tenth of a percent": ("stage3.0.weight", lambda w: w * w.dtype.type(1.001)),
    "another order of classes": ("head.weight", lambda w: w[::-1]),
    "constant output": ("head.weight", np.zeros_like),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_fails(name, change, copy):
    verdict = verdict_of(CHECKPOINT, copy("fashion.onnx", lambda model: replaced(model, name, change)))
    assert not verdict.passed
    assert "fashion.onnx (ONNX, fp32) against fashion.pt (checkpoint, float64): relative error" in verdict.failure_line


def test_a_graph_whose_rows_are_mixed_up_fails(copy):
    """The batch is turned into the features and back, one row on."""

    def mixed(model):
        gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
        gemm.output[0] = "scores"
        model.graph.initializer.append(numpy_helper.from_array(np.array([10, -1], np.int64), "turned"))
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 10], np.int64), "back"))
        model.graph.node.append(helper.make_node("Reshape", ["scores", "turned"], ["mixed"], name="mixed"))
        model.graph.node.append(helper.make_node("Reshape", ["mixed", "back"], ["flat"], name="flat"))
        model.graph.node.append(helper.make_node("Relu", ["flat"], ["output"], name="last"))

    verdict = verdict_of(CHECKPOINT, copy("fashion.onnx", mixed))
    assert not verdict.passed


def test_another_epsilon_fails_and_the_right_one_passes(exported):
    assert main([str(CHECKPOINT), str(exported / "fashion.onnx"), "--eps", "1e-5", "--quiet"]) == 0
    assert main([str(CHECKPOINT), str(exported / "fashion.onnx"), "--eps", "1.1e-5", "--quiet"]) == 1


def test_the_gate_may_be_given(exported, capsys):
    files = [str(CHECKPOINT), str(exported / "fashion.fp16.onnx"), "--quiet"]
    assert main([*files, "--gate", "1e-5"]) == 1
    assert "exceeds 1.0e-05" in capsys.readouterr().err
    assert main([*files, "--gate", "1e-2"]) == 0
    assert not verdict_of(CHECKPOINT, exported / "fashion.fp16.onnx", gate=Gate(1e-5, top1=True)).passed


def test_the_checkpoint_of_another_network_is_not_what_the_file_was_made_from(exported, saved):
    other = saved(contiguous_float(NaiveRepVGG(Shape()).state_dict()))
    with pytest.raises(VerificationFailed, match=r"take different images: 3x28x28 and 1x28x28"):
        verdict_of(other, exported / "fashion.onnx")


def assert_one_line(capsys, code, *words):
    captured = capsys.readouterr()
    assert code == 1
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ")
    assert any(word in captured.err for word in words), captured.err


def test_a_candidate_that_loses_rows_is_one_line(spoilt, capsys):
    right, wrong = spoilt(mean_of_outputs(axes=[0], keepdims=1))
    words = ("a batch of 3 came back as 1 rows", "outputs of 1, 3 rows")
    assert_one_line(capsys, main([str(right), str(wrong)]), *words)


def test_a_reference_that_loses_rows_is_one_line(spoilt, capsys):
    right, wrong = spoilt(mean_of_outputs(axes=[0], keepdims=1))
    assert_one_line(capsys, main([str(wrong), str(right)]), "rows")


@pytest.mark.parametrize("first", [True, False], ids=["as the reference", "as the candidate"])
def test_an_output_without_rows_is_one_line(first, spoilt, capsys):
    right, wrong = spoilt(mean_of_outputs(keepdims=0))
    files = [wrong, right] if first else [right, wrong]
    assert_one_line(capsys, main([str(path) for path in files]), "row")


# --- outputs


def test_feature_maps_agree_with_their_checkpoint_without_any_flag(mapped):
    verdict = verdict_of(CHECKPOINT, mapped)
    assert verdict.passed
    assert verdict.assumptions["features"] == "1,2"
    assert "top-1" not in verdict.line


def test_feature_maps_and_scores_are_not_the_same_network(mapped, exported, capsys):
    with pytest.raises(
        VerificationFailed, match=r"has the outputs stage1, stage2, .* has output: not the same network"
    ):
        verdict_of(mapped, exported / "fashion.onnx")
    told = Request(path=CHECKPOINT, out=exported, features=(1, 3))
    assert not verdict_of(CHECKPOINT, mapped, told=told).passed


def test_outputs_of_other_names_are_compared_in_their_places(mapped, tmp_path):
    model = onnx.load(mapped)
    table = {"stage1": "c2", "stage2": "c3"}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [table.get(name, name) for name in names]
    for output in model.graph.output:
        output.name = table[output.name]
    onnx.save(model, tmp_path / "other.onnx")
    assert verdict_of(mapped, tmp_path / "other.onnx").passed
    outputs = list(model.graph.output)[::-1]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    onnx.save(model, tmp_path / "turned.onnx")
    assert not verdict_of(mapped, tmp_path / "turned.onnx").passed


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_one_feature_map_that_is_another_fails(name, mapped, tmp_path):
    model = onnx.load(mapped)
    weights = [t.name for t in model.graph.initializer if t.name.startswith(f"{name}.") and t.name.endswith(".weight")]
    replaced(model, max(weights), lambda w: w * np.float32(1.001))
    onnx.save(model, tmp_path / "other.onnx")
    verdict = verdict_of(mapped, tmp_path / "other.onnx")
    assert not verdict.passed
    assert verdict.checks[0].value > 1e-4


def test_a_wrong_number_of_strides_in_the_metadata_is_one_line(copy):
    def lie(model):
        for entry in model.metadata_props:
            entry.value = entry.value.replace("2,2,2,2,2", "2,2,2,2")

    with pytest.raises(
        VerificationFailed, match="not what the other file was made from: --strides: 4 numbers for 5 stages"
    ):
        verdict_of(CHECKPOINT, copy("fashion.onnx", lie))


@pytest.mark.parametrize("strides", ["2,2,x,2,2", "", "2;2;2;2;2", "two", "2,2,2,2,3"])
def test_strides_in_the_metadata_that_are_no_strides_make_no_sense(strides, copy):
    def lie(model):
        for entry in model.metadata_props:
            entry.value = entry.value.replace("2,2,2,2,2", strides)

    with pytest.raises(InputRejected, match=r"the assumptions in the file's metadata make no sense: .*strides"):
        verdict_of(CHECKPOINT, copy("fashion.onnx", lie))


@pytest.mark.parametrize(
    ("name", "value"), [("weights", "mean"), ("features", "2,1"), ("features", "x"), ("size", "28:30")]
)
def test_other_assumptions_in_the_metadata_that_nobody_can_make_make_no_sense(name, value, copy):
    def lie(model):
        entry = next(entry for entry in model.metadata_props if entry.key == "assumptions")
        entry.value = json.dumps({**json.loads(entry.value), name: value})

    with pytest.raises(InputRejected, match=rf"the assumptions in the file's metadata make no sense: .*{name}"):
        verdict_of(CHECKPOINT, copy("fashion.onnx", lie))


def test_other_strides_in_the_metadata_make_another_network(copy):
    def lie(model):
        for entry in model.metadata_props:
            entry.value = entry.value.replace("2,2,2,2,2", "2,2,1,1,1")

    path = copy("fashion.onnx", lie)
    assert not verdict_of(CHECKPOINT, path).passed


def test_files_made_under_different_assumptions_are_told_apart(exported, copy):
    def other(model):
        for entry in model.metadata_props:
            entry.value = entry.value.replace('"eps": "1e-05"', '"eps": "0.001"')

    with pytest.raises(VerificationFailed, match=r"different assumptions: eps 1e-05 and 0\.001"):
        verdict_of(exported / "fashion.fp16.onnx", copy("fashion.onnx", other))


# --- what is no RepVGG: exit code 1


def test_a_foreign_operation_is_named(copy):
    def foreign(model):
        next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Tanh"

    with pytest.raises(VerificationFailed, match=r"a foreign operation: Tanh stage0\.0/Relu"):
        verdict_of(CHECKPOINT, copy("fashion.onnx", foreign))


def test_an_operation_of_another_domain_is_named(copy):
    def foreign(model):
        next(node for node in model.graph.node if node.op_type == "Relu").domain = "com.example"

    with pytest.raises(VerificationFailed, match="a foreign operation: Relu"):
        verdict_of(CHECKPOINT, copy("fashion.onnx", foreign))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_a_number_is_exit_code_1_in_either_file(value, copy, saved, capsys):
    def planted(weight):
        weight.flat[7] = value
        return weight

    path = copy("fashion.onnx", lambda model: replaced(model, "stage2.0.weight", planted))
    assert main([str(CHECKPOINT), str(path)]) == 1
    assert "weight stage2.0.weight: NaN or infinite" in capsys.readouterr().err
    state = contiguous_float(NaiveRepVGG(Shape()).state_dict())
    planted(next(iter(state.values())).numpy())
    assert main([str(saved(state)), str(CHECKPOINT)]) == 1
    assert "NaN or infinite" in capsys.readouterr().err


def test_an_input_in_half_precision_is_named(copy):
    def half(model):
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16

    with pytest.raises(VerificationFailed, match="its input is float16 with 4 dimensions, not float32"):
        verdict_of(CHECKPOINT, copy("fashion.onnx", half))


# --- what cannot be used


def test_an_engine_without_a_gpu_is_exit_code_4(exported, capsys):
    assert main([str(exported / "fashion.onnx"), str(exported / "fashion.fp16.engine")]) == 4
    assert "no GPU" in capsys.readouterr().err


def test_an_engine_that_was_changed_is_refused_before_anything_asks_for_a_gpu(exported, tmp_path, capsys):
    for name in ("fashion.fp16.engine", "fashion.fp16.engine.json"):
        shutil.copy(exported / name, tmp_path / name)
    data = bytearray((tmp_path / "fashion.fp16.engine").read_bytes())
    data[-1000] ^= 1
    (tmp_path / "fashion.fp16.engine").write_bytes(data)
    assert main([str(exported / "fashion.onnx"), str(tmp_path / "fashion.fp16.engine")]) == 3
    assert "SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"nothing", b"\x08\x08", b"PK\x03\x04", b"\x80\x02."])
def test_a_file_that_is_none_of_the_three_is_one_line(content, exported, tmp_path, capsys):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    for pair in ([path, exported / "fashion.onnx"], [exported / "fashion.onnx", path]):
        assert main([str(file) for file in pair]) == 3
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert str(path) in lines[0]


@pytest.mark.parametrize("flags", [["--gate", "x"], ["--gate", "1,2"], ["--gate", "-1"], ["--no-such-flag"]])
def test_a_wrong_flag_is_exit_code_2(flags, exported, capsys):
    assert main([str(CHECKPOINT), str(exported / "fashion.onnx"), *flags]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_metadata_that_makes_no_sense_is_one_line(copy, capsys):
    def nonsense(model):
        for entry in model.metadata_props:
            entry.value = entry.value.replace('"size": "28x28"', '"size": "large"')

    assert main([str(CHECKPOINT), str(copy("fashion.onnx", nonsense))]) == 3
    assert "make no sense" in capsys.readouterr().err


def test_images_of_another_size_are_refused(exported, tmp_path, capsys):
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 27, 28), np.uint8))
    files = [str(CHECKPOINT), str(exported / "fashion.onnx")]
    assert main([*files, "--inputs", str(tmp_path / "images.npz")]) == 3
    assert "1 channels of 28x28" in capsys.readouterr().err


def test_help_needs_nothing_heavy(tmp_path):
    done = run_process(["-X", "importtime", "-m", "exporter.verify", "--help"], tmp_path)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "onnx", "onnxruntime"}
    assert "checkpoint, ONNX file and engine" in done.stdout


def test_strides_that_do_not_fit_two_checkpoints_are_a_wrong_flag(saved, tmp_path):
    path = saved(contiguous_float(NaiveRepVGG(Shape()).state_dict()))
    with pytest.raises(UsageError, match="--strides: 2 numbers for 5 stages"):
        verdict_of(path, path, told=Request(path=path, out=tmp_path, size=(20, 20), strides=(2, 2)))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{}", b"", b"[1]"], ids=["bytes", "empty", "nothing", "a list"])
def test_a_broken_sidecar_is_one_line(content, exported, tmp_path, capsys):
    shutil.copy(exported / "fashion.fp16.engine", tmp_path)
    (tmp_path / "fashion.fp16.engine.json").write_bytes(content)
    assert main([str(CHECKPOINT), str(tmp_path / "fashion.fp16.engine")]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "fashion.fp16.engine.json" in lines[0]


def test_an_engine_of_a_precision_that_is_not_compared_is_one_line(exported, tmp_path, capsys):
    shutil.copy(exported / "fashion.fp16.engine", tmp_path)
    fields = json.loads((exported / "fashion.fp16.engine.json").read_text())
    (tmp_path / "fashion.fp16.engine.json").write_text(json.dumps({**fields, "precision": "int4"}))
    assert main([str(CHECKPOINT), str(tmp_path / "fashion.fp16.engine")]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "int4" in lines[0]


def test_a_graph_that_leaves_its_channels_open_takes_those_of_the_other(copy, exported, capsys):
    def opened(model):
        model.graph.input[0].type.tensor_type.shape.dim[1].Clear()
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "C"

    path = copy("fashion.onnx", opened)
    assert verdict_of(CHECKPOINT, path).passed
    assert main([str(path), str(path)]) == 3
    assert "neither says how many channels" in capsys.readouterr().err
