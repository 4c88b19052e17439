"""golden.bin: written as its documentation says, and read back only if every byte of it is what it must be."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.commands import golden as command
from engines.console import Parser, exit_code_of
from engines.errors import InputRejected
from engines.golden_file import GoldenFile, golden_file_from_bytes, golden_file_from_vectors
from engines.parity import GATES, Gate

IMAGES = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
SCORES = np.array([[1.5, -2.5], [3.0, 4.0]], np.float32)
FEATURES = np.arange(2 * 1 * 1 * 2, dtype=np.float32).reshape(2, 1, 1, 2)
SMALL = GoldenFile(IMAGES, {"scores": SCORES, "é": FEATURES}, {"int8": Gate(0.25, top1=False, min_sqnr_db=20.0)})


def assert_equal(found, expected):
    np.testing.assert_array_equal(found.images, expected.images)
    assert list(found.outputs) == list(expected.outputs)
    for name, array in expected.outputs.items():
        assert found.outputs[name].dtype == np.float32
        np.testing.assert_array_equal(found.outputs[name], array)
    assert found.gates == expected.gates


def hashed_again(content):
    return content[:-32] + hashlib.sha256(content[:-32]).digest()


def test_the_bytes_are_as_documented():
    body = b"".join(
        [
            struct.pack("<I", 2),
            struct.pack("<I", 1),
            struct.pack("<I", 4) + b"int8" + struct.pack("<Idd", 0, 0.25, 20.0),
            struct.pack("<I", 3),
            struct.pack("<I", 5) + b"input" + struct.pack("<5I", 4, 2, 3, 2, 2),
            struct.pack("<I", 6) + b"scores" + struct.pack("<3I", 2, 2, 2),
            struct.pack("<I", 2) + "é".encode() + struct.pack("<5I", 4, 2, 1, 1, 2),
            struct.pack("<24f", *range(24)),
            struct.pack("<4f", 1.5, -2.5, 3.0, 4.0),
            struct.pack("<4f", *range(4)),
        ]
    )
    size = 8 + 4 + 8 + len(body) + 32
    content = b"RVGOLDEN" + struct.pack("<IQ", 1, size) + body
    assert SMALL.to_bytes() == content + hashlib.sha256(content).digest()


def test_a_gate_without_an_sqnr():
    content = GoldenFile(IMAGES, {"output": SCORES}, GATES).to_bytes()
    assert golden_file_from_bytes(content, "golden.bin").gates == GATES
    least = struct.unpack_from("<d", content, content.index(b"fp32") + 4 + 4 + 8)[0]
    assert math.isnan(least)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 4),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    outputs=st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=5).filter(lambda name: name != "input"),
        st.one_of(st.tuples(st.integers(1, 4)), st.tuples(*[st.integers(1, 3)] * 3)),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read_back(count, size, outputs, seed):
    generator = np.random.default_rng(seed)
    arrays = {name: generator.normal(size=(count, *shape)).astype(np.float32) for name, shape in outputs.items()}
    golden = GoldenFile(generator.normal(size=(count, 3, *size)).astype(np.float32), arrays, GATES)
    assert_equal(golden_file_from_bytes(golden.to_bytes(), "golden.bin"), golden)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, len(SMALL.to_bytes()) - 1), change=st.integers(1, 255))
def test_any_changed_byte_is_refused(place, change):
    content = bytearray(SMALL.to_bytes())
    content[place] ^= change
    with pytest.raises(InputRejected, match=r"^golden\.bin: .*; copy the file again, or write it with"):
        golden_file_from_bytes(bytes(content), "golden.bin")


@settings(max_examples=60, deadline=None)
@given(kept=st.integers(0, len(SMALL.to_bytes()) - 1), more=st.binary(max_size=8))
def test_a_file_cut_short_or_with_another_end_is_refused(kept, more):
    content = SMALL.to_bytes()
    if content[:kept] + more == content:
        return
    with pytest.raises(InputRejected):
        golden_file_from_bytes(content[:kept] + more, "golden.bin")


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(8, len(SMALL.to_bytes()) - 33), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.integers(0, 40),
)
def test_damage_that_is_hashed_again_is_refused_or_is_another_sound_file(edits, cut):
    """Nothing is raised but a refusal, and what is read is all that is in the file."""
    content = bytearray(SMALL.to_bytes()[: -32 - cut] if cut % 4 == 0 else SMALL.to_bytes()[:-32])
    for place, value in edits:
        content[min(place, len(content) - 1)] = value
    damaged = hashed_again(bytes(content) + bytes(32))
    try:
        golden = golden_file_from_bytes(damaged, "golden.bin")
    except InputRejected:
        return
    assert all(np.isfinite(array).all() for array in (golden.images, *golden.outputs.values()))
    assert_equal(golden_file_from_bytes(golden.to_bytes(), "golden.bin"), golden)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: b"RVGOLDEM" + c[8:], "not a golden.bin"),
        (lambda c: c[:8] + b"\2" + c[9:], "of version 2, and 1 is read here"),
        (lambda c: c[:12] + b"\0" + c[13:], "it says another size than it has"),
        (lambda c: c[:20] + bytes(4) + c[24:], "it has a count of 0"),
        (lambda c: c[:20] + b"\3" + c[21:], "3 images, and 2 of input"),
        (lambda c: c.replace(b"input", b"inpux"), "its first array is not images"),
        (lambda c: c.replace(b"scores", b"score\xff"), "utf-8"),
        (lambda c: c.replace(b"\2\0\0\0\xc3\xa9", b"\2\0\0\0\0\0", 1), None),
        (lambda c: c.replace(struct.pack("<f", 1.5), struct.pack("<f", math.nan)), "NaN or infinite"),
        (lambda c: c.replace(struct.pack("<d", 0.25), struct.pack("<d", 1.0)), "its gate for int8 is none"),
        (lambda c: c.replace(struct.pack("<d", 20.0), struct.pack("<d", math.inf)), "its gate for int8 is none"),
        (lambda c: c.replace(b"int8" + bytes(4), b"int8\2" + bytes(3)), "its gate for int8 is none"),
    ],
)
def test_a_file_that_contradicts_itself(change, said):
    changed = change(SMALL.to_bytes())
    assert changed != SMALL.to_bytes()
    if said is None:
        assert "\0\0" in golden_file_from_bytes(hashed_again(changed), "golden.bin").outputs
        return
    with pytest.raises(InputRejected, match=said):
        golden_file_from_bytes(hashed_again(changed), "golden.bin")


def test_a_name_that_stands_twice():
    content = GoldenFile(IMAGES, {"aa": SCORES, "bb": SCORES}, GATES).to_bytes()
    with pytest.raises(InputRejected, match="twice"):
        golden_file_from_bytes(hashed_again(content.replace(b"bb", b"aa")), "golden.bin")


def written(folder, **arrays):
    np.savez(folder / "golden.npz", **arrays)
    return folder / "golden.npz"


def test_the_vectors_are_rounded_to_float32(tmp_path):
    exact = np.random.default_rng(0).normal(size=(2, 3))
    features = np.random.default_rng(1).normal(size=(2, 4, 1, 2))
    golden = golden_file_from_vectors(written(tmp_path, input=IMAGES, scores=exact, features=features))
    expected = GoldenFile(IMAGES, {"scores": exact.astype(np.float32), "features": features.astype(np.float32)}, GATES)
    assert_equal(golden, expected)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"input": IMAGES, "scores": np.array([[1e300, 1.0], [2.0, 3.0]])}, "scores holds values that float32 cannot"),
        ({"input": IMAGES, "scores": SCORES}, "expected float64"),
        ({"input": IMAGES}, "not an .npz of input and outputs"),
    ],
)
def test_vectors_that_cannot_be_written(tmp_path, arrays, said):
    with pytest.raises(InputRejected, match=said):
        golden_file_from_vectors(written(tmp_path, **arrays))


def run_command(capsys, *arguments):
    """As ``engines.cli`` runs it."""

    def parser():
        made = Parser(prog="python -m engines golden")
        command.add_arguments(made)
        return made

    code = exit_code_of(parser, command.run, list(map(str, arguments)), memory_hint="")
    return code, capsys.readouterr()


def test_the_command(capsys, fashion):
    code, printed = run_command(capsys, fashion)
    path = fashion / "golden.bin"
    assert (code, printed.err) == (0, "")
    assert printed.out == f"{path}: 4 images, output, {path.stat().st_size} bytes\n"
    golden = golden_file_from_bytes(path.read_bytes(), "golden.bin")
    with np.load(fashion / "golden.npz") as vectors:
        np.testing.assert_array_equal(golden.images, vectors["input"])
        np.testing.assert_array_equal(golden.outputs["output"], vectors["output"].astype(np.float32))
    assert golden.gates == GATES


def test_the_command_writes_whole_or_nothing(capsys, tmp_path):
    code, printed = run_command(capsys, tmp_path / "none")
    assert (code, printed.out) == (3, "")
    assert printed.err == f"error: {tmp_path / 'none'}: no such directory; give that of an export\n"
    code, printed = run_command(capsys, tmp_path)
    assert (code, "golden.npz: no such file" in printed.err) == (3, True)
    written(tmp_path, input=IMAGES, scores=SCORES.astype(np.float64))
    (tmp_path / "golden.bin").mkdir()
    code, printed = run_command(capsys, tmp_path)
    assert (code, printed.out) == (5, "")
    assert printed.err.startswith(f"error: {tmp_path / 'golden.bin'}: cannot be written")
    assert "--out" not in printed.err
    assert printed.err.endswith("; DIR must be a writable directory with space left\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["golden.bin", "golden.npz"]
