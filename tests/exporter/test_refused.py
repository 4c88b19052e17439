"""What is refused is recognised by name, by its own entry alone, and nothing that is exported ever is."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.lineages import LINEAGES
from exporter.lineages.lineage import BRANCH_TENSORS, COUNTER, FUSED_TENSORS, POST_TENSORS, SE_TENSORS
from exporter.lineages.refused import REFUSED, Refusal, RefusedFamily, refusal_from_class, refusal_from_names
from tests.conftest import ROOT
from tests.networks import NAMINGS, NaiveRepVGG, Shape, contiguous_float, deployed_state, renamed
from tests.refused_names import CLASSES, LOADABLE, SUPPORTED, TABLES, names

RENAMEABLE = (
    "super-gradients RepVGG",
    "RepOptimizers RepVGG",
    "RepOptimizers RepOpt-VGG (RealVGG)",
    "PaddleClas RepVGG",
)


PREFIXES = ("", "module.", "backbone.", "model.", "model.backbone.", "img_backbone.", "0.", "model.0.", "net.encoder.")


def claims(names):
    return [family.name for family in REFUSED if family.has(names)]


@pytest.mark.parametrize(("family", "table"), TABLES, ids=[f"{i}-{family}" for i, (family, _) in enumerate(TABLES)])
def test_each_table_is_claimed_by_its_own_entry_alone(family, table):
    assert claims(table) == [family]
    refusal = refusal_from_names(iter(table))
    assert refusal == Refusal(family, next(one.remedy for one in REFUSED if one.name == family))


def test_every_entry_has_a_table_and_a_sample_of_it():
    assert {family for family, _ in TABLES} == {family.name for family in REFUSED}
    for entry in REFUSED:
        all_names = [name for family, table in TABLES if family == entry.name for name in table]
        sample = entry.sample.split(" ")[0]
        assert sample in all_names, sample


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.name)
def test_each_pattern_of_an_entry_is_needed(entry):
    tables = [table for family, table in TABLES if family == entry.name]
    for pattern in entry.tensors:
        for table in tables:
            rest = [name for name in table if not re.search(pattern, name)]
            assert len(rest) < len(table)
            assert not entry.has(rest)
    assert not entry.has([])


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_is_exported_is_never_claimed(family, prefix):
    blocks, forms, se, heads = SUPPORTED[family]
    gates = " ".join(f"{name}.weight {name}.bias" for name in se.split())
    head = " ".join(f"{name}.weight {name}.bias" for name in heads.split())
    for form in forms:
        table = [prefix + name for name in names(blocks, f"{form} {gates}", head)]
        assert claims(table) == [], table[:3]
        assert refusal_from_names(table) is None


CANONICAL = [name for names in BRANCH_TENSORS.values() for name in names]
CANONICAL += [*FUSED_TENSORS, *POST_TENSORS, *SE_TENSORS, f"dense.bn.{COUNTER}", f"identity.bn.{COUNTER}"]


@given(
    lineage=st.sampled_from(LINEAGES),
    prefix=st.sampled_from(PREFIXES),
    blocks=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)), min_size=1, max_size=6),
    inner=st.lists(st.sampled_from(CANONICAL), min_size=1, max_size=20, unique=True),
)
@settings(max_examples=300, deadline=None)
def test_no_names_of_a_lineage_are_claimed(lineage, prefix, blocks, inner):
    """Any tensors that the lineage itself knows, in any blocks, beside all that it drops."""
    canonical = [f"stage{stage}.{index if stage else 0}.{name}" for stage, index in blocks for name in inner]
    raw = [lineage.foreign(name) for name in [*canonical, "head.weight", "head.bias"]]
    known = [name for name in raw if lineage.canonical(name) is not None]
    dropped = [one.glob.replace("*", "0.weight") for one in lineage.dropped]
    if lineage.name == "QARepVGG":
        known.append("stage1.1.rbr_identity.weight")  # without it, this is block V5, whose identity has no tensors
    assert claims([prefix + name for name in [*known, *dropped]]) == []


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("se", [False, True])
def test_real_state_dicts_are_not_claimed(naming, se):
    network = NaiveRepVGG(Shape(se=se))
    for state in (network.state_dict(), deployed_state(network)):
        assert claims(list(renamed(state, naming))) == []


@pytest.mark.parametrize("dotted", CLASSES)
def test_classes_of_pickled_modules_are_known(dotted):
    refusal = refusal_from_class(dotted)
    assert refusal is not None
    assert refusal.name == CLASSES[dotted]


def test_every_entry_has_a_class_and_what_can_be_exported_has_none():
    assert set(CLASSES.values()) == {family.name for family in REFUSED}
    assert [refusal_from_class(dotted) for dotted in LOADABLE] == [None] * len(LOADABLE)


def test_names_and_remedies_are_one_line_that_ends_a_message():
    for family in REFUSED:
        text = f"model.pt: {family.name} weights, which are not exported; {family.remedy}"
        assert "\n" not in text
        assert len(text) < 330
        assert not family.remedy.endswith(".")
        assert family.source.split("/")[0] in ("github.com", "timm", "transformers")
    assert len({family.name for family in REFUSED}) == len(REFUSED)


def test_all_of_the_patterns_must_be_found_and_none_of_the_others():
    entry = RefusedFamily("x", "a.b", (r"^a\.", r"\.b$"), (), "", "", without=(r"^c$",))
    assert entry.has(["a.x", "x.b"])
    assert entry.has(["a.b"])
    assert not entry.has(["a.x"])
    assert not entry.has(["a.b", "c"])


HOSTILE = (
    "stage1.0.",
    "model.",
    "1.",
    "m.",
    "features.0.0.",
    "branches.0.",
    "rbr_",
    "dbb_",
    "heads.head1.",
    "\n",
    "weight_rbr_a",
)


def busy_seconds(recognise, part):
    begun = time.process_time()
    recognise([part * (20_000 // len(part)) + "!"])
    return time.process_time() - begun


@pytest.mark.parametrize("part", HOSTILE)
def test_names_made_to_keep_an_expression_busy_do_not(part):
    """Names come out of files of any origin: the time must grow with a name's length, and not with its square."""
    assert busy_seconds(refusal_from_names, part) < 0.2


