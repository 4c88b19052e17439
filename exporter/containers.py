"""Where the weights stand in a checkpoint: containers, averaged weights, prefixes. Nothing here reads a file.

Training code saves a dict of many things. The weights are at its top, or under one of ``CONTAINERS``, or under one
inside another. Beside them may be their exponential moving average, under one of ``AVERAGES``: then there are two
networks in one file. The averaged one is what is validated and published, so it is what is taken where nobody says
otherwise; which one it was is told. mmengine swaps the two as it saves: there, ``state_dict`` is the average.

Only real dicts count, and only through the methods of ``dict`` itself: a pickle may put attributes of any name on an
OrderedDict or a tensor, which must not stand in for methods.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from torch import Tensor

from exporter.errors import CheckpointRejected, listed
from exporter.stand_ins import stand_in_name

CONTAINERS = ("state_dict", "model", "params", "net", "model_state_dict", "network", "weights")
"""Where weights are, tried in this order."""
AVERAGES = ("ema", "state_dict_ema", "model_ema", "ema_net", "ema_state_dict", "params_ema")
"""Where averaged weights are, tried in this order."""
WRAPPERS = ("module", "_orig_mod")
"""Parts of a tensor's name that a wrapper put there: of data-parallel training and of ``torch.compile``."""
AVERAGE_COUNTERS = ("steps", "n_averaged")
"""How often an average was updated, which stands among its weights."""
KINDS = ("ema", "raw")
CONTAINER_DEPTH = 2

_INSIDE_AVERAGE = ("module", *AVERAGES, *CONTAINERS)
_AT_THE_TOP = "the weights at the top"
_LONGEST_KEY = 80

Entries = dict[object, object]


@dataclasses.dataclass(frozen=True)
class Contained:
    """Weights and where they were.

    Attributes:
        state: the container's entries, tensors and others, by their keys.
        twin: those of the other kind, where the file holds both averaged and raw weights.
        container: the path of keys that leads to ``state``, joined by dots.
        others: what stood beside it.
        weights: which kind was taken, "ema" or "raw"; None where the file holds only one.
    """

    state: Entries
    twin: Entries | None
    container: str
    others: tuple[str, ...]
    weights: str | None


def weights_from_content(content: object, path: pathlib.Path, wanted: str | None = None) -> Contained:
    """The weights inside what a file holds.

    Args:
        content: what was read.
        path: of the file, for messages.
        wanted: "ema" or "raw"; None takes the average where there is one.

    Raises:
        CheckpointRejected: there are no weights, or none of the kind that is wanted.
    """
    top = _entries(content)
    if top is None:
        held = stand_in_name(content) or f"a {type(content).__name__}"
        raise CheckpointRejected(f"{path}: holds {held}, not named weights; save a state_dict")
    trails = _trails(top)
    if not trails:
        raise CheckpointRejected(_no_weights(top, path))
    if wanted is not None and wanted not in trails:
        (kind,) = trails
        held = f"the {'averaged' if kind == 'ema' else 'raw'} weights ({_named(trails[kind])})"
        raise CheckpointRejected(f"{path}: --weights {wanted}: the file holds only {held}; leave --weights out")
    kind = wanted or next(kind for kind in KINDS if kind in trails)
    other = trails.get("raw" if kind == "ema" else "ema")
    return Contained(
        state=_at(top, trails[kind]),
        twin=None if other is None else _at(top, other),
        container=".".join(trails[kind]),
        others=_others(top, trails[kind], other),
        weights=None if other is None else kind,
    )


