"""What a GPU says of itself through NVML: clocks, heat, power, energy, and what holds its clocks back.

The package is nvidia-ml-py. NVML counts cards in another order than CUDA does, and knows nothing of
CUDA_VISIBLE_DEVICES; a card is therefore found by its place on the PCI bus. What a card does not tell is None: cards
before Volta count no energy. Power is the driver's own average over some tens of milliseconds or more; over a span of
time the difference of ``energy_joules`` is the better figure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any

from engines.cuda import checked, cuda_runtime
from engines.errors import DeviceFailed, SdkMissing, first_line

INSTALL = "pip install nvidia-ml-py"
BUS_ID_LENGTH = 64
REASONS = ("nvmlClocksEventReason", "nvmlClocksThrottleReason")
"""Beginnings of the names of NVML's bits; the second is the older form, and has some that the first has not."""


@dataclasses.dataclass(frozen=True)
class Unavailable:
    """Why there is no telemetry, in one line."""

    reason: str


@dataclasses.dataclass(frozen=True)
class CardDescription:
    """What stays the same."""

    name: str | None
    driver: str | None
    maximum_sm_clock_mhz: int | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a card says at one moment.

    ``throttled`` are the reasons for its clocks not being higher, in words; "gpu idle" is one of them.
    """

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    throttled: tuple[str, ...] | None


class Nvml:
    """A card, as NVML sees it."""

    @classmethod
    def open(cls, device: int) -> Nvml | Unavailable:
        """The card that CUDA calls ``device``, or why it cannot be asked. Nothing is raised, and nothing started.

        Args:
            device: the GPU's index, as CUDA counts.
        """
        try:
            import pynvml
        except ModuleNotFoundError:
            return Unavailable(f"nvidia-ml-py is not installed here; {INSTALL}")
        try:
            bus_id = _bus_id(cuda_runtime(), device)
            pynvml.nvmlInit()
        except (SdkMissing, DeviceFailed, pynvml.NVMLError) as error:
            return Unavailable(f"NVML does not answer: {first_line(error)}")
        try:
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        except pynvml.NVMLError as error:
            _shut_down(pynvml)
            return Unavailable(f"NVML does not know the GPU at {bus_id}: {first_line(error)}")
        return cls(pynvml, handle)

    def __init__(self, pynvml: Any, handle: Any) -> None:
        """Takes over one call of nvmlInit; ``open`` is the way in."""
        self._pynvml, self._handle = pynvml, handle
        self._closed = False
        self._words = reason_words(pynvml)

    def description(self) -> CardDescription:
        """Its name, its driver, and how high its clock goes."""
        pynvml, handle = self._pynvml, self._handle
        return CardDescription(
            name=self._told(pynvml.nvmlDeviceGetName, handle),
            driver=self._told(pynvml.nvmlSystemGetDriverVersion),
            maximum_sm_clock_mhz=self._told(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
        )

    def sample(self) -> Sample:
        """What it says now."""
        pynvml, handle = self._pynvml, self._handle
        power = self._told(pynvml.nvmlDeviceGetPowerUsage, handle)
        return Sample(
            sm_clock_mhz=self._told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
            temperature_c=self._told(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
            power_w=None if power is None else power / 1e3,
            throttled=self._throttled(),
        )

    def energy_joules(self) -> float | None:
        """What it has used since its driver was loaded."""
        millijoules = self._told(self._pynvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)
        return None if millijoules is None else millijoules / 1e3

    def close(self) -> None:
        """Ends the use of NVML; the second time it does nothing."""
        if not self._closed:
            self._closed = True
            _shut_down(self._pynvml)

    def _throttled(self) -> tuple[str, ...] | None:
        pynvml, handle = self._pynvml, self._handle
        mask = self._told(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if mask is None:  # a driver before 535 has the older name alone
            mask = self._told(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        return None if mask is None else words_of_mask(mask, self._words)

    def _told(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What NVML answers; None where this card or driver does not tell it."""
        try:
            return function(*arguments)
        except self._pynvml.NVMLError:
            return None


def reason_words(pynvml: Any) -> dict[int, str]:
    """The words for each bit of NVML's mask of reasons, made of the names of the package's constants."""
    words: dict[int, str] = {}
    for prefix in REASONS:
        for name in sorted(dir(pynvml)):  # of two names for a bit the first, which is the newer one
            value = getattr(pynvml, name) if name.startswith(prefix) else None
            if isinstance(value, int) and value.bit_count() == 1:
                words.setdefault(value, _spaced(name.removeprefix(prefix)))
    return words


def words_of_mask(mask: int, words: dict[int, str]) -> tuple[str, ...]:
    """The reasons in ``mask``, from its lowest bit up; one without a name is given as its bit."""
    bits = [1 << position for position in range(mask.bit_length()) if mask >> position & 1]
    return tuple(words.get(bit, f"reason {bit:#x}") for bit in bits)


def _spaced(name: str) -> str:
    """As in "sw power cap" for ``SwPowerCap``."""
    return " ".join(re.findall(r"[A-Z][a-z0-9]*", name)).lower()


def _bus_id(runtime: Any, device: int) -> str:
    """As in "0000:41:00.0"; what stands behind the terminator is no part of it."""
    padded = checked(runtime, runtime.cudaDeviceGetPCIBusId, BUS_ID_LENGTH, device)
    return bytes(padded).partition(b"\0")[0].decode()


def _shut_down(pynvml: Any) -> None:
    with contextlib.suppress(pynvml.NVMLError):  # it was asked for: that is all that a caller can do
        pynvml.nvmlShutdown()
