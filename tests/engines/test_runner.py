"""The runner on a backend that writes down what it is given: any batch fits, and nothing wrong gets in."""

from __future__ import annotations

import io
import math
import shutil
import threading
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engines
from engines.backends.backend import TensorDescription
from engines.errors import InputRejected, UsageError
from engines.runner import Runner, load

IMAGE = TensorDescription("image", "float32", (None, 2, 3))
SCALE = TensorDescription("scale", "float32", (None, 1))
ROWS = TensorDescription("rows", "float32", (None, 2))


class Recorder:
    """Sums each image over its last axis, times the scale of its row; ``batches`` are those that it was given."""

    def __init__(self, minimum=1, maximum=None, *, inputs=(IMAGE,)):
        self.inputs, self.outputs, self.batch = inputs, (ROWS,), (minimum, maximum)
        self.batches, self.closed, self.at_once, self.most_at_once, self.pause = [], 0, 0, 0, 0

    def run(self, feeds):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        (rows,) = {len(array) for array in feeds.values()}
        assert self.batch[0] <= rows <= (self.batch[1] or math.inf)
        assert all(array.flags.c_contiguous and array.flags.aligned for array in feeds.values())
        self.batches.append(rows)
        self.last = feeds["image"]
        time.sleep(self.pause)
        answer = feeds["image"].sum(axis=2) * feeds.get("scale", np.float32(1))
        self.at_once -= 1
        return {"rows": answer}

    def close(self):
        self.closed += 1


class WithoutBatch(Recorder):
    """Its output is the mean over the batch."""

    def run(self, feeds):
        return {"rows": super().run(feeds)["rows"].mean(axis=0)}


def opened(backend):
    return Runner(backend, title="Recorder")


def images(rows):
    return np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3)


@pytest.mark.parametrize(
    ("minimum", "maximum", "rows", "batches"),
    [
        (1, None, 1, [1]),
        (1, None, 1000, [1000]),
        (1, 4, 4, [4]),
        (1, 4, 5, [4, 1]),
        (1, 4, 11, [4, 4, 3]),
        (3, 8, 1, [3]),
        (3, 8, 2, [3]),
        (3, 4, 9, [4, 4, 3]),
        (4, 4, 3, [4]),
        (4, 4, 4, [4]),
        (4, 4, 10, [4, 4, 4]),
        (1, 1, 3, [1, 1, 1]),
    ],
)
def test_a_batch_is_split_above_the_maximum_and_padded_below_the_minimum(minimum, maximum, rows, batches):
    backend = Recorder(minimum, maximum)
    outputs = opened(backend).run({"image": images(rows)})
    assert backend.batches == batches
    assert list(outputs) == ["rows"]
    assert outputs["rows"].dtype == np.float32
    np.testing.assert_array_equal(outputs["rows"], images(rows).sum(axis=2))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.none() | st.integers(0, 9), st.integers(1, 40))
def test_every_row_gets_its_own_answer_whatever_the_batches(minimum, more, rows):
    backend = Recorder(minimum, None if more is None else minimum + more, inputs=(IMAGE, SCALE))
    scale = np.linspace(-1, 1, rows, dtype=np.float32)[:, None]
    outputs = opened(backend).run({"scale": scale, "image": images(rows)})
    np.testing.assert_array_equal(outputs["rows"], images(rows).sum(axis=2) * scale)


def test_a_batch_is_padded_with_its_last_row():
    backend = Recorder(4, 4)
    opened(backend).run({"image": images(2)})
    np.testing.assert_array_equal(backend.last, images(2)[[0, 1, 1, 1]])


def test_an_output_without_the_batch_is_given_as_it_is_but_never_put_together():
    runner = opened(WithoutBatch(1, 4))
    assert runner.run({"image": images(4)})["rows"].shape == (2,)
    with pytest.raises(InputRejected, match=r"rows: \(2,\) for a batch of 4: .*a batch of 5 can be neither split nor"):
        runner.run({"image": images(5)})


# --- feature maps, of images of any size

MAP = TensorDescription("image", "float32", (None, 3, None, None))
PARTS = (TensorDescription("half", "float32", (None, 3, None, None)), TensorDescription("sum", "float32", (None, 3)))


class Maps(Recorder):
    """Every second row and column of each image, and the sum of each channel; sizes as its ``profile`` says."""

    def __init__(self, minimum=1, maximum=None, **others):
        super().__init__(minimum, maximum, inputs=(MAP,))
        self.outputs = PARTS
        self.__dict__.update(others)

    def run(self, feeds):
        self.batches.append(feeds["image"].shape)
        return {"half": feeds["image"][:, :, ::2, ::2], "sum": feeds["image"].sum(axis=(2, 3))}


