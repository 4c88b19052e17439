"""Every function, constant and number of arguments that the engines use of nvidia-ml-py, held to the real package."""

from __future__ import annotations

import inspect

import pynvml
import pytest

from tests.conftest import ROOT
from tests.contract.binding_uses import uses_of
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_nvml import FakeNvml

MODULE = ROOT / "engines" / "bench" / "telemetry.py"


def nvml_uses(source):
    return uses_of(source, {"pynvml": ""}, lambda name: None)


def nvml_faults(uses):
    faults = []
    for use in uses:
        thing = getattr(pynvml, use.name, None)
        if thing is None:
            faults.append(f"line {use.line}: {use.name} is not there")
        elif use.arguments is not None:
            takes = len(inspect.signature(thing).parameters)
            if use.arguments != takes:
                faults.append(f"line {use.line}: {use.name} takes {takes} arguments, not {use.arguments}")
    return faults


def test_nvml_has_what_the_code_uses():
    assert nvml_faults(nvml_uses(MODULE.read_text(encoding="utf-8"))) == []


def test_the_uses_of_nvml_are_found():
    uses = {(use.name, use.arguments) for use in nvml_uses(MODULE.read_text(encoding="utf-8"))}
    assert uses == {
        ("nvmlInit", 0), ("nvmlShutdown", 0), ("nvmlSystemGetDriverVersion", 0), ("nvmlDeviceGetName", 1),
        ("nvmlDeviceGetHandleByPciBusId", 1), ("nvmlDeviceGetMaxClockInfo", 2), ("nvmlDeviceGetClockInfo", 2),
        ("nvmlDeviceGetPowerUsage", 1), ("nvmlDeviceGetTemperature", 2), ("nvmlDeviceGetTotalEnergyConsumption", 1),
        ("nvmlDeviceGetCurrentClocksEventReasons", 1), ("nvmlDeviceGetCurrentClocksThrottleReasons", 1),
        ("NVML_CLOCK_SM", None), ("NVML_CLOCK_MEM", None), ("NVML_TEMPERATURE_GPU", None), ("NVMLError", None),
    }  # fmt: skip


def test_planted_mistakes_with_nvml_are_found():
    planted = """
def f(self, pynvml):
    handle = pynvml.nvmlDeviceGetHandle(0)
    self._told(self._pynvml.nvmlDeviceGetClockInfo, handle)
    pynvml.nvmlInit(1)
    self._told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SHADER)
"""
    assert sorted(nvml_faults(nvml_uses(planted))) == [
        "line 3: nvmlDeviceGetHandle is not there",
        "line 4: nvmlDeviceGetClockInfo takes 2 arguments, not 1",
        "line 5: nvmlInit takes 0 arguments, not 1",
        "line 6: NVML_CLOCK_SHADER is not there",
    ]


def test_the_fake_has_the_real_names_and_signatures_and_no_others():
    fake = FakeNvml(FakeCuda())
    for use in nvml_uses(MODULE.read_text(encoding="utf-8")):
        assert (getattr(fake, use.name) is getattr(pynvml, use.name)) == (use.arguments is None)
    with pytest.raises(AttributeError):
        fake.nvmlDeviceGetHandle  # noqa: B018
    with pytest.raises(TypeError):
        fake.nvmlDeviceGetClockInfo(0)
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        fake.nvmlDeviceGetName(0)
