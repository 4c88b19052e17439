"""The networks of ``benchmarks/paper_table.py``, with random weights, as modules and as files.

A RepVGG's training form is a graph of its own here, written node by node: each branch's Conv, each BatchNormalization
and each Add stand in it as in the module. PyTorch's exporter would fold the batch norms behind convolutions already.
Its deployed form is read back from the file that the exporter wrote, so that both ways of running it have the same
weights, bit for bit. A ResNet comes from timm, and its file from PyTorch's exporter, with its batch norms folded.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from benchmarks.plain_export import Block, ConvBN, RepVGG
from benchmarks.random_checkpoint import NOISE_SHAPE, random_repvgg
from engines.errors import InputRejected, SdkMissing, UsageError, first_line
from engines.golden import GOLDEN_NAME
from exporter.onnx_file import graph_from_file, write_onnx
from exporter.onnx_graph import BATCH, INPUT, IR_VERSION, OPSET, Graph, checked, with_metadata
from exporter.variants import VARIANTS, Variant

RESNETS = ("ResNet-18", "ResNet-34", "ResNet-50")
OUTPUT = "output"
GOLDEN_IMAGES = 4
METADATA = {"precision": "fp32"}
"""By which the file's parity gate is found."""
PLAIN_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Relu": nn.ReLU,
    "GlobalAveragePool": lambda: nn.AdaptiveAvgPool2d(1),
    "Flatten": nn.Flatten,
}


def variant_from_title(title: str) -> Variant:
    """A published RepVGG, as in RepVGG-B1g4 or B1g4.

    Raises:
        UsageError: there is none of that name.
    """
    known = {variant.title: variant for variant in VARIANTS if variant.family == "RepVGG" and "se" not in variant.name}
    wanted = title if title.startswith("RepVGG-") else f"RepVGG-{title}"
    if wanted not in known:
        raise UsageError(f"--networks {title}: unknown; choose from {', '.join([*known, *RESNETS])}")
    return known[wanted]


def random_network(variant: Variant, classes: int = 1000) -> RepVGG:
    """The training form in eval mode, the same at every call; its batch norms' statistics are those of its noise."""
    model = random_repvgg(variant.depths, variant.widths, classes)
    if variant.groups > 1:
        for position, block in enumerate(_blocks(model)):
            if position % 2 == 0 and position > 0:
                for branch in (block.rbr_dense, block.rbr_1x1):
                    branch.conv = _grouped(branch.conv, variant.groups)
        with torch.no_grad():
            model.train()(torch.randn(NOISE_SHAPE))
    return model.eval()


def write_training_form(model: RepVGG, size: int, path: pathlib.Path) -> pathlib.Path:
    """Writes the module as an ONNX file, node by node: nothing is folded or left out."""
    nodes: list[onnx.NodeProto] = []
    source = INPUT
    for name, block in ((name, part) for name, part in model.named_modules() if isinstance(part, Block)):
        nodes += _block_nodes(name, block, source)
        source = f"{name}/relu"
    nodes.append(helper.make_node("GlobalAveragePool", [source], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["features"], name="flatten", axis=1))
    gemm = ["features", "linear.weight", "linear.bias"]
    nodes.append(helper.make_node("Gemm", gemm, [OUTPUT], name="linear", transB=1))
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    values = [
        helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [BATCH, 3, size, size]),
        *(helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in weights.items()),
    ]
    result = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [BATCH, model.linear.out_features])
    graph = helper.make_graph(nodes, "training", values, [result])
    structure = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    write_onnx(with_metadata(checked(Graph(structure, weights)), METADATA), path)
    return path


def deployed_module(path: pathlib.Path) -> nn.Sequential:
    """The module of a deployed float32 file: its convolutions and ReLUs in their order, and the classifier.

    Raises:
        InputRejected: there is anything else in the file.
    """
    graph = graph_from_file(path)
    weights = {name: torch.from_numpy(np.array(array)) for name, array in graph.weights.items()}
    nodes = graph.structure.graph.node
    foreign = [node.op_type for node in nodes if node.op_type not in ("Conv", "Gemm", *PLAIN_LAYERS)]
    if foreign:
        raise InputRejected(f"{path}: has a {foreign[0]}, which no deployed RepVGG has; export it again")
    layers: list[nn.Module] = []
    for node in nodes:
        if node.op_type == "Conv":
            layers.append(_convolution(node, weights))
        elif node.op_type == "Gemm":
            classes, channels = weights[node.input[1]].shape
            linear = nn.Linear(channels, classes)
            linear.load_state_dict({"weight": weights[node.input[1]], "bias": weights[node.input[2]]})
            layers.append(linear)
        else:
            layers.append(PLAIN_LAYERS[node.op_type]())
    return nn.Sequential(*layers).eval()


def timm_problem() -> str | None:
    """Why there is no timm; None where it can be used."""
    if importlib.util.find_spec("timm") is None:
        return "timm is not installed here (pip install timm)"
    try:
        importlib.import_module("timm")
    except Exception as error:  # a torchvision for another torch fails in its own ways
        return f"timm does not start here ({first_line(error)})"
    return None


