"""A seeded part of ``benchmarks/fuzz_checkpoints.py``, and every defect that it looks for, planted and found."""

from __future__ import annotations

import collections
import random
import time
import warnings

import numpy as np
import pytest
import torch

from benchmarks import harness as harness_module
from benchmarks.fuzz_checkpoints import main, run, table
from benchmarks.harness import Canary, Harness, enter
from benchmarks.mutations import CANARY_FILE, MUTATIONS, mutation
from benchmarks.originals import Case, originals
from exporter.checkpoint import checkpoint_from_path
from exporter.errors import CheckpointRejected, SdkMissing

SEED = 20261122
COUNT = 240


@pytest.fixture(scope="module")
def pool():
    return originals()


@pytest.fixture(scope="module")
def canary():
    return Canary()


@pytest.fixture
def attempt(canary, tmp_path, monkeypatch):
    """``attempt(case, entry, whole)``: the outcome of one file in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def attempt_one(case, entry=enter, *, whole=False):
        folder = tmp_path / f"attempt {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return Harness(folder, canary, entry).attempt(case, whole=whole)

    return attempt_one


def whole_file(pool, form="zip"):
    original = pool[1]
    return Case("whole", original.files[form], ".safetensors" if form == "safetensors" else ".pt", original.network)


@pytest.mark.slow
def test_every_mutation_ends_in_weights_or_in_one_line(pool, canary, tmp_path):
    shown = []
    outcomes = run(range(COUNT), SEED, 3, Harness(tmp_path, canary), pool, shown.append)
    assert shown == []
    assert [outcome for outcome in outcomes if outcome.defects] == []
    codes = collections.Counter(outcome.code for outcome in outcomes)
    assert codes.keys() <= {0, 1, 3}
    assert codes[3] > COUNT / 4, "the mutations hardly damage anything"
    assert codes[0] > COUNT / 20, "hardly a mutation is harmless: little was compared"
    assert any(outcome.whole and outcome.code == 0 for outcome in outcomes)
    assert len({outcome.kind for outcome in outcomes}) > 30
    assert str(codes[3]) in table(outcomes).replace(" ", "") or "refused" in table(outcomes)


def test_a_mutation_is_the_same_for_the_same_seed(pool):
    first, again, other = (mutation(random.Random(seed), pool) for seed in ("0 7", "0 7", "0 8"))
    assert (first.kind, first.content) == (again.kind, again.content)
    assert first.content != other.content


def test_the_shares_of_the_mutations_are_in_a_hundred():
    assert sum(share for _, share in MUTATIONS) == 100


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "half", "wrapped"])
def test_the_originals_are_whole(form, pool, attempt):
    for original in pool:
        suffix = ".safetensors" if form == "safetensors" else ".pt"
        state = None if form == "half" else original.state
        outcome = attempt(Case("whole", original.files[form], suffix, original.network, state))
        assert (outcome.code, outcome.defects) == (0, ()), original.network.family.name


@pytest.mark.slow
def test_an_original_is_exported_and_answers_as_the_independent_network(pool, attempt):
    outcome = attempt(whole_file(pool), whole=True)
    assert (outcome.code, outcome.whole, outcome.defects) == (0, True, ())


# Planted faults


def raising(error):
    def entry(*_):
        raise error

    return entry


class TwoLines(CheckpointRejected):
    """An error whose text did not become one line."""

    def __str__(self):
        return "first\nsecond"


def loading_code(path, *_):
    torch.load(path, weights_only=False)
    raise CheckpointRejected("done")


def leaving_in(where):
    def entry(path, out, *_):
        target = {"out": out / "model.onnx", "beside": path.parent / "core", "temporary": path.parent / "tmp" / "x"}[
            where
        ]
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"")
        raise CheckpointRejected("refused")

    return entry


def warning(path, *_):
    warnings.warn("look out", UserWarning, stacklevel=1)
    return checkpoint_from_path(path)


def with_other_weights(path, *_):
    checkpoint = checkpoint_from_path(path)
    name = next(name for name, tensor in checkpoint.tensors.items() if tensor.is_floating_point())
    checkpoint.tensors[name] = checkpoint.tensors[name] + 1e-6
    return checkpoint


def with_a_tensor_too_few(path, *_):
    checkpoint = checkpoint_from_path(path)
    checkpoint.tensors.pop(next(iter(checkpoint.tensors)))
    return checkpoint


def exporting_another_network(path, out, *_):
    checkpoint = checkpoint_from_path(path)
    out.mkdir()
    images = np.ones((2, checkpoint.tensors["stage0.rbr_dense.conv.weight"].shape[1], 28, 28), np.float32)
    np.savez(out / "golden.npz", input=images, output=np.ones((2, 7)))
    return checkpoint


PLANTED = {
    "a raw error": (raising(KeyError("stage0")), "KeyError: 'stage0'"),
    "an error of two lines": (raising(TwoLines("a")), "not one good line"),
    "an error of no words": (raising(CheckpointRejected("")), "not one good line"),
    "a traceback in an error": (raising(CheckpointRejected("Traceback (most recent")), "not one good line"),
    "an exit code that no file can cause": (raising(SdkMissing("no GPU")), "exit code 4"),
    "a file in the output directory": (leaving_in("out"), "left in the output directory: ['model.onnx']"),
    "a file beside the checkpoint": (leaving_in("beside"), "left behind: core"),
    "a temporary file": (leaving_in("temporary"), "left behind: x"),
    "a warning": (warning, "warned: look out"),
    "a weight that differs": (with_other_weights, "other tensors than torch reads"),
    "a tensor too few": (with_a_tensor_too_few, "other tensors than torch reads"),
    "code that is run": (loading_code, "ran code: pickle.find_class"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_a_defect(fault, pool, attempt):
    entry, words = PLANTED[fault]
    assert attempt(whole_file(pool)).defects == ()
    defects = attempt(whole_file(pool), entry).defects
    assert any(words in defect for defect in defects), defects


def test_an_exported_network_that_answers_otherwise_is_a_defect(pool, attempt):
    defects = attempt(whole_file(pool), exporting_another_network, whole=True).defects
    assert "another network than the tensors make" in defects


def test_a_file_that_must_not_be_accepted_is_a_defect(pool, attempt):
    case = whole_file(pool)
    wrong = Case(case.kind, case.content, case.suffix, case.network, must_fail=True)
    assert attempt(wrong).defects == ("accepted, which is wrong",)


def test_weights_that_a_mutation_did_not_make_are_a_defect(pool, attempt):
    case = whole_file(pool)
    state = {name: tensor * 1 for name, tensor in pool[1].state.items()}
    assert attempt(Case(case.kind, case.content, case.suffix, case.network, state)).defects == ()
    state["linear.bias"][0] += 1
    expected = "other tensors than the file was made of"
    assert attempt(Case(case.kind, case.content, case.suffix, case.network, state)).defects == (expected,)


def test_a_file_that_takes_too_long_is_a_defect(pool, attempt, monkeypatch):
    monkeypatch.setattr(harness_module, "SECONDS", 1)
    (defect,) = attempt(whole_file(pool), lambda *_: time.sleep(30)).defects
    assert "not done after 1 s" in defect


def hostile_cases(pool):
    rng = random.Random(SEED)
    while True:
        case = mutation(rng, pool)
        if case.kind == "hostile pickle":
            yield case


def test_the_hostile_pickles_would_run(pool, attempt, tmp_path):
    """Each runs something in a loader that lets it, and nothing here: the canary and the file it would make tell."""
    heard, made = set(), 0
    for case, _ in zip(hostile_cases(pool), range(30), strict=False):
        assert attempt(case).defects == ()
        assert not (tmp_path / CANARY_FILE).exists()
        defects = attempt(case, loading_code).defects
        heard |= {defect.partition(" (")[0] for defect in defects if defect.startswith("ran code")}
        made += (tmp_path / CANARY_FILE).exists()
        (tmp_path / CANARY_FILE).unlink(missing_ok=True)
    assert {"ran code: pickle.find_class", "ran code: os.system"} <= heard
    assert made > 0


@pytest.mark.slow
def test_the_command_prints_its_table_and_its_figures(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fuzz_checkpoints.py", "--mutations", "10", "--whole", "0"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "exit code  how it ended" in printed
    assert "10 mutations, seed 0, " in printed
    assert printed.endswith("0 with defects\n")
