"""A small network and its images, on which INT8 is calibrated in a second or two."""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image

from tests.families import Network
from tests.family_names import OFFICIAL, Shape

SIZE, MARGIN = 16, 2
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SMALL = Shape(depths=(1, 1, 1, 1, 1))
COUNT = 128


@functools.cache
def pictures(count=COUNT, seed=0, margin=MARGIN):
    """Coloured patches with noise on them: uint8 (count, SIZE + 2 margin, SIZE + 2 margin, 3)."""
    random = np.random.default_rng(seed)
    side = SIZE + 2 * MARGIN
    patches = random.integers(0, 256, (count, 5, 5, 3)).repeat(side // 5, axis=1).repeat(side // 5, axis=2)
    brightness = random.normal(0, 30, (count, 1, 1, 3))
    noisy = 0.8 * patches + brightness + random.normal(0, 12, patches.shape)
    cut = slice(MARGIN - margin, side - MARGIN + margin)
    return noisy.clip(0, 255).astype(np.uint8)[:, cut, cut]


def normalised(pixels):
    """What the network gets: (n, 3, H, W) float32."""
    return torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2).copy()).float()


@functools.cache
def network(family=OFFICIAL, shape=SMALL, seed=0):
    """Its batch norms keep the very statistics of the images that it is calibrated on."""
    return Network(family, shape, seed, normalised(pictures(margin=0)))


def save_images(path, count=COUNT, seed=0, **arrays):
    np.savez(path, images=pictures(count, seed, 0), **arrays)
    return path


def save_network(path, *arguments, **options):
    torch.save(network(*arguments, **options).state, path)
    return path


def answers(pixels):
    """The classes that ``network()`` names, in float64."""
    return network().answer(normalised(pixels)).argmax(dim=1).numpy()


def save_folder(folder, pixels, classes=None):
    """PNG files; with ``classes`` (N,), each in the folder of its class."""
    for index, image in enumerate(pixels):
        parent = folder if classes is None else folder / str(classes[index])
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(parent / f"{index:04}.png")
    return folder