def resnet(title: str) -> nn.Module:
    """A ResNet of timm's with random weights, in eval mode, the same at every call.

    Raises:
        SdkMissing: timm cannot be used.
    """
    problem = timm_problem()
    if problem is not None:
        raise SdkMissing(f"{title}: {problem}")
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    name = title.lower().replace("-", "")
    module: nn.Module = timm.create_model(name, pretrained=False, zero_init_last=False)
    with torch.no_grad():
        module.train()(torch.randn(NOISE_SHAPE))
    return module.eval()


def write_module(module: nn.Module, size: int, path: pathlib.Path) -> pathlib.Path:
    """Writes a module by PyTorch's exporter, which folds batch norms into the convolutions before them."""
    program = torch.onnx.export(
        module,
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    if program is None:
        raise InputRejected(f"{path.name}: PyTorch's exporter made nothing of it")
    model = program.model_proto
    helper.set_model_props(model, METADATA)
    onnx.save(model, path)
    return path


def write_golden_vectors(module: nn.Module, size: int, directory: pathlib.Path) -> pathlib.Path:
    """Writes the module's answers to noise in float64, as an export does."""
    images = np.random.default_rng(0).standard_normal((GOLDEN_IMAGES, 3, size, size), np.float32)
    path = directory / GOLDEN_NAME
    with torch.inference_mode():
        answers = module.double()(torch.from_numpy(images).double()).numpy()
    module.float()
    np.savez(path, input=images, output=answers)
    return path


def parameters_of(module: nn.Module) -> int:
    """Trained numbers; statistics of batch norms are none."""
    return sum(parameter.numel() for parameter in module.parameters())


def parameters_of_file(path: pathlib.Path) -> int:
    """Numbers in the weights of a float32 file."""
    return sum(array.size for array in graph_from_file(path).weights.values() if array.dtype == np.float32)


def multiply_accumulates_of(module: nn.Module, size: int) -> int:
    """Of every convolution and matrix of the module, for one image: counted while it computes one."""
    total = 0

    def count(layer: nn.Module, _inputs: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += result.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += result.numel() * layer.in_features

    hooks = [layer.register_forward_hook(count) for layer in module.modules()]
    with torch.inference_mode():
        module(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return total


def _blocks(model: RepVGG) -> Iterator[Block]:
    return (part for part in model.modules() if isinstance(part, Block))


def _grouped(conv: nn.Conv2d, groups: int) -> nn.Conv2d:
    """A convolution of the same shape with groups, with new weights."""
    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    new = nn.Conv2d(conv.in_channels, conv.out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(new.weight, nonlinearity="relu")
    return new


def _block_nodes(name: str, block: Block, source: str) -> Iterator[onnx.NodeProto]:
    """Convolutions, batch norms and sums of one block; its result is ``<name>/relu``."""
    sums = []
    for branch in ("rbr_dense", "rbr_1x1"):
        part: ConvBN = getattr(block, branch)
        yield _convolution_node(f"{name}.{branch}.conv", part.conv, source)
        yield _batch_norm_node(f"{name}.{branch}.bn", part.bn, f"{name}.{branch}.conv/out")
        sums.append(f"{name}.{branch}.bn/out")
    if block.rbr_identity is not None:
        yield _batch_norm_node(f"{name}.rbr_identity", block.rbr_identity, source)
        sums.append(f"{name}.rbr_identity/out")
    total = sums[0]
    for index, term in enumerate(sums[1:]):
        yield helper.make_node("Add", [total, term], [f"{name}/sum{index}"], name=f"{name}/add{index}")
        total = f"{name}/sum{index}"
    yield helper.make_node("Relu", [total], [f"{name}/relu"], name=f"{name}/activation")


def _convolution_node(name: str, conv: nn.Conv2d, source: str) -> onnx.NodeProto:
    return helper.make_node(
        "Conv",
        [source, f"{name}.weight"],
        [f"{name}/out"],
        name=name,
        kernel_shape=list(conv.kernel_size),
        pads=[conv.kernel_size[0] // 2] * 4,
        strides=list(conv.stride),
        group=conv.groups,
    )


def _batch_norm_node(name: str, bn: nn.BatchNorm2d, source: str) -> onnx.NodeProto:
    tensors = [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    return helper.make_node("BatchNormalization", [source, *tensors], [f"{name}/out"], name=name, epsilon=bn.eps)


def _convolution(node: onnx.NodeProto, weights: dict[str, Tensor]) -> nn.Conv2d:
    """The module of a Conv node with weights and bias."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    weight, bias = (weights[name] for name in node.input[1:])
    groups = attributes["group"]
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(attributes["kernel_shape"]),
        tuple(attributes["strides"]),
        attributes["pads"][0],
        groups=groups,
    )
    conv.load_state_dict({"weight": weight, "bias": bias})
    return conv
