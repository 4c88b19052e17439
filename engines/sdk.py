"""Which NVIDIA compilers this machine has, and which one a build should use.

``tensorrt`` compiles for the GPU it runs on, so it needs one. ``tensorrt_rtx`` compiles ahead of time for the cards in
RTX_CARDS on a machine without any GPU. Nothing here imports either until it is chosen.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Sequence

from engines.errors import SdkMissing, UsageError

RTX_CARDS = (75, 80, 86, 89, 120, 121)
TURING = 75


@dataclasses.dataclass(frozen=True)
class Sdk:
    """A compiler by its Python module, whether it builds with no GPU, and the line that installs it."""

    module: str
    title: str
    needs_gpu: bool
    install: str


SDKS = (
    Sdk("tensorrt", "TensorRT", needs_gpu=True, install="pip install 'repvgg-exporter[tensorrt]'"),
    Sdk("tensorrt_rtx", "TensorRT for RTX", needs_gpu=False, install="pip install 'repvgg-exporter[rtx]'"),
)


def is_installed(sdk: Sdk) -> bool:
    """Whether the module can be found; it is not imported."""
    return importlib.util.find_spec(sdk.module) is not None


def gpu_compute_capability(index: int = 0) -> int | None:
    """Compute capability of a GPU as in 86 for 8.6, asked of the driver; None without a driver or such a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    major_attribute, minor_attribute = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR of cuda.h
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, device)
    )
    return None if failed else major.value * 10 + minor.value


def sdk_for_build(name: str | None, cards: Sequence[int]) -> Sdk:
    """The compiler to build with: the one asked for, else ``tensorrt`` where it and a GPU are, else ``tensorrt_rtx``.

    Args:
        name: a module of SDKS, or None to choose.
        cards: compute capabilities to build for, as in (86, 89); empty for the compiler's default.

    Raises:
        UsageError: no compiler of that name, or a combination of cards that must not share an engine.
        SdkMissing: it is not installed, or it needs a GPU (of that kind) and there is none.
    """
    by_name = {sdk.module: sdk for sdk in SDKS}
    if name is not None and name not in by_name:
        raise UsageError(f"--sdk {name}: unknown; choose from {', '.join(by_name)}")
    capability = gpu_compute_capability()
    full, rtx = SDKS
    chosen = by_name[name] if name else (full if is_installed(full) and capability is not None else rtx)
    if not is_installed(chosen):
        raise SdkMissing(f"{chosen.title} is not installed here; {chosen.install}")
    if chosen.needs_gpu:
        _check_own_card(chosen, capability, cards)
    else:
        _check_rtx_cards(cards)
    return chosen


def _check_own_card(sdk: Sdk, capability: int | None, cards: Sequence[int]) -> None:
    if capability is None:
        raise SdkMissing(
            f"{sdk.title} needs a GPU to build, and none answers here; --sdk tensorrt_rtx builds without one"
        )
    other = [card for card in cards if card != capability]
    if other:
        raise SdkMissing(
            f"--gpu sm{other[0]}: {sdk.title} builds for the card it runs on, which is sm{capability}; "
            f"build on that card"
        )


def _check_rtx_cards(cards: Sequence[int]) -> None:
    unknown = [card for card in cards if card not in RTX_CARDS]
    if unknown:
        offered = ", ".join(f"sm{card}" for card in RTX_CARDS)
        raise SdkMissing(
            f"--gpu sm{unknown[0]}: TensorRT for RTX has no such target (it has {offered}); "
            f"build the typed ONNX with --sdk tensorrt on that card"
        )
    if TURING in cards and len(set(cards)) > 1:
        raise UsageError(
            f"--gpu: sm{TURING} must have an engine of its own, since one shared with it loses INT8 on every card; "
            f"run once with --gpu sm{TURING} and another --out"
        )


def check_precision(sdk: Sdk, precision: str, cards: Sequence[int]) -> None:
    """Raises ``UsageError`` for a card on which the compiler would quietly make something else of the ``precision``."""
    if precision == "int8" and not sdk.needs_gpu and TURING in cards:
        raise UsageError(
            f"--gpu sm{TURING}: {sdk.title} has no INT8 convolutions for Turing, and would compute them in half; "
            f"use --trt fp16, or build model.int8.onnx with --sdk tensorrt on that card"
        )


def versions() -> dict[str, str]:
    """Installed versions of what shapes a result: the compilers, ONNX Runtime, numpy."""
    names = ("tensorrt", "tensorrt-rtx-cu12", "onnxruntime", "onnxruntime-gpu", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
