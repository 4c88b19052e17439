"""Writes what ``--expect`` and ``engines run`` are shown with: the trained network's answers, an image, class names.

    python examples/expect_fashion.py

The network is that of ``train_fashion.py``, in eval mode and float32, so that its answers are an outside witness of the
exporter: ``fashion_expected.npz`` has the first 16 test images, normalised, and what the network says to them.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import torch
from PIL import Image
from train_fashion import RepVGG, normalised

HERE = pathlib.Path(__file__).resolve().parent
NAMES = (
    "T-shirt or top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
COUNT = 16
SHOWN = "Ankle boot"


def main() -> None:
    """Writes ``fashion_expected.npz``, ``fashion_classes.txt`` and ``ankle_boot.png`` into ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    out: pathlib.Path = parser.parse_args().out
    with np.load(HERE / "fashion_test.npz") as archive:
        pixels, labels = archive["images"], archive["labels"]
    model = RepVGG()
    model.load_state_dict(torch.load(HERE / "fashion.pt", weights_only=True))
    images = normalised(pixels[:COUNT])
    model.eval()
    with torch.inference_mode():
        outputs = model(images)
    np.savez_compressed(out / "fashion_expected.npz", input=images.numpy(), output=outputs.numpy())
    (out / "fashion_classes.txt").write_text("".join(f"{name}\n" for name in NAMES), encoding="utf-8")
    Image.fromarray(pixels[labels == NAMES.index(SHOWN)][0]).save(out / "ankle_boot.png")


if __name__ == "__main__":
    main()
