"""The GPU under a benchmark: which card it is, what its peaks are, and what it draws while it works.

Energy is measured apart from time, since cards count it in steps of tens of milliseconds: a row is computed without a
pause for a while, and the whole card's energy in that while is divided by the images. Idle draw is part of it. Clocks
and heat are asked for between slices of that while.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines.bench.contenders import ON_DEVICE, Contender
from engines.bench.options import Options
from engines.bench.rounds import SLICE, WINDOWS, warmed_up
from engines.bench.telemetry import Nvml, Sample, Unavailable
from engines.roofline.cards import Card, card_of_device
from engines.timing import Clock, Queries

IDLE = "gpu idle"
"""A reason for low clocks that says nothing of a card that is at work."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU: ``card`` are its peaks, where they are known; ``problem`` says why it tells nothing of itself."""

    name: str | None
    driver: str | None
    maximum_sm_clock_mhz: int | None
    card: Card | None
    nvml: Nvml | None
    problem: str | None

    def telemetry(self, queries: Queries, batch: int, duration: float, clock: Clock) -> dict[str, Any] | None:
        """What the card tells of itself while it computes these queries; None where it tells nothing.

        Args:
            queries: of ``batch`` images each.
            batch: images at once.
            duration: seconds of a row's measurement; a third of it is spent here.
            clock: of the host, in seconds.
        """
        if self.nvml is None:
            return None
        count = max(1, round(SLICE / warmed_up(queries, clock)))
        samples, done = [self.nvml.sample()], 0
        energy, started = self.nvml.energy_joules(), clock()
        while clock() - started < duration / WINDOWS:
            queries.run(count)
            done += count
            samples.append(self.nvml.sample())
        seconds, after = clock() - started, self.nvml.energy_joules()
        used = None if energy is None or after is None else after - energy
        told = _summary(samples)
        return {
            "seconds": seconds,
            "images": done * batch,
            "joules_per_image": None if used is None else used / (done * batch),
            "maximum_sm_clock_mhz": self.maximum_sm_clock_mhz,
            **told,
            "power_w": told["power_w"] if used is None else used / seconds,
        }


def device_of(contenders: Sequence[Contender], options: Options, resources: contextlib.ExitStack) -> Device | None:
    """The GPU that any of the files runs on; None where all of them run on the CPU.

    Args:
        contenders: open.
        options: with the GPU's index.
        resources: ends the use of NVML.
    """
    on_gpu = any(contender.ways == ON_DEVICE for contender in contenders) or options.provider not in (None, "cpu")
    if not on_gpu:
        return None
    nvml = Nvml.open(options.device)
    if isinstance(nvml, Unavailable):
        return Device(None, None, None, None, None, f"no bounds, clocks or energy: {nvml.reason}")
    resources.callback(nvml.close)
    told = nvml.description()
    card = None if told.name is None else card_of_device(told.name)
    problem = None if card is not None else f"no bounds: the peaks of {told.name or 'this GPU'} are not known"
    return Device(told.name, told.driver, told.maximum_sm_clock_mhz, card, nvml, problem)


def _summary(samples: Sequence[Sample]) -> Mapping[str, Any]:
    """Medians of the clocks and of the power, the highest temperature, and every reason that was given."""

    def told(name: str, summary: Callable[[list[float]], float]) -> float | None:
        values = [value for sample in samples if (value := getattr(sample, name)) is not None]
        return float(summary(values)) if values else None

    reasons = [sample.throttled for sample in samples if sample.throttled is not None]
    return {
        "sm_clock_mhz": told("sm_clock_mhz", statistics.median),
        "memory_clock_mhz": told("memory_clock_mhz", statistics.median),
        "temperature_c": told("temperature_c", max),
        "power_w": told("power_w", statistics.median),
        "throttled": sorted({word for words in reasons for word in words} - {IDLE}) if reasons else None,
    }
