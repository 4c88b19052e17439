"""Tests that need a GPU. Without ``--gpu`` they are reported as not run; with it, a machine without one fails them."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from engines.sdk import SDKS, gpu_compute_capability, is_installed

HERE = pathlib.Path(__file__).resolve().parent
PRECISIONS = ("fp32", "fp16")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--gpu"):
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason="not run: needs a GPU; make test-gpu runs it"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if gpu_compute_capability() is None:
        pytest.fail("--gpu was given and no GPU answers here; check with nvidia-smi", pytrace=False)
    if not any(is_installed(sdk) for sdk in SDKS):
        pytest.fail("--gpu was given and neither TensorRT is installed here; pip install 'repvgg-exporter[rtx]'")


def pytest_generate_tests(metafunc):
    for name in ("engine", "maps"):
        if name in metafunc.fixturenames:
            installed = [sdk.module for sdk in SDKS if is_installed(sdk)] or ["no SDK"]
            cases = [(sdk, precision) for sdk in installed for precision in PRECISIONS]
            metafunc.parametrize(name, cases, indirect=True, ids="-".join)


@dataclasses.dataclass(frozen=True)
class Exported:
    """An engine for this GPU, built by the SDK that the test is for."""

    path: pathlib.Path
    precision: str


@pytest.fixture(scope="session")
def engine(request, tmp_path_factory):
    """The shipped network, exported and compiled for the GPU that is here; None where there is none."""
    return _exported(*request.param, tmp_path_factory, size=28)


@pytest.fixture(scope="session")
def maps(request, tmp_path_factory):
    """The same network's feature maps, for images of 20x20 to 40x36."""
    return _exported(*request.param, tmp_path_factory, size="20:28:40x36", features=(1, 2, 4))


def _exported(sdk, precision, tmp_path_factory, **options):
    capability = gpu_compute_capability()
    if capability is None:
        return None  # the test says so itself
    import exporter
    from tests.conftest import EXAMPLES

    out = tmp_path_factory.mktemp(f"{sdk}-{precision}")
    exporter.export(
        EXAMPLES / "fashion.pt",
        out,
        trt=(precision,),
        batch=(2, 8, 16),
        calibration=EXAMPLES / "fashion_calibration.npz",
        sdk=sdk,
        gpu=(capability,),
        **options,
    )
    return Exported(out / f"fashion.{precision}.engine", precision)
