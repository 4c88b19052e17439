"""Faults planted between the stages of a whole run: each fails the verdict, in the stage that should see it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import exporter
from engines.parity import compare
from exporter import pipeline
from exporter import plain as plain_module
from exporter.checkpoint import checkpoint_from_path
from exporter.errors import CheckpointRejected, VerificationFailed
from exporter.images import noise_images
from exporter.reference import reference_from_repvgg
from exporter.request import Request
from tests.networks import NaiveRepVGG, Shape, contiguous_float

BLOCK = "stage1.1.fused.weight"


def with_tensor(plain, name, change):
    tensors = dict(plain.tensors)
    tensors[name] = change(tensors[name].clone())
    return dataclasses.replace(plain, tensors=tensors)


def swap(weight):
    return weight[[1, 0, *range(2, len(weight))]]


def scaled(weight):
    return weight * 1.001


def nan(weight):
    weight.view(-1)[0] = float("nan")
    return weight


WRONG_WEIGHTS = {
    "swapped channels": swap,
    "a transposed kernel": lambda weight: weight.transpose(2, 3).contiguous(),
    "a tenth of a percent": scaled,
    "a NaN": nan,
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("change", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_wrong_fused_weights_fail_against_the_reference(change, checkpoint, tmp_path, monkeypatch):
    right = pipeline.plain_from_repvgg
    monkeypatch.setattr(pipeline, "plain_from_repvgg", lambda a, t, x: with_tensor(right(a, t, x), BLOCK, change))
    with pytest.raises(VerificationFailed, match="fp32, ONNX Runtime against float64"):
        exporter.export(checkpoint, tmp_path / "out", size=20)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["golden.npz.rejected", "model.onnx.rejected", "report.json.rejected", "report.md.rejected"]
    report = json.loads((tmp_path / "out" / "report.json.rejected").read_text())
    assert report["passed"] is False
    assert [check["stage"] for check in report["checks"] if not check["passed"]] == [
        "fp32, ONNX Runtime against float64"
    ]


def fuse_with(change):
    """Fusion of a block whose inputs were changed first."""
    right = plain_module.convolution_from_block

    def wrong(block, own, bn_eps):
        return right(*change(block, dict(own), bn_eps))

    return wrong


def another_eps(block, own, bn_eps):
    return block, own, 1e-3


def a_dropped_branch(block, own, bn_eps):
    return dataclasses.replace(block, branches=block.branches[:-1]), own, bn_eps


def a_stale_statistic(block, own, bn_eps):
    own["dense.bn.running_mean"] = own["dense.bn.running_mean"] * 0.9
    return block, own, bn_eps


@pytest.mark.parametrize("change", [another_eps, a_dropped_branch, a_stale_statistic])
def test_a_wrong_fusion_fails_its_certificate(change, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(plain_module, "convolution_from_block", fuse_with(change))
    with pytest.raises(VerificationFailed) as caught:
        exporter.export(checkpoint, tmp_path / "out", size=20)
    for stage in ("fusion, block by block", "fusion, whole network in float64", "fp32, ONNX Runtime against float64"):
        assert stage in str(caught.value)


def test_a_wrong_stride_in_the_graph_fails(checkpoint, tmp_path, monkeypatch):
    right = pipeline.structure_from_architecture

    def wrong(architecture, size):
        blocks = [dataclasses.replace(b, stride=1) if b.name == "stage3.0" else b for b in architecture.blocks]
        return right(dataclasses.replace(architecture, blocks=tuple(blocks)), size)

    monkeypatch.setattr(pipeline, "structure_from_architecture", wrong)
    with pytest.raises(VerificationFailed) as caught:
        exporter.export(checkpoint, tmp_path / "out", size=20)
    assert "fp32, graph contract: stage3.0/Conv has (strides, pads, group, dilations)" in str(caught.value)
    assert "fp32, ONNX Runtime against float64" in str(caught.value)


def test_a_typed_graph_with_another_weight_fails_contract_and_twin(checkpoint, tmp_path, monkeypatch):
    precision = next(p for p in pipeline.PRECISIONS if p.name == "fp16")

    def wrong(graph, peaks):
        rewritten = precision.rewrite(graph, peaks)
        weights = dict(rewritten.graph.weights)
        weights["stage2.0.weight"] = (weights["stage2.0.weight"] * np.float16(1.5)).astype(np.float16)
        return dataclasses.replace(rewritten, graph=dataclasses.replace(rewritten.graph, weights=weights))

    wrong_precision = dataclasses.replace(precision, rewrite=wrong)
    monkeypatch.setattr(pipeline, "PRECISIONS", (pipeline.PRECISIONS[0], wrong_precision))
    with pytest.raises(VerificationFailed) as caught:
        exporter.export(checkpoint, tmp_path / "out", size=20, trt=["fp16"])
    assert "fp16, graph contract: weight stage2.0.weight differs" in str(caught.value)
    assert "fp16, explicit-cast twin against float64: relative error" in str(caught.value)
    assert "fp16, engine audit" not in str(caught.value)


def test_an_engine_of_another_graph_fails_its_audit(checkpoint, tmp_path, monkeypatch):
    """The engine is compiled from a file that differs from the one that was checked."""
    right = pipeline.submit
    other = NaiveRepVGG(Shape(), seed=9)
    torch.save(contiguous_float(other.state_dict()), tmp_path / "other.pt")
    exporter.export(tmp_path / "other.pt", tmp_path / "other", size=20, trt=["fp16"])

    def wrong(typed, compiler, request):
        right(dataclasses.replace(typed, onnx=tmp_path / "other" / "other.fp16.onnx"), compiler, request)

    monkeypatch.setattr(pipeline, "submit", wrong)
    with pytest.raises(VerificationFailed, match=r"fp16, engine audit: .*do not stand in the engine bit for bit"):
        exporter.export(checkpoint, tmp_path / "out", size=20, trt=["fp16"])


def test_a_simplifier_that_changes_the_graph_fails_the_contract(checkpoint, tmp_path, monkeypatch, simplifier_process):
    right = simplifier_process.result

    def wrong(self):
        import onnx

        model = onnx.ModelProto.FromString(right(self))
        model.graph.node[1].op_type = "Sigmoid"
        return model.SerializeToString()

    monkeypatch.setattr(simplifier_process, "result", wrong)
    with pytest.raises(VerificationFailed, match=r"fp32, graph contract: 1 Sigmoid where 0 belong|Relu where"):
        exporter.export(checkpoint, tmp_path / "out", size=20)


def test_a_simplifier_that_dies_is_reported_in_one_line(checkpoint, tmp_path, monkeypatch, simplifier_process):
    monkeypatch.setattr(simplifier_process, "submit", lambda self, model: (self.send(b"no model"), self.close_input()))
    with pytest.raises(VerificationFailed, match=r"onnxsim: it gave no answer \(status 1: "):
        exporter.export(checkpoint, tmp_path / "out", size=20)
    assert not (tmp_path / "out").exists()


def test_fused_weights_beyond_float32_are_refused(small, saved, tmp_path):
    state = contiguous_float(small.state_dict())
    state["stage1.0.rbr_dense.bn.weight"][0] = 3e38
    state["stage1.0.rbr_dense.conv.weight"][0] = 30.0
    with pytest.raises(CheckpointRejected, match=r"stage1\.0: its fused weights are too large for float32"):
        exporter.export(saved(state), tmp_path / "out", size=20)


def test_the_training_networks_own_loss_is_that_of_its_float32_outputs(small, checkpoint, tmp_path):
    request = Request(path=checkpoint, out=tmp_path, size=(20, 20))
    network = pipeline.network_from_checkpoint(checkpoint_from_path(checkpoint), request)
    reference = reference_from_repvgg(network.architecture, network.tensors, noise_images(3, (20, 20)))
    with torch.no_grad():
        naive = small.float()(torch.from_numpy(reference.images)).double().numpy()
    loss = pipeline.training_time_loss(request, network.architecture, reference)
    assert 1e-8 < loss < 1e-6
    assert loss == pytest.approx(compare(reference.outputs, naive).relative_error, rel=5)
