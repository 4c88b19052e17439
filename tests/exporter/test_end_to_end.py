"""Published networks at full size, from the command line to an audited engine: A0, B1g4, B3; 224 px, 1000 classes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from exporter.variants import variant_from_name
from tests.conftest import run_process
from tests.networks import NaiveRepVGG, Shape, contiguous_float, renamed

LONG = True
BLOCKS = {"A0": 22, "B1g4": 28, "B3": 28}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "naming"), [("A0", "timm"), ("B1g4", "mmpretrain"), ("B3", "official")])
def test_a_published_network_goes_all_the_way(name, naming, tmp_path):
    variant = variant_from_name(name)
    model = NaiveRepVGG(Shape(variant.depths, variant.widths, classes=1000, even_groups=variant.groups))
    state = contiguous_float(renamed(model.state_dict(), naming))
    torch.save(
        {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}, "epoch": 1}, tmp_path / "x.pth"
    )
    arguments = ["-m", "exporter", "x.pth", "--onnx", "--trt", "fp16", "--arch", name]
    done = run_process(arguments, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    blocks = BLOCKS[name]
    assert f"RepVGG-{name}, {naming} naming under state_dict, training form" in done.stdout
    audit = f"{blocks} of {blocks} convs in FP16, Conv+ReLU in one kernel each, all {blocks + 1} weights bit-equal"
    assert audit in done.stdout
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    assert report["passed"] is True
    assert report["engines"][0]["compute_capabilities"] == [80, 86, 89, 120, 121]
    assert [block for block in report["architecture"]["groups"] if block > 1] == [4] * (13 if name == "B1g4" else 0)
    with np.load(tmp_path / "x" / "golden.npz") as golden:
        image, output = torch.from_numpy(golden["input"][:1]), golden["output"][0]
    answer = model.answer(image).numpy()[0]
    assert np.abs(answer - output).max() / np.abs(answer).max() < 1e-12
    shutil.rmtree(tmp_path / "x")
