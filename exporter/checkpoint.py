"""File to named tensors: safe reading, and checks of what was read. Nothing here knows a network.

A file is judged by what it holds, not by its ending: a zip or legacy archive of ``torch.save`` is read with
``weights_only=True`` (no code in it is ever run), anything that begins like a safetensors file as such. Tensors are
memory-mapped where the format allows, so that reading a file costs no copy of the weights. Where in the file they are
is the business of ``exporter.containers``, and the objects beside them are that of ``exporter.stand_ins``.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from exporter.containers import check_average, weights_from_content, without_prefixes
from exporter.errors import CheckpointRejected, NotFinite, first_line, listed
from exporter.outline import Outline, outline_from_file
from exporter.pickled import refused_file
from exporter.stand_ins import stand_ins

EXTENSIONS = (".pt", ".pth", ".bin", ".safetensors")

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_FOLDER = 0x10
"""The attribute of a zip's record that makes it a folder."""
_LARGEST_VIEW = 1 << 24
"""Elements of a tensor that may repeat those of its storage; a few numbers can pretend to be any number of them."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file by their names without wrappers' prefixes.

    Attributes:
        path: of the file.
        tensors: float weights and integer counters, in the file's own dtypes.
        container: the path of keys to them, joined by dots; "" for the top.
        others: what stood beside them, unused.
        weights: "ema" or "raw", whichever was taken of a file that holds both averaged and raw weights; else None.
    """

    path: pathlib.Path
    tensors: dict[str, Tensor]
    container: str
    others: tuple[str, ...]
    weights: str | None = None


def checkpoint_from_path(path: pathlib.Path, weights: str | None = None) -> Checkpoint:
    """Reads the weights of a checkpoint file.

    Args:
        path: the file.
        weights: "ema" for averaged or "raw" for other weights; None takes the average where the file holds one.

    Raises:
        CheckpointRejected: missing, unreadable, not a checkpoint, with code in it, damaged, or without weights.
    """
    contained = weights_from_content(_content(path), path, weights)
    tensors = without_prefixes(contained.state, path)
    if weights is None:
        check_average(contained, path)
    _check_values(tensors, path)
    return Checkpoint(path, tensors, contained.container, contained.others, contained.weights)


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
        _check_records(path)
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


def _check_records(path: pathlib.Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:
        raise CheckpointRejected(f"{path}: a cut or damaged archive ({first_line(error)}); copy it again") from error
    if any(record.filename.endswith("constants.pkl") for record in records):
        raise CheckpointRejected(
            f"{path}: a TorchScript archive, which holds a program; save the weights instead: "
            f"torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pt')"
        )
    compressed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if compressed:  # what is mapped into memory would be the compressed bytes
        raise CheckpointRejected(
            f"{path}: a compressed archive ({compressed[0]}), which torch.save does not write; unpack the checkpoint "
            f"from it, or load it with torch and save it again"
        )
    if len({record.filename for record in records}) != len(records):
        raise CheckpointRejected(f"{path}: a damaged archive (two records of one name); copy it again")
    folders = [r.filename for r in records if r.external_attr & _FOLDER and not r.filename.endswith("/")]
    if folders:  # torch would read whatever is in memory in their place
        raise CheckpointRejected(f"{path}: a damaged archive ({folders[0]} is marked as a folder); copy it again")


def _from_torch(path: pathlib.Path, *, mmap: bool) -> Any:
    try:
        outline = outline_from_file(path)
    except Exception as error:
        raise CheckpointRejected(f"{path}: cannot be read ({first_line(error)}); copy the file again") from error
    if mmap:
        _check_storages(path, outline)
    try:
        with warnings.catch_warnings(), stand_ins():
            warnings.simplefilter("ignore")  # about old formats, which are either read or refused
            if path.suffix == ".safetensors":  # torch.load believes the ending; a file object has none
                with open(path, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise refused_file(path, outline, error) from error
    except Exception as error:
        raise CheckpointRejected(f"{path}: cannot be read ({first_line(error)}); copy the file again") from error


def _check_storages(path: pathlib.Path, outline: Outline) -> None:
    """That each storage is as long as its record: mapped into memory, a longer one would go on in the next."""
    with zipfile.ZipFile(path) as archive:
        sizes = {name.rpartition("/data/")[2]: archive.getinfo(name).file_size for name in archive.namelist()}
    for key, size in outline.storages.items():
        if sizes.get(key) != size:
            raise CheckpointRejected(
                f"{path}: damaged (data/{key} has {sizes.get(key, 'no')} bytes, not {size}); copy the file again"
            )


def _from_safetensors(path: pathlib.Path) -> Any:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointRejected(
            f"{path}: not a whole safetensors file ({first_line(error)}); copy it again"
        ) from error


def _check_values(tensors: Mapping[str, Tensor], path: pathlib.Path) -> None:
    """Every weight is a finite floating-point number; counters (integers of one element) are let through."""
    strange = [name for name, t in tensors.items() if t.layout != torch.strided or t.is_quantized or t.is_meta]
    if strange:
        raise CheckpointRejected(
            f"{path}: {listed(strange)}: sparse, quantized or without values; export plain tensors"
        )
    repeated = [name for name, tensor in tensors.items() if tensor.numel() > max(_LARGEST_VIEW, _stored(tensor))]
    if repeated:
        raise CheckpointRejected(
            f"{path}: {listed(repeated)}: more numbers than the file holds; save them with .contiguous()"
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


def _stored(tensor: Tensor) -> int:
    """How many elements the tensor's storage has."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()
