"""The machine that a receipt is of: its GPU, processor, software and peaks; nothing that names a person or a host."""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from engines.bench.machine import load_average, machine, versions
from engines.receipts.anonymous import anonymous
from engines.roofline.cards import CARDS

GPU_PACKAGES = ("cuda-bindings", "nvidia-ml-py")
CUDA_DRIVER = "cuda driver"
NOT_OF_A_BENCHMARK = (*GPU_PACKAGES, CUDA_DRIVER)
"""Versions that a benchmark alone does not tell."""
CARD_FIELDS = ("key", "title", "compute_capability", "operations_per_second", "bytes_per_second")


def machine_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As the first of the benchmarks' ``records`` says, which knows the GPU; else what is known without one."""
    told: dict[str, Any] = anonymous(records[0]["machine"] if records else machine(None, load_average()))
    return told


def card_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The peaks that the roofline of the ``records`` was made of; None where the card's are not known."""
    keys = {record["machine"]["card"] for record in records}
    card = next((card for card in CARDS if card.key in keys), None)
    return None if card is None else {name: getattr(card, name) for name in CARD_FIELDS}


def versions_of(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Python's, the libraries' and the driver's, as far as they are here."""
    found: dict[str, str] = dict(records[0]["versions"] if records else versions())
    for name in GPU_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = cuda_of_driver()
    return found if cuda is None else {**found, CUDA_DRIVER: cuda}


def cuda_of_driver() -> str | None:
    """The newest CUDA that the driver knows, as in "12.8"; None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
