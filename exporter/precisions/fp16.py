"""float16: every weight and activation in half precision, float32 at the graph's input and output.

First, channels that leave half too little room are rescaled by powers of two (``exporter.precisions.rescaling``). Then
the rewrite gives each node a type. Half is the rule; a node stays in float32 when one of its weights is still beyond
65504, or a tensor that goes into or out of it was seen beyond that (``peaks``). A Cast stands wherever a tensor crosses
from one type to the other, so also behind the input and before each output; what is an output of the network and read
in it, too, is read before that Cast.

    half    ulp 2^-11 relative, largest 65504, below 6e-8 zero

ONNX Runtime's CPU provider computes float16 graphs in float32 and drops the rounding between nodes, so it would not see
an overflow. ``explicit_cast_twin`` is the same graph in float32 with a Cast to float16 and back behind every half node:
it rounds and overflows where the typed graph does, with float32 sums inside each node, as tensor cores have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from engines.parity import GATES
from exporter.onnx_graph import Graph, checked
from exporter.precisions.headroom import headroom_of_graph
from exporter.precisions.precision import Peaks, Precision, Rewritten
from exporter.precisions.rescaling import HALF_MAX, rescaled


def half_from_float(graph: Graph, peaks: Peaks) -> Rewritten:
    """Rewrites a float32 graph to half precision; nodes that would overflow are kept, by name and with the reason."""
    fitted = rescaled(graph, peaks)
    nodes = list(graph.structure.graph.node)
    kept = {node.name: reason for node in nodes if (reason := _overflow(node, fitted.largest, fitted.peaks))}
    kept |= _readers_of(kept, nodes)
    half_nodes = [node for node in nodes if node.name not in kept]
    half_weights = {name for node in half_nodes for name in node.input if name in graph.weights}
    weights = {name: _half(array) if name in half_weights else array for name, array in fitted.graph.weights.items()}
    typed = checked(_with(graph, _typed_nodes(graph, kept), weights))
    return Rewritten(typed, kept, fitted.exponents, headroom_of_graph(graph, peaks, fitted.exponents))


def _typed_nodes(graph: Graph, kept: Mapping[str, str]) -> list[onnx.NodeProto]:
    """The graph's nodes and the Casts between those that are ``kept`` in float32 and the others."""
    outputs = {value.name for value in graph.structure.graph.output}
    types = {value.name: TensorProto.FLOAT for value in graph.structure.graph.input if value.name not in graph.weights}
    rewritten: list[onnx.NodeProto] = []
    casts: dict[tuple[str, int], str] = {}
    for node in graph.structure.graph.node:
        wanted = TensorProto.FLOAT if node.name in kept else TensorProto.FLOAT16
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for index, name in enumerate(node.input):
            if name in types and types[name] != wanted:
                copy.input[index] = _cast(name, wanted, casts, rewritten)
        types.update(dict.fromkeys(node.output, wanted))
        rewritten.append(copy)
        for index, name in enumerate(node.output):
            if name in outputs and wanted == TensorProto.FLOAT16:
                casts[name, wanted] = copy.output[index] = f"{name}/half"
                types[name] = TensorProto.FLOAT
                rewritten.append(_cast_node(casts[name, wanted], name, name, TensorProto.FLOAT))
    return rewritten


def _readers_of(kept: Mapping[str, str], nodes: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """The ReLUs and the like that read a kept Conv's result, and why they are kept, too.

    The compiler turns Cast, float32 Conv, Cast back into a half Conv, although the network is strongly typed; with the
    next operation between Conv and Cast it does not.
    """
    maker = {node.output[0]: node.name for node in nodes if node.op_type == "Conv" and node.name in kept}
    return {
        node.name: f"it reads {maker[name]}"
        for node in nodes
        for name in node.input
        if name in maker and node.op_type != "Conv" and node.name not in kept
    }


def explicit_cast_twin(graph: Graph) -> Graph:
    """The float32 graph that rounds to float16 wherever the typed ``graph`` does; weights are cast as it runs."""
    nodes: list[onnx.NodeProto] = []
    half = {name for name, array in graph.weights.items() if array.dtype == np.float16}
    widened: dict[str, str] = {}
    for node in graph.structure.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.op_type == "Cast":
            (source,), (target,) = node.input, node.output
            to_half = helper.get_node_attr_value(node, "to") == TensorProto.FLOAT16
            nodes += _rounding(source, target) if to_half else [helper.make_node("Identity", [source], [target])]
            continue
        for index, name in enumerate(node.input):
            if name in half:
                if name not in widened:
                    widened[name] = f"{name}/widened"
                    nodes.append(helper.make_node("Cast", [name], [widened[name]], to=TensorProto.FLOAT))
                copy.input[index] = widened[name]
        rounds = any(name in half for name in node.input) or _is_half(graph, node)
        if rounds:
            copy.output[0] = f"{node.output[0]}/exact"
        nodes.append(copy)
        nodes += _rounding(copy.output[0], node.output[0]) if rounds else []
    return _with(graph, nodes, graph.weights)


def _is_half(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node without weights (ReLU, pooling, Mul) computes in half, from the inferred type of its output."""
    return any(
        value.name == node.output[0] and value.type.tensor_type.elem_type == TensorProto.FLOAT16
        for value in graph.structure.graph.value_info
    )


def _rounding(source: str, target: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", [source], [f"{target}/half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{target}/half"], [target], to=TensorProto.FLOAT),
    ]


def _overflow(node: onnx.NodeProto, largest: Mapping[str, float], peaks: Peaks) -> str | None:
    """Why ``node`` cannot be computed in half, or None."""
    for name in node.input:
        if largest.get(name, 0.0) > HALF_MAX:
            return f"weight {name} reaches {largest[name]:.4g}"
    for name in (*node.input, *node.output):
        if name in peaks and peaks[name].max() > HALF_MAX:
            return f"activation {name} reaches {peaks[name].max():.4g}"
    return None


def _half(array: NDArray[Any]) -> NDArray[np.float16]:
    rounded: NDArray[np.float16] = torch.from_numpy(array).half().numpy()  # five times as fast as numpy's
    return rounded


def _cast(name: str, to: int, casts: dict[tuple[str, int], str], nodes: list[onnx.NodeProto]) -> str:
    """The name of ``name`` in the other type, adding the Cast where it is first needed."""
    if (name, to) not in casts:
        casts[name, to] = f"{name}/{'half' if to == TensorProto.FLOAT16 else 'float'}"
        nodes.append(_cast_node(name, casts[name, to], name, to))
    return casts[name, to]


def _cast_node(source: str, target: str, name: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{name}/Cast", to=to)


def _with(graph: Graph, nodes: Iterable[onnx.NodeProto], weights: Mapping[str, NDArray[Any]]) -> Graph:
    """``graph`` with other nodes and weights; types inside are inferred anew."""
    structure = onnx.ModelProto()
    structure.CopyFrom(graph.structure)
    del structure.graph.node[:], structure.graph.value_info[:]
    structure.graph.node.extend(nodes)
    for value in structure.graph.input:
        if value.name in weights:
            value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(weights[value.name].dtype)
    return Graph(onnx.shape_inference.infer_shapes(structure, strict_mode=True), weights)


FP16 = Precision(
    name="fp16",
    dtype="float16",
    rewrite=half_from_float,
    twin=explicit_cast_twin,
    computed_by="explicit-cast twin",
    gate=GATES["fp16"],
)
