"""The forms in which a network's weights are saved, and what training code saves around and beside them.

form                 in the file
training             the branches (``Network.state``)
deployed             one kernel and a bias a block, fused by the paper's formulas; or in some blocks only
with_wrong_fused     the branches, and beside them kernels that are not theirs
with_batch_norm      one kernel a block with a batch norm behind it
"""

from __future__ import annotations

import pathlib
import sys
import types
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.families import Network, State, random_batch_norm
from tests.family_names import BATCH_NORM, FAST_REID, PLUS, WITH_BN, Block, batch_norms, kernel_shapes


def deployed(network: Network, which: Callable[[Block], bool] = lambda block: True) -> State:
    """The state with the branches of the chosen blocks fused into one kernel each, in float32; the rest as it is."""
    state = dict(network.state)
    for block in filter(which, network.blocks):
        weight, bias = fused(network, block)
        for name in branch_names(network, block):
            del state[name]
        for name, tensor in zip(network.family.fused, (weight, bias), strict=True):
            state[f"{block.prefix}.{name}"] = tensor.float()
    return state


def partly_deployed(network: Network) -> State:
    """Every other block deployed, the first one not."""
    chosen = {block.prefix for block in network.blocks[1::2]}
    return deployed(network, lambda block: block.prefix in chosen)


def with_wrong_fused(network: Network) -> State:
    """The training form, and beside its live branches kernels that are not theirs, as placeholders are."""
    generator = torch.Generator().manual_seed(99)
    state = dict(network.state)
    for block in network.blocks:
        shapes = (block.cout, block.cin // block.groups, block.kernel, block.kernel), (block.cout,)
        for name, shape in zip(network.family.fused, shapes, strict=True):
            state[f"{block.prefix}.{name}"] = torch.randn(shape, generator=generator)
    return state


def with_batch_norm(network: Network) -> State:
    """One kernel a block with a batch norm behind it, as quantization-aware training of the deployed form has."""
    generator = torch.Generator().manual_seed(98)
    state = deployed(network)
    for block in network.blocks:
        weight, bias = (state.pop(f"{block.prefix}.{name}").double() for name in network.family.fused)
        norm = random_batch_norm(f"{block.prefix}.{WITH_BN[1]}", block.cout, generator)
        gamma, _, mean, variance = norm.values()
        factor = gamma / (variance + network.family.eps).sqrt()
        norm[f"{block.prefix}.{WITH_BN[1]}.bias"] = bias + mean * factor
        state[f"{block.prefix}.{WITH_BN[0]}"] = (weight / factor[:, None, None, None]).float()
        state |= {name: tensor.float() for name, tensor in norm.items()}
    return state


def branch_names(network: Network, block: Block) -> list[str]:
    """The names of every tensor that fusing takes away."""
    kernels = [name for name, _ in kernel_shapes(network.family, block)]
    return kernels + [f"{name}.{part}" for name in batch_norms(network.family, block) for part in BATCH_NORM]


def fused(network: Network, block: Block) -> tuple[Tensor, Tensor]:
    """Kernel and bias of the sum of a block's branches, by the paper's section 3.3, channel by channel; float64."""
    family, state = network.family, {name: tensor.double() for name, tensor in network.state.items()}
    inner, centre = block.cin // block.groups, block.kernel // 2
    weight = torch.zeros(block.cout, inner, block.kernel, block.kernel, dtype=torch.float64)
    bias = torch.zeros(block.cout, dtype=torch.float64)
    convs = [tuple(name.format(b=b) for name in family.dense) for b in range(block.convs)]
    branches: list[tuple[str | None, str | None]] = [(conv, norm) for conv, norm in convs]
    branches += [family.pointwise] if block.kernel > 1 else []
    branches += [(None, family.identity)] if block.has_identity else []
    for conv, norm in branches:
        scale, shift = scale_and_shift(
            state, None if norm is None else f"{block.prefix}.{norm}", block.cout, family.eps
        )
        for channel in range(block.cout):
            if conv is None:
                weight[channel, channel % inner, centre, centre] += scale[channel]
                continue
            kernel = state[f"{block.prefix}.{conv}.weight"][channel] * scale[channel]
            if kernel.shape[-1] == block.kernel:
                weight[channel] += kernel
            else:
                weight[channel, :, centre, centre] += kernel[:, 0, 0]
        bias += shift
    if family.post is not None:
        scale, shift = scale_and_shift(state, f"{block.prefix}.{family.post}", block.cout, family.eps)
        weight, bias = weight * scale[:, None, None, None], bias * scale + shift
    return weight, bias


def scale_and_shift(state: Mapping[str, Tensor], norm: str | None, channels: int, eps: float) -> tuple[Tensor, Tensor]:
    """A batch norm as y = scale x + shift."""
    if norm is None:
        return torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    gamma, beta, mean, variance = (state[f"{norm}.{part}"] for part in BATCH_NORM)
    scale = gamma / (variance + eps).sqrt()
    return scale, beta - mean * scale


def with_counters(state: Mapping[str, Tensor]) -> State:
    """With ``num_batches_tracked`` beside every batch norm, as torch saves it."""
    counters = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(1000)
        for name in state
        if name.endswith("running_var")
    }
    return {**state, **counters}


