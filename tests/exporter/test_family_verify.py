"""``exporter.verify`` of every kind of output: what a file was made with stands in the file, and no flag is needed."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from exporter import verify
from tests.conftest import Outcome
from tests.families import Network
from tests.family_exports import SIZE, export
from tests.family_names import FAMILIES, OFFICIAL, Shape
from tests.family_states import whole

MADE = {
    "SE after the ReLU": ("RepVGGplus", SIZE),
    "depthwise, two feature maps": ("MobileOne", (*SIZE, "--features", "2,4")),
    "backbone of any size": ("fast-reid", ("--size", "20:28x36:44x52")),
    "identities without tensors, a stride that is given": ("QARepVGG", (*SIZE, "--strides", "2,1,2,2,2")),
}


def verified(directory, *arguments):
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = verify.main([str(argument) for argument in arguments])
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory):
    name, flags = MADE[request.param]
    export_ = export(tmp_path_factory.mktemp("made"), whole(Network(*FAMILIES[name])), *flags)
    assert export_.outcome.code == 0, export_.outcome.stderr
    return export_


def test_a_file_is_the_network_of_its_checkpoint(made):
    outcome = verified(made.directory.parent, "model.pt", made.path)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "against model.pt (checkpoint, float64): relative error" in outcome.stdout


def test_a_file_with_one_weight_that_is_another_is_not(made):
    """The largest weight of the last convolution, a hundredth larger."""
    model = onnx.load(made.path)
    kernels = {node.input[1] for node in model.graph.node if node.op_type == "Conv" and "/se/" not in node.name}
    tensor = [one for one in model.graph.initializer if one.name in kernels][-1]
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[np.abs(array).argmax()] *= 1.01
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, made.directory.parent / "changed.onnx")
    outcome = verified(made.directory.parent, "model.pt", "changed.onnx")
    assert outcome.code == 1
    assert "exceeds" in outcome.error


def test_the_weights_that_were_taken_are_taken_again(tmp_path):
    """Of two sets of weights in one checkpoint, without a flag that says which."""
    raw, ema = Network(OFFICIAL, Shape(), seed=1), Network(OFFICIAL, Shape(), seed=2)
    taken = export(tmp_path, {"state_dict": raw.state, "state_dict_ema": ema.state}, *SIZE, "--weights", "raw")
    assert verified(tmp_path, "model.pt", taken.path).code == 0
    assert verified(tmp_path, "model.pt", taken.path, "--weights", "ema").code == 1
