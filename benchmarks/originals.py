"""The whole checkpoints that ``benchmarks.mutations`` damages, as people have them.

A trained network and one network of each family, saved by torch.save in both of its forms, by safetensors, in half
precision, and inside a wrapper of training code with its objects beside the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import pathlib
import pickletools
import zipfile

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from tests.families import Network
from tests.family_names import FAMILIES, OFFICIAL, Shape
from tests.family_states import extras

ROOT = pathlib.Path(__file__).resolve().parent.parent
FASHION = ROOT / "examples" / "fashion.pt"
FASHION_SHAPE = Shape(depths=(1, 4, 3, 2, 1), widths=(48, 48, 64, 64, 64), in_channels=1, outputs=10)
SMALL = {"depths": (1, 1, 2, 2, 1), "widths": (4, 4, 6, 8, 8)}

State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One file to try.

    Attributes:
        kind: which mutation made it.
        content: of the file.
        suffix: of its name.
        network: what it was made from, which can say what a network of these tensors answers.
        state: the weights that it must give where it is accepted; None where other ones may be.
        must_fail: whether accepting it is wrong.
        weights: "ema" or "raw" where that is asked for.
    """

    kind: str
    content: bytes
    suffix: str
    network: Network
    state: State | None = None
    must_fail: bool = False
    weights: str | None = None


@dataclasses.dataclass(frozen=True)
class Original:
    """A whole network and its files by form; ``pickle`` are the opcodes' positions in the zip's data.pkl."""

    network: Network
    state: State
    files: dict[str, bytes]
    pickle: bytes
    positions: list[int]


def originals(names: tuple[str, ...] = ("fashion", *FAMILIES)) -> list[Original]:
    """The trained network of the examples and one of each family."""
    return [_original(name) for name in names]


def _original(name: str) -> Original:
    if name == "fashion":
        network = Network(OFFICIAL, FASHION_SHAPE)
        network.state = state = dict(torch.load(FASHION, weights_only=True))
    else:
        family, shape = FAMILIES[name]
        depths = shape.depths if family.mobile else SMALL["depths"]
        shape = dataclasses.replace(shape, depths=depths, widths=SMALL["widths"], even_groups=1)
        network = Network(family, shape)
        state = network.state | extras(network)
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    whole = {key: tensor.contiguous() for key, tensor in state.items()}
    files = {
        "zip": saved(state),
        "legacy": saved(state, zipped=False),
        "safetensors": save(whole),
        "half": saved(half),
        "wrapped": saved({"model": state, "ema": None, "args": argparse.Namespace(lr=0.1), "best": np.float64(3)}),
    }
    pkl = records_of(files["zip"])["archive/data.pkl"]
    return Original(network, state, files, pkl, [at for _, _, at in pickletools.genops(pkl) if at is not None])


def saved(content: object, *, zipped: bool = True) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def records_of(content: bytes) -> dict[str, bytes]:
    """The records of a zip by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def repacked(content: bytes, pkl: bytes) -> bytes:
    """The zip with another pickle in it and checksums that are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, record in records_of(content).items():
            archive.writestr(name, pkl if name.endswith("/data.pkl") else record)
    return buffer.getvalue()