def maps(rows, height, width):
    return np.random.default_rng(rows).normal(size=(rows, 3, height, width)).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 11])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_feature_maps_of_any_size_are_split_and_padded_with_their_rows(rows, size):
    backend = Maps(2, 4)
    images = maps(rows, *size)
    outputs = opened(backend).run({"image": images})
    np.testing.assert_array_equal(outputs["half"], images[:, :, ::2, ::2])
    np.testing.assert_allclose(outputs["sum"], images.sum(axis=(2, 3)), rtol=1e-5, atol=1e-5)
    assert all(shape[2:] == size and 2 <= shape[0] <= 4 for shape in backend.batches)


PROFILE = {"image": ((2, 3, 4, 6), (4, 3, 8, 9))}


@pytest.mark.parametrize("size", [(4, 6), (8, 9), (5, 7)])
def test_sizes_inside_the_profile_are_taken(size):
    outputs = opened(Maps(2, 4, profile=PROFILE)).run({"image": maps(3, *size)})
    assert outputs["half"].shape == (3, 3, -(-size[0] // 2), -(-size[1] // 2))


@pytest.mark.parametrize("size", [(3, 6), (4, 5), (9, 9), (8, 10)])
def test_sizes_outside_of_the_profile_are_refused_with_the_range(size):
    backend = Maps(2, 4, profile=PROFILE)
    with pytest.raises(UsageError) as raised:
        opened(backend).run({"image": maps(9, *size)})
    shown = "x".join(map(str, (3, *size)))
    assert str(raised.value) == f"image: {shown} is outside of the engine's profile, 3x4x6 to 3x8x9"
    assert backend.batches == []


EXPECTED = "expected image float32 (N, 2, 3)"


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({}, f"inputs none: {EXPECTED}"),
        ({"input": images(1)}, f"inputs input: {EXPECTED}"),
        ({"image": images(1), "mask": images(1)}, f"inputs image, mask: {EXPECTED}"),
        ({"image": images(1).astype(np.float64)}, f"image: float64 (1, 2, 3); {EXPECTED}"),
        ({"image": images(1).astype(np.float16)}, f"image: float16 (1, 2, 3); {EXPECTED}"),
        ({"image": images(1).astype(">f4")}, f"image: >f4 (1, 2, 3); {EXPECTED}"),
        ({"image": images(1)[0]}, f"image: float32 (2, 3); {EXPECTED}"),
        ({"image": images(1).transpose(0, 2, 1)}, f"image: float32 (1, 3, 2); {EXPECTED}"),
        ({"image": np.float32(1)}, "image: a float32; expected a numpy array image float32 (N, 2, 3)"),
        ({"image": np.array(1, np.float32)}, f"image: float32 (); {EXPECTED}"),
        ({"image": images(1).tolist()}, "image: a list; expected a numpy array image float32 (N, 2, 3)"),
        ({"image": np.ma.masked_array(images(1))}, "image: a MaskedArray; expected a numpy array"),
        ({"image": images(0)}, f"an empty batch: {EXPECTED} with N at least 1"),
    ],
)
def test_what_the_file_does_not_take_is_refused_with_what_it_takes(feeds, said):
    backend = Recorder()
    with pytest.raises(UsageError) as caught:
        opened(backend).run(feeds)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    assert backend.batches == []


def test_inputs_of_different_batches_are_refused():
    runner = opened(Recorder(inputs=(IMAGE, SCALE)))
    with pytest.raises(UsageError, match="scale: a batch of 3, and 2 before it"):
        runner.run({"image": images(2), "scale": np.ones((3, 1), np.float32)})


def test_a_size_that_is_free_may_be_anything_but_nothing():
    free = TensorDescription("image", "float32", (None, 2, None))
    runner = opened(Recorder(inputs=(free,)))
    for width in (1, 7):
        assert runner.run({"image": np.ones((2, 2, width), np.float32)})["rows"].tolist() == [[width, width]] * 2
    with pytest.raises(UsageError, match=r"image: float32 \(2, 2, 0\); expected image float32 \(N, 2, \?\)"):
        runner.run({"image": np.ones((2, 2, 0), np.float32)})


def misaligned(array):
    """The same numbers, one byte off."""
    room = np.zeros(array.nbytes + 1, np.uint8)
    room[1:] = np.frombuffer(array.tobytes(), np.uint8)
    return room[1:].view(np.float32).reshape(array.shape)


class Subclass(np.ndarray):
    """As numpy.memmap is one."""


@pytest.mark.parametrize(
    "form",
    [
        np.asfortranarray,
        lambda array: np.repeat(array, 2, axis=2)[:, :, ::2],
        lambda array: array[::-1].copy()[::-1],
        misaligned,
        lambda array: array.view(Subclass),
        lambda array: np.frombuffer(array.tobytes(), np.float32).reshape(array.shape),
    ],
    ids=["column by column", "strided", "reversed", "misaligned", "subclass", "read-only"],
)
def test_the_same_numbers_in_another_layout_give_the_same_answer(form):
    array = form(images(5))
    assert array.shape == (5, 2, 3)
    outputs = opened(Recorder(2, 3)).run({"image": array})
    np.testing.assert_array_equal(outputs["rows"], images(5).sum(axis=2))


