"""ONNX Runtime as a backend: what it says of a file, whose arrays go in and out, and that nothing falls back."""

from __future__ import annotations

import shutil
import sys
import types

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.backends.backend import TensorDescription
from engines.backends.onnx_runtime import PROVIDERS, OnnxRuntime
from engines.errors import InputRejected, SdkMissing, UsageError
from engines.runner import load


def write(path, nodes, inputs, outputs, weights=(), **options):
    """An ONNX file; ``inputs`` and ``outputs`` are (name, type, shape)."""
    infos = [[helper.make_tensor_value_info(*value) for value in values] for values in (inputs, outputs)]
    graph = helper.make_graph(nodes, "graph", *infos, list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"precision": "fp32", "note": "a=b"})
    onnx.save(model, path, **options)
    return path


def doubling(path, shape=("N", 3), kind=TensorProto.FLOAT):
    node = helper.make_node("Add", ["x", "x"], ["y"])
    return write(path, [node], [("x", kind, shape)], [("y", kind, shape)])


@pytest.fixture
def file(tmp_path):
    return doubling(tmp_path / "double.onnx")


def test_it_says_what_the_file_takes_and_gives(tmp_path):
    node = helper.make_node("Concat", ["a", "b"], ["c"], axis=1)
    inputs = [("a", TensorProto.FLOAT16, ("N", 3, "W")), ("b", TensorProto.FLOAT16, ("N", 1, "W"))]
    file = write(tmp_path / "two.onnx", [node], inputs, [("c", TensorProto.FLOAT16, ("N", 4, "W"))])
    backend = OnnxRuntime(file)
    assert backend.inputs == (
        TensorDescription("a", "float16", (None, 3, None)),
        TensorDescription("b", "float16", (None, 1, None)),
    )
    assert backend.outputs == (TensorDescription("c", "float16", (None, 4, None)),)
    assert backend.batch == (1, None)
    assert backend.metadata == {"precision": "fp32", "note": "a=b"}
    feeds = {"a": np.ones((2, 3, 5), np.float16), "b": np.zeros((2, 1, 5), np.float16)}
    answer = backend.run(feeds)
    assert list(answer) == ["c"]
    np.testing.assert_array_equal(answer["c"], np.concatenate([feeds["a"], feeds["b"]], axis=1))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 9])
def test_a_batch_that_the_file_fixes_is_kept(tmp_path, rows):
    with load(doubling(tmp_path / "four.onnx", (4, 3))) as runner:
        assert runner.batch == (4, 4)
        x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
        np.testing.assert_array_equal(runner.run({"x": x})["y"], 2 * x)


def test_the_outputs_are_the_callers_own(file):
    with load(file) as runner:
        x = np.ones((2, 3), np.float32)
        first = runner.run({"x": x})["y"]
        kept = first.copy()
        first[...] = 7
        second = runner.run({"x": 5 * x})["y"]
    assert not np.shares_memory(first, second)
    assert (first == 7).all()
    assert (kept == 2).all()
    assert (second == 10).all()


def test_an_input_that_is_the_output_is_copied(tmp_path):
    node = helper.make_node("Identity", ["x"], ["y"])
    shape = ("N", 3)
    file = write(tmp_path / "same.onnx", [node], [("x", 1, shape)], [("y", 1, shape)])
    with load(file) as runner:
        x = np.ones((2, 3), np.float32)
        answer = runner.run({"x": x})["y"]
    x[...] = 3
    assert (answer == 1).all()


