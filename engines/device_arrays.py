"""Arrays that lie on a GPU, read without a copy: where they begin, what they hold, and who keeps them alive.

Two protocols say so, and between them PyTorch, CuPy, PyCUDA and Numba speak both:

    DLPack                      ``__dlpack__`` returns a capsule around a C structure; the producer makes the consumer's
                                stream wait for what is still being computed. Asked first.
    __cuda_array_interface__    a dictionary, version 2 or 3; version 3 may name the stream that is still computing.

The C structures (dlpack.h), in native layout; a capsule is named "dltensor" or, of version 1, "dltensor_versioned":

    DLTensor                  data, device {type, id}, ndim, dtype {code, bits, lanes}, shape, strides, byte offset
    DLManagedTensor           DLTensor, context, deleter
    DLManagedTensorVersioned  version {major, minor}, context, deleter, flags, DLTensor

Only contiguous arrays in row-major order are taken: anything else would need a copy, which nobody asked for.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np

from engines.errors import ReportedError, UsageError, first_line

CUDA_DEVICE = 2  # kDLCUDA
READ_ONLY, COPIED = 1, 2  # DLPACK_FLAG_BITMASK_READ_ONLY, DLPACK_FLAG_BITMASK_IS_COPIED
DTYPE_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}  # DLDataTypeCode that numpy has: int, uint, float, bool
LEGACY_DEFAULT_STREAM = 1  # both protocols write the default stream so: 0 would be ambiguous
PLAIN, VERSIONED = b"dltensor", b"dltensor_versioned"
USED_PLAIN, USED_VERSIONED = b"used_dltensor", b"used_dltensor_versioned"  # constants: a capsule keeps the pointer


@dataclasses.dataclass(frozen=True)
class DeviceArray:
    """A contiguous array on a GPU: ``address`` of its first element, ``dtype`` and ``shape`` as numpy has them.

    ``stream`` is one that still computes it, None when none is known; ``owner`` keeps the memory alive.
    """

    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read_only: bool
    stream: int | None
    owner: Any


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER))


class _VersionedManaged(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_IS_VALID = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_POINTER = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_RENAME = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))


def device_array(name: str, array: Any, *, device: int, stream: int) -> DeviceArray:
    """Reads where ``array`` lies.

    Args:
        name: of the input or output that it is for, used in errors.
        array: anything with ``__dlpack__`` or ``__cuda_array_interface__``.
        device: the GPU that it must be on.
        stream: handle of the stream that will use it; 0 is the default stream.

    Raises:
        UsageError: not an array of that GPU, or not contiguous.
    """
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _from_dlpack(name, array, device, stream)
    try:
        interface = getattr(array, "__cuda_array_interface__", None)
    except Exception as error:  # PyTorch raises for a tensor that is not on a GPU
        _refuse(name, first_line(error), error)
    if interface is None:
        _refuse(name, f"a {type(array).__name__} has neither __dlpack__ nor __cuda_array_interface__")
    try:
        return _from_cuda_array_interface(name, array, interface)
    except ReportedError:
        raise
    except Exception as error:  # a dictionary from outside, with anything in it
        _refuse(name, f"its __cuda_array_interface__ makes no sense ({type(error).__name__}: {error})", error)


def fitting_shape(
    fixed: tuple[int | None, ...], largest: tuple[int, ...], shape: tuple[int, ...], batch: int
) -> tuple[int, ...]:
    """The engine's shape of an input, with its free extents from ``shape``, or the largest where that is no such."""
    if len(shape) != len(fixed):
        return (batch, *largest[1:])
    free = (batch, *shape[1:])
    return tuple(given if extent is None else extent for extent, given in zip(fixed, free, strict=True))


def require(name: str, array: DeviceArray, dtype: np.dtype[Any], shape: tuple[int, ...], *, written: bool) -> None:
    """Refuses an array that is not exactly what the engine will read or write at its address.

    Raises:
        UsageError: another dtype or shape, no memory behind it, or read-only although it is to be written.
    """
    if array.dtype != dtype:
        _refuse(name, f"its dtype is {array.dtype}, the engine's is {dtype}")
    if array.shape != shape:
        _refuse(name, f"its shape is {array.shape}, the engine's is {shape}")
    if array.address <= 0:
        _refuse(name, "it has no memory")
    if written and array.read_only:
        _refuse(name, "it is read-only, and an output is written")


def stream_handle(stream: Any) -> int:
    """The handle of a CUDA stream: an ``int`` itself, or an object of cuda.core, PyTorch, CuPy or PyCUDA.

    Raises:
        UsageError: it is none of these.
    """
    try:
        if isinstance(stream, int) and not isinstance(stream, bool):
            handle = stream
        elif hasattr(stream, "__cuda_stream__"):
            protocol = stream.__cuda_stream__
            handle = int((protocol() if callable(protocol) else protocol)[1])
        else:
            names = ("cuda_stream", "ptr", "handle")  # PyTorch, CuPy, PyCUDA
            handle = int(getattr(stream, next(name for name in names if hasattr(stream, name))))
    except Exception as error:
        raise UsageError(
            f"stream: a {type(stream).__name__} is no CUDA stream; give its handle as an int, "
            f"or a stream of PyTorch, CuPy, PyCUDA or cuda.core"
        ) from error
    if handle < 0:
        raise UsageError(f"stream: {handle} is no handle of a CUDA stream")
    return handle


