"""Every family's network once more, from the papers and naively: the oracle that exported files are held against.

Nothing here imports the exporter. A ``Network`` is random weights under a family's names. ``stages`` computes it in
float64 from whatever a state dict holds, branch by branch:

    live branches      BN(K x) for each, or K x and x themselves where the family gives a branch no batch norm
    only one kernel    K x + b, or BN(K x) where it has a batch norm of its own

    plain              ReLU(SE(sum))            SE(ReLU(sum)) for RepVGGplus
    QARepVGG           ReLU(BN(sum))

Batch norm statistics are those of the network's own noise, then disturbed per channel, so that activations stay of
order one and every number in a file matters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from tests.family_names import BATCH_NORM, WITH_BN, Block, Family, Shape, batch_norms, kernel_shapes

State = dict[str, Tensor]


class Network:
    """Random weights of one family's network; ``state`` is its training form in float32, under the family's names."""

    def __init__(self, family: Family, shape: Shape, seed: int = 0, seen: Tensor | None = None) -> None:
        """With ``seen``, batch norms keep the very statistics of these images (N, C, H, W), as training leaves them."""
        if shape.strides[-1] == Shape.strides[-1]:
            shape = dataclasses.replace(shape, strides=(*shape.strides[:-1], family.last_stride))
        self.family, self.shape = family, shape
        self.blocks = family.blocks(shape)
        generator = torch.Generator().manual_seed(seed)
        self.state = self._random_state(generator)
        self._settle(generator, seen)
        self.state = {name: tensor.float() for name, tensor in self.state.items()}

    @property
    def has_head(self) -> bool:
        return self.family.head is not None and self.shape.outputs is not None

    def noise(self, size: tuple[int, int] = (40, 48), count: int = 3, seed: int = 5) -> Tensor:
        """Images (count, C, H, W) in float32."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, self.shape.in_channels, *size, generator=generator)

    def stages(self, x: Tensor, state: Mapping[str, Tensor] | None = None, **changes: object) -> list[Tensor]:
        """What leaves each stage, in float64, from ``state`` (any form, any dtype); ``changes`` to the family."""
        state = self.state if state is None else state
        family = dataclasses.replace(self.family, **changes)  # type: ignore[arg-type]
        wide = {name: tensor.double() for name, tensor in state.items()}
        outputs: dict[int, Tensor] = {}
        x = x.double()
        for block in self.blocks:
            x = outputs[block.stage] = block_answer(family, block, wide, x)
        return list(outputs.values())

    def answer(self, x: Tensor, state: Mapping[str, Tensor] | None = None, **changes: object) -> Tensor:
        """The classifier's (N, outputs), or without one the last stage's (N, C, h, w); float64."""
        state = self.state if state is None else state
        last = self.stages(x, state, **changes)[-1]
        head = self.family.head
        if head is None or f"{head}.weight" not in state:
            return last
        pooled = last.sum(dim=(2, 3)) / (last.shape[2] * last.shape[3])
        return pooled @ state[f"{head}.weight"].double().T + state[f"{head}.bias"].double()

    def loss_of_float32(self, x: Tensor, state: Mapping[str, Tensor] | None = None) -> float:
        """What float32 arithmetic itself loses: max|y32 - y64| / max|y64| over the last feature map."""
        state = self.state if state is None else state
        narrow = {name: tensor.float() for name, tensor in state.items()}
        exact, y = self.stages(x, state)[-1], x.float()
        for block in self.blocks:
            y = block_answer(self.family, block, narrow, y)
        return float((y.double() - exact).abs().max() / exact.abs().max())

    def _random_state(self, generator: torch.Generator) -> State:
        state: State = {}
        for block in self.blocks:
            for name, shape in kernel_shapes(self.family, block):
                fan = math.prod(shape[1:])
                # as small as trained kernels are, so that the batch norms' epsilon makes a difference
                state[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * (0.1 / math.sqrt(fan))
            for name in batch_norms(self.family, block):
                state |= random_batch_norm(name, block.cout, generator)
            if block.se:
                state |= self._random_se(block, generator)
        if self.family.head is not None and self.shape.outputs is not None:
            shape = (self.shape.outputs, self.shape.widths[-1])
            state[f"{self.family.head}.weight"] = torch.randn(shape, generator=generator, dtype=torch.float64) / 2
            state[f"{self.family.head}.bias"] = torch.randn(shape[:1], generator=generator, dtype=torch.float64) / 4
        return state

    def _random_se(self, block: Block, generator: torch.Generator) -> State:
        assert self.family.se is not None
        down, up = (f"{block.prefix}.{name}" for name in self.family.se)
        shapes = {
            f"{down}.weight": (block.se, block.cout, 1, 1),
            f"{down}.bias": (block.se,),
            f"{up}.weight": (block.cout, block.se, 1, 1),
            f"{up}.bias": (block.cout,),
        }
        return {name: torch.randn(s, generator=generator, dtype=torch.float64) / 2 for name, s in shapes.items()}

    def _settle(self, generator: torch.Generator, seen: Tensor | None) -> None:
        """Gives every batch norm the statistics of what it sees here; of noise, times a factor per channel."""
        spread = 0.0 if seen is not None else 1.0
        x = (self.noise(seed=11) if seen is None else seen).double()
        for block in self.blocks:
            for part, y in live_branches(self.family, block, self.state, x):
                if part is not None:
                    self._set_statistics(part, y, generator, spread)
            if self.family.post is not None:
                total = sum(settled_branches(self.family, block, self.state, x))
                assert isinstance(total, Tensor)
                self._set_statistics(f"{block.prefix}.{self.family.post}", total, generator, spread)
            x = block_answer(self.family, block, self.state, x)

    def _set_statistics(self, name: str, y: Tensor, generator: torch.Generator, spread: float) -> None:
        mean, variance = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3))
        shift = torch.randn(mean.shape, generator=generator, dtype=torch.float64) / 4 * spread
        factor = 1 + (torch.rand(mean.shape, generator=generator, dtype=torch.float64) * 1.5 - 0.5) * spread
        self.state[f"{name}.running_mean"] = mean + shift * variance.sqrt()
        self.state[f"{name}.running_var"] = variance * factor


