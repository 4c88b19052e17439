"""NVML without a GPU: names, numbers of arguments, constants and errors of the real ``pynvml``.

What the cards do is a list of phases in the pretended time of ``tests.engines.fake_cuda``; energy is power times time.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pynvml as real

from tests.engines.fake_cuda import BUS_IDS, FakeCuda

NAMES = {0: "NVIDIA A10", 1: "NVIDIA L4"}


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a card does from the time ``begins`` on, in seconds; ``reasons`` is NVML's mask."""

    begins: float = 0.0
    sm_mhz: int = 1500
    memory_mhz: int = 6000
    celsius: int = 50
    watts: float = 100.0
    reasons: int = 0


class FakeNvml:
    """Stands in for the module ``pynvml``; ``refused`` are functions that raise the error given, by name.

    NVML counts the cards by their place on the bus, not as CUDA does; a handle says which one it is of.
    """

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.phases: tuple[Phase, ...] = (Phase(),)
        self.refused: dict[str, int] = {}
        self.names: list[str] = []
        self.open = 0

    def __dir__(self) -> list[str]:
        return dir(real)

    def __getattr__(self, name: str) -> Any:
        original = getattr(real, name)  # AttributeError for what the real module has not
        if not inspect.isfunction(original):
            return original
        implementation = getattr(self, f"_{name}")
        signature = inspect.signature(original)

        def call(*arguments: Any) -> Any:
            signature.bind(*arguments)
            self.names.append(name)
            if name in self.refused:
                raise real.NVMLError(self.refused[name])
            if name != "nvmlInit" and not self.open:
                raise real.NVMLError(real.NVML_ERROR_UNINITIALIZED)
            return implementation(*arguments)

        return call

    def refuse(self, *names: str, error: int = real.NVML_ERROR_NOT_SUPPORTED) -> None:
        """Lets these functions say that the card does not support them, or another ``error``."""
        self.refused.update(dict.fromkeys(names, error))

    def joules(self) -> float:
        """What has been used since time 0."""
        now, ends = self.cuda.time, [phase.begins for phase in self.phases[1:]]
        spans = zip(self.phases, [*ends, float("inf")], strict=True)
        return sum(phase.watts * max(min(end, now) - phase.begins, 0.0) for phase, end in spans)

    def _now(self) -> Phase:
        return [phase for phase in self.phases if phase.begins <= self.cuda.time][-1]

    def _nvmlInit(self) -> None:
        self.open += 1

    def _nvmlShutdown(self) -> None:
        self.open -= 1

    def _nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def _nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> int:
        found = [device for device, known in BUS_IDS.items() if known == bus_id]
        if not found:
            raise real.NVMLError(real.NVML_ERROR_NOT_FOUND)
        return found[0]

    def _nvmlDeviceGetName(self, handle: int) -> str:
        return NAMES[handle]

    def _clock(self, kind: int) -> int:
        return {real.NVML_CLOCK_SM: self._now().sm_mhz, real.NVML_CLOCK_MEM: self._now().memory_mhz}[kind]

    def _nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return self._clock(kind)

    def _nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> int:
        return {real.NVML_CLOCK_SM: 2175, real.NVML_CLOCK_MEM: 8001}[kind]

    def _nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        assert sensor == real.NVML_TEMPERATURE_GPU
        return self._now().celsius

    def _nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return round(self._now().watts * 1e3)

    def _nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return round(self.joules() * 1e3)

    def _nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return self._now().reasons

    def _nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self._now().reasons
