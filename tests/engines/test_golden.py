"""Golden vectors: what is not whole, finite and paired is refused, and what could not tell anything apart is seen."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import golden as golden_module
from engines.errors import InputRejected
from engines.golden import Golden, golden_from_file
from engines.outputs import Layout, layout_from_outputs
from engines.parity import GATES

IMAGES = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
OUTPUTS = np.random.default_rng(1).standard_normal((4, 10))
MAPS = {
    "stage1": np.random.default_rng(2).standard_normal((4, 2, 4, 6)),
    "stage2": 1000 * np.random.default_rng(3).standard_normal((4, 5, 2, 3)),
}
SCORES = Layout(("output",), (1.0,), ranked=True)


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def with_value(array, value):
    changed = array.copy()
    changed[0, 1] = value
    return changed


def test_the_vectors_of_a_real_export_are_read(fashion_export):
    golden = golden_from_file(fashion_export / "golden.npz")
    assert (golden.images.shape, golden.images.dtype) == ((4, 1, 28, 28), np.float32)
    assert (golden.outputs.shape, golden.outputs.dtype) == ((4, 10), np.float64)
    assert golden.contrast > 0.1


def test_what_was_saved_is_read(tmp_path):
    golden = golden_from_file(saved(tmp_path / "g.npz", input=IMAGES, output=OUTPUTS))
    np.testing.assert_array_equal(golden.images, IMAGES)
    np.testing.assert_array_equal(golden.outputs, OUTPUTS)
    assert (golden.layout, golden.shapes) == (SCORES, {"output": (10,)})


def test_several_outputs_are_read_as_joined_rows_each_in_its_own_scale(tmp_path):
    golden = golden_from_file(saved(tmp_path / "g.npz", stage1=MAPS["stage1"], input=IMAGES, stage2=MAPS["stage2"]))
    assert golden.shapes == {"stage1": (2, 4, 6), "stage2": (5, 2, 3)}
    assert golden.layout == layout_from_outputs(MAPS)
    expected = [array.reshape(4, -1) / np.abs(array).max() for array in MAPS.values()]
    np.testing.assert_array_equal(golden.outputs, np.concatenate(expected, axis=1))
    assert golden.outputs.shape == (4, 48 + 30)
    assert not golden.layout.gate(GATES["fp16"]).top1


def test_one_feature_map_is_no_row_of_scores(tmp_path):
    golden = golden_from_file(saved(tmp_path / "g.npz", input=IMAGES, output=MAPS["stage1"]))
    np.testing.assert_array_equal(golden.outputs, MAPS["stage1"].reshape(4, -1))
    assert not golden.layout.ranked
    assert golden.shapes == {"output": (2, 4, 6)}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"input": IMAGES}, "not an .npz of input and outputs"),
        ({"output": OUTPUTS}, "not an .npz of input and outputs"),
        ({"input": IMAGES.astype(np.float64), "output": OUTPUTS}, "input is float64 (4, 3, 8, 8); expected float32"),
        ({"input": IMAGES, "output": OUTPUTS.astype(np.float32)}, "output is float32 (4, 10); expected float64"),
        ({"input": IMAGES[0], "output": OUTPUTS}, "input is float32 (3, 8, 8); expected float32 of 4 dimensions"),
        ({"input": IMAGES, "output": OUTPUTS[0]}, "output is float64 (10,); expected float64 of 2 or 4 dimensions"),
        ({"input": IMAGES[:0], "output": OUTPUTS[:0]}, "input is float32 (0, 3, 8, 8); expected"),
        ({"input": IMAGES[:3], "output": OUTPUTS}, "3 inputs and 4 of output"),
        ({"input": IMAGES, **MAPS, "stage3": OUTPUTS[:3]}, "4 inputs and 3 of stage3"),
        ({"input": IMAGES, "stage1": MAPS["stage1"][:, 0]}, "stage1 is float64 (4, 4, 6); expected float64 of 2 or 4"),
        ({"input": IMAGES, **MAPS, "stage3": OUTPUTS[:, :0]}, "stage3 is float64 (4, 0); expected float64"),
        ({"input": IMAGES, **MAPS, "stage3": with_value(OUTPUTS, np.nan)}, "stage3 holds NaN or infinite values"),
        ({"input": with_value(IMAGES, np.nan), "output": OUTPUTS}, "input holds NaN or infinite values"),
        ({"input": IMAGES, "output": with_value(OUTPUTS, np.nan)}, "output holds NaN or infinite values"),
        ({"input": IMAGES, "output": with_value(OUTPUTS, -np.inf)}, "output holds NaN or infinite values"),
        ({"input": np.array([object()]), "output": OUTPUTS}, "not an .npz of input and outputs"),
    ],
)
def test_what_cannot_be_the_vectors_is_refused(tmp_path, arrays, said):
    path = saved(tmp_path / "g.npz", **arrays)
    with pytest.raises(InputRejected) as caught:
        golden_from_file(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert str(caught.value).endswith("; export again, or copy the file again")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputRejected, match=r"golden\.npz: no such file, so there is nothing to compare with"):
        golden_from_file(tmp_path / "golden.npz")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "golden.npz")
    with pytest.raises(InputRejected, match=r"golden\.npz: not an \.npz of input and outputs \(it is no plain file\)"):
        golden_from_file(tmp_path / "golden.npz")


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, input=IMAGES, output=OUTPUTS)
    return buffer.getvalue()


WHOLE = npz()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_damaged_file_is_refused_or_holds_the_same_numbers(tmp_path_factory, position, difference):
    content = bytearray(WHOLE)
    content[position] ^= difference
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(content)
    try:
        golden = golden_from_file(path)
    except InputRejected:
        return
    np.testing.assert_array_equal(golden.images, IMAGES)
    np.testing.assert_array_equal(golden.outputs, OUTPUTS)


def test_an_archive_that_claims_to_be_huge_is_refused(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3, 100000000, 100000000), }\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "g.npz", "w") as archive:
        archive.writestr("input.npy", member)
        archive.writestr("output.npy", member)
    with pytest.raises(InputRejected, match=r"not an \.npz of input and outputs"):
        golden_from_file(tmp_path / "g.npz")


# --- whether they could tell a wrong answer


@pytest.mark.parametrize(
    ("outputs", "contrast"),
    [
        ([[1, 2], [3, 4]], 0.5),
        ([[1, 2], [1, 2.5], [-4, 2]], 0.125),
        ([[1, 2], [1, 2]], 0),
        ([[1, 1], [2, 2]], 0),
        ([[0, 0], [0, 0]], 0),
        ([[3, 3]], 0),
        ([[3, 4]], np.inf),
        ([[1], [2]], 0.5),
        ([[2], [2]], 0),
    ],
)
def test_the_contrast_is_how_far_the_two_most_alike_answers_are_apart(outputs, contrast):
    images = np.arange(len(outputs), dtype=np.float32)[:, None, None, None]
    assert Golden(images, np.array(outputs, np.float64), SCORES).contrast == contrast


def test_the_same_image_twice_may_have_the_same_answer():
    images = np.array([1, 1, 2], np.float32)[:, None, None, None]
    assert Golden(images, np.array([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]]), SCORES).contrast == 0.5


ALIKE = 10 + 0.01 * OUTPUTS


def test_answers_within_half_the_contrast_are_never_called_mixed_up():
    golden = Golden(IMAGES, ALIKE, SCORES)
    reach = 0.499 * golden.contrast * np.abs(ALIKE).max()
    for seed in range(20):
        noise = np.random.default_rng(seed).uniform(-reach, reach, ALIKE.shape)
        assert golden.mixed_up(ALIKE + noise) == []


@pytest.mark.parametrize(
    ("outputs", "rows"),
    [
        (ALIKE[::-1], [0, 1, 2, 3]),
        (ALIKE[[0, 2, 1, 3]], [1, 2]),
        (np.repeat(ALIKE[:1], 4, axis=0), [1, 2, 3]),
        (ALIKE.astype(np.float32), []),
    ],
)
def test_alike_answers_in_another_order_are_seen(outputs, rows):
    assert np.abs(outputs - ALIKE).max() / np.abs(ALIKE).max() < 5e-3  # a comparison alone would let them pass
    assert Golden(IMAGES, ALIKE, SCORES).mixed_up(outputs) == rows


def test_the_order_of_two_equal_images_does_not_matter():
    images = IMAGES[[0, 0, 2, 3]]
    assert Golden(images, ALIKE, SCORES).mixed_up(ALIKE[[1, 0, 2, 3]]) == []


# --- several outputs


@pytest.fixture
def golden(tmp_path):
    return golden_from_file(saved(tmp_path / "g.npz", input=IMAGES, **MAPS))


def test_the_same_outputs_of_something_else_are_joined_in_the_same_way(golden):
    found = {name: MAPS[name].astype(np.float32) for name in reversed(MAPS)}
    np.testing.assert_allclose(golden.joined(found), golden.outputs, rtol=1e-6)
    assert golden.mixed_up(golden.joined(found)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda maps: maps.pop("stage2"), "no output stage2"),
        (lambda maps: maps.update(stage3=OUTPUTS), "the golden vectors have no output stage3"),
        (
            lambda maps: maps.update(stage1=maps["stage1"].transpose(0, 1, 3, 2)),
            "stage1 is 2x6x4 for each image, and 2x4x6 in the golden vectors",
        ),
        (
            lambda maps: maps.update(stage2=maps["stage2"].reshape(4, 30)),
            "stage2 is 30 for each image, and 5x2x3 in the golden vectors",
        ),
    ],
)
def test_outputs_that_are_others_or_turned_are_never_joined(golden, change, said):
    maps = dict(MAPS)
    change(maps)
    with pytest.raises(ValueError, match=said):
        golden.joined(maps)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("fault", [1e-3, np.nan])
def test_the_worst_output_is_the_one_farthest_off_in_its_own_scale(golden, name, fault):
    noise = {other: array + 1e-5 * np.abs(array).max() for other, array in MAPS.items()}
    noise[name] = noise[name].copy()
    noise[name][2, 1, 1, 1] += fault * np.abs(MAPS[name]).max()
    assert golden.worst_output(golden.joined(noise)) == name


def test_rows_mixed_up_in_every_output_are_seen(golden):
    order = [1, 0, 2, 3]
    assert golden.mixed_up(golden.joined({name: array[order] for name, array in MAPS.items()})) == [0, 1]


def test_an_archive_that_takes_too_much_memory_is_refused_before_it_does(tmp_path, monkeypatch):
    path = saved(tmp_path / "g.npz", input=IMAGES, output=OUTPUTS)
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    monkeypatch.setattr(golden_module, "LARGEST_SIZE", size)
    golden_from_file(path)
    monkeypatch.setattr(golden_module, "LARGEST_SIZE", size - 1)
    with pytest.raises(InputRejected, match=r"not an \.npz of input and outputs \(it would take more than"):
        golden_from_file(path)