def without_prefixes(state: Mapping[object, object], path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a container by their names, without the parts that wrappers put there.

    Raises:
        CheckpointRejected: two names become one.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        name = _unwrapped_name(str(key))
        if name in AVERAGE_COUNTERS and _is_counter(value):
            continue
        if name in tensors:
            raise CheckpointRejected(
                f"{path}: two tensors are called {name} once prefixes are gone; remove one of them"
            )
        tensors[name] = Tensor.detach(value)
    return tensors


def check_average(contained: Contained, path: pathlib.Path) -> None:
    """That an average which nobody asked for by name holds every weight that stands beside it.

    Raises:
        CheckpointRejected: some are raw only, such as the statistics of batch norms.
    """
    if contained.weights != "ema" or contained.twin is None:
        return
    averaged, raw = (_weight_names(state) for state in (contained.state, contained.twin))
    missing = sorted(raw - averaged)
    if missing:
        where = contained.container or "at the top"
        raise CheckpointRejected(
            f"{path}: the averaged weights ({where}) lack {listed(missing, 3)}, which the raw weights have; "
            f"choose --weights raw, or --weights ema to take the average as it is"
        )


def _entries(value: object) -> Entries | None:
    """The entries of a dict that was a dict in the file, too."""
    return None if not isinstance(value, dict) or stand_in_name(value) is not None else dict(dict.items(value))


def _trails(top: Entries) -> dict[str, tuple[str, ...]]:
    """The keys that lead to the averaged and to the raw weights, of those that there are."""
    averaged = _search(top, AVERAGES, _INSIDE_AVERAGE, CONTAINER_DEPTH)
    raw = _search(top, CONTAINERS, CONTAINERS, CONTAINER_DEPTH)
    for key in CONTAINERS if averaged is None else ():
        within = _search(_entries(top.get(key)) or {}, AVERAGES, (), 1)
        averaged = averaged or (None if within is None else (key, *within))
    if raw is None and any("." in str(key) for key in top if isinstance(key, str)) and _holds_weights(top):
        raw = ()
    if raw == ("state_dict",) and averaged == ("ema_state_dict",) and _is_of_mmengine(top):
        averaged, raw = raw, averaged
    return {kind: trail for kind, trail in zip(KINDS, (averaged, raw), strict=True) if trail is not None}


def _search(entries: Entries, names: Sequence[str], inner: Sequence[str], depth: int) -> tuple[str, ...] | None:
    for name in names:
        within = _entries(entries.get(name))
        if not within:
            continue
        deeper = _search(within, inner, inner, depth - 1) if depth > 1 else None
        if deeper is not None:
            return (name, *deeper)
        if _holds_weights(within):
            return (name,)
    return None


def _holds_weights(entries: Entries) -> bool:
    """Whether a tensor of more than one number is in it: a best accuracy is often a tensor, too."""
    return any(isinstance(value, Tensor) and Tensor.numel(value) != 1 for value in entries.values())


def _is_of_mmengine(top: Entries) -> bool:
    """By its message hub, its version in ``meta`` or the counter of its average; other code does not swap."""
    meta = _entries(top.get("meta")) or {}
    averaged = _entries(top.get("ema_state_dict")) or {}
    return "message_hub" in top or "mmengine_version" in meta or "steps" in averaged


def _at(top: Entries, trail: Sequence[str]) -> Entries:
    entries = top
    for key in trail:
        entries = _entries(entries[key]) or {}
    return entries


def _others(top: Entries, trail: Sequence[str], twin: Sequence[str] | None) -> tuple[str, ...]:
    """What stood beside each container of ``trail``; beside weights at the top, only their twin is told."""
    if not trail:
        return () if twin is None else (_named(twin),)
    others: list[str] = []
    flat = twin is not None and not twin
    for depth, key in enumerate(trail):
        beside = _at(top, trail[:depth])
        hidden = flat and depth == 0
        others += [_shown(name) for name in beside if name != key and not (hidden and isinstance(beside[name], Tensor))]
    return (*others, _AT_THE_TOP) if flat else tuple(others)


def _named(trail: Sequence[str]) -> str:
    return ".".join(trail) or _AT_THE_TOP


def _shown(key: object) -> str:
    """A key as it may stand in a line."""
    text = " ".join(str(key).split()) if isinstance(key, str | int | float | tuple) else type(key).__name__
    return text if len(text) <= _LONGEST_KEY else text[: _LONGEST_KEY - 3] + "..."


def _no_weights(top: Entries, path: pathlib.Path) -> str:
    entries = top
    for _ in range(CONTAINER_DEPTH):
        within = (_entries(entries.get(key)) for key in (*CONTAINERS, *AVERAGES))
        entries = next((inside for inside in within if inside), entries)
    objects = [f"{key} is a {kind}" for key, value in top.items() if (kind := stand_in_name(value)) is not None]
    keys = listed(sorted(map(_shown, entries))) or "nothing"
    told = f"; {listed(objects, 3)}" if objects else ""
    places = ", ".join((*CONTAINERS, *AVERAGES))
    return f"{path}: holds no weights (only {keys}{told}); expected named tensors, at the top or under {places}"


def _unwrapped_name(name: str) -> str:
    *parts, last = name.split(".")
    return ".".join((*(part for part in parts if part not in WRAPPERS), last))


def _is_counter(tensor: Tensor) -> bool:
    return Tensor.numel(tensor) == 1 and not Tensor.is_floating_point(tensor)


def _weight_names(state: Entries) -> set[str]:
    weights = {key: value for key, value in state.items() if isinstance(value, Tensor) and not _is_counter(value)}
    return {_unwrapped_name(str(key)) for key in weights}