def _refuse(name: str, why: str, cause: BaseException | None = None) -> NoReturn:
    raise UsageError(f"{name}: this array cannot be used on the GPU: {why}") from cause


def _from_dlpack(name: str, array: Any, device: int, stream: int) -> DeviceArray:
    kind, number = (int(part) for part in array.__dlpack_device__())
    if kind != CUDA_DEVICE:
        _refuse(name, f"it is on a device of DLPack's type {kind}, not on a CUDA GPU (2); move it there, or use run")
    if number != device:
        _refuse(name, f"it is on GPU {number}, the engine on GPU {device}")
    waiting = stream or LEGACY_DEFAULT_STREAM
    try:
        try:
            capsule = array.__dlpack__(stream=waiting, max_version=(1, 0), copy=False)
        except TypeError:  # a producer from before version 1 of the protocol
            capsule = array.__dlpack__(stream=waiting)
    except Exception as error:  # such as a tensor that requires grad
        _refuse(name, first_line(error), error)
    return _from_capsule(name, capsule, array, device)


def _from_capsule(name: str, capsule: Any, owner: Any, device: int) -> DeviceArray:
    """Consumes the capsule. ``owner`` is the array it came from, which keeps the memory; no copy was allowed."""
    versioned = bool(_IS_VALID(capsule, VERSIONED))
    if not versioned and not _IS_VALID(capsule, PLAIN):
        _refuse(name, "its __dlpack__ returned no DLPack capsule, or one that was consumed before")
    address = _POINTER(capsule, VERSIONED if versioned else PLAIN)
    layout = _VersionedManaged if versioned else _Managed
    managed = layout.from_address(address)
    # From now on the capsule's own destructor does nothing.
    _RENAME(capsule, USED_VERSIONED if versioned else USED_PLAIN)
    try:
        if versioned and managed.major != 1:
            _refuse(name, f"its DLPack capsule is of version {managed.major}, known is 1")
        flags = int(managed.flags) if versioned else 0
        if flags & COPIED:
            _refuse(name, "its __dlpack__ returned a copy")
        return _from_tensor(name, managed.tensor, owner, device, read_only=bool(flags & READ_ONLY))
    finally:
        if managed.deleter:
            managed.deleter(address)


def _from_tensor(name: str, tensor: Any, owner: Any, device: int, *, read_only: bool) -> DeviceArray:
    if (tensor.device_type, tensor.device_id) != (CUDA_DEVICE, device):
        _refuse(name, f"its capsule is of device type {tensor.device_type}, number {tensor.device_id}")
    if tensor.code not in DTYPE_KINDS or tensor.lanes != 1 or tensor.bits not in (8, 16, 32, 64):
        _refuse(name, f"DLPack's dtype (code {tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes) is not numpy's")
    kind = DTYPE_KINDS[tensor.code]
    if (kind == "b" and tensor.bits != 8) or (kind == "f" and tensor.bits == 8):
        _refuse(name, f"DLPack's dtype (code {tensor.code}, {tensor.bits} bits) is not numpy's")
    dtype = np.dtype(f"{kind}{tensor.bits // 8}")
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        _require_contiguous(name, shape, tensor.strides[: tensor.ndim])
    return DeviceArray((tensor.data or 0) + tensor.byte_offset, dtype, shape, read_only, None, owner)


def _from_cuda_array_interface(name: str, array: Any, interface: dict[str, Any]) -> DeviceArray:
    if interface["version"] not in (2, 3):
        _refuse(name, f"version {interface['version']} of __cuda_array_interface__ is not known, 2 and 3 are")
    address, read_only = interface["data"]
    dtype = np.dtype(interface["typestr"])
    shape = tuple(int(extent) for extent in interface["shape"])
    if interface.get("mask") is not None:
        _refuse(name, "it is masked")
    if not dtype.isnative:
        _refuse(name, f"its byte order is foreign ({interface['typestr']})")
    strides = interface.get("strides")
    if strides is not None:
        _require_contiguous(name, shape, [stride / dtype.itemsize for stride in strides])
    stream = interface.get("stream")
    if stream is not None and int(stream) < 1:
        _refuse(name, f"its __cuda_array_interface__ names the stream {stream}, which the protocol forbids")
    return DeviceArray(int(address or 0), dtype, shape, bool(read_only), None if stream is None else int(stream), array)


def _require_contiguous(name: str, shape: tuple[int, ...], strides: Iterable[float]) -> None:
    """``strides`` in elements; that of an extent of 1 does not matter, nor do any in an empty array."""
    if math.prod(shape) == 0:
        return
    expected = 1
    for extent, stride in reversed(list(zip(shape, strides, strict=True))):
        if extent != 1 and stride != expected:
            _refuse(name, "it is not contiguous in row-major order; make a contiguous copy of it first")
        expected *= extent
