"""One contract for all backends: what goes in comes out the same, and what does not fit is refused in the same way.

ONNX Runtime is the real one. TensorRT and TensorRT for RTX run over the fakes of ``tests.engines``, on no GPU.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import engines.runner
from engines.backends import BACKENDS
from engines.backends.backend import TensorDescription
from engines.errors import SdkMissing, UsageError
from tests.engines.fake_machine import (
    BATCH,
    CLASSES,
    FREE_ONNX,
    ONNX,
    SIZE,
    SIZES,
    answers,
    assert_answers,
    fake_machine,
    images,
)
from tests.engines.sdk_bindings import FULL, RTX

KINDS = [entry.kind for entry in BACKENDS]
VERSION = {"tensorrt": FULL[1], "tensorrt_rtx": RTX}
MOST = BATCH[-1]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def opened(kind, monkeypatch, tmp_path):
    """``opened()`` loads the same network in the backend; at the end nothing of a GPU may be left.

    ``opened(free=True)`` loads one for images of any of SIZES, with a feature map among its outputs.
    """
    machine = None if kind == "onnx" else fake_machine(monkeypatch, tmp_path, VERSION[kind])

    def open_file(*, free=False, **options):
        if machine is not None:
            return engines.runner.load(machine.engine(free=free), **options)
        path = tmp_path / "small.onnx"
        path.write_bytes(FREE_ONNX if free else ONNX)
        return engines.runner.load(path, **options)

    yield open_file
    if machine is not None:
        machine.assert_nothing_left()


def test_every_backend_is_in_this_contract():
    assert set(KINDS) == {"onnx", *VERSION}


@pytest.mark.parametrize("rows", [1, 2, 3, MOST, MOST + 1, 2 * MOST + 3])
def test_the_same_inputs_give_the_same_outputs(opened, rows):
    feeds = images(rows)
    with opened() as runner:
        for _ in range(3):
            assert_answers(runner.run({"input": feeds}), feeds)


@pytest.mark.parametrize("rows", [1, MOST, MOST + 3])
def test_images_of_any_size_give_feature_maps_of_theirs(opened, rows):
    with opened(free=True) as runner:
        assert runner.inputs == (TensorDescription("input", "float32", (None, 3, None, None)),)
        assert runner.outputs[1] == TensorDescription("features", "float32", (None, 4, None, None))
        for size in (*SIZES, SIZES[0], (7, 9)):
            feeds = images(rows, 0, size)
            found = runner.run({"input": feeds})
            assert_answers(found, feeds, FREE_ONNX)
            assert found["features"].shape == (rows, 4, -(-size[0] // 2), -(-size[1] // 2))


def test_rows_do_not_depend_on_their_neighbours(opened):
    """A batch that is padded or split gives each row what the row gives alone."""
    feeds = images(MOST + 1)
    with opened() as runner:
        together = runner.run({"input": feeds})["output"]
        alone = [runner.run({"input": feeds[row : row + 1]})["output"][0] for row in range(len(feeds))]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    assert not np.allclose(together[0], together[1])


def test_inputs_and_outputs_are_described_alike(opened):
    with opened() as runner:
        assert runner.inputs == (TensorDescription("input", "float32", (None, 3, SIZE, SIZE)),)
        assert runner.outputs == (
            TensorDescription("output", "float32", (None, CLASSES)),
            TensorDescription("features", "float32", (None, 4)),
        )


def test_outputs_are_own_arrays(opened):
    with opened() as runner:
        for rows in (MOST, 1, MOST + 2):
            first = runner.run({"input": images(rows, 1)})
            kept = {name: array.copy() for name, array in first.items()}
            for array in runner.run({"input": images(rows, 2)}).values():
                array[...] = np.nan
            for name, array in first.items():
                np.testing.assert_array_equal(array, kept[name])
                assert array.flags.writeable


def test_inputs_are_left_as_they_are(opened):
    feeds = images(MOST + 1)
    before = feeds.copy()
    feeds.flags.writeable = False
    with opened() as runner:
        runner.run({"input": feeds})
    np.testing.assert_array_equal(feeds, before)


def test_an_input_that_is_not_contiguous_is_taken_for_its_values(opened):
    feeds = np.ascontiguousarray(images(4).transpose(2, 3, 1, 0)).transpose(3, 2, 0, 1)
    assert not feeds.flags.c_contiguous
    with opened() as runner:
        assert_answers(runner.run({"input": feeds}), images(4))


WRONG_FEEDS = {
    "dtype": {"input": images(4).astype(np.float64)},
    "shape": {"input": images(4)[:, :, :, :7]},
    "channels": {"input": images(4)[:, :1]},
    "dimensions": {"input": images(4)[0]},
    "no rows": {"input": images(4)[:0]},
    "name": {"image": images(4)},
    "one too many": {"input": images(4), "mask": images(4)},
    "none": {},
    "a list": {"input": images(4).tolist()},
}
SAID = {}


@pytest.mark.parametrize("case", WRONG_FEEDS)
def test_what_does_not_fit_is_refused_in_the_same_words(opened, case):
    with opened() as runner:
        with pytest.raises(UsageError) as raised:
            runner.run(WRONG_FEEDS[case])
        assert "\n" not in str(raised.value)
        assert SAID.setdefault(case, str(raised.value)) == str(raised.value)
        feeds = images(4)
        assert_answers(runner.run({"input": feeds}), feeds)


def test_a_closed_file_says_so_and_closing_twice_is_nothing(opened):
    runner = opened()
    runner.close()
    runner.close()
    with pytest.raises(UsageError) as raised:
        runner.run({"input": images(4)})
    assert SAID.setdefault("closed", str(raised.value)) == str(raised.value)


def test_leaving_the_block_closes_it_also_by_an_error(opened):
    with pytest.raises(ZeroDivisionError), opened() as runner:
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="closed"):
        runner.run({"input": images(4)})


@pytest.mark.parametrize("graph", [True, False])
def test_graphs_change_nothing(opened, graph):
    with opened(graph=graph) as runner:
        for seed, rows in enumerate((4, 4, 5, 4, 1, 1)):
            feeds = images(rows, seed)
            assert_answers(runner.run({"input": feeds}), feeds)


def test_a_backend_that_is_asked_for_and_missing_fails(opened, kind, monkeypatch):
    """With its package gone it is an error with the line that installs it, never another backend."""
    import sys

    runner = opened()
    runner.close()
    monkeypatch.setitem(sys.modules, {"onnx": "onnxruntime"}.get(kind, kind), None)
    with pytest.raises(SdkMissing) as raised:
        opened()
    assert "pip install 'repvgg-exporter[" in str(raised.value)
    assert raised.value.exit_code == 4


def test_the_network_of_this_contract_can_tell_right_from_wrong():
    """Its rows differ, and so do its outputs for other inputs; a constant would pass everything above."""
    for onnx_file in (ONNX, FREE_ONNX):
        others = answers(images(4, 2), onnx_file)
        for name, array in answers(images(4, 1), onnx_file).items():
            assert np.isfinite(array).all()
            assert not np.allclose(array, others[name])
    assert [value.name for value in onnx.load_from_string(ONNX).graph.output] == ["output", "features"]
    with pytest.raises(AssertionError):
        assert_answers(answers(images(4, 2)), images(4, 1))