def auxiliary_heads(network: Network) -> State:
    """RepVGGplus' three classifiers of training: a 3x3 convolution with a batch norm, a pool, a linear layer."""
    generator = torch.Generator().manual_seed(97)
    last = {block.prefix.split(".")[0]: block.cout for block in network.blocks}
    state: State = {}
    for stage in ("stage1", "stage2", "stage3_first"):
        channels = last[stage]
        state[f"{stage}_aux.0.conv.weight"] = torch.randn(channels, channels, 3, 3, generator=generator)
        state |= {k: v.float() for k, v in random_batch_norm(f"{stage}_aux.0.bn", channels, generator).items()}
        state[f"{stage}_aux.3.weight"] = torch.randn(network.shape.outputs or 1, channels, generator=generator)
        state[f"{stage}_aux.3.bias"] = torch.randn(network.shape.outputs or 1, generator=generator)
    return state


def extras(network: Network) -> State:
    """What the family's training keeps beside the network itself."""
    if network.family is PLUS:
        return auxiliary_heads(network)
    return reid_heads(network) if network.family is FAST_REID else {}


def whole(network: Network) -> State:
    """The training form with everything that the family's training keeps beside it."""
    return network.state | extras(network)


def reid_heads(network: Network) -> State:
    """fast-reid's embedding head: a batch norm as the neck, and the identities' weights."""
    generator = torch.Generator().manual_seed(96)
    width = network.shape.widths[-1]
    neck = random_batch_norm("heads.bottleneck.0", width, generator)
    return {
        "heads.weight": torch.randn(11, width, generator=generator),
        **{name: tensor.float() for name, tensor in neck.items()},
    }


def without(state: Mapping[str, Tensor], *parts: str) -> State:
    """Without every tensor whose name contains one of ``parts``; fails where that leaves the state as it is."""
    left = {name: tensor for name, tensor in state.items() if not any(part in name for part in parts)}
    assert len(left) < len(state), f"nothing is called {parts}"
    return left


def narrowed(state: Mapping[str, Tensor], dtype: torch.dtype) -> State:
    """Floating tensors rounded to ``dtype``."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


class CfgNode(dict[str, object]):
    """Stands for yacs' class of this name: a dict with attributes of its own, saved under that name."""

    def __init__(self, *entries: Mapping[str, object]) -> None:
        super().__init__(*entries)
        self.__dict__["__immutable__"] = True


CfgNode.__module__ = "yacs.config"


def settings() -> CfgNode:
    """The configuration that training code of this kind saves beside the weights."""
    return CfgNode({"DATA": CfgNode({"IMG_SIZE": 224}), "OUTPUT": "out", "TAG": None})


def save(content: object, path: pathlib.Path) -> None:
    """``torch.save`` where yacs is installed, though it is not here and will not be where the file is read."""
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    module.__dict__["CfgNode"] = CfgNode
    sys.modules.update({"yacs": package, "yacs.config": module})
    try:
        torch.save(content, path)
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]


def prefixed(state: Mapping[str, Tensor], *prefixes: str) -> State:
    return {"".join(prefixes) + name: tensor for name, tensor in state.items()}
