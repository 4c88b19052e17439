"""repvgg_verify and ``engines.judgement`` come to the same verdict on the same answers, for the same reason."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from engines.golden import Golden
from engines.golden_file import GoldenFile
from engines.judgement import LEAST_CONTRAST, judgement
from engines.outputs import layout_from_outputs
from engines.parity import GATES
from tests.engines.cpp.programs import BATCH, CHANNELS, FACTOR, SIZE, TERM, WEIGHTS, Network, run, write_engine

OUTPUTS = ("output", "features")
CASES = int(os.environ.get("REPVGG_VERDICT_CASES", "48"))
"""Set the environment variable for more."""
MIXED_UP = (128, 167, 309)
"""Seeds of the rarest kind: answers within the gate that are for other images."""


def case_of(seed):
    """A network that is wrong in one way or another, the vectors it is held against, and its precision."""
    generator = np.random.default_rng(seed)
    precision = str(generator.choice(list(GATES)))
    features = bool(generator.integers(2))
    spread, offset = 10.0 ** generator.uniform(-2.5, 1), generator.choice([0.0, 20.0])
    shape = (int(generator.integers(1, 7)), CHANNELS, SIZE, SIZE)
    images = (offset + spread * generator.normal(size=shape)).astype(np.float32)
    if generator.integers(4) == 0:
        images[-1] = images[0]
    gate = GATES[precision].max_relative_error
    wrong = WEIGHTS + generator.normal(size=WEIGHTS.shape) * gate * 10.0 ** generator.uniform(-4, 0.5)
    odds = {"swap": 0.5, "nan": 0.1}
    faults = [f"fault {kind} {output}" for kind, odd in odds.items() if generator.random() < odd for output in OUTPUTS]
    network = Network(features=features, weights=wrong.astype(np.float32), lines=tuple(faults))
    exact = network.answers(images)
    return network, images, {name: array.astype(np.float32) for name, array in exact.items()}, precision


def answers_of(network, images):
    """What the stub computes: one image alone and then the others, in parts of the largest batch, padded."""
    means = images.astype(np.float64).mean(axis=(2, 3))
    answers = {"output": (means @ network.weights.astype(np.float64).T).astype(np.float32)}
    if network.features:
        answers["features"] = np.float32(FACTOR) * images + np.float32(TERM)
    start = 0
    for rows in (1, *[BATCH[2]] * 2):
        part = {name: array[start : start + rows].copy() for name, array in answers.items()}
        padded = {name: np.concatenate([x, *[x[-1:]] * (BATCH[0] - len(x))]) for name, x in part.items()}
        for array in padded.values():
            if "fault swap output" in network.lines:
                array[:] = array[::-1].copy()
            if "fault nan output" in network.lines and len(array):
                array.reshape(-1)[-1] = np.nan
        for name, array in padded.items():
            answers[name][start : start + rows] = array[: len(part[name])]
        start += rows
    return answers


def pythons_verdict(network, images, outputs, precision):
    """Why the answers do not pass, without its figures; None where they do."""
    layout = layout_from_outputs(outputs)
    reference = layout.joined({name: array.astype(np.float64) for name, array in outputs.items()})
    golden = Golden(images, reference, layout, {name: array.shape[1:] for name, array in outputs.items()})
    if golden.contrast <= LEAST_CONTRAST:
        return "two answers or all values are the same, so a mix-up could not be seen"
    return judgement(golden, answers_of(network, images), GATES[precision]).failure


def reason(text):
    """Without the numbers, whose last digit is the rounding's."""
    return None if text is None else re.sub(r"[-+.\d]+(e[-+]\d+)?", "#", text)


@pytest.fixture
def verdicts(programs, tmp_path):
    """For each seed what repvgg_verify found, and what Python did."""

    def call(seed):
        network, images, outputs, precision = case_of(seed)
        golden, tolerance = GoldenFile(images, outputs, GATES), GATES[precision].max_relative_error
        engine = write_engine(tmp_path, network, precision=precision, tolerance=tolerance)
        (tmp_path / "golden.bin").write_bytes(golden.to_bytes())
        done = run(programs / "repvgg_verify", engine, tmp_path / "golden.bin")
        assert done.returncode in (0, 1), done.stderr
        found = re.match("error: (golden vectors|answers, by launches): ([^;\n]+)", done.stderr)
        assert (found is None) == (done.returncode == 0), done.stderr
        return found and found[2], pythons_verdict(network, images, outputs, precision)

    return call


def test_random_networks(verdicts):
    found = {seed: verdicts(seed) for seed in (*range(CASES), *MIXED_UP)}
    for seed, (of_cpp, of_python) in found.items():
        assert reason(of_cpp) == reason(of_python), seed
    kinds = {reason(of_cpp) for of_cpp, _ in found.values()}
    assert len(kinds) == 5, kinds  # right; NaN; beyond the gate, in the error and in the SQNR; mixed up
    assert all("mixed up" in found[seed][0] for seed in MIXED_UP)
    assert 0.15 < sum(of_cpp is None for of_cpp, _ in found.values()) / len(found) < 0.75
