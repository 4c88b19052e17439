"""Arrays on a GPU that a caller gives by name, held against an engine's inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.backends.backend import Profile, check_extents
from engines.backends.loaded_engine import Shapes
from engines.backends.staging import StagedTensor
from engines.device_arrays import DeviceArray, device_array, fitting_shape, require
from engines.errors import UsageError, listed


def device_arrays(
    tensors: tuple[StagedTensor, ...], given: Mapping[str, Any], *, device: int, stream: int
) -> dict[str, DeviceArray]:
    """What was ``given`` for all ``tensors``, by name, to be used on ``stream`` of the GPU ``device``.

    Raises:
        UsageError: other names, or something that is no array on that GPU.
    """
    names = [tensor.name for tensor in tensors]
    if sorted(given) != sorted(names):
        raise UsageError(f"device arrays were given for {listed(sorted(given))}, the engine has {listed(names)}")
    return {name: device_array(name, given[name], device=device, stream=stream) for name in names}


def checked_shapes(
    inputs: tuple[StagedTensor, ...],
    arrays: Mapping[str, DeviceArray],
    batches: tuple[int, int | None],
    profile: Profile,
) -> Shapes:
    """The shapes of the inputs' ``arrays``, which agree with the engine's and with one batch of its ``profile``.

    Raises:
        UsageError: a shape or dtype is another, or the batch is not in the range ``batches``.
    """
    least, most = batches
    name, first = next(iter(arrays.items()))
    batch = first.shape[0] if first.shape else 0
    if not least <= batch <= (most or batch):
        raise UsageError(f"{name}: a batch of {batch} is outside of the engine's profile, {least} to {most}")
    for tensor in inputs:
        array, (_, largest) = arrays[tensor.name], profile[tensor.name]
        expected = fitting_shape(tensor.description.shape, largest, array.shape, batch)
        require(tensor.name, array, tensor.dtype, expected, written=False)
        check_extents(tensor.name, array.shape, profile)
    return {name: array.shape for name, array in arrays.items()}
