"""Small networks in INT8, quantized by hand: nearest rounding, the largest values as ranges; and what codes compute.

``codes_answer`` is the oracle: sums of products of codes times scales, in float64, block by block from the
architecture. It knows no ONNX node.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from exporter.architecture import with_features
from exporter.images import noise_images
from exporter.onnx_graph import onnx_from_plain, structure_from_architecture
from exporter.onnxruntime_cpu import session_from_layers
from exporter.plain import plain_from_repvgg
from exporter.quantization.quantized import Quantized, QuantizedLayer
from tests.families import Network
from tests.family_names import APPLE, OFFICIAL, PLUS, Shape
from tests.family_states import without
from tests.inference import network_from_state

SIZE = (20, 24)
SE = Shape(se=3)
NETWORKS = {
    "plain": (OFFICIAL, Shape(), (), True),
    "grouped": (OFFICIAL, Shape(even_groups=2), (), True),
    "grey": (OFFICIAL, Shape(in_channels=1), (), True),
    "se": (OFFICIAL, SE, (), True),
    "plus": (PLUS, SE, (), True),
    "mobile": (APPLE, Shape(convs=2, se=3), (), True),
    "features": (OFFICIAL, Shape(), (1, 2), True),
    "features with se": (PLUS, SE, (0, 2, 4), True),
    "backbone": (OFFICIAL, Shape(), (), False),
}
"""Family, shape, features and whether there is a classifier."""


def plain_network(name):
    """One of NETWORKS, fused; with features, without what lies behind them."""
    family, shape, features, head = NETWORKS[name]
    state = Network(family, shape).state
    architecture, tensors = network_from_state(state if head else without(state, f"{family.head}."))
    if features:
        architecture = with_features(architecture, features)
        blocks = tuple(f"{block.name}." for block in architecture.blocks)
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(blocks)}
    return plain_from_repvgg(architecture, tensors, images_of(architecture)[:1])


def images_of(architecture):
    return noise_images(architecture.in_channels, SIZE)


def float_graph(plain, size=None):
    return onnx_from_plain(plain, structure_from_architecture(plain.architecture, size), {})


def quantized_graph(graph, images, form, kept=()):
    """Every Conv and Gemm of a float graph in INT8 but SE's and those whose names are in ``kept``."""
    layers = [node for node in graph.structure.graph.node if node.op_type in ("Conv", "Gemm")]
    left = {node.name: "SE" if "/se/" in node.name else "asked for" for node in layers}
    left = {name: why for name, why in left.items() if why == "SE" or name in kept}
    chosen = [node for node in layers if node.name not in left]
    read = [node.input[0] for node in chosen if node.input[0] != "input"]
    values = dict(zip(read, session_from_layers(graph, read).tensors(images, read), strict=True)) if read else {}
    values["input"] = images
    made = {
        node.name: quantized_layer(values[node.input[0]], *(graph.weights[name] for name in node.input[1:]), form)
        for node in chosen
    }
    return Quantized(form, graph, made, left)


def quantized_layer(x, weight, bias, form):
    """The codes of a layer with the input values ``x``; numbers are such as the form's dtype holds."""
    over = tuple(range(1, weight.ndim)) if form.per_channel else None
    scale = np.asarray((np.abs(weight).max(axis=over) / 127).astype(form.dtype))
    codes = np.rint(weight / spread(scale, weight).astype(np.float64)).clip(-127, 127).astype(np.int8)
    input_scale = float(form.dtype.type(np.abs(x).max() / 127))
    return QuantizedLayer(input_scale, codes, scale, bias.astype(form.dtype).astype(np.float32))


def spread(scale, weight):
    """A scale for each output channel, or one, in a shape that broadcasts to the weight's."""
    return np.reshape(scale, (-1, *[1] * (weight.ndim - 1)))


def exact(x):
    return x


def half(x):
    return x.half().double()


def codes_answer(quantized, architecture, images, reads=exact, weighs=exact):
    """By output, what the codes compute in float64.

    ``reads`` rounds what codes are made of, ``weighs`` the products of a weight's codes and its scale.
    """
    weights = {
        name: torch.from_numpy(array.astype(quantized.form.dtype)).double()
        for name, array in quantized.graph.weights.items()
    }

    def computed(node, parameters, x, operation):
        layer = quantized.layers.get(node)
        if layer is None:
            weight, bias = (weights[f"{parameters}.{part}"] for part in ("weight", "bias"))
            return operation(x, weight, bias)
        quotient = (reads(x).float() / torch.tensor(layer.input_scale)).double()  # in float32, as a runtime divides
        codes = torch.clamp(torch.round(quotient), -128, 127)
        weight = torch.from_numpy(layer.weight * spread(layer.weight_scale, layer.weight).astype(np.float64))
        return operation(codes * layer.input_scale, weighs(weight), torch.from_numpy(layer.bias).double())

    def block_answer(block, x):
        def convolved(x, weight, bias):
            return functional.conv2d(x, weight, bias, block.stride, block.padding, 1, block.groups)

        def excited(y):
            hidden = y.mean(dim=(2, 3))
            for part, activation in (("reduce", torch.relu), ("expand", torch.sigmoid)):
                weight, bias = (weights[f"{block.name}.se.{part}.{kind}"] for kind in ("weight", "bias"))
                hidden = activation(hidden @ weight[:, :, 0, 0].T + bias)
            return y * hidden[:, :, None, None]

        y = computed(f"{block.name}/Conv", block.name, x, convolved)
        if block.se_channels is None:
            return torch.relu(y)
        return excited(torch.relu(y)) if block.se_after_activation else torch.relu(excited(y))

    outputs, x = {}, torch.from_numpy(images).double()
    for block in architecture.blocks:
        x = block_answer(block, x)
        outputs |= {output.name: x.numpy() for output in architecture.outputs if output.block == block.name}
    if architecture.classes is not None:
        outputs["output"] = computed("head/Gemm", "head", x.mean(dim=(2, 3)), functional.linear).numpy()
    return outputs


def sqnr_db(reference, candidate):
    """Of two mappings from outputs to arrays."""
    signal = sum(float((reference[name].astype(np.float64) ** 2).sum()) for name in reference)
    noise = sum(float(((reference[name].astype(np.float64) - candidate[name]) ** 2).sum()) for name in reference)
    return 10 * np.log10(signal / max(noise, 1e-300))


def sqnr_of_images(reference, candidate):
    """The same image by image, from the farthest on."""
    count = len(next(iter(reference.values())))
    return sorted(
        sqnr_db(*({name: value[image] for name, value in outputs.items()} for outputs in (reference, candidate)))
        for image in range(count)
    )
