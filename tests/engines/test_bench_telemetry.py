"""What a card says through NVML: the figures that the fake was told, None where it tells nothing, never a guess."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys

import cuda.bindings
import numpy as np
import pynvml as real
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.bench.device import Device
from engines.bench.telemetry import CardDescription, Nvml, Sample, Unavailable, reason_words, words_of_mask
from engines.timing import Timing
from tests.conftest import ROOT
from tests.engines.bench_files import VirtualClock
from tests.engines.fake_cuda import BUS_IDS
from tests.engines.fake_machine import fake_machine
from tests.engines.fake_nvml import Phase

WORDS = reason_words(real)
FUNCTIONS = {
    "nvmlDeviceGetClockInfo": {"sm_clock_mhz", "memory_clock_mhz"},
    "nvmlDeviceGetTemperature": {"temperature_c"},
    "nvmlDeviceGetPowerUsage": {"power_w"},
    "nvmlDeviceGetName": {"name"},
    "nvmlSystemGetDriverVersion": {"driver"},
    "nvmlDeviceGetMaxClockInfo": {"maximum_sm_clock_mhz"},
}
UNTOLD = ["NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "NO_PERMISSION", "GPU_IS_LOST", "UNKNOWN"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    made = fake_machine(monkeypatch, tmp_path)
    yield made
    made.assert_nothing_left()


@pytest.fixture
def card(machine):
    """The first one, opened."""
    nvml = Nvml.open(0)
    assert isinstance(nvml, Nvml)
    yield nvml
    nvml.close()


def test_a_card_says_what_it_is(card):
    assert card.description() == CardDescription("NVIDIA A10", "580.65.06", 2175)


@pytest.mark.parametrize(("device", "name"), [(0, "NVIDIA A10"), (1, "NVIDIA L4")])
def test_a_card_is_found_by_its_place_on_the_bus(machine, device, name):
    nvml = Nvml.open(device)
    assert nvml.description().name == name
    nvml.close()
    assert "cudaSetDevice" not in machine.names
    assert "cudaMalloc" not in machine.names


def test_samples_and_energy_follow_the_time(machine, card):
    slowed = real.nvmlClocksEventReasonSwPowerCap | real.nvmlClocksEventReasonHwThermalSlowdown
    machine.nvml.phases = (
        Phase(0.0, 300, 405, 35, 20.5, real.nvmlClocksEventReasonGpuIdle),
        Phase(2.0, 2100, 8000, 60, 120.0),
        Phase(5.0, 1410, 8000, 83, 130.25, slowed),
    )
    told = []
    for now in (0.0, 3.0, 6.0):
        machine.cuda.time = now
        told.append((card.sample(), card.energy_joules()))
    assert told == [
        (Sample(300, 405, 35, 20.5, ("gpu idle",)), 0.0),
        (Sample(2100, 8000, 60, 120.0, ()), 2 * 20.5 + 120.0),
        (Sample(1410, 8000, 83, 130.25, ("sw power cap", "hw thermal slowdown")), 2 * 20.5 + 3 * 120.0 + 130.25),
    ]


@pytest.mark.parametrize("error", UNTOLD)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_card_does_not_tell_is_none_and_the_rest_is_told(machine, card, name, error):
    whole = {**vars(card.description()), **vars(card.sample())}
    machine.nvml.refuse(name, error=getattr(real, f"NVML_ERROR_{error}"))
    found = {**vars(card.description()), **vars(card.sample())}
    assert {key for key, value in found.items() if value is None} == FUNCTIONS[name]
    assert {key for key, value in found.items() if value != whole[key]} == FUNCTIONS[name]


def test_a_card_that_counts_no_energy_says_none(machine, card):
    machine.cuda.time = 2.0
    assert card.energy_joules() == 200.0
    machine.nvml.refuse("nvmlDeviceGetTotalEnergyConsumption")
    assert card.energy_joules() is None


def test_an_older_driver_is_asked_by_the_older_name_and_none_is_not_no_reason(machine, card):
    machine.nvml.phases = (Phase(reasons=real.nvmlClocksThrottleReasonReliability),)
    machine.nvml.refuse("nvmlDeviceGetCurrentClocksEventReasons", error=real.NVML_ERROR_FUNCTION_NOT_FOUND)
    assert card.sample().throttled == ("reliability",)
    machine.nvml.refuse("nvmlDeviceGetCurrentClocksThrottleReasons")
    assert card.sample().throttled is None


# --- reasons in words


def test_the_words_are_those_of_the_packages_constants():
    assert WORDS == {
        0x1: "gpu idle",
        0x2: "applications clocks setting",
        0x4: "sw power cap",
        0x8: "hw slowdown",
        0x10: "sync boost",
        0x20: "sw thermal slowdown",
        0x40: "hw thermal slowdown",
        0x80: "hw power brake slowdown",
        0x100: "display clock setting",
        0x200: "board limit",
        0x400: "reliability",
    }


@given(st.sets(st.integers(0, 63)))
@settings(max_examples=100, deadline=None)
def test_every_bit_of_a_mask_is_one_reason_in_order(bits):
    words = words_of_mask(sum(1 << bit for bit in bits), WORDS)
    expected = [WORDS.get(1 << bit, f"reason {1 << bit:#x}") for bit in sorted(bits)]
    assert list(words) == expected
    assert len(set(words)) == len(bits)


# --- where there is no telemetry


def unsupported(machine, monkeypatch, name, error):
    machine.nvml.refuse(name, error=error)
    return 0


def without(machine, monkeypatch, module):
    if module == "cuda.bindings.runtime":
        monkeypatch.delattr(cuda.bindings, "runtime")
    monkeypatch.setitem(sys.modules, module, None)
    return 0


def hidden(machine, monkeypatch):
    monkeypatch.setitem(BUS_IDS, 1, "0000:99:00.0")
    machine.nvml.refuse("nvmlDeviceGetHandleByPciBusId", error=real.NVML_ERROR_NOT_FOUND)
    return 1


ABSENT = {
    "no package": (
        functools.partial(without, module="pynvml"),
        "nvidia-ml-py is not installed here; pip install nvidia-ml-py",
    ),
    "no cuda-bindings": (
        functools.partial(without, module="cuda.bindings.runtime"),
        "NVML does not answer: cuda-bindings is not installed here; pip install 'repvgg-exporter[tensorrt]'",
    ),
    "no library": (
        functools.partial(unsupported, name="nvmlInit", error=real.NVML_ERROR_LIBRARY_NOT_FOUND),
        "NVML does not answer: NVML Shared Library Not Found",
    ),
    "no driver": (
        functools.partial(unsupported, name="nvmlInit", error=real.NVML_ERROR_DRIVER_NOT_LOADED),
        "NVML does not answer: Driver Not Loaded",
    ),
    "no such GPU": (
        lambda machine, monkeypatch: 7,
        "NVML does not answer: cudaDeviceGetPCIBusId failed: cudaErrorInvalidDevice (invalid device ordinal); check "
        "with nvidia-smi that this process may see that GPU",
    ),
    "a GPU that NVML does not know": (hidden, "NVML does not know the GPU at 0000:99:00.0: Not Found"),
}


@pytest.mark.parametrize("case", ABSENT)
def test_where_there_is_none_the_reason_is_one_line_and_nothing_stays_open(machine, monkeypatch, case):
    prepare, reason = ABSENT[case]
    assert Nvml.open(prepare(machine, monkeypatch)) == Unavailable(reason)
    assert machine.nvml.open == 0


def test_closing_ends_it_once_and_quietly(machine):
    first, second = Nvml.open(0), Nvml.open(1)
    assert machine.nvml.open == 2
    first.close()
    first.close()
    assert machine.nvml.open == 1
    assert second.sample().sm_clock_mhz == 1500
    second.close()
    assert machine.nvml.names.count("nvmlShutdown") == 2
    third = Nvml.open(0)
    machine.nvml.refuse("nvmlShutdown", error=real.NVML_ERROR_GPU_IS_LOST)
    third.close()
    machine.nvml.open = 0


def test_nothing_is_imported_before_it_is_asked_for():
    script = "import sys, engines.bench.telemetry; print('pynvml' in sys.modules, 'cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


# --- what is told of a row


class Card:
    """Says these things one after the other, and counts ``energies``."""

    def __init__(self, samples, energies):
        self._samples, self._energies = iter(samples), iter(energies)

    def sample(self):
        return next(self._samples)

    def energy_joules(self):
        return next(self._energies)


class Steady:
    """Queries of 1/64 s, three of which are a slice."""

    def __init__(self, clock):
        self._clock = clock

    def run(self, count):
        self._clock.now += count / 64
        return Timing(np.full(count, 1 / 64), count / 64)


def told_of(samples, energies=(100.0, 133.0)):
    """Of 0.8 / 3 s, in slices of three queries of four images each."""
    clock = VirtualClock()
    device = Device("NVIDIA L4", "580", 2175, None, Card(samples, energies), None)
    found = device.telemetry(Steady(clock), 4, 0.8, clock)
    assert (found["seconds"], found["images"]) == (18 / 64, 72)
    return found


def samples_of(**lists):
    """Seven samples, of these values and of None."""
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(Sample))
    return [Sample(**nothing | {name: values[place] for name, values in lists.items()}) for place in range(7)]


def test_clocks_are_medians_the_heat_is_the_highest_and_the_power_is_that_of_the_energy():
    found = told_of(
        samples_of(
            sm_clock_mhz=[1200, 1500, 1510, 1510, 1520, 1600, 1900],
            memory_clock_mhz=[400, 6000, 6000, 6000, 6000, 6000, 6000],
            temperature_c=[50, 52, 57, 56, 55, 54, 53],
            power_w=[70.0] * 7,
        )
    )
    assert (found["sm_clock_mhz"], found["memory_clock_mhz"], found["maximum_sm_clock_mhz"]) == (1510, 6000, 2175)
    assert found["temperature_c"] == 57
    assert found["joules_per_image"] == pytest.approx(33 / 72)
    assert found["power_w"] == pytest.approx(33 / (18 / 64))
    assert found["throttled"] is None


@pytest.mark.parametrize("energies", [(None, 133.0), (100.0, None)])
def test_without_energy_the_power_is_the_median_of_what_was_drawn(energies):
    found = told_of(samples_of(power_w=[10.0, 70, 70, None, 71, 72, 300]), energies)
    assert (found["joules_per_image"], found["power_w"]) == (None, 70.5)
    assert (found["sm_clock_mhz"], found["temperature_c"]) == (None, None)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([("sw power cap", "gpu idle"), None, ("hw slowdown",), (), (), (), ("hw slowdown",)],
         ["hw slowdown", "sw power cap"]),
        ([("gpu idle",), *[()] * 6], []),
        ([None] * 7, None),
    ],
)  # fmt: skip
def test_every_reason_that_was_given_is_told_once_but_that_the_card_was_idle(given, told):
    assert told_of(samples_of(throttled=given))["throttled"] == told
