"""The whole way, in this process, for every lineage and form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import exporter
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
