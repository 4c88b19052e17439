"""``examples/serve_pycuda.py`` over a stand-in for PyCUDA and the fakes of ``tests.engines``, with no GPU."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest

from engines.errors import UsageError
from tests.conftest import EXAMPLES
from tests.engines.fake_machine import BATCH, answers, fake_machine, images


class StandIn:
    """The few names of PyCUDA that the example uses; ``log`` is what was done with contexts and streams."""

    def __init__(self, cuda):
        self.cuda, self.log, self.live = cuda, [], []
        self.driver = types.ModuleType("pycuda.driver")
        self.driver.init = lambda: self.log.append("init")
        self.driver.Device = self.device
        self.driver.Stream = self.stream
        self.gpuarray = types.ModuleType("pycuda.gpuarray")
        self.gpuarray.to_gpu = self.to_gpu
        self.gpuarray.empty = lambda shape, dtype: self.to_gpu(np.full(shape, np.nan, dtype))
        self.package = types.ModuleType("pycuda")
        self.package.driver, self.package.gpuarray = self.driver, self.gpuarray

    def device(self, number):
        context = types.SimpleNamespace(
            push=lambda: self.log.append(f"push primary {number}"), pop=lambda: self.log.append(f"pop primary {number}")
        )
        return types.SimpleNamespace(retain_primary_context=lambda: context)

    def stream(self):
        handle = self.cuda.new_stream()
        self.log.append("stream")

        def synchronize():
            self.log.append("synchronize")
            self.cuda._cudaStreamSynchronize(handle)

        return types.SimpleNamespace(handle=handle, synchronize=synchronize)

    def to_gpu(self, array):
        assert self.log[-1] != "pop primary 0", "an array was made with no context"
        address = self.cuda.device_array(array)
        self.live.append(address)
        strides = array.strides
        interface = {
            "shape": array.shape, "strides": strides, "data": (address, False), "typestr": array.dtype.str,
            "stream": None, "version": 3,
        }  # fmt: skip
        return types.SimpleNamespace(
            __cuda_array_interface__=interface,
            get=lambda: self.cuda.host_array(address, array.dtype, array.shape),
        )

    def release(self):
        for address in self.live:
            self.cuda._cudaFree(address)
        for handle in set(self.cuda.streams) - {0}:
            self.cuda._cudaStreamDestroy(handle)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    machine = fake_machine(monkeypatch, tmp_path)
    made = StandIn(machine.cuda)
    for name, module in (("", made.package), (".driver", made.driver), (".gpuarray", made.gpuarray)):
        monkeypatch.setitem(sys.modules, f"pycuda{name}", module)
    monkeypatch.setitem(sys.modules, "pycuda.autoinit", None)  # importing it would fail
    made.machine = machine
    yield made
    made.release()
    machine.assert_nothing_left()


@pytest.fixture
def example(stand_in):
    spec = importlib.util.spec_from_file_location("serve_pycuda", EXAMPLES / "serve_pycuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_images_go_in_and_scores_come_out(example, stand_in):
    feeds = images(4)
    found = example.scores(str(stand_in.machine.engine()), feeds)
    np.testing.assert_allclose(found, answers(feeds)["output"], rtol=1e-5, atol=1e-6)
    assert stand_in.log == ["init", "push primary 0", "stream", "synchronize", "pop primary 0"]
    assert "cudaMemcpyAsync" not in stand_in.machine.names


def test_without_the_synchronisation_there_would_be_no_scores(example, stand_in):
    handle = stand_in.cuda.new_stream()
    stand_in.driver.Stream = lambda: types.SimpleNamespace(handle=handle, synchronize=lambda: None)
    assert np.isnan(example.scores(str(stand_in.machine.engine()), images(4))).all()


def test_a_batch_that_the_engine_does_not_take_is_refused_and_the_context_is_put_back(example, stand_in):
    with pytest.raises(UsageError, match="outside of the engine's profile"):
        example.scores(str(stand_in.machine.engine()), images(BATCH[-1] + 1))
    assert stand_in.log[-1] == "pop primary 0"


def test_the_command_prints_a_class_for_each_image(example, stand_in, capsys):
    example.main(str(stand_in.machine.engine()))
    printed = capsys.readouterr().out.strip().strip("[]").split()
    assert len(printed) == BATCH[0]
    noise = np.random.default_rng(0).standard_normal((BATCH[0], 3, 8, 8), np.float32)
    assert [int(word) for word in printed] == list(answers(noise)["output"].argmax(axis=1))


def test_the_example_says_that_no_gpu_has_run_it_and_uses_no_autoinit():
    text = (EXAMPLES / "serve_pycuda.py").read_text(encoding="utf-8")
    assert "No GPU has run this yet" in text
    assert "import pycuda.autoinit" not in text
