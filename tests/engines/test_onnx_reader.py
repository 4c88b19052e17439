"""ONNX files read without onnx: equal to what the onnx package reads; damaged or foreign bytes refused in one line."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import re
import time
import tracemalloc

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engines.audit import audit_of_file, expected_from_nodes, expected_from_onnx
from engines.backends.backend import TensorDescription
from engines.errors import InputRejected
from engines.onnx_file import DTYPES, Node, OnnxFile, onnx_file_from_path
from tests.conftest import run_process
from tests.engines.conftest import expected
from tests.networks import Shape

PLAIN, WITH_SE = Shape(classes=8), Shape(se=True, widths=(16, 32, 32, 48, 64))


@pytest.fixture(params=["fp16", "fp32", "se", "external data"])
def real(request, compiled, tmp_path):
    """An exported ONNX file."""
    source = compiled(WITH_SE if request.param == "se" else PLAIN, "fp32" if request.param == "fp32" else "fp16").onnx
    if request.param != "external data":
        return source
    path = tmp_path / "net.onnx"
    onnx.save(onnx.load(source), path, save_as_external_data=True, location="net.data", size_threshold=0)
    assert path.stat().st_size < source.stat().st_size / 2
    return path


def described(values):
    found = []
    for value in values:
        tensor = value.type.tensor_type
        shape = [None if dim.dim_param else dim.dim_value for dim in tensor.shape.dim]
        found.append(
            TensorDescription(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, tuple(shape))
        )
    return tuple(found)


def attribute_of(proto):
    """Its value as the onnx package gives it, lists as tuples and bytes as text."""
    value = helper.get_attribute_value(proto)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | tuple):
        return tuple(entry.decode() if isinstance(entry, bytes) else entry for entry in value)
    return value


def node_of(proto):
    attributes = {attribute.name: attribute_of(attribute) for attribute in proto.attribute}
    return Node(proto.name, proto.op_type, proto.domain, tuple(proto.input), tuple(proto.output), attributes)


def test_a_real_graph_is_read_as_the_onnx_package_reads_it(real):
    found, model = onnx_file_from_path(real), onnx.load(real)
    assert found.path == real
    assert found.producer == model.producer_name == "repvgg-exporter"
    assert found.opsets == {entry.domain: entry.version for entry in model.opset_import} == {"": 17}
    assert found.metadata == {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(found.metadata["assumptions"])["size"] == "32x32"
    assert found.inputs == described(model.graph.input) == (TensorDescription("input", "float32", (None, 3, 32, 32)),)
    assert found.outputs == described(model.graph.output)
    assert found.nodes == tuple(node_of(node) for node in model.graph.node)
    first = next(node for node in found.nodes if node.op_type == "Conv")
    assert first.attributes == {"kernel_shape": (3, 3), "pads": (1,) * 4, "strides": (2, 2), "group": 1}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert list(found.weights) == list(weights)
    for name, array in weights.items():
        assert (found.weights[name].dtype, found.weights[name].shape) == (array.dtype, array.shape)
        assert found.weights[name].tobytes() == array.tobytes()


def test_every_weight_is_a_view_of_the_mapped_file(real):
    for name, array in onnx_file_from_path(real).weights.items():
        view = array
        while isinstance(view, np.ndarray):
            assert not view.flags.writeable
            view = view.base
        assert isinstance(view.obj, mmap.mmap), name


def test_reading_needs_neither_onnx_nor_torch(compiled, tmp_path):
    script = f"""
