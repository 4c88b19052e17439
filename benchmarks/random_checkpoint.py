"""Makes a RepVGG checkpoint with random weights, in training form, whose activations stay near 1 through the depth.

    python -m benchmarks.random_checkpoint A0 OUT.pth

He initialisation; the batch norms' statistics are those of one batch of noise, each then moved at random, and their
scales and shifts are random, so that no batch norm is the identity.
"""

from __future__ import annotations

import argparse
import pathlib

import torch
from torch import nn

from benchmarks.plain_export import NETWORKS, RepVGG

SEED = 0
NOISE_SHAPE = (8, 3, 64, 64)


def random_repvgg(depths: tuple[int, ...], widths: tuple[int, ...], classes: int = 1000) -> RepVGG:
    """The network in eval mode, the same at every call."""
    torch.manual_seed(SEED)
    model = RepVGG(depths, widths, classes)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.3, 1.0)
            nn.init.uniform_(norm.bias, -0.2, 0.2)
            norm.momentum = 1.0
        model.train()(torch.randn(NOISE_SHAPE))
        for norm in norms:
            _moved(norm)
    return model.eval()


def _moved(norm: nn.BatchNorm2d) -> None:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    mean += torch.empty_like(mean).uniform_(-0.2, 0.2) * variance.sqrt()
    variance *= torch.empty_like(variance).uniform_(0.8, 1.25)


def main() -> None:
    """Writes the state dict of one network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("out", type=pathlib.Path)
    arguments = parser.parse_args()
    torch.save(random_repvgg(*NETWORKS[arguments.network]).state_dict(), arguments.out)


if __name__ == "__main__":
    main()
