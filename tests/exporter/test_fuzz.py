"""Damaged checkpoints by the hundred: an exit code that means something, one line at most, nothing left behind."""

from __future__ import annotations

import json
import random
import shutil
import traceback
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.networks import NaiveRepVGG, Shape, contiguous_float

LONG = True
SEED = 20261122
TINY = Shape(depths=(1, 1, 2, 1, 1), widths=(4, 4, 6, 6, 8), classes=5)
QUIET_BY_DEFAULT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@pytest.fixture
def attempt(command, tmp_path):
    """``attempt(name)``: (exit code, stderr's lines, the golden outputs or None, whether anything is left)."""

    def run(name):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = command(name, "--size", "16", "--out", "out")
        shown = [str(w.message) for w in caught if not issubclass(w.category, QUIET_BY_DEFAULT)]
        out, golden = tmp_path / "out", None
        if outcome.code == 0:
            with np.load(out / "golden.npz") as arrays:
                golden = arrays["output"]
        left = [path.name for path in tmp_path.iterdir() if path.name != name]
        shutil.rmtree(out, ignore_errors=True)
        return outcome.code, [*outcome.stderr.splitlines(), *shown], golden, left

    return run


def saved_as(form, path):
    state = contiguous_float(NaiveRepVGG(TINY, seed=1).state_dict())
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")


def mutated(content, rng):
    """``content`` after one to three byte flips, cuts and insertions; half of them near its beginning or its end."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if not changed:
            break
        at = rng.choice([rng.randrange(len(changed)), *(rng.randrange(min(2000, len(changed))) for _ in range(2))])
        at = rng.choice([at, at, len(changed) - 1 - at])
        kind = rng.choice(["flip", "flip", "flip", "set", "insert", "delete", "cut"])
        if kind == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "set":
            changed[at] = rng.choice([0, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == "insert":
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == "delete":
            del changed[at : at + rng.randrange(1, 9)]
        else:
            del changed[at:]
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "count"), [("zip", 160), ("legacy", 60), ("safetensors", 80)])
def test_a_damaged_checkpoint_is_reported_or_harmless(form, count, attempt, tmp_path):
    name = "model.safetensors" if form == "safetensors" else "model.pt"
    saved_as(form, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    code, lines, golden, _ = attempt(name)
    assert (code, lines) == (0, [])

    rng = random.Random(SEED)
    problems, codes = [], []
    for number in range(count):
        content = mutated(whole, rng)
        (tmp_path / name).write_bytes(content)
        try:
            code, lines, outputs, left = attempt(name)
        except Exception:
            problems.append((number, traceback.format_exc(limit=-2)))
            continue
        codes.append(code)
        if code not in (0, 1, 3) or len(lines) > 1 or bool(lines) != (code != 0):
            problems.append((number, code, lines))
        if code == 3 and left:
            problems.append((number, "left behind", left))
        if code == 0 and form == "zip" and not np.array_equal(outputs, golden):
            problems.append((number, "another network, and nobody noticed"))
    assert problems == []
    assert codes.count(3) > count / 4, "the mutations hardly damage anything"
    assert codes.count(0) > 0, "no mutation is harmless: nothing was compared"


def test_a_changed_weight_is_seen_in_the_golden_outputs(attempt, tmp_path):
    saved_as("safetensors", tmp_path / "model.safetensors")
    golden = attempt("model.safetensors")[2]
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    header = int.from_bytes(content[:8], "little")
    first, _ = json.loads(content[8 : 8 + header])["linear.bias"]["data_offsets"]
    content[8 + header + first] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    code, lines, outputs, _ = attempt("model.safetensors")
    assert (code, lines) == (0, [])
    assert not np.array_equal(outputs, golden)