def random_batch_norm(name: str, channels: int, generator: torch.Generator) -> State:
    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(channels, generator=generator, dtype=torch.float64) * (high - low) + low

    values = (uniform(0.3, 1.2), uniform(-0.2, 0.4), uniform(-0.3, 0.3), uniform(0.2, 2.0))
    return {f"{name}.{part}": value for part, value in zip(BATCH_NORM, values, strict=True)}


def block_answer(family: Family, block: Block, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """One block, in the dtype of ``state`` and ``x``; live branches before any fused kernel."""
    dense = f"{block.prefix}.{family.dense[0].format(b=0)}.weight"
    if dense in state:
        total = sum(settled_branches(family, block, state, x))
        assert isinstance(total, Tensor)
        if family.post is not None:
            total = normalised(state, f"{block.prefix}.{family.post}", total, family.eps)
    elif f"{block.prefix}.{WITH_BN[0]}" in state:
        total = convolved(block, x, state[f"{block.prefix}.{WITH_BN[0]}"])
        total = normalised(state, f"{block.prefix}.{WITH_BN[1]}", total, family.eps)
    else:
        weight, bias = (state[f"{block.prefix}.{name}"] for name in family.fused)
        total = convolved(block, x, weight) + bias[:, None, None]
    if not block.se:
        return total.clamp(min=0)
    if family.se_after_relu:
        return excited(family, block, state, total.clamp(min=0))
    return excited(family, block, state, total).clamp(min=0)


def live_branches(
    family: Family, block: Block, state: Mapping[str, Tensor], x: Tensor
) -> list[tuple[str | None, Tensor]]:
    """What each branch gives before its batch norm, with that batch norm's name; None where it has none."""
    branches: list[tuple[str | None, Tensor]] = []
    for b in range(block.convs):
        conv, norm = (f"{block.prefix}.{name.format(b=b)}" for name in family.dense)
        branches.append((norm, convolved(block, x, state[f"{conv}.weight"])))
    if block.kernel > 1:
        name, batch_norm = family.pointwise
        y = convolved(block, x, state[f"{block.prefix}.{name}.weight"])
        branches.append((None if batch_norm is None else f"{block.prefix}.{batch_norm}", y))
    if block.has_identity:
        branches.append((None if family.identity is None else f"{block.prefix}.{family.identity}", x))
    return branches


def settled_branches(family: Family, block: Block, state: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    """The branches after their batch norms."""
    return [
        y if name is None else normalised(state, name, y, family.eps)
        for name, y in live_branches(family, block, state, x)
    ]


def convolved(block: Block, x: Tensor, kernel: Tensor) -> Tensor:
    return functional.conv2d(x, kernel, None, block.stride, kernel.shape[-1] // 2, 1, block.groups)


def normalised(state: Mapping[str, Tensor], name: str, y: Tensor, eps: float) -> Tensor:
    weight, bias, mean, variance = (state[f"{name}.{part}"][:, None, None] for part in BATCH_NORM)
    return (y - mean) / (variance + eps).sqrt() * weight + bias


def excited(family: Family, block: Block, state: Mapping[str, Tensor], y: Tensor) -> Tensor:
    """SE (Hu et al., CVPR 2018), with its 1x1 convolutions as the matrix products that they are."""
    assert family.se is not None
    down, up = (f"{block.prefix}.{name}" for name in family.se)
    squeezed = y.mean(dim=(2, 3))
    reduced = (squeezed @ state[f"{down}.weight"][:, :, 0, 0].T + state[f"{down}.bias"]).clamp(min=0)
    expanded = reduced @ state[f"{up}.weight"][:, :, 0, 0].T + state[f"{up}.bias"]
    return y * (1 / (1 + torch.exp(-expanded)))[:, :, None, None]