def test_weights_beside_the_file_are_read(tmp_path):
    weight = numpy_helper.from_array(np.arange(3000, dtype=np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    shape = ("N", 3000)
    values = [("x", 1, shape)], [("y", 1, shape)]
    file = write(tmp_path / "big.onnx", [node], *values, [weight], save_as_external_data=True, location="big.onnx.data")
    with load(file) as runner:
        answer = runner.run({"x": np.zeros((1, 3000), np.float32)})["y"]
    np.testing.assert_array_equal(answer[0], np.arange(3000, dtype=np.float32))
    (tmp_path / "big.onnx.data").unlink()
    with pytest.raises(InputRejected, match=r"big\.onnx: ONNX Runtime refuses it"):
        load(file)


def test_another_ending_changes_nothing(file):
    moved = shutil.copy(file, file.with_suffix(".ort"))
    with load(moved) as runner:
        assert runner.run({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[2, 2, 2]]


@pytest.mark.parametrize(
    ("inputs", "output", "nodes", "said"),
    [
        (
            [("x", TensorProto.STRING, ("N",))],
            ("y", TensorProto.STRING, ("N",)),
            "Identity",
            r"x is a tensor\(string\)",
        ),
        ([("x", TensorProto.FLOAT, ())], ("y", TensorProto.FLOAT, ()), "Identity", "no batch in common"),
        (
            [("x", TensorProto.FLOAT, (2, 3)), ("z", TensorProto.FLOAT, (4, 3))],
            ("y", TensorProto.FLOAT, (2, 3)),
            "Identity",
            "no batch in common",
        ),
    ],
    ids=["text", "a number", "two batches"],
)
def test_a_graph_that_has_no_batch_of_arrays_is_refused(tmp_path, inputs, output, nodes, said):
    file = write(tmp_path / "odd.onnx", [helper.make_node(nodes, ["x"], ["y"])], inputs, [output])
    with pytest.raises(InputRejected, match=said):
        load(file)


def test_a_graph_that_is_none_is_refused_in_one_line(tmp_path):
    node = helper.make_node("NoSuchOperation", ["x"], ["y"])
    file = write(tmp_path / "odd.onnx", [node], [("x", 1, ("N", 3))], [("y", 1, ("N", 3))])
    with pytest.raises(InputRejected, match=r"odd\.onnx: ONNX Runtime refuses it \(.*NoSuchOperation.*\); export") as c:
        load(file)
    assert "\n" not in str(c.value)


def test_a_failure_while_running_is_one_line(tmp_path):
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    shape = numpy_helper.from_array(np.array([0, 7], np.int64), "shape")
    file = write(tmp_path / "odd.onnx", [node], [("x", 1, ("N", "W"))], [("y", 1, ("N", 7))], [shape])
    with load(file) as runner:
        assert runner.run({"x": np.ones((2, 7), np.float32)})["y"].shape == (2, 7)
        with pytest.raises(InputRejected, match=r"odd\.onnx: ONNX Runtime failed \(") as caught:
            runner.run({"x": np.ones((2, 6), np.float32)})
    assert "\n" not in str(caught.value)


# --- providers


def test_an_unknown_provider_is_refused_with_the_known_ones(file):
    with pytest.raises(UsageError, match="provider 'gpu': unknown; choose from cpu, cuda, tensorrt"):
        load(file, provider="gpu")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_here_is_missing_and_not_replaced(file, provider):
    if PROVIDERS[provider] in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    with pytest.raises(SdkMissing, match=rf"provider {provider}: this ONNX Runtime has .*CPUExecutionProvider"):
        load(file, provider=provider)


def test_without_onnx_runtime_the_line_that_installs_it_is_given(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SdkMissing, match=r"pip install 'repvgg-exporter\[ort\]'"):
        load(file)


class Session:
    """A session whose first provider did not start, as ONNX Runtime makes one; ``asked`` is what it was asked for."""

    asked = None

    def __init__(self, *arguments, **options):
        Session.asked = arguments, options

    def get_providers(self):
        return ["CPUExecutionProvider"]


@pytest.fixture
def with_cuda(monkeypatch):
    """An ONNX Runtime that lists CUDA."""

    def install(session):
        real = onnxruntime
        fake = types.SimpleNamespace(
            get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
            SessionOptions=real.SessionOptions,
            InferenceSession=session,
        )
        monkeypatch.setitem(sys.modules, "onnxruntime", fake)

    return install


def test_a_provider_that_onnx_runtime_drops_in_silence_is_missing(file, with_cuda):
    with_cuda(Session)
    with pytest.raises(
        SdkMissing, match="CUDAExecutionProvider: ONNX Runtime could not start it and would use CPUExec"
    ):
        load(file, provider="cuda", device=1)
    (path, options), named = Session.asked
    assert path == str(file)
    assert named == {"providers": [("CUDAExecutionProvider", {"device_id": "1"})], "enable_fallback": 0}
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_a_provider_that_refuses_the_graph_is_missing(file, with_cuda):
    def refuse(*_, **__):
        raise RuntimeError("nodes were assigned to the CPU\nand more")

    with_cuda(refuse)
    with pytest.raises(SdkMissing, match=r"CUDAExecutionProvider cannot compute it here \(nodes were .* the CPU\)$"):
        load(file, provider="cuda")


@pytest.mark.parametrize(("given", "threads", "stopped"), [({}, 0, None), ({"threads": 2, "spinning": False}, 2, "1")])
def test_threads_and_whether_they_spin_are_passed_on(file, monkeypatch, given, threads, stopped):
    made = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, **rest: made.append(options) or real(path, options, **rest),
    )
    OnnxRuntime(file, **given)
    (options,) = made
    assert options.intra_op_num_threads == threads
    try:
        found = options.get_session_config_entry("session.force_spinning_stop")
    except RuntimeError:  # it is not set
        found = None
    assert found == stopped
