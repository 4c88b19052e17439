"""The ledger layer by layer: in which layer does which form of the network leave the reference?

One image, the one whose outputs are farthest off, goes through every form again, and this time the output of each block
is kept: (1, C, H, W), by its name in the ONNX graph. Each is compared with the training-time network's in float64. A
layer departs where its relative error exceeds the gate of its stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.architecture import Architecture
from exporter.ledger import Stage
from exporter.model import outputs_of_network
from exporter.onnx_graph import Graph, onnx_from_plain, structure_from_architecture
from exporter.onnxruntime_cpu import session_from_layers
from exporter.plain import CERTIFICATE_GATE, plain_from_repvgg
from exporter.precisions import Exponents
from exporter.report import LayerRow

Layers = dict[str, NDArray[np.floating]]
Image = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class LayerStage:
    """One form of the network, its layers' outputs, and the largest relative error that is allowed in it."""

    name: str
    layers: Mapping[str, NDArray[np.floating]]
    gate: float


@dataclasses.dataclass(frozen=True)
class LayerGraph:
    """A form of the network that is a graph, and the largest relative error that is allowed in it.

    ``exponents`` are the powers of two that the channels of some Convs were multiplied by.
    """

    name: str
    graph: Graph
    gate: float
    exponents: Exponents


def names_of(architecture: Architecture) -> list[str]:
    """The layers that are compared: each block's output, then the network's."""
    names = [*architecture.tensor_names.values(), *(output.name for output in architecture.outputs)]
    return list(dict.fromkeys(names))


def farthest_row(reference: NDArray[np.float64], stages: Sequence[Stage]) -> int:
    """The input on which any stage is farthest from the reference, in units of that stage's own typical error."""
    worst = np.zeros(len(reference))
    for stage in stages:
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(stage.outputs - reference[stage.order]).max(axis=1)
            error[~np.isfinite(error)] = np.inf
            typical = float(np.median(error)) or 1.0
            np.maximum.at(worst, stage.order, error / typical if np.isfinite(typical) else np.isinf(error) * 1.0)
    return int(worst.argmax())


def layers_of_network(architecture: Architecture, tensors: Mapping[str, Tensor], image: Tensor) -> Layers:
    """Of a network, in the dtype of ``image``."""
    kept, observe = _kept(architecture)
    outputs_of_network(architecture, tensors, image, observe)
    return kept


def layers_of_graph(graph: Graph, architecture: Architecture, image: Image, exponents: Exponents) -> Layers:
    """Of an ONNX graph, exactly as written; blocks whose channels were rescaled by ``exponents`` as they were before.

    Raises:
        VerificationFailed: ONNX Runtime refuses it, or it has no such layer.
    """
    names = names_of(architecture)
    found = dict(zip(names, session_from_layers(graph, names).tensors(image, names), strict=True))
    for block, name in architecture.tensor_names.items():
        if (powers := exponents.get(f"{block}/Conv")) is not None:
            found[name] = np.ldexp(found[name], -powers[:, None, None])
    return found


def layer_stages(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    size: tuple[int, int],
    image: Image,
    graphs: Sequence[LayerGraph],
    gate: float,
) -> list[LayerStage]:
    """Every form of the network that comes before the files, then ``graphs``.

    Args:
        architecture: of the training-time network.
        tensors: by canonical name.
        size: (height, width) of the image.
        image: (1, C, H, W).
        graphs: those that come after.
        gate: the largest relative error allowed in float32.
    """
    fused, observe = _kept(architecture)
    plain = plain_from_repvgg(architecture, tensors, image, observe)
    rounded = layers_of_network(plain.architecture, plain.tensors, torch.from_numpy(image))
    graph = onnx_from_plain(plain, structure_from_architecture(architecture, size), {})
    return [
        LayerStage("fused, float64", fused, CERTIFICATE_GATE),
        LayerStage("fused, float32", rounded, gate),
        LayerStage("ONNX", layers_of_graph(graph, architecture, image, {}), gate),
        *(
            LayerStage(one.name, layers_of_graph(one.graph, architecture, image, one.exponents), one.gate)
            for one in graphs
        ),
    ]


def rows_from_stages(reference: Mapping[str, NDArray[np.floating]], stages: Sequence[LayerStage]) -> list[LayerRow]:
    """A row for each layer, in the network's order."""
    return [
        LayerRow(layer, {stage.name: _relative_error(truth, stage.layers[layer]) for stage in stages})
        for layer, truth in reference.items()
    ]


def first_departing(rows: Sequence[LayerRow], stages: Sequence[LayerStage]) -> str | None:
    """The first layer beyond its gate, with the first stage in which it is; None where all are within."""
    gates = {stage.name: stage.gate for stage in stages}
    for row in rows:
        for stage, error in row.errors.items():
            if not error <= gates[stage]:
                return f"{row.layer} in {stage}"
    return None


def _kept(architecture: Architecture) -> tuple[Layers, Callable[[str, Tensor], None]]:
    kept: Layers = {}
    wanted = set(names_of(architecture))

    def observe(name: str, value: Tensor) -> None:
        if name in wanted:
            kept[name] = value.numpy()

    return kept, observe


def _relative_error(truth: NDArray[np.floating], found: NDArray[np.floating]) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        worst, scale = float(np.abs(found.astype(np.float64) - truth).max()), float(np.abs(truth).max())
    return worst / scale if scale else (0.0 if worst == 0 else float("inf"))
