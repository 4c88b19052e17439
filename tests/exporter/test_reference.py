"""The reference: answers in float64, peaks of every tensor by its name in the graph, and the golden vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporter import model
from exporter.architecture import with_features
from exporter.checks import fusion_checks
from exporter.onnx_graph import onnx_from_plain, structure_from_architecture
from exporter.onnxruntime_cpu import session_from_layers
from exporter.plain import plain_from_repvgg
from exporter.reference import GOLDEN_NAME, reference_from_repvgg, write_golden
from tests.families import Network
from tests.family_names import FAMILIES, FAST_REID, OFFICIAL, Shape
from tests.family_states import whole
from tests.inference import network_from_state

SIZE = (20, 24)
UNSEEN = "factor"
"""What a Sigmoid gives is between 0 and 1, and nobody asks for it."""


def network_of(name, features=()):
    naive = Network(*FAMILIES[name])
    architecture, tensors = network_from_state(whole(naive))
    if features:
        architecture = with_features(architecture, features)
        blocks = tuple(f"{block.name}." for block in architecture.blocks)
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(blocks)}
    return naive, architecture, tensors


@pytest.mark.parametrize("features", [(), (0, 2)], ids=["all", "features"])
@pytest.mark.parametrize("name", FAMILIES)
def test_peaks_are_those_of_every_tensor_of_the_graph_channel_by_channel(name, features):
    naive, architecture, tensors = network_of(name, features)
    images = naive.noise(SIZE).numpy()
    reference = reference_from_repvgg(architecture, tensors, images)
    plain = plain_from_repvgg(architecture, tensors, images[:1])
    graph = onnx_from_plain(plain, structure_from_architecture(plain.architecture, SIZE), {})
    names = [name for node in graph.structure.graph.node for name in node.output if not name.endswith(UNSEEN)]
    values = session_from_layers(graph, names).tensors(images, names)
    assert set(reference.peaks) == {"input", *names}
    for tensor, value in zip(names, values, strict=True):
        largest = np.abs(value).max(axis=tuple(axis for axis in range(value.ndim) if axis != 1))
        scale = float(largest.max())
        assert reference.peaks[tensor] == pytest.approx(largest.astype(np.float64), rel=1e-4, abs=1e-5 * scale), tensor
    assert reference.peaks["input"] == pytest.approx(np.abs(images).max(axis=(0, 2, 3)))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answers_are_the_naive_networks_own(name):
    naive, architecture, tensors = network_of(name)
    images = naive.noise(SIZE)
    reference = reference_from_repvgg(architecture, tensors, images.numpy())
    assert reference.named["output"] == pytest.approx(naive.answer(images).numpy(), rel=1e-9, abs=1e-12)
    _, cut, tensors = network_of(name, (1, 3, 4))
    stages = naive.stages(images)
    found = reference_from_repvgg(cut, tensors, images.numpy()).named
    assert list(found) == ["stage1", "stage3", "stage4"]
    for output, maps in found.items():
        assert maps == pytest.approx(stages[int(output[-1])].numpy(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("features", [(), (1, 4)], ids=["scores", "features"])
def test_a_batch_in_parts_gives_what_it_gives_whole(features, monkeypatch):
    naive, architecture, tensors = network_of("official", features)
    images = naive.noise(SIZE, count=5).numpy()
    whole = reference_from_repvgg(architecture, tensors, images)
    monkeypatch.setattr(model, "PIXELS_AT_ONCE", 2 * SIZE[0] * SIZE[1])
    assert [len(part) for part in model.parts_of(torch.from_numpy(images))] == [2, 2, 1]
    parts = reference_from_repvgg(architecture, tensors, images)
    assert parts.named.keys() == whole.named.keys()
    for name, value in whole.named.items():
        assert parts.named[name] == pytest.approx(value, rel=1e-12, abs=1e-15)
    for name, peaks in whole.peaks.items():
        assert parts.peaks[name] == pytest.approx(peaks, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("features", [(), (1, 4)], ids=["scores", "features"])
def test_the_golden_vectors_are_the_images_and_each_output_by_name(features, tmp_path):
    naive, architecture, tensors = network_of("official", features)
    reference = reference_from_repvgg(architecture, tensors, naive.noise(SIZE).numpy())
    write_golden(reference, tmp_path / GOLDEN_NAME)
    with np.load(tmp_path / GOLDEN_NAME, allow_pickle=False) as arrays:
        assert list(arrays) == ["input", *(f"stage{stage}" for stage in features)] if features else ["input", "output"]
        assert arrays["input"].dtype == np.float32
        assert np.array_equal(arrays["input"], reference.images)
        for name, value in reference.named.items():
            assert arrays[name].dtype == np.float64
            assert np.array_equal(arrays[name], value)


# --- the fused network against it


@pytest.mark.parametrize("features", [(), (0, 3)], ids=["scores", "features"])
def test_fusion_is_compared_on_as_many_images_as_were_computed(features):
    naive, architecture, tensors = network_of("official", features)
    images = naive.noise(SIZE).numpy()
    reference = reference_from_repvgg(architecture, tensors, images)
    for count in (1, 3):
        plain = plain_from_repvgg(architecture, tensors, images[:count])
        assert [check.passed for check in fusion_checks(plain, reference)] == [True, True]
    other = plain_from_repvgg(architecture, tensors, images[1:2])
    assert [check.passed for check in fusion_checks(other, reference)] == [True, False]


@pytest.mark.parametrize("name", ["stage0", "stage3"])
def test_one_feature_map_of_the_fused_network_that_is_another_fails(name):
    """In its own scale: the outputs of the two stages are a thousand apart."""
    naive = Network(OFFICIAL, Shape())
    state = {
        key: tensor * (1000 if key.startswith("stage0.") and key.endswith(("bn.weight", "bn.bias")) else 1)
        for key, tensor in naive.state.items()
    }
    state = {
        key: tensor * (1e-3 if key.startswith("stage1.0.") and key.endswith("conv.weight") else 1)
        for key, tensor in state.items()
    }
    architecture, tensors = network_from_state(state)
    architecture = with_features(architecture, (0, 3))
    images = naive.noise(SIZE).numpy()
    reference = reference_from_repvgg(architecture, tensors, images)
    scales = [np.abs(values).max() for values in reference.named.values()]
    assert scales[0] > 100 * scales[1]
    plain = plain_from_repvgg(architecture, tensors, images)
    assert [check.passed for check in fusion_checks(plain, reference)] == [True, True]
    plain.outputs[name].reshape(-1)[5] += 1e-9 * np.abs(plain.outputs[name]).max()
    whole = fusion_checks(plain, reference)[1]
    assert whole.passed is False
    assert whole.value == pytest.approx(1e-9, rel=0.01)


def test_a_family_without_a_classifier_answers_with_its_last_feature_map():
    assert FAST_REID.head is None
    naive, architecture, tensors = network_of("fast-reid")
    reference = reference_from_repvgg(architecture, tensors, naive.noise(SIZE).numpy())
    assert reference.named["output"].shape == (3, 20, 2, 2)
    assert (reference.layout.names, reference.layout.ranked) == (("output",), False)
    assert reference.outputs.shape == (3, 80)
