"""Arrays on a GPU, read through both protocols: capsules of PyTorch's own making, and of ours down to the last byte."""

from __future__ import annotations

import ctypes
import gc
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import device_arrays
from engines.device_arrays import DeviceArray, device_array, require, stream_handle
from engines.errors import UsageError

F4 = np.dtype("f4")


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    """PyTorch's tensors here are on the CPU, whose number is 1 for DLPack; the layout of a capsule is the same."""
    monkeypatch.setattr(device_arrays, "CUDA_DEVICE", 1)


class Torch:
    """A tensor that gives its capsule whatever stream it is asked for, as one on a GPU would."""

    def __init__(self, tensor, *, versioned=True):
        self.tensor, self.versioned, self.asked = tensor, versioned, []

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, *, stream, **version):
        self.asked.append((stream, version))
        if not self.versioned and version:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.tensor.__dlpack__(**version)


@pytest.mark.parametrize("versioned", [True, False], ids=["version 1", "before version 1"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool],
)
def test_the_capsules_of_pytorch_are_read_as_they_are(cpu_as_gpu, dtype, versioned):
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    for part in (tensor, tensor[1:], tensor.reshape(24), tensor[1, 2, 3]):
        read = device_array("input", Torch(part, versioned=versioned), device=0, stream=7)
        assert read.address == part.data_ptr()
        assert read.dtype == part.numpy().dtype
        assert read.shape == tuple(part.shape)
        assert not read.read_only


@pytest.mark.parametrize("versioned", [True, False])
def test_a_capsule_is_consumed_and_nothing_of_the_tensor_is_kept(cpu_as_gpu, versioned):
    tensor = torch.zeros(1000)
    before = sys.getrefcount(tensor)
    source = Torch(tensor, versioned=versioned)
    for _ in range(50):
        assert device_array("input", source, device=0, stream=7).owner is source
    gc.collect()
    assert sys.getrefcount(tensor) <= before + 1  # that of source


@pytest.mark.parametrize(("stream", "asked"), [(0, 1), (1, 1), (2, 2), (1234, 1234)])
def test_the_producer_is_told_the_stream_and_that_no_copy_is_wanted(cpu_as_gpu, stream, asked):
    source = Torch(torch.zeros(4))
    device_array("input", source, device=0, stream=stream)
    assert source.asked == [(asked, {"max_version": (1, 0), "copy": False})]
    older = Torch(torch.zeros(4), versioned=False)
    device_array("input", older, device=0, stream=stream)
    assert older.asked[-1] == (asked, {})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4, 6).T, "it is not contiguous in row-major order; make a contiguous copy of it first"),
        (torch.zeros(4, 6)[:, ::2], "it is not contiguous in row-major order; make a contiguous copy of it first"),
        (torch.zeros(1, 4, 4).expand(3, 4, 4), "it is not contiguous in row-major order"),
        (torch.zeros(4, dtype=torch.bfloat16), "DLPack's dtype (code 4, 16 bits, 1 lanes) is not numpy's"),
        (torch.zeros(4, dtype=torch.complex64), "DLPack's dtype (code 5, 64 bits, 1 lanes) is not numpy's"),
        (torch.zeros(4, requires_grad=True), "require"),
    ],
    ids=["transposed", "strided", "expanded", "bfloat16", "complex", "grad"],
)
def test_tensors_that_cannot_be_used_as_they_lie_are_refused(cpu_as_gpu, tensor, message):
    with pytest.raises(UsageError) as raised:
        device_array("input", Torch(tensor), device=0, stream=7)
    assert str(raised.value).startswith("input: this array cannot be used on the GPU: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_extent_of_one_may_have_any_stride_and_an_empty_array_any_at_all(cpu_as_gpu):
    tensor = torch.zeros(5, 1, 4).as_strided((5, 1, 4), (4, 999, 1))
    assert device_array("input", Torch(tensor), device=0, stream=7).shape == (5, 1, 4)
    assert device_array("input", Torch(torch.zeros(0, 4).T), device=0, stream=7).shape == (4, 0)


@pytest.mark.parametrize("array", [torch.zeros(4), np.zeros(4, np.float32)], ids=["PyTorch", "numpy"])
def test_what_is_on_the_cpu_is_refused(array):
    with pytest.raises(UsageError, match=r"type 1, not on a CUDA GPU \(2\); move it there, or use run"):
        device_array("input", array, device=0, stream=7)


# --- capsules made here, byte by byte, on a CUDA device

NEW_CAPSULE = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int), ("device_id", ctypes.c_int), ("ndim", ctypes.c_int),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p), ("deleter", DELETER),
        ("flags", ctypes.c_uint64), ("tensor", Tensor),
    )  # fmt: skip