def test_an_expression_that_can_be_kept_busy_would_be_seen():
    assert busy_seconds(RefusedFamily("x", "x", (r"\w+\.x",), (), "", "").has, "a") > 0.2


def test_recognising_needs_no_torch():
    """Only the module itself: its package has the lineages, whose tensors are torch's."""
    path = ROOT / "exporter" / "lineages" / "refused.py"
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('refused', {str(path)!r})\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['refused'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert module.refusal_from_names(['model.22.dfl.conv.weight'])\n"
        "assert not {'torch', 'numpy', 'exporter'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def refused_state(family, network):
    """The network's weights as that family would have saved them."""
    state = contiguous_float(network.state_dict())
    pairs = {
        "super-gradients RepVGG": (
            ("stage0.", "stem."),
            ("rbr_dense.", "branch_3x3."),
            ("rbr_1x1.", "branch_1x1."),
            ("rbr_identity.", "no_conv_branch."),
        ),
        "RepOptimizers RepVGG": (
            ("rbr_dense.conv.", "conv_3x3."), ("rbr_dense.bn.", "bn_3x3."), ("rbr_1x1.conv.", "conv_1x1."),
            ("rbr_1x1.bn.", "bn_1x1."), ("rbr_identity.", "bn_identity."),
        ),
        "RepOptimizers RepOpt-VGG (RealVGG)": (("rbr_dense.", ""),),
        "PaddleClas RepVGG": ((".running_mean", "._mean"), (".running_var", "._variance")),
    }[family]  # fmt: skip
    if family == "PaddleClas RepVGG":
        state["linear.weight"] = state["linear.weight"].T.contiguous()
    return {with_replaced(name, pairs): tensor for name, tensor in state.items()}


def with_replaced(name, pairs):
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def renames_in(remedy):
    """The (old, new) pairs that a remedy tells, as in ``rename a. to b., c. to d. and e. to f. and save it``."""
    told = re.search(r"rename (.+?)(?:,? and save|, transpose)", remedy)[1]
    return re.findall(r"(\S+) to (\S+?)(?:,|$| and)", told)


@pytest.mark.parametrize("family", RENAMEABLE)
def test_what_a_remedy_tells_to_rename_is_then_exported(family, saved, command, tmp_path):
    """The refusal's own words are followed, to the letter, and the network comes out right."""
    branches = family != "RepOptimizers RepOpt-VGG (RealVGG)"
    network = NaiveRepVGG(Shape(pointwise=branches, identity=branches))
    state = refused_state(family, network)
    outcome = command(saved(state, "refused.pt"), "--size", "32", "--out", "no")
    assert outcome.code == 3
    remedy = next(one.remedy for one in REFUSED if one.name == family)
    assert family in outcome.error
    assert remedy in outcome.error
    assert not (tmp_path / "no").exists()
    pairs = renames_in(remedy)
    assert pairs
    again = {with_replaced(name, pairs): tensor for name, tensor in state.items()}
    if "transpose linear.weight" in remedy:
        again["linear.weight"] = again["linear.weight"].T.contiguous()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    np.savez(tmp_path / "io.npz", input=images.numpy(), output=network.answer(images).numpy())
    outcome = command(saved(again, "again.pt"), "--size", "32", "--out", "yes", "--expect", "io.npz")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "official naming" in outcome.stdout
