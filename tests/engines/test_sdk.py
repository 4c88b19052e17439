"""Which compiler is chosen, for every kind of machine, and the question to the GPU driver."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys

import pytest

from engines import sdk as sdk_module
from engines.errors import ReportedError, SdkMissing, UsageError
from engines.sdk import (
    SDKS,
    Sdk,
    gpu_compute_capability,
    is_installed,
    sdk_for_build,
    versions,
)
from tests.conftest import ROOT

FULL, RTX = SDKS
BOTH = ("tensorrt", "tensorrt_rtx")


@pytest.fixture
def machine(monkeypatch):
    """Pretends that these SDKs are installed and that GPU 0 has this compute capability."""

    def pretend(installed, capability):
        monkeypatch.setattr(sdk_module, "is_installed", lambda sdk: sdk.module in installed)
        monkeypatch.setattr(sdk_module, "gpu_compute_capability", lambda: capability)

    return pretend


@pytest.mark.parametrize(
    ("installed", "capability", "name", "cards", "chosen"),
    [
        (BOTH, 86, None, (), FULL),
        (BOTH, 86, None, (86,), FULL),
        (BOTH, None, None, (), RTX),
        (("tensorrt_rtx",), 86, None, (), RTX),
        (("tensorrt_rtx",), 86, None, (89, 120), RTX),
        (("tensorrt_rtx",), None, None, (), RTX),
        (("tensorrt",), 90, None, (90,), FULL),
        (BOTH, 86, "tensorrt_rtx", (), RTX),
        (BOTH, 86, "tensorrt_rtx", (89,), RTX),
        (BOTH, None, "tensorrt_rtx", (80, 86, 89, 120, 121), RTX),
        (BOTH, None, "tensorrt_rtx", (75,), RTX),
        (BOTH, None, "tensorrt_rtx", (75, 75), RTX),
        (BOTH, 86, "tensorrt", (86, 86), FULL),
    ],
)
def test_the_compiler_that_fits_the_machine_is_chosen(machine, installed, capability, name, cards, chosen):
    machine(installed, capability)
    assert sdk_for_build(name, cards) is chosen


NO_GPU = "TensorRT needs a GPU to build, and none answers here; --sdk tensorrt_rtx builds without one"
OTHER_CARD = "--gpu sm89: TensorRT builds for the card it runs on, which is sm86; build on that card"
NO_TARGET = (
    "--gpu sm90: TensorRT for RTX has no such target (it has sm75, sm80, sm86, sm89, sm120, sm121); "
    "build the typed ONNX with --sdk tensorrt on that card"
)
TURING = (
    "--gpu: sm75 must have an engine of its own, since one shared with it loses INT8 on every card; "
    "run once with --gpu sm75 and another --out"
)
NO_FULL = "TensorRT is not installed here; pip install 'repvgg-exporter[tensorrt]'"
NO_RTX = "TensorRT for RTX is not installed here; pip install 'repvgg-exporter[rtx]'"


@pytest.mark.parametrize(
    ("installed", "capability", "name", "cards", "kind", "message"),
    [
        (BOTH, 86, "trt", (), UsageError, "--sdk trt: unknown; choose from tensorrt, tensorrt_rtx"),
        (BOTH, 86, "", (), UsageError, "--sdk : unknown; choose from tensorrt, tensorrt_rtx"),
        ((), None, None, (), SdkMissing, NO_RTX),
        ((), 86, None, (), SdkMissing, NO_RTX),
        (("tensorrt",), None, None, (), SdkMissing, NO_RTX),
        (("tensorrt",), None, "tensorrt_rtx", (), SdkMissing, NO_RTX),
        (("tensorrt_rtx",), 86, "tensorrt", (), SdkMissing, NO_FULL),
        (BOTH, None, "tensorrt", (), SdkMissing, NO_GPU),
        (BOTH, None, "tensorrt", (86,), SdkMissing, NO_GPU),
        (BOTH, 86, "tensorrt", (89,), SdkMissing, OTHER_CARD),
        (BOTH, 86, None, (86, 89), SdkMissing, OTHER_CARD),
        (BOTH, None, None, (90,), SdkMissing, NO_TARGET),
        (BOTH, 86, "tensorrt_rtx", (86, 90), SdkMissing, NO_TARGET),
        (BOTH, None, None, (75, 86), UsageError, TURING),
        (BOTH, None, "tensorrt_rtx", (86, 75), UsageError, TURING),
    ],
)  # fmt: skip
def test_what_cannot_be_built_here_says_why_and_what_to_do(machine, installed, capability, name, cards, kind, message):
    machine(installed, capability)
    with pytest.raises(ReportedError) as raised:
        sdk_for_build(name, cards)
    assert type(raised.value) is kind
    assert str(raised.value) == message
    assert raised.value.exit_code == (2 if kind is UsageError else 4)


def test_an_installed_module_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "stand_in_sdk.py").write_text("raise RuntimeError('imported')")
    stand_in = Sdk("stand_in_sdk", "Stand-in", needs_gpu=False, install="")
    assert not is_installed(stand_in)
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed(stand_in)
    assert "stand_in_sdk" not in sys.modules


def test_the_versions_are_those_of_what_is_installed():
    found = versions()
    assert found["numpy"] == importlib.metadata.version("numpy")
    assert found["tensorrt-rtx-cu12"] == importlib.metadata.version("tensorrt-rtx-cu12")
    assert set(found) <= {"tensorrt", "tensorrt-rtx-cu12", "onnxruntime", "onnxruntime-gpu", "numpy"}
    for name, version in found.items():
        assert importlib.metadata.version(name) == version


def test_an_sdk_that_is_not_installed_has_no_version(monkeypatch):
    def version(name):
        if name != "numpy":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert versions() == {"numpy": "2.0"}


# --- the driver

DRIVER = """
int cuInit(unsigned flags) {{ return flags == 0 ? {init} : 1; }}
int cuDeviceGet(int *device, int ordinal) {{ if (ordinal) return 101; *device = 7; return {get}; }}
int cuDeviceGetAttribute(int *value, int attribute, int device) {{
    if (device != 7) return 101;
    if (attribute == 75) {{ *value = {major}; return {attribute_75}; }}
    if (attribute == 76) {{ *value = {minor}; return {attribute_76}; }}
    return 1;
}}
"""


@pytest.fixture
def driver(tmp_path):
    """What ``gpu_compute_capability`` says in a process that finds a libcuda.so.1 of this behaviour."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")

    def ask(**behaviour):
        usual = {"init": 0, "get": 0, "attribute_75": 0, "attribute_76": 0, "major": 8, "minor": 6}
        source = tmp_path / "driver.c"
        source.write_text(DRIVER.format(**{**usual, **behaviour}))
        library = tmp_path / "libcuda.so.1"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
        script = "from engines.sdk import gpu_compute_capability; print(gpu_compute_capability())"
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return done.stdout.strip()

    return ask


@pytest.mark.parametrize(("major", "minor", "capability"), [(8, 6, "86"), (12, 0, "120"), (7, 5, "75"), (9, 0, "90")])
def test_the_drivers_answer_is_the_compute_capability(driver, major, minor, capability):
    assert driver(major=major, minor=minor) == capability


@pytest.mark.parametrize(
    "failure", [{"init": 100}, {"init": 35}, {"get": 101}, {"attribute_75": 1}, {"attribute_76": 1}], ids=str
)
def test_a_driver_that_fails_means_no_gpu(driver, failure):
    assert driver(**failure) == "None"


def test_no_driver_means_no_gpu(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(sdk_module.ctypes, "CDLL", missing)
    assert gpu_compute_capability() is None
