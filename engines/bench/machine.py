"""What a benchmark ran on: nothing that names a person or a host."""

from __future__ import annotations

import os
import pathlib
import platform
from typing import Any

from engines.bench.device import Device
from engines.sdk import versions as sdk_versions

CPU_INFO = pathlib.Path("/proc/cpuinfo")


def load_average() -> float | None:
    """Processes that ran or waited for a processor, in the mean of the last minute; None where nobody counts them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def machine(device: Device | None, load: float | None) -> dict[str, Any]:
    """Processor, cores, how busy they were before, and the GPU."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": load,
        "gpu": None if device is None else device.name,
        "card": None if device is None or device.card is None else device.card.key,
        "driver": None if device is None else device.driver,
    }


def versions() -> dict[str, str]:
    """Python's and the libraries'."""
    return {"python": platform.python_version(), **sdk_versions()}


def _processor() -> str:
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, UnicodeDecodeError, StopIteration):
        return platform.processor() or platform.machine()