class Made:
    """An array of GPU 0 with a capsule that counts how often it is deleted; ``changes`` go into the structures."""

    def __init__(self, shape=(2, 3), strides=None, *, versioned=True, device=(2, 0), **changes):
        self.device, self.versioned, self.deleted = device, versioned, []
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        fields = {
            "data": 0x7000,
            "device_type": 2,
            "device_id": 0,
            "ndim": len(shape),
            "code": 2,
            "bits": 32,
            "lanes": 1,
        }
        self.managed = Versioned(1, 0) if versioned else Managed()
        for name, value in (fields | {k: v for k, v in changes.items() if k not in ("major", "flags")}).items():
            setattr(self.managed.tensor, name, value)
        self.managed.tensor.shape = ctypes.cast(self._shape, ctypes.POINTER(ctypes.c_int64))
        if self._strides is not None:
            self.managed.tensor.strides = ctypes.cast(self._strides, ctypes.POINTER(ctypes.c_int64))
        for name in ("major", "flags"):
            if name in changes:
                setattr(self.managed, name, changes[name])
        self.deleter = DELETER(self.deleted.append)
        self.managed.deleter = self.deleter
        self.name = b"dltensor_versioned" if versioned else b"dltensor"
        self.capsule = NEW_CAPSULE(ctypes.addressof(self.managed), self.name, None)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream, max_version=None, copy=None):
        return self.capsule


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize(
    ("shape", "strides", "changes", "address"),
    [
        ((2, 3), None, {}, 0x7000),
        ((2, 3), (3, 1), {}, 0x7000),
        ((2, 3), (3, 1), {"byte_offset": 256}, 0x7100),
        ((), None, {"byte_offset": 8}, 0x7008),
        ((0, 3), None, {"data": None}, 0),
    ],
)
def test_a_capsule_on_a_gpu_is_read_and_deleted_once(versioned, shape, strides, changes, address):
    made = Made(shape, strides, versioned=versioned, **changes)
    read = device_array("input", made, device=0, stream=7)
    assert read == DeviceArray(address, F4, shape, read_only=False, stream=None, owner=made)
    assert made.deleted == [ctypes.addressof(made.managed)]
    assert repr(made.capsule).split('"')[1] == "used_" + made.name.decode()
    with pytest.raises(UsageError, match="no DLPack capsule, or one that was consumed before"):
        device_array("input", made, device=0, stream=7)
    assert len(made.deleted) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_type": 1}, "its capsule is of device type 1, number 0"),
        ({"device_id": 1}, "its capsule is of device type 2, number 1"),
        ({"lanes": 4}, "4 lanes"),
        ({"bits": 4}, "4 bits"),
        ({"bits": 8}, "code 2, 8 bits"),
        ({"code": 6, "bits": 32}, "code 6, 32 bits"),
        ({"code": 9}, "code 9"),
        ({"strides": (1, 2)}, "not contiguous"),
        ({"strides": (3, -1)}, "not contiguous"),
        ({"major": 2}, "of version 2, known is 1"),
        ({"flags": 2}, "returned a copy"),
    ],
    ids=str,
)
def test_a_capsule_that_is_refused_is_deleted_once_as_well(changes, message):
    made = Made((2, 3), changes.pop("strides", None), **changes)
    with pytest.raises(UsageError) as raised:
        device_array("input", made, device=0, stream=7)
    assert message in str(raised.value)
    assert len(made.deleted) == 1


def test_an_array_on_another_gpu_is_refused_before_its_capsule_is_asked_for():
    made = Made(device=(2, 1))
    with pytest.raises(UsageError) as raised:
        device_array("input", made, device=0, stream=7)
    assert str(raised.value) == "input: this array cannot be used on the GPU: it is on GPU 1, the engine on GPU 0"
    assert repr(made.capsule).split('"')[1] == "dltensor_versioned"


def test_a_read_only_capsule_is_read_and_not_written():
    read = device_array("input", Made(flags=1), device=0, stream=7)
    require("input", read, F4, (2, 3), written=False)
    with pytest.raises(UsageError, match="it is read-only, and an output is written"):
        require("input", read, F4, (2, 3), written=True)


@pytest.mark.parametrize("capsule", [None, 7, "dltensor", object()])
def test_what_is_no_capsule_is_refused(capsule):
    made = Made()
    made.capsule = capsule
    with pytest.raises(UsageError, match="no DLPack capsule"):
        device_array("input", made, device=0, stream=7)


# --- __cuda_array_interface__