def test_a_closed_runner_says_so_and_is_closed_once():
    backend = Recorder()
    with opened(backend) as runner:
        runner.run({"image": images(1)})
    runner.close()
    assert backend.closed == 1
    for call in (lambda: runner.run({"image": images(1)}), lambda: runner.enqueue({}, {}, 0)):
        with pytest.raises(UsageError, match="this runner is closed; load the file again"):
            call()


def test_a_failure_inside_closes_the_runner_too():
    backend = Recorder()
    with pytest.raises(ZeroDivisionError), opened(backend):
        raise ZeroDivisionError
    assert backend.closed == 1


def test_threads_take_turns():
    backend = Recorder()
    backend.pause = 0.001
    runner, answers = opened(backend), {}

    def work(number):
        for _ in range(20):
            answers[number] = runner.run({"image": np.full((1, 2, 3), number, np.float32)})["rows"]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.most_at_once == 1
    assert {number: answer.tolist() for number, answer in answers.items()} == {n: [[3 * n] * 2] for n in range(4)}


def test_device_arrays_go_to_a_backend_that_takes_them_and_no_other():
    backend = Recorder()
    with pytest.raises(UsageError, match=r"Recorder takes no arrays on a GPU; call run\(\) with numpy arrays"):
        opened(backend).enqueue({"image": object()}, {"rows": object()}, 7)
    calls = []
    backend.enqueue = lambda *arguments: calls.append(arguments)
    inputs, outputs = {"image": object()}, {"rows": object()}
    opened(backend).enqueue(inputs, outputs, 7)
    assert calls == [(inputs, outputs, 7)]


# --- opening a file


def test_the_content_and_not_the_name_says_what_a_file_is(fashion):
    renamed = shutil.copy(fashion / "fashion.onnx", fashion / "weights.bin")
    with load(renamed) as runner:
        assert runner.inputs == (TensorDescription("input", "float32", (None, 1, 28, 28)),)
        assert runner.outputs == (TensorDescription("output", "float32", (None, 10)),)
        assert (runner.batch, runner.manifest) == ((1, None), None)
        assert runner.metadata["precision"] == "fp32"
    shutil.copy(fashion / "fashion.fp16.engine", fashion / "engine.onnx")
    with pytest.raises(InputRejected, match=r"engine\.onnx: its sidecar engine\.onnx\.json is missing"):
        load(fashion / "engine.onnx")


def pickled():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.onnx", b"", "not a whole ONNX file"),
        ("a.bin", b"", "neither an ONNX file nor a TensorRT engine"),
        ("a.onnx", b"\x89PNG\r\n\x1a\n" + bytes(64), "not a whole ONNX file"),
        ("a.pt", pickled(), "neither an ONNX file nor a TensorRT engine"),
        ("a.txt", b"input\n" * 9, "neither an ONNX file nor a TensorRT engine"),
        ("a.bin", b"\x08\x08", "neither an ONNX file nor a TensorRT engine"),
        ("a.bin", b"\x3a\x00\x7a\x00", "neither an ONNX file nor a TensorRT engine"),
        ("a.bin", b"\x0a\x00\x3a\x00", "neither an ONNX file nor a TensorRT engine"),
        ("a.bin", b"\x3a\x00" * 20_000, "neither an ONNX file nor a TensorRT engine"),
        ("a.engine", b"PK\x03\x04" + bytes(64), "its sidecar a.engine.json is missing"),
        ("a.engine", b"", "its sidecar a.engine.json is missing"),
    ],
)
def test_a_file_that_is_neither_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputRejected) as caught:
        load(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {said}")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_an_onnx_file_cut_short_is_refused(fashion, share):
    content = (fashion / "fashion.onnx").read_bytes()
    (fashion / "fashion.onnx").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputRejected, match=r"fashion\.onnx: not a whole ONNX file; export it again"):
        load(fashion / "fashion.onnx")


@pytest.mark.parametrize(
    ("path", "said"), [("none.onnx", "no such file; check the path"), (".", "is a directory; give a file in it")]
)
def test_a_path_without_a_file_is_refused(tmp_path, path, said):
    with pytest.raises(InputRejected, match=said):
        load(tmp_path / path)


def test_arguments_that_do_not_fit_the_file_are_refused(fashion_export):
    with pytest.raises(UsageError, match="device -1: GPUs are counted from 0"):
        load(fashion_export / "fashion.onnx", device=-1)
    with pytest.raises(UsageError, match="an engine takes no provider; that is for ONNX files"):
        load(fashion_export / "fashion.fp16.engine", provider="cpu")


def test_the_package_offers_the_functions_under_their_names():
    assert engines.load is load
    assert engines.Runner is Runner
    assert engines.build.__module__ == "engines.build"
    assert callable(engines.build)
    with pytest.raises(AttributeError, match="module 'engines' has no attribute 'unload'"):
        _ = engines.unload