import sys
from engines.onnx_file import onnx_file_from_path
print(len(onnx_file_from_path({str(compiled(PLAIN).onnx)!r}).weights), sorted({{'onnx', 'torch'}} & set(sys.modules)))
"""
    done = run_process(["-c", script], tmp_path)
    assert done.stdout == "16 []\n", done.stderr


# --- what an engine must hold


@pytest.mark.parametrize(("shape", "precision"), [(PLAIN, "fp16"), (PLAIN, "fp32"), (WITH_SE, "fp16")])
def test_an_engine_is_audited_against_its_onnx_file_as_against_the_exporters_graph(compiled, shape, precision):
    network = compiled(shape, precision)
    found = expected_from_onnx(onnx_file_from_path(network.onnx))
    for ours, theirs in zip(found, expected(network.onnx), strict=True):
        assert [dataclasses.asdict(entry).keys() for entry in ours] == [vars(entry).keys() for entry in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.node == other.node
            assert getattr(one, "relu_node", None) == getattr(other, "relu_node", None)
            assert one.weight.tobytes() == other.weight.tobytes()
            assert one.bias.tobytes() == other.bias.tobytes()
    assert audit_of_file(network.engine, *found).line == network.line


def test_an_engine_of_other_weights_is_found_out_without_torch_or_onnx(compiled):
    found = expected_from_onnx(onnx_file_from_path(compiled(PLAIN, seed=2).onnx))
    problems = audit_of_file(compiled(PLAIN, seed=1).engine, *found).problems
    assert len(problems) >= 8
    assert problems[0] == "stage0.0/Conv: its weights do not stand in the engine bit for bit"


@pytest.mark.parametrize("inputs", [("x", "w"), ("x",), ("x", "w", "made"), ("x", "made", "b"), ("x", "w", "")])
@pytest.mark.parametrize("operation", ["Conv", "Gemm"])
def test_a_convolution_without_stored_weight_and_bias_cannot_be_audited(operation, inputs):
    weights = {"w": np.ones((1, 1)), "b": np.ones(1)}
    whole = Node("odd", operation, "", ("x", "w", "b"), ("y",))
    assert sum(map(len, expected_from_nodes([whole], weights, "net.onnx"))) == 1
    with pytest.raises(InputRejected, match=f"net.onnx: {operation} odd has no stored weight and bias"):
        expected_from_nodes([dataclasses.replace(whole, inputs=inputs)], weights, "net.onnx")


# --- every form in which a weight can stand

VALUES = {
    "float32": [0.5, -2.0, 65504.0],
    "float64": [0.5, -2.0, 1e300],
    "float16": [0.5, -2.0, 65504.0],
    "int8": [-128, 0, 127],
    "int16": [-(2**15), 0, 2**15 - 1],
    "int32": [-(2**31), 0, 2**31 - 1],
    "int64": [-(2**63), 0, 2**63 - 1],
    "uint8": [0, 1, 255],
    "uint16": [0, 1, 2**16 - 1],
    "uint32": [0, 1, 2**32 - 1],
    "uint64": [0, 1, 2**64 - 1],
    "bool": [True, False, True],
}


def model_of(*tensors, nodes=(), inputs=(), **fields):
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, "H", 8]) for name in ("x", *inputs)]
    graph = helper.make_graph(list(nodes), "graph", shape, shape[:1], initializer=list(tensors))
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)], **fields
    )


def read(model, folder):
    path = folder / "net.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return onnx_file_from_path(path)


@pytest.mark.parametrize("raw", [True, False], ids=["raw bytes", "a list of numbers"])
@pytest.mark.parametrize("dtype", VALUES)
def test_a_weight_of_any_dtype_is_read(tmp_path, dtype, raw):
    array = np.array([VALUES[dtype]], dtype)
    content = array.tobytes() if raw else array.reshape(-1)
    tensor = helper.make_tensor("w", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, content, raw=raw)
    found = read(model_of(tensor), tmp_path).weights["w"]
    assert (found.dtype, found.shape) == (array.dtype, (1, 3))
    assert found.tobytes() == numpy_helper.to_array(tensor).tobytes() == array.tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3)])
def test_a_weight_of_any_shape_is_read(tmp_path, shape):
    array = np.zeros(shape, np.float32)
    assert read(model_of(numpy_helper.from_array(array, "w")), tmp_path).weights["w"].shape == shape


def test_the_names_of_dtypes_are_onnxs():
    names = {number: name.lower() for name, number in TensorProto.DataType.items() if number < len(DTYPES)}
    renamed = {"float": "float32", "double": "float64"}
    assert list(DTYPES) == [renamed.get(names[number], names[number]) for number in range(len(DTYPES))]


def test_symbolic_sizes_are_none_and_stored_weights_are_no_inputs(tmp_path):
    found = read(model_of(numpy_helper.from_array(np.ones(3, np.float32), "w"), inputs=["w"], ir_version=3), tmp_path)
    assert found.inputs == (TensorDescription("x", "float32", (None, 3, None, 8)),)
    assert found.opsets == {"": 17, "own": 1}
    assert list(found.weights) == ["w"]


# --- attributes of nodes

SCALARS = {
    "integer": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "text": st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
}
ATTRIBUTES = st.dictionaries(
    st.text("abcdefgh_", min_size=1, max_size=8),
    st.one_of(*SCALARS.values(), *(st.lists(scalar, min_size=1, max_size=4) for scalar in SCALARS.values())),
    max_size=5,
)


@given(ATTRIBUTES)
@settings(max_examples=60, deadline=None)
def test_attributes_are_read_as_the_onnx_package_reads_them(everything, attributes):
    node = helper.make_node("Own", ["x"], ["y"], name="own", domain="own", **attributes)
    path = everything.with_name("attributes.onnx")
    path.write_bytes(model_of(nodes=[node]).SerializeToString())
    (found,) = onnx_file_from_path(path).nodes
    assert found == node_of(node)
    assert {name: type(value) for name, value in found.attributes.items()} == {
        name: type(attribute_of(attribute)) for attribute in node.attribute for name in [attribute.name]
    }


def attribute(name, **fields):
    return onnx.AttributeProto(name=name, **fields)


def node_with(*attributes, op_type="Own"):
    return onnx.NodeProto(op_type=op_type, input=["x"], output=["y"], attribute=attributes)


@pytest.mark.parametrize("numbers", [[0.5, -2.0, 65504.0], [1.5]])
def test_a_list_of_floats_is_read_packed_and_not(tmp_path, numbers):
    """Writers of proto3 pack them; onnx does not."""
    content = np.array(numbers, np.float32).tobytes()
    packed = b"\x0a\x01f" + bytes([7 << 3 | 2, len(content)]) + content + b"\xa0\x01\x06"
    loose = attribute("f", floats=numbers, type=onnx.AttributeProto.FLOATS)
    assert onnx.AttributeProto.FromString(packed) == loose
    node = onnx.NodeProto(op_type="Own").SerializeToString()
    for stored in (packed, loose.SerializeToString()):
        model = model_of()
        model.graph.node.add().MergeFromString(node + bytes([5 << 3 | 2, len(stored)]) + stored)
        assert read(model, tmp_path).nodes[0].attributes == {"f": tuple(numbers)}


def test_what_is_neither_numbers_nor_text_is_left_out(tmp_path):
    graph = helper.make_graph([], "inner", [], [])
    node = node_with(
        attribute("tensor", t=numpy_helper.from_array(np.ones(3)), type=onnx.AttributeProto.TENSOR),
        attribute("graph", g=graph, type=onnx.AttributeProto.GRAPH),
        attribute("bytes", s=b"\xff\xfe", type=onnx.AttributeProto.STRING),
        attribute("many bytes", strings=[b"a", b"\xff"], type=onnx.AttributeProto.STRINGS),
        attribute("nothing"),
        attribute("kept", i=7, type=onnx.AttributeProto.INT),
    )
    (found,) = read(model_of(nodes=[node]), tmp_path).nodes
    assert found.attributes == {"kept": 7}
    assert found.constant is None


def test_what_is_not_said_is_zero_or_empty(tmp_path):
    types = onnx.AttributeProto
    kinds = {"i": types.INT, "f": types.FLOAT, "s": types.STRING, "is": types.INTS, "fs": types.FLOATS}
    node = node_with(*(attribute(name, type=kind) for name, kind in kinds.items()))
    (found,) = read(model_of(nodes=[node]), tmp_path).nodes
    assert found.attributes == {"i": 0, "f": 0.0, "s": "", "is": (), "fs": ()}


@pytest.mark.parametrize("array", [np.array([2, -1], np.int64), np.array(0.5, np.float32), np.zeros((0, 3))])
def test_the_tensor_that_a_constant_is(tmp_path, array):
    node = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(array, "c"))
    (found,) = read(model_of(nodes=[node]), tmp_path).nodes
    assert found.constant.dtype == array.dtype
    assert found.constant.shape == array.shape
    assert found.constant.tobytes() == array.tobytes()
    assert found.attributes == {}


def test_a_constant_that_numpy_lacks_or_that_is_a_number_has_no_tensor(tmp_path):
    lacking = helper.make_tensor("c", TensorProto.BFLOAT16, [1], [1.0])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=lacking),
        helper.make_node("Constant", [], ["d"], value_int=3),
    ]
    first, second = read(model_of(nodes=nodes), tmp_path).nodes
    assert (first.constant, first.attributes) == (None, {})
    assert (second.constant, second.attributes) == (None, {"value_int": 3})


def external(**entries):
    tensor = TensorProto(name="w", dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.mark.parametrize(
    ("entries", "value"),
    [({}, [1.0, 2.0]), ({"offset": 8}, [3.0, 4.0]), ({"offset": 4, "length": 8}, [2.0, 3.0])],
)
def test_external_data_begins_and_ends_where_the_file_says(tmp_path, entries, value):
    content = [1.0, 2.0] if not entries else [1.0, 2.0, 3.0, 4.0]
    (tmp_path / "w.data").write_bytes(np.array(content, np.float32).tobytes())
    found = read(model_of(external(location="w.data", **entries)), tmp_path)
    assert found.weights["w"].tolist() == value


# --- what is refused


def w(**fields):
    return TensorProto(**{"name": "w", "dims": [2], "data_type": TensorProto.FLOAT, "raw_data": bytes(8), **fields})


def of_type(number):
    return w(data_type=number, raw_data=bytes(2), dims=[1])


NO_TENSOR = helper.make_model(
    helper.make_graph([], "g", [helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)], [])
)
SPARSE = model_of()
SPARSE.graph.sparse_initializer.add(dims=[4])
TWICE = model_of()
TWICE.metadata_props.add(key="precision", value="fp16")
TWICE.metadata_props.add(key="precision", value="fp32")

REFUSED = {
    "an attribute twice": (
        model_of(nodes=[node_with(attribute("a"), attribute("a"))]),
        "two attributes are called 'a'",
    ),
    "a whole constant of half the bytes": (
        model_of(nodes=[helper.make_node("Constant", [], ["c"], value=w(raw_data=bytes(4)))]),
        "1 numbers where 2 belong",
    ),
    "empty": (b"", "cannot mmap an empty file"),
    "text": (b"no ONNX file, but text", "wire type"),
    "JSON": (b'{"schema": 1}', "wire type 3"),
    "an archive": (b"PK\x03\x04" + bytes(40), "cut short|wire type"),
    "zeros": (bytes(64), "wire type|no model"),
    "no graph": (onnx.ModelProto(ir_version=8, producer_name="x"), "it holds no model"),
    "no version": (onnx.ModelProto(graph=onnx.GraphProto(name="g")), "it holds no model"),
    "a sequence": (NO_TENSOR, "'s' is no tensor of a known shape"),
    "sparse weights": (SPARSE, "sparse weights"),
    "metadata twice": (TWICE, "two metadata are called 'precision'"),
    "a weight twice": (model_of(w(), w()), "two weights are called 'w'"),
    "too few bytes": (model_of(w(raw_data=bytes(4))), "weight w has 1 numbers where 2 belong"),
    "no multiple": (model_of(w(raw_data=bytes(7))), "multiple of element size"),
    "no bytes": (model_of(w(raw_data=b"")), "weight w has 0 numbers where 2 belong"),
    "a huge shape": (model_of(w(dims=[2**62, 2**62])), "weight w has 2 numbers where"),
    "a huge empty shape": (model_of(w(dims=[0, 2**62], raw_data=b"")), "too big|too large"),
    "a negative size": (model_of(w(dims=[-2])), "weight w has no whole shape"),
    "many dimensions": (model_of(w(dims=[1] * 70, raw_data=bytes(4))), "dimension"),
    "a segment": (model_of(w(segment=TensorProto.Segment(begin=0, end=1))), "weight w has no whole shape"),
    "bfloat16": (model_of(of_type(TensorProto.BFLOAT16)), "weight w is bfloat16, which numpy lacks"),
    "text as a weight": (model_of(of_type(TensorProto.STRING)), "weight w is string, which numpy lacks"),
    "no type": (model_of(of_type(0)), "there is no tensor type 0"),
    "an unknown type": (model_of(of_type(99)), "there is no tensor type 99"),
    "float16 of 17 bits": (
        model_of(TensorProto(name="w", dims=[1], data_type=TensorProto.FLOAT16, int32_data=[2**16])),
        "weight w has numbers that are no uint16",
    ),
    "int8 of 9 bits": (
        model_of(TensorProto(name="w", dims=[1], data_type=TensorProto.INT8, int32_data=[128])),
        "weight w has numbers that are no int8",
    ),
    "a list of complex numbers": (
        model_of(TensorProto(name="w", dims=[1], data_type=TensorProto.COMPLEX64, float_data=[1, 2])),
        "complex",
    ),
    "external, elsewhere": (model_of(external(location="../secret")), "outside the model's own directory"),
    "external, absolute": (model_of(external(location="/etc/passwd")), "outside the model's own directory"),
    "external, nowhere": (model_of(external()), "no file"),
    "external, parent": (model_of(external(location="..")), "no file"),
    "external, missing": (model_of(external(location="missing")), "no file missing is there"),
    "external, past the end": (model_of(external(location="net.onnx", length=2**40)), "reaches past the end"),
    "external, before the start": (model_of(external(location="net.onnx", offset=-8)), "reaches past the end"),
    "external, no number": (model_of(external(location="net.onnx", offset="x")), "invalid literal"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, kind):
    content, said = REFUSED[kind]
    with pytest.raises(InputRejected, match=said) as error:
        read(content, tmp_path)
    message = str(error.value)
    assert re.fullmatch(r".*net\.onnx: not a whole ONNX file \(.*\); export it again", message)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "net.onnx"
    {"missing": lambda: None, "directory": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(InputRejected, match=r"no file net\.onnx is there"):
        onnx_file_from_path(path)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A small file with every kind of field that is read, so that damage hits them often."""
    folder = tmp_path_factory.mktemp("everything")
    (folder / "w.data").write_bytes(bytes(8))
    tensors = [
        numpy_helper.from_array(np.ones((2, 2), np.float16), "raw"),
        helper.make_tensor("floats", TensorProto.FLOAT, [2], [1.0, 2.0]),
        helper.make_tensor("halves", TensorProto.FLOAT16, [2], [1.0, 2.0]),
        helper.make_tensor("integers", TensorProto.INT64, [2], [1, -2]),
        external(location="w.data"),
    ]
    attributes = {"pads": [1, 1], "group": 1, "alpha": 0.5, "betas": [0.5, 2.0], "auto_pad": "VALID"}
    nodes = [
        helper.make_node("Conv", ["x", "raw", "floats"], ["y"], name="conv", domain="own", **attributes),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(2, np.int64))),
    ]
    model = model_of(*tensors, nodes=nodes, producer_name="p")
    helper.set_model_props(model, {"precision": "fp16", "assumptions": "{}"})
    path = folder / "whole.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_the_small_file_is_whole(everything):
    assert list(onnx_file_from_path(everything).weights) == ["raw", "floats", "halves", "integers", "w"]


