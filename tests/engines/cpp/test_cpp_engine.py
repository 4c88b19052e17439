"""engines/cpp, the library: what it computes, what it does when a call fails, and several threads."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from tests.engines.cpp.programs import CHANNELS, CLASSES, FACTOR, SIZE, TERM, WEIGHTS, Network, run, write_engine


def numbered_images(batch, size):
    """Those of the probe."""
    values = CHANNELS * size[0] * size[1]
    pixels = ((np.arange(values) * 31 + 7) % 17).astype(np.float32) / np.float32(17)
    images = np.stack([np.float32(image % 7) - np.float32(3) + pixels for image in range(batch)])
    return images.reshape(batch, CHANNELS, *size)


def assert_answers(lines, batches, network, size=(SIZE, SIZE)):
    """The probe's lines, one for each output of each batch, are the network's answers."""
    expected = [array for batch in batches for array in network.answers(numbered_images(batch, size)).values()]
    assert len(lines) == len(expected)
    for line, array in zip(lines, expected, strict=True):
        found = np.array([float.fromhex(number) for number in line.split()])
        np.testing.assert_allclose(found, array.ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", [False, True])
def test_batches_are_padded_split_and_launched_as_graphs(probe, tmp_path, features):
    network = Network(features=features)
    batches = [1, 2, 3, 4, 5, 9, 1, 3, 9]  # the profile takes 2 to 4
    *lines, graphs = probe("infer", write_engine(tmp_path, network), *batches).splitlines()
    assert_answers(lines, batches, network)
    assert graphs.split() == ["graphs", "3"]


def test_a_context_is_for_one_size_of_images(probe, tmp_path):
    network = Network(free=True, features=True)
    engine = write_engine(tmp_path, network)
    *lines, _ = probe("infer", engine, 3, 6, PROBE_HEIGHT=7, PROBE_WIDTH=3).splitlines()
    assert_answers(lines, [3, 6], network, (7, 3))
    *lines, _ = probe("infer", engine, 3).splitlines()
    assert_answers(lines, [3], network, (SIZE, SIZE))


def test_a_size_outside_of_the_profile_is_refused(programs, tmp_path):
    done = run(programs / "probe", "infer", write_engine(tmp_path, Network(free=True)), 3, PROBE_HEIGHT=9)
    assert (done.returncode, done.stdout) == (2, "2 9x4 is outside of the engine's profile, 3x2 to 8x8\n")


def test_where_no_graph_can_be_recorded_the_answers_are_the_same_and_it_is_said(probe, tmp_path):
    network = Network(lines=("uncapturable",))
    *lines, graphs = probe("infer", write_engine(tmp_path, network), 3, 3).splitlines()
    assert_answers(lines, [3, 3], network)
    assert graphs.startswith("graphs 0 ")
    assert "cannot be recorded as a CUDA graph" in graphs


def test_more_batch_sizes_than_graphs(probe, tmp_path):
    network = Network(batch=(1, 9, 20))
    batches = list(range(1, 20))
    *lines, graphs = probe("infer", write_engine(tmp_path, network), *batches, *batches).splitlines()
    assert_answers(lines, batches * 2, network)
    assert graphs == "graphs 16 more than 16 batch sizes; the later ones have no graph"


def test_the_stub_computes_in_the_outputs_own_layout():
    images = numbered_images(2, (SIZE, SIZE))
    answers = Network(features=True).answers(images)
    assert answers["output"].shape == (2, CLASSES)
    np.testing.assert_allclose(answers["output"][1, 2], images[1].mean(axis=(1, 2)) @ WEIGHTS[2], rtol=1e-6)
    assert answers["features"][1, 2, 3, 1] == pytest.approx(FACTOR * images[1, 2, 3, 1] + TERM)


def test_every_failing_call_is_an_error_or_changes_nothing_and_nothing_leaks(probe, tmp_path):
    calls, refused, endured = map(
        int, re.findall(r"\d+", probe("faults", write_engine(tmp_path, Network(features=True))))
    )
    assert refused + endured == 2 * calls
    assert calls > 100
    assert 0 < endured < refused  # a graph that cannot be recorded is endured


def test_every_failing_allocation_is_an_error_or_changes_nothing_and_nothing_leaks(probe, tmp_path):
    refused, endured = map(
        int, re.findall(r"\d+", probe("allocations", write_engine(tmp_path, Network(features=True))))
    )
    assert refused > 100
    assert endured < 10


@pytest.mark.parametrize(("batch", "batches", "graphs"), [((2, 3, 4), (1, 3, 4, 9), 3), ((1, 9, 20), range(1, 21), 16)])
def test_once_each_batch_size_has_run_nothing_is_allocated(probe, tmp_path, batch, batches, graphs):
    engine = write_engine(tmp_path, Network(batch=batch))
    assert probe("steady", engine, *batches) == f"0 allocations, {graphs} graphs\n"


@pytest.mark.parametrize("sdk", ["tensorrt_rtx", "tensorrt"])
def test_two_threads_with_a_context_each(request, tmp_path, sdk):
    programs = request.getfixturevalue("programs" if sdk == "tensorrt_rtx" else "threaded")
    done = run(programs / "probe", "threads", write_engine(tmp_path, Network(features=True), sdk=sdk))
    assert (done.returncode, done.stdout, done.stderr) == (0, "two threads agree\n", "")


@pytest.mark.parametrize(
    ("fixture", "kind", "said"),
    [
        ("programs", "leak", "LeakSanitizer"),
        ("programs", "double free", "stub: memory was freed that is not allocated"),
        ("programs", "unfreed", "stub: something was never freed"),
        ("threaded", "race", "ThreadSanitizer: data race"),
    ],
)
def test_what_watches_the_tests_above_sees_a_planted_fault(request, fixture, kind, said):
    done = run(request.getfixturevalue(fixture) / "probe", "fault", kind)
    assert done.returncode != 0
    assert said in done.stderr


def test_wrong_calls(probe, tmp_path):
    lines = probe("calls", write_engine(tmp_path, Network(features=True))).splitlines()
    assert [line.split(" ", 1) for line in lines] == [
        ["2", "no path of an engine is given"],
        ["2", "device -1: GPUs are counted from 0"],
        ["2", "the engine is not loaded"],
        ["2", "the context is not created"],
        ["0", ""],
        ["2", "9999x4 is outside of the engine's profile, 4x4 to 4x4"],
        ["0", ""],
        ["2", "the engine has several outputs; name those you want"],
        ["2", "other is no output of this engine"],
        ["2", "(null) is no output of this engine"],
        ["2", "output: no memory for its answers is given"],
        ["2", "no memory for images or answers is given"],
        ["2", "no memory for images or answers is given"],
        ["2", "a batch of 0; give at least one image"],
        ["2", "a batch of -5; give at least one image"],
        ["2", "output: is asked for twice"],
        ["2", "no runtime cache was named when the engine was loaded"],
        ["2", "the engine is not loaded"],
        ["7", ""],
        ["0", ""],
        ["0", ""],
        ["2", "the context is not created"],
    ]


def test_times_are_those_of_the_last_call_that_succeeded(probe, tmp_path):
    milliseconds = 10 * 0.5  # of nine images, in parts of 4, 4 and 2
    assert probe("times", write_engine(tmp_path)) == f"{milliseconds / 1000:g} 12\n"


def test_two_devices_and_a_thread_on_a_third(probe, tmp_path):
    assert probe("devices", write_engine(tmp_path, Network(features=True)), STUB_DEVICES=3) == "two devices agree\n"


def test_sha256_at_every_length_around_the_blocks(probe, tmp_path):
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{length}" for length in [*range(130), 1000, 65537]]
    for path in paths:
        path.write_bytes(generator.bytes(int(path.name)))
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert probe("hash", *paths).split() == expected
