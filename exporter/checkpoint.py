"""File to named tensors: safe reading, containers, prefixes. Nothing here knows a network.

A file is judged by what it holds, not by its ending: a zip or legacy archive of ``torch.save`` is read with
``weights_only=True`` (no code in it is ever run), anything that begins like a safetensors file as such. Tensors are
memory-mapped where the format allows, so that reading a file costs no copy of the weights.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from exporter.errors import CheckpointRejected, NotFinite, first_line, listed

# The place for further containers, such as the exponential moving averages: tried in this order.
CONTAINERS = ("state_dict", "model", "params", "net")
CONTAINER_DEPTH = 2
PREFIXES = ("module.", "_orig_mod.")
EXTENSIONS = (".pt", ".pth", ".bin", ".safetensors")

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file by their names without wrappers' prefixes; ``container`` is the path of keys to them."""

    path: pathlib.Path
    tensors: dict[str, Tensor]
    container: str
    others: tuple[str, ...]


def checkpoint_from_path(path: pathlib.Path) -> Checkpoint:
    """Reads the weights of a checkpoint file.

    Raises:
        CheckpointRejected: missing, unreadable, not a checkpoint, with code in it, damaged, or without weights.
    """
    content = _content(path)
    state, container, others = _unwrapped(content, path)
    tensors = _without_prefixes(state, path)
    _check_values(tensors, path)
    return Checkpoint(path, tensors, container, others)


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether a file begins as one of torch.save or safetensors does; what cannot be read does not."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except (OSError, ValueError):
        return False
    return head.startswith((_ZIP, _PICKLE)) or head[8:9] == b"{"


def check_archive(path: pathlib.Path) -> None:
    """Compares every record of a zip checkpoint with its stored checksum; other formats have none.

    Raises:
        CheckpointRejected: a record differs from its checksum.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise CheckpointRejected(f"{path}: the archive is damaged ({first_line(error)}); copy it again") from error
    if damaged is not None:
        raise CheckpointRejected(f"{path}: record {damaged} differs from its checksum; copy the file again")


def _content(path: pathlib.Path) -> Any:
    head = _head(path)
    if head.startswith(_ZIP):
        _refuse_torchscript(path)
        return _from_torch(path, mmap=True)
    if head[8:9] == b"{" and path.suffix == ".safetensors":
        return _from_safetensors(path)
    if head.startswith(_PICKLE):
        return _from_torch(path, mmap=False)
    if head[8:9] == b"{":
        return _from_safetensors(path)
    raise CheckpointRejected(
        f"{path}: not a checkpoint (it begins with {head[:8]!r}); expected a file of torch.save or safetensors, "
        f"such as {', '.join(EXTENSIONS)}"
    )


def _head(path: pathlib.Path) -> bytes:
    if path.is_dir():
        raise CheckpointRejected(f"{path}: a directory, not a checkpoint; name the file in it")
    try:
        if path.exists() and not path.is_file():
            raise CheckpointRejected(f"{path}: not a regular file; copy the checkpoint into one")
        with open(path, "rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise CheckpointRejected(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise CheckpointRejected(f"{path}: cannot be read ({first_line(error)}); check the path") from error
    if not head:
        raise CheckpointRejected(f"{path}: an empty file; copy the checkpoint again")
    return head


def _refuse_torchscript(path: pathlib.Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointRejected(f"{path}: a cut or damaged archive ({first_line(error)}); copy it again") from error
    if any(name.endswith("constants.pkl") for name in names):
        raise CheckpointRejected(
            f"{path}: a TorchScript archive, which holds a program; save the weights instead: "
            f"torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pt')"
        )


def _from_torch(path: pathlib.Path, *, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats, which are either read or refused
            if path.suffix == ".safetensors":  # torch.load believes the ending; a file object has none
                with open(path, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = _REFUSED_GLOBAL.search(str(error))
        if found is None:
            raise CheckpointRejected(f"{path}: damaged ({first_line(error)}); copy the file again") from error
        raise CheckpointRejected(
            f"{path}: holds code ({found[1]}), which is not run; where you trust the file, save its weights alone: "
            f"m = torch.load('{path.name}', weights_only=False); "
            f"torch.save(m.state_dict() if hasattr(m, 'state_dict') else m['state_dict'], 'weights.pt')"
        ) from error
    except Exception as error:
        raise CheckpointRejected(f"{path}: cannot be read ({first_line(error)}); copy the file again") from error


def _from_safetensors(path: pathlib.Path) -> Any:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointRejected(
            f"{path}: not a whole safetensors file ({first_line(error)}); copy it again"
        ) from error


def _unwrapped(content: Any, path: pathlib.Path) -> tuple[Mapping[str, Any], str, tuple[str, ...]]:
    """The state dict inside ``content``, the keys that lead to it, and what stood beside it."""
    trail: list[str] = []
    others: list[str] = []
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((key for key in CONTAINERS if isinstance(content.get(key), Mapping) and content[key]), None)
        if inner is None or len(trail) == CONTAINER_DEPTH:
            break
        others += [str(key) for key in content if key != inner]
        trail.append(inner)
        content = content[inner]
    if not isinstance(content, Mapping):
        raise CheckpointRejected(f"{path}: holds a {type(content).__name__}, not named weights; save a state_dict")
    if not any(isinstance(value, Tensor) for value in content.values()):
        keys = listed(sorted(str(key) for key in content)) or "nothing"
        raise CheckpointRejected(
            f"{path}: holds no weights (only {keys}); "
            f"expected named tensors, at the top or under {', '.join(CONTAINERS)}"
        )
    return content, ".".join(trail), tuple(others)


def _without_prefixes(state: Mapping[str, Any], path: pathlib.Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        name = str(key)
        while stripped := next((name[len(p) :] for p in PREFIXES if name.startswith(p)), None):
            name = stripped
        if name in tensors:
            raise CheckpointRejected(
                f"{path}: two tensors are called {name} once prefixes are gone; remove one of them"
            )
        tensors[name] = value.detach()
    return tensors


def _check_values(tensors: Mapping[str, Tensor], path: pathlib.Path) -> None:
    """Every weight is a finite floating-point number; counters (integers of one element) are let through."""
    strange = [name for name, t in tensors.items() if t.layout != torch.strided or t.is_quantized or t.is_meta]
    if strange:
        raise CheckpointRejected(
            f"{path}: {listed(strange)}: sparse, quantized or without values; export plain tensors"
        )
    counters = [name for name, tensor in tensors.items() if not tensor.is_floating_point() and tensor.numel() == 1]
    wrong = [name for name, t in tensors.items() if name not in counters and not t.is_floating_point()]
    if wrong:
        dtype = str(tensors[wrong[0]].dtype).removeprefix("torch.")
        raise CheckpointRejected(
            f"{path}: {listed(wrong)}: {dtype} where floating-point weights were expected; export the float checkpoint"
        )
    bad = [name for name, tensor in tensors.items() if name not in counters and not _is_finite(tensor)]
    if bad:
        raise NotFinite(f"{path}: {listed(bad)}: NaN or infinite; the training run diverged or the file is damaged")
    negative = [name for name, t in tensors.items() if name.endswith("running_var") and (t.float() < 0).any()]
    if negative:
        raise CheckpointRejected(f"{path}: {listed(negative)}: a negative variance; the file is damaged, copy it again")


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass and without a copy."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
