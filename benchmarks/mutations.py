"""Damaged, foreign and hostile checkpoints, made from whole ones (``benchmarks.originals``) by a seeded generator.

Each mutation knows what may come of it: certain weights, any weights that the file really holds, or only a refusal.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import random
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.originals import Case, Original, State, repacked, saved

CANARY_MODULE, CANARY_FILE = "canary_that_must_not_sing", "canary.txt"


# Bytes


def flipped(rng: random.Random, pool: list[Original]) -> Case:
    """One to three flips, overwritten bytes, insertions, deletions and cuts, near the ends more often."""
    original = rng.choice(pool)
    form = rng.choice(list(original.files))
    changed = bytearray(original.files[form])
    for _ in range(rng.choice((1, 1, 2, 3))):
        near = rng.randrange(min(2000, len(changed)) or 1)
        at = rng.choice((rng.randrange(len(changed) or 1), near, max(0, len(changed) - 1 - near)))
        _change(changed, at, rng)
    # A checksum covers every record of a zip: what is still accepted must be what it was.
    state = original.state if form in ("zip", "wrapped") else None
    suffix = ".safetensors" if form == "safetensors" else ".pt"
    return Case(f"bytes, {form}", bytes(changed), suffix, original.network, state)


def _change(changed: bytearray, at: int, rng: random.Random) -> None:
    kind = rng.choice(("flip", "flip", "flip", "set", "insert", "delete", "cut"))
    if kind == "insert":
        changed[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == "delete":
        del changed[at : at + rng.randrange(1, 9)]
    elif kind == "cut":
        del changed[at:]
    elif changed:
        changed[at] = changed[at] ^ (1 << rng.randrange(8)) if kind == "flip" else rng.choice((0, 0x7F, 0x80, 0xFF))


def spliced(rng: random.Random, pool: list[Original]) -> Case:
    """The beginning of one file and the end of another, or a piece of one inside the other."""
    first, second = rng.choice(pool), rng.choice(pool)
    a, b = rng.choice(list(first.files.values())), rng.choice(list(second.files.values()))
    at, length = rng.randrange(len(a)), rng.randrange(1, 5000)
    piece = b[max(0, min(at, len(b) - length)) :][:length]
    content = rng.choice(
        (a[:at] + b[rng.randrange(len(b)) :], a[:at] + piece + a[at + len(piece) :], a + b, a[at:] + b)
    )
    return Case("splice", content, rng.choice((".pt", ".safetensors")), first.network)


# Pickles


HOSTILE = (
    b"cposix\nsystem\n",
    b"cos\nsystem\n",
    b"c__builtin__\neval\n",
    b"c__builtin__\nexec\n",
    b"c__builtin__\n__import__\n",
    b"csubprocess\nPopen\n",
    b"cimportlib\nimport_module\n",
    b"crunpy\nrun_path\n",
    f"c{CANARY_MODULE}\nsing\n".encode(),
)
HARMLESS = (b"cargparse\nNamespace\n", b"cnumpy\ndtype\n", b"c__builtin__\ngetattr\n", b"ccollections\nOrderedDict\n")
PIECES = (b"}", b"]", b")", b"N", b"K\x01", b"(", b"t", b"u", b"s", b"R", b"b", b"\x81", b"Q", b"q\x00", b"h\x01", b".")


def opcodes(rng: random.Random, pool: list[Original]) -> Case:
    """A pickle whose opcodes are left out, repeated, swapped, replaced or called upon to run code."""
    original = rng.choice(pool)
    pkl = bytearray(original.pickle)
    hostile = rng.random() < 0.4
    for _ in range(0 if hostile else rng.choice((1, 1, 2, 4))):
        at = rng.randrange(1, len(original.positions) - 1)
        begin, end = original.positions[at], original.positions[at + 1]
        part = bytes(pkl[begin:end])
        kind = rng.choice(("delete", "repeat", "replace", "insert", "argument", "swap"))
        if kind == "delete":
            del pkl[begin:end]
        elif kind in ("repeat", "insert"):
            pkl[end:end] = part if kind == "repeat" else rng.choice((*PIECES, *HARMLESS))
        elif kind == "replace":
            pkl[begin:end] = rng.choice(PIECES)
        elif kind == "argument" and len(part) > 1:
            pkl[rng.randrange(begin + 1, end)] = rng.randrange(256)
        else:
            pkl[begin:end] = bytes(pkl[end : end + 2]) + part
    if hostile:
        return _hostile(rng, original)
    return Case("opcodes", repacked(original.files["zip"], bytes(pkl)), ".pt", original.network)


def _hostile(rng: random.Random, original: Original) -> Case:
    text = rng.choice((f"touch {CANARY_FILE}", CANARY_MODULE, f"open({CANARY_FILE!r}, 'w')")).encode()
    argument = b"X" + len(text).to_bytes(4, "little") + text + b"\x85"
    call = rng.choice(HOSTILE) + argument + rng.choice((b"R", b"\x81", b"R}b"))
    pkl = original.pickle
    in_front = rng.random() < 0.5
    pkl = pkl[:2] + call + b"0" + pkl[2:] if in_front else pkl[:-1] + call + b"\x86."
    content = rng.choice((repacked(original.files["zip"], pkl), pkl))
    return Case("hostile pickle", content, ".pt", original.network, must_fail=True)


# Tensors


def _with_number(number: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone().reshape(-1)
        changed[len(changed) // 2] = number
        return changed.reshape(tensor.shape)

    return change


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "NaN": (_with_number(float("nan")), True),
    "infinite": (_with_number(float("-inf")), True),
    "huge": (lambda t: t.double() * 1e300, False),
    "zero": (torch.zeros_like, False),
    "int8": (lambda t: t.to(torch.int8), True),
    "boolean": (lambda t: t > 0, True),
    "complex": (lambda t: t.to(torch.complex64), True),
    "float64": (lambda t: t.double(), False),
    "bfloat16": (lambda t: t.bfloat16(), False),
    "flat": (lambda t: t.reshape(-1), False),
    "one more axis": (lambda t: t[None], True),
    "one channel fewer": (lambda t: t[:-1], True),
    "one channel more": (lambda t: torch.cat([t, t[:1]]), True),
    "none": (lambda t: t[:0], True),
    "a scalar": (lambda t: t.reshape(-1)[0], True),
    "turned": (lambda t: t.transpose(0, -1), False),
    "every other": (lambda t: torch.stack([t, t], -1)[..., 0], False),
    "expanded": (lambda t: t.reshape(-1)[:1].expand(10**12), True),
    "sparse": (lambda t: t.to_sparse(), True),
    "without values": (lambda t: t.to("meta"), True),
}

VALUES = ("NaN", "infinite", "int8", "boolean", "complex", "expanded", "sparse", "without values")
"""What is wrong with any tensor, also one that a family leaves out."""


def tensors(rng: random.Random, pool: list[Original]) -> Case:
    """Tensors that are renamed, left out, repeated, or of another shape, type or value."""
    original = rng.choice(pool)
    state = dict(original.state)
    weights = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel() > 1]
    name = rng.choice(weights)
    kind = rng.choice(("rename", "drop", "twice", "swap", "variance", *CHANGES))
    must_fail = False
    if kind in CHANGES:
        change, must_fail = CHANGES[kind]
        state[name] = change(state[name])
        must_fail = must_fail and (kind in VALUES or name in original.network.state)
    elif kind == "rename":
        state[rng.choice((name + "s", name[1:], "extra." + name, name.replace(".", "_"), "", "\n"))] = state.pop(name)
    elif kind == "drop":
        del state[name]
        must_fail = name in original.network.state
    elif kind == "twice":
        state[rng.choice(("module.", "_orig_mod.module.")) + name] = state[name] + 1
        must_fail = True
    elif kind == "swap":
        other = rng.choice(weights)
        state[name], state[other] = state[other], state[name]
    else:
        variances = [name for name in weights if name.endswith("running_var")]
        name = rng.choice(variances)
        state[name] = _with_number(-1e-3)(state[name])
        must_fail = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Case(f"tensor, {kind}", saved(state), ".pt", original.network, state, must_fail=must_fail)


# Containers


class Unknown:
    """An object whose class no reader knows."""


def _bomb(rng: random.Random) -> object:
    bomb: object = rng.choice(([], {}, ()))
    for _ in range(rng.randrange(50, 400)):
        bomb = rng.choice(([bomb], {"model": bomb}, (bomb,), {"ema": bomb, "state_dict": bomb}))
    return bomb


BESIDE: dict[str, Callable[[random.Random], object]] = {
    "epoch": lambda rng: rng.randrange(300),
    "args": lambda rng: argparse.Namespace(lr=rng.random(), data=pathlib.Path("data"), seed=np.int64(1)),
    "optimizer": lambda rng: {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    "best_acc1": lambda rng: torch.tensor([rng.random()]),
    "history": lambda rng: {"loss": np.arange(3.0), "scale": np.float32(1)},
    "nested": _bomb,
    "rng_state": lambda rng: torch.get_rng_state(),
}


def containers(rng: random.Random, pool: list[Original]) -> Case:
    """Weights in wrappers, known and unknown, beside an average, beside objects, with prefixes anywhere."""
    original = rng.choice(pool)
    raw = original.state
    averaged = {name: t * 1.5 if t.is_floating_point() else t for name, t in raw.items()}
    state: State | None = raw
    weights = None
    content: object
    layout = rng.choice(("plain", "deep", "both", "mmengine", "unknown", "prefixed", "hidden", "not a dict"))
    if layout == "plain":
        content = {rng.choice(("state_dict", "model", "params", "net", "model_state_dict", "network", "weights")): raw}
    elif layout == "deep":
        content = {"model": {rng.choice(("state_dict", "net", "params")): raw}}
    elif layout in ("both", "mmengine"):
        weights = rng.choice((None, "ema", "raw"))
        pairs = (
            ("model", "ema"),
            ("state_dict", "state_dict_ema"),
            ("net", "ema_net"),
            ("state_dict", "ema_state_dict"),
        )
        key, twin = pairs[-1] if layout == "mmengine" else rng.choice(pairs[:-1])
        content = {key: raw, twin: {f"module.{name}": t for name, t in averaged.items()}}
        swapped = layout == "mmengine"
        content |= {"message_hub": {}} if swapped else {}
        state = averaged if (weights == "raw") == swapped else raw
    elif layout == "prefixed":
        cut = {name: rng.choice([i for i, c in enumerate("." + name) if c == "."]) for name in raw}
        wrapper = rng.choice(("module.", "_orig_mod.", "module._orig_mod."))
        content = {"model": {name[: cut[name]] + wrapper + name[cut[name] :]: t for name, t in raw.items()}}
    else:
        state = None
        content = {
            "unknown": {"teacher": raw},
            "hidden": {"model": {"net": {"params": raw}}},
            "not a dict": rng.choice(([raw], (raw,), next(iter(raw.values())), None, 3, "model", _bomb(rng))),
        }[layout]
    if isinstance(content, dict):
        content |= {key: BESIDE[key](rng) for key in rng.sample(list(BESIDE), rng.randrange(4))}
    refused = layout in ("unknown", "hidden", "not a dict")
    if isinstance(content, dict) and rng.random() < 0.15:
        content["hook"], refused = rng.choice((Unknown(), Unknown, random.Random(0), print)), True
    zipped = rng.random() < 0.8
    kind = f"container, {layout}"
    return Case(kind, saved(content, zipped=zipped), ".pt", original.network, state, must_fail=refused, weights=weights)


def plain_pickles(rng: random.Random, pool: list[Original]) -> Case:
    """Pickles that torch.save did not write, of every protocol, whole and cut."""
    original = rng.choice(pool)
    content = {"model": dict(list(original.state.items())[:3]), "hook": rng.choice((None, Unknown(), _bomb(rng)))}
    data = pickle.dumps(content, protocol=rng.randrange(6))
    return Case(
        "plain pickle", data[: rng.choice((None, rng.randrange(len(data))))], ".pt", original.network, must_fail=True
    )


MUTATIONS: tuple[tuple[Callable[[random.Random, list[Original]], Case], int], ...] = (
    (flipped, 30),
    (spliced, 10),
    (opcodes, 20),
    (tensors, 20),
    (containers, 18),
    (plain_pickles, 2),
)
"""Each with its share in a hundred."""


def mutation(rng: random.Random, pool: list[Original]) -> Case:
    """One of all of them."""
    (make,) = rng.choices([make for make, _ in MUTATIONS], [share for _, share in MUTATIONS])
    return make(rng, pool)
