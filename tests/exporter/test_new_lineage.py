"""A further family is one file and one line: here the file's content is in the test, and the line is a monkeypatch."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
import torch

import exporter.lineages
from exporter.lineages import LINEAGES, Lineage
from exporter.lineages.table import markdown_from_lineages
from tests.conftest import ROOT
from tests.networks import NaiveRepVGG, Shape, contiguous_float, deployed_state

EPSILON = 2e-3
SCHEMA = json.loads((ROOT / "exporter" / "report" / "report.schema.json").read_text(encoding="utf-8"))
SLAB = Lineage(
    name="slab",
    title="Slab",
    source="example.org/slab, slab.py",
    bn_eps=EPSILON,
    stem="trunk.entry",
    block="trunk.level{stage}.slab{index}",
    first_stage=1,
    head="answer",
    modules=(
        ("wide", "dense"),
        ("wide_norm", "dense.bn"),
        ("narrow", "pointwise"),
        ("narrow_norm", "pointwise.bn"),
        ("as_is", "identity.bn"),
        ("merged", "fused"),
        ("gate.in", "se.reduce"),
        ("gate.out", "se.expand"),
    ),
    last_stride=1,
    dropped=(),
)
THEIRS = (
    ("rbr_dense.conv.", "wide."),
    ("rbr_dense.bn.", "wide_norm."),
    ("rbr_1x1.conv.", "narrow."),
    ("rbr_1x1.bn.", "narrow_norm."),
    ("rbr_identity.", "as_is."),
    ("rbr_reparam.", "merged."),
    ("se.down.", "gate.in."),
    ("se.up.", "gate.out."),
    ("linear.", "answer."),
)


def in_slab(state):
    return {slab_name(name): tensor for name, tensor in contiguous_float(state).items()}


def slab_name(name):
    """The authors' name of a tensor in that of the new family, written apart from its table."""
    for theirs, ours in THEIRS:
        name = name.replace(theirs, ours)
    stage, _, rest = name.partition(".")
    if stage == "answer":
        return name
    return f"trunk.entry.{rest}" if stage == "stage0" else f"trunk.level{stage.removeprefix('stage')}.slab{rest}"


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(exporter.lineages, "LINEAGES", (*LINEAGES, SLAB))


@pytest.fixture
def network():
    return NaiveRepVGG(Shape(widths=(8, 8, 12, 16, 20), strides=(2, 2, 2, 2, 1), eps=EPSILON, se=True))


@pytest.fixture
def answers(network, tmp_path):
    """The independent network's own answers, which the export must reproduce."""
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    np.savez(tmp_path / "io.npz", input=images.numpy(), output=network.answer(images).numpy())
    return "io.npz"


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("form", ["training", "deployed"])
def test_a_file_in_the_new_names_is_exported(form, network, answers, saved, command, tmp_path):
    state = in_slab(network.state_dict() if form == "training" else deployed_state(network))
    outcome = command(saved(state), "--size", "32", "--expect", answers, "--out", "out")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert f"slab naming, {form} form" in outcome.stdout
    assert "stage strides 2,2,2,2,1" in outcome.stdout
    assert "assumed: batch norm eps 0.002 (slab code; --eps)" in outcome.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["checkpoint"]["lineage"] == "slab"
    jsonschema.validate(report["checkpoint"]["lineage"], SCHEMA["$defs"]["checkpoint"]["properties"]["lineage"])
    with np.load(tmp_path / "out" / "golden.npz") as golden:
        theirs = network.answer(torch.from_numpy(golden["input"])).numpy()
        assert np.abs(golden["output"] - theirs).max() < (1e-12 if form == "training" else 1e-5) * np.abs(theirs).max()


def test_without_its_line_the_file_is_not_recognised(network, saved, command, tmp_path):
    outcome = command(saved(in_slab(network.state_dict())), "--size", "32", "--out", "out")
    assert outcome.code == 3
    assert "not a RepVGG that is known" in outcome.error
    assert "slab" not in outcome.error.replace("slab0", "").replace("slab1", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("wrong", [["--eps", "1e-5"], ["--strides", "2,2,2,2,2"]])
def test_what_its_entry_assumes_is_what_its_networks_need(wrong, network, answers, saved, command):
    """Another epsilon or stride than the entry's is seen by the network's own answers."""
    outcome = command(saved(in_slab(network.state_dict())), "--size", "32", "--expect", answers, *wrong)
    assert outcome.code == 1
    assert wrong[0] in outcome.stdout


@pytest.mark.usefixtures("known")
def test_errors_speak_its_names(network, saved, command):
    state = in_slab(network.state_dict())
    del state["trunk.level2.slab1.narrow_norm.running_var"]
    state["other.weight"] = torch.ones(1)
    outcome = command(saved(state), "--size", "32")
    assert outcome.code == 3
    assert "not a whole Slab checkpoint" in outcome.error
    assert "missing: trunk.level2.slab1.narrow_norm.running_var" in outcome.error
    assert "unexpected: other.weight" in outcome.error


def test_the_readmes_table_gets_its_row():
    row = markdown_from_lineages((*LINEAGES, SLAB)).splitlines()[-1]
    assert row.startswith(
        "| Slab | `trunk.level1.slab0.wide.weight` | `trunk.level1.slab0.merged.weight` | `answer.weight`"
    )
    assert "strides 2,2,2,2,1, eps 0.002" in row