def damaged(content, data):
    """A few bytes changed, put in, or left out, and perhaps cut short."""
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 4))
        content = content[:start] + data.draw(st.binary(max_size=10)) + content[start + length :]
    return content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) and content else content


def read_or_refused(path):
    """Reads the file within a second and a megabyte or so; returns what came of it."""
    started, found, refusal = time.process_time(), None, None
    tracemalloc.start()
    try:
        found = onnx_file_from_path(path)
    except InputRejected as error:
        refusal = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2_000_000 + path.stat().st_size
    assert time.process_time() - started < 5
    return found or refusal


def is_read_or_refused(path):
    found = read_or_refused(path)
    refused = isinstance(found, str) and found.startswith(f"{path}: not a whole ONNX file (") and "\n" not in found
    return refused or isinstance(found, OnnxFile)


def test_what_the_fuzzing_measures_would_see_a_large_allocation(everything, monkeypatch):
    def greedy(path):
        raise ValueError(len(bytes(4_000_000)))

    monkeypatch.setattr("engines.onnx_file._mapped", greedy)
    with pytest.raises(AssertionError, match=r"assert 4\d{6} < "):
        read_or_refused(everything)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(everything, data):
    path = everything.with_name("damaged.onnx")
    path.write_bytes(damaged(everything.read_bytes(), data))
    assert is_read_or_refused(path)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_real_file_is_read_or_refused_and_nothing_else(compiled, data):
    source = compiled(PLAIN).onnx
    path = source.with_name("damaged.onnx")
    path.write_bytes(damaged(source.read_bytes(), data))
    assert is_read_or_refused(path)


@given(st.binary(min_size=1, max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused_and_nothing_else(everything, content):
    path = everything.with_name("any.onnx")
    path.write_bytes(content)
    assert is_read_or_refused(path)


def test_a_file_of_nothing_but_tiny_fields_is_refused_before_it_fills_the_memory(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x08\x01" * 1_000_000)
    started = time.process_time()
    with pytest.raises(InputRejected, match="more than 65536 fields"):
        onnx_file_from_path(path)
    assert time.process_time() - started < 5
