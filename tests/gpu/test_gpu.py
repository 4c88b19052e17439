"""For owners of a GPU: engines loaded by the real SDK, their answers and graphs, and that memory is given back."""

from __future__ import annotations

import numpy as np
import pytest

import engines
from engines.cuda import checked, cuda_runtime
from engines.errors import UsageError
from engines.golden import golden_from_file
from engines.outputs import layout_from_outputs
from engines.parity import GATES, compare

LARGEST_LEFT = 8 << 20  # bytes: what the driver keeps of a first use


def golden_of(engine):
    return golden_from_file(engine.path.with_name("golden.npz"))


def noise(rows, shape=(1, 28, 28), seed=0):
    return np.random.default_rng(seed).standard_normal((rows, *shape), np.float32)


def assert_parity(engine, reference, found):
    assert GATES[engine.precision].failure(compare(reference, found)) is None


@pytest.mark.parametrize("graph", [True, False])
def test_the_golden_vectors_are_answered(engine, graph):
    golden = golden_of(engine)
    with engines.load(engine.path, graph=graph) as runner:
        for _ in range(3):
            assert_parity(engine, golden.outputs, runner.run({"input": golden.images})["output"])


def test_a_wrong_answer_would_be_noticed(engine):
    golden = golden_of(engine)
    with engines.load(engine.path) as runner:
        found = runner.run({"input": golden.images})["output"]
    assert GATES[engine.precision].failure(compare(golden.outputs, found[::-1])) is not None


def test_batches_are_split_and_padded(engine):
    images = noise(37)
    with engines.load(engine.path) as runner, engines.load(engine.path.with_suffix(".onnx")) as onnx:
        expected = onnx.run({"input": images})["output"]
        for rows in (1, 2, 3, 16, 17, 37):
            assert_parity(engine, expected[:rows], runner.run({"input": images[:rows]})["output"])


def test_graphs_give_the_bits_of_plain_runs(engine):
    with engines.load(engine.path, graph=True) as recorded, engines.load(engine.path, graph=False) as plain:
        for rows in (2, 5, 16, 5, 2, 16):
            images = noise(rows, seed=rows)
            first, second = recorded.run({"input": images}), plain.run({"input": images})
            np.testing.assert_array_equal(first["output"], second["output"])


def test_device_arrays_of_pytorch_go_in_and_out(engine):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    images = noise(8)
    stream = torch.cuda.Stream()
    with engines.load(engine.path) as runner, torch.cuda.stream(stream):
        given = torch.from_numpy(images).cuda(non_blocking=True)
        found = torch.empty((8, runner.outputs[0].shape[1]), device="cuda")
        runner.enqueue({"input": given}, {"output": found}, stream)
        doubled = found * 2
        stream.synchronize()
        expected = runner.run({"input": images})["output"]
    np.testing.assert_array_equal(found.cpu().numpy(), expected)
    np.testing.assert_array_equal(doubled.cpu().numpy(), expected * 2)


def test_memory_is_given_back(engine):
    cuda = cuda_runtime()

    def free():
        status, left, _ = cuda.cudaMemGetInfo()
        assert status == cuda.cudaError_t.cudaSuccess
        return left

    def life():
        with engines.load(engine.path) as runner:
            for rows in (2, 16, 16):
                runner.run({"input": noise(rows)})

    life()
    checked(cuda, cuda.cudaDeviceSynchronize)
    before = free()
    for _ in range(5):
        life()
    checked(cuda, cuda.cudaDeviceSynchronize)
    assert before - free() <= LARGEST_LEFT


def test_a_second_load_reads_the_cache_that_the_first_one_wrote(engine):
    with engines.load(engine.path) as runner:
        first = runner.run({"input": noise(4)})["output"]
    caches = list(engine.path.parent.glob(f"{engine.path.name}.sm*.cache"))
    assert len(caches) == (1 if "tensorrt_rtx" in engine.path.parent.name else 0)
    with engines.load(engine.path) as runner:
        np.testing.assert_array_equal(runner.run({"input": noise(4)})["output"], first)


# --- feature maps, of images of any size

SIZES = ((20, 20), (28, 28), (40, 36), (33, 21), (28, 28))


def assert_same_maps(maps, expected, found):
    """Feature maps by name, each held against its own largest value."""
    layout = layout_from_outputs({name: array.astype(np.float64) for name, array in expected.items()})
    assert {name: array.shape for name, array in found.items()} == {name: a.shape for name, a in expected.items()}
    comparison = compare(layout.joined(expected), layout.joined(found))
    assert layout.gate(GATES[maps.precision]).failure(comparison) is None


def test_the_golden_vectors_of_feature_maps_are_answered(maps):
    golden = golden_of(maps)
    gate = golden.layout.gate(GATES[maps.precision])
    with engines.load(maps.path) as runner:
        for _ in range(3):
            found = golden.joined(runner.run({"input": golden.images}))
            assert gate.failure(compare(golden.outputs, found)) is None
        assert gate.failure(compare(golden.outputs, found[::-1])) is not None


@pytest.mark.parametrize("graph", [True, False])
def test_images_of_every_size_and_batch_give_the_maps_of_onnx_runtime(maps, graph):
    with engines.load(maps.path, graph=graph) as runner, engines.load(maps.path.with_suffix(".onnx")) as onnx:
        for seed, size in enumerate(SIZES):
            for rows in (1, 2, 16, 19):
                images = noise(rows, (1, *size), seed)
                assert_same_maps(maps, onnx.run({"input": images}), runner.run({"input": images}))


@pytest.mark.parametrize("size", [(19, 20), (20, 19), (41, 36), (40, 37)])
def test_a_size_outside_of_the_profile_is_refused(maps, size):
    with engines.load(maps.path) as runner:
        with pytest.raises(UsageError, match="is outside of the engine's profile, 1x20x20 to 1x40x36"):
            runner.run({"input": noise(4, (1, *size))})
        assert set(runner.run({"input": noise(4)})) == {"stage1", "stage2", "stage4"}
