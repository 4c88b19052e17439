"""Trains the RepVGG that ships as ``examples/fashion.pt``, and cuts the two image files beside it.

    apt-get install dataset-fashion-mnist
    python examples/train_fashion.py --out examples

The block is the training-time block of the RepVGG paper (Ding et al., CVPR 2021, section 3.2), with the tensor names of
the authors' code: ``rbr_dense`` (3x3 convolution and batch norm), ``rbr_1x1`` (the same, 1x1) and ``rbr_identity``
(a batch norm, where input and output have the same shape), summed before the ReLU. This file imports nothing from the
exporter, so that a network made by it is an outside witness.

Images are scaled to 0..1 and normalised with mean 0.5 and deviation 0.5, the exporter's default for one channel.
"""

from __future__ import annotations

import argparse
import gzip
import pathlib
import time

import numpy as np
import torch
from torch import nn

DEPTHS = (4, 3, 2, 1)
WIDTHS = (48, 48, 64, 64, 64)
CALIBRATION_IMAGES = 512
TEST_IMAGES = 2000


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Sequential:
    """A bias-free convolution named ``conv`` and its batch norm named ``bn``."""
    layers = nn.Sequential()
    layers.add_module(
        "conv",
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
    )
    layers.add_module("bn", nn.BatchNorm2d(out_channels))
    return layers


class RepVGGBlock(nn.Module):
    """Three branches, one sum, one ReLU: (N, in, H, W) to (N, out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        same_shape = in_channels == out_channels and stride == 1
        self.rbr_identity = nn.BatchNorm2d(in_channels) if same_shape else None
        self.rbr_dense = conv_bn(in_channels, out_channels, 3, stride)
        self.rbr_1x1 = conv_bn(in_channels, out_channels, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """ReLU of the sum of the branches."""
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            y = y + self.rbr_identity(x)
        return torch.relu(y)


class RepVGG(nn.Module):
    """``stage0`` and four stages, each beginning with stride 2; global average pooling; ``linear``."""

    def __init__(self, in_channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stage0 = RepVGGBlock(in_channels, WIDTHS[0], stride=2)
        channels = WIDTHS[0]
        for index, (depth, width) in enumerate(zip(DEPTHS, WIDTHS[1:], strict=True), start=1):
            blocks = []
            for position in range(depth):
                blocks.append(RepVGGBlock(channels, width, stride=2 if position == 0 else 1))
                channels = width
            setattr(self, f"stage{index}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, classes)."""
        for index in range(5):
            x = getattr(self, f"stage{index}")(x)
        scores: torch.Tensor = self.linear(x.mean(dim=(2, 3)))
        return scores


def images_and_labels(folder: pathlib.Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """The IDX files ``<prefix>-images-idx3-ubyte.gz`` and labels: uint8 (N, 28, 28) and int64 (N,)."""
    with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return images, labels


def normalised(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, 28, 28) to float32 (N, 1, 28, 28), (pixel / 255 - 0.5) / 0.5."""
    return torch.from_numpy(images[:, None].astype(np.float32) / 255.0 - 0.5) / 0.5


def augmented(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random mirror image per sample and one random shift by up to two pixels per batch."""
    mirror = torch.rand(len(batch), generator=generator) < 0.5
    batch = torch.where(mirror[:, None, None, None], batch.flip(-1), batch)
    top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
    return nn.functional.pad(batch, (2, 2, 2, 2), value=-1.0)[:, :, top : top + 28, left : left + 28]


def accuracy(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in percent, in eval mode."""
    model.eval()
    with torch.inference_mode():
        parts = zip(torch.split(x, 500), torch.split(labels, 500), strict=True)
        hits = sum(int((model(images).argmax(1) == truth).sum()) for images, truth in parts)
    return 100.0 * hits / len(labels)


def trained(data: pathlib.Path, epochs: int, seed: int) -> tuple[RepVGG, float]:
    """A network trained for ``epochs`` on the 60,000 training images, and its top-1 on the 10,000 test images."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train_images, train_labels = images_and_labels(data, "train")
    test_images, test_labels = images_and_labels(data, "t10k")
    x, labels = normalised(train_images), torch.from_numpy(train_labels)
    model, batch_size = RepVGG(), 128
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=2e-4)
    steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.15, total_steps=steps, pct_start=0.15)
    for epoch in range(epochs):
        model.train()
        start, order = time.monotonic(), torch.randperm(len(x), generator=generator)
        for chosen in torch.split(order, batch_size)[: len(x) // batch_size]:
            loss = nn.functional.cross_entropy(model(augmented(x[chosen], generator)), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        top1 = accuracy(model, normalised(test_images), torch.from_numpy(test_labels))
        print(f"epoch {epoch + 1}/{epochs}: test top-1 {top1:.2f} % ({time.monotonic() - start:.0f} s)", flush=True)
    return model, top1


def main() -> None:
    """Writes ``fashion.pt``, ``fashion_calibration.npz`` and ``fashion_test.npz`` into ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, top1 = trained(arguments.data, arguments.epochs, arguments.seed)
    torch.save(model.state_dict(), arguments.out / "fashion.pt")
    for prefix, count, name in (("train", CALIBRATION_IMAGES, "calibration"), ("t10k", TEST_IMAGES, "test")):
        images, labels = images_and_labels(arguments.data, prefix)
        np.savez_compressed(arguments.out / f"fashion_{name}.npz", images=images[:count], labels=labels[:count])
    print(f"test top-1 {top1:.2f} % on 10,000 images; written to {arguments.out}")


if __name__ == "__main__":
    main()