class Interface:
    def __init__(self, **changes):
        usual = {
            "data": (0x7000, False),
            "shape": (2, 3),
            "typestr": "<f4",
            "version": 3,
            "strides": None,
            "stream": None,
        }
        self.__cuda_array_interface__ = {
            name: value for name, value in (usual | changes).items() if value != "left out"
        }


@pytest.mark.parametrize(
    ("changes", "stream"),
    [
        ({}, None),
        ({"version": 2, "stream": "left out"}, None),
        ({"strides": (12, 4)}, None),
        ({"strides": "left out"}, None),
        ({"stream": 1}, 1),
        ({"stream": 94_000}, 94_000),
        ({"mask": None}, None),
    ],
    ids=str,
)
def test_the_interface_is_read(changes, stream):
    array = Interface(**changes)
    read = device_array("input", array, device=0, stream=7)
    assert read == DeviceArray(0x7000, F4, (2, 3), read_only=False, stream=stream, owner=array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "version 1 of __cuda_array_interface__ is not known, 2 and 3 are"),
        ({"version": 4}, "version 4"),
        ({"typestr": ">f4"}, "its byte order is foreign (>f4)"),
        ({"typestr": "nonsense"}, "makes no sense"),
        ({"strides": (4, 8)}, "not contiguous"),
        ({"strides": (24, 8)}, "not contiguous"),
        ({"strides": (4,)}, "makes no sense"),
        ({"stream": 0}, "names the stream 0, which the protocol forbids"),
        ({"mask": "a mask"}, "it is masked"),
        ({"data": 0x7000}, "makes no sense"),
        ({"data": "left out"}, "makes no sense"),
        ({"shape": None}, "makes no sense"),
    ],
    ids=str,
)
def test_an_interface_that_cannot_be_used_is_refused(changes, message):
    with pytest.raises(UsageError) as raised:
        device_array("features", Interface(**changes), device=0, stream=7)
    assert str(raised.value).startswith("features: this array cannot be used on the GPU: ")
    assert message in str(raised.value)


def test_read_only_memory_is_known_for_it():
    assert device_array("input", Interface(data=(0x7000, True)), device=0, stream=7).read_only


@pytest.mark.parametrize("array", [[1.0], 7, None, object()], ids=["list", "int", "None", "object"])
def test_what_is_no_array_is_refused(array):
    with pytest.raises(
        UsageError, match=f"a {type(array).__name__} has neither __dlpack__ nor __cuda_array_interface__"
    ):
        device_array("input", array, device=0, stream=7)


values = (
    st.none() | st.integers() | st.text(max_size=5) | st.booleans() | st.lists(st.integers(), max_size=4).map(tuple)
)
keys = ("data", "shape", "typestr", "version", "strides", "stream", "mask")


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(keys), values), st.booleans())
def test_any_interface_is_an_array_or_one_line(changes, alone):
    array = Interface(**changes)
    if alone:
        array.__cuda_array_interface__ = changes
    outcome = outcome_of(array)
    if isinstance(outcome, UsageError):
        assert "\n" not in str(outcome)
    else:
        assert isinstance(outcome.address, int)
        assert all(isinstance(extent, int) for extent in outcome.shape)


def outcome_of(array):
    """A DeviceArray or a UsageError; anything else comes out of it."""
    try:
        return device_array("input", array, device=0, stream=7)
    except UsageError as error:
        return error


# --- what an array must be, and streams

ARRAY = DeviceArray(0x7000, F4, (2, 3), read_only=False, stream=None, owner=None)


def test_an_array_that_fits_is_let_through():
    require("input", ARRAY, F4, (2, 3), written=True)


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("f2", (2, 3), "its dtype is float32, the engine's is float16"),
        ("f4", (3, 2), "its shape is (2, 3), the engine's is (3, 2)"),
        ("f4", (2, 3, 1), "its shape is (2, 3), the engine's is (2, 3, 1)"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(dtype, shape, message):
    with pytest.raises(UsageError) as raised:
        require("input", ARRAY, np.dtype(dtype), shape, written=False)
    assert str(raised.value) == f"input: this array cannot be used on the GPU: {message}"


class Protocol:
    def __init__(self, value):
        self.__cuda_stream__ = value


@pytest.mark.parametrize("stream", [7, Protocol((0, 7)), Protocol(lambda: (0, 7))])
def test_streams_are_read(stream):
    assert stream_handle(stream) == 7


@pytest.mark.parametrize("stream", [Protocol((0,)), Protocol(None), Protocol((0, "x")), -7, "7", 7.0, True])
def test_what_is_no_stream_is_refused(stream):
    with pytest.raises(UsageError, match=r"^stream: "):
        stream_handle(stream)
