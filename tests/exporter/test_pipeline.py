"""The whole way, in this process, for every lineage and form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import exporter
from exporter import processes
from tests.conftest import SimplifierHere
from tests.networks import NAMINGS, NaiveRepVGG, Shape, contiguous_float, deployed_state, renamed


@pytest.mark.parametrize("form", ["training", "deployed"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_the_outputs_are_those_of_the_naive_network(naming, form, saved, tmp_path):
    model = NaiveRepVGG(Shape(), seed=3)
    state = contiguous_float(model.state_dict()) if form == "training" else deployed_state(model)
    path = saved(renamed(state, naming))
    report = exporter.export(path, tmp_path / "out", size=20)
    golden = np.load(tmp_path / "out" / "golden.npz")
    answer = model.answer(torch.from_numpy(golden["input"])).numpy()
    error = np.abs(answer - golden["output"]).max() / np.abs(answer).max()
    assert error < (1e-12 if form == "training" else 1e-6)
    assert report.passed
    assert report.checkpoint["lineage"] == naming
    assert report.checkpoint["form"] == form


@pytest.mark.parametrize("shape", [Shape(), Shape(se=True, even_groups=4)], ids=["plain", "grouped with SE"])
def test_onnxsim_in_this_process_gives_what_its_process_gives(shape, saved, tmp_path, simplifier_process):
    """Most tests have it here; the process is what users have."""
    path = saved(contiguous_float(NaiveRepVGG(shape).state_dict()))
    exporter.export(path, tmp_path / "process", size=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "SimplifierProcess", SimplifierHere)
        patch.setattr(simplifier_process, "__init__", None)
        exporter.export(path, tmp_path / "here", size=20)
    one, other = (tmp_path / name / "model.onnx" for name in ("process", "here"))
    assert one.read_bytes() == other.read_bytes()
