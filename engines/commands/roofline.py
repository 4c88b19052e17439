"""``python -m engines roofline FILE...``: how fast could it be at best, on cards that are not here?"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from engines.arguments import integers_from_text
from engines.errors import printable
from engines.interrupts import Uninterrupted
from engines.sizes import size_from_text

if TYPE_CHECKING:
    from engines.roofline.cards import Card
    from engines.roofline.fused_kernels import Work

NAME = "roofline"
HELP = "predict the least time on cards that are not here, from the graph and the makers' peaks; nothing is measured"
SCHEMA = 1
BATCHES = "1,8,32"
SAID = (
    "predicted, not measured: the least time by arithmetic and memory traffic at the makers' peaks. Launches are left "
    "out, so a run takes longer; so are caches, and one that stays in the L2 cache may take less"
)
MILLI, GIGA, MEGA, KILO = 1e3, 1e9, 1e6, 1e3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "files", type=pathlib.Path, nargs="+", metavar="FILE", help="ONNX files, or engines with theirs beside them"
    )
    parser.add_argument("--gpu", metavar="CARD[,CARD]", help="as in l4,a100 (default: every card that is known)")
    parser.add_argument("--batch", default=BATCHES, metavar="N[,N]", help=f"images at once (default: {BATCHES})")
    parser.add_argument("--size", metavar="N|HxW", help="of the images, for files that take any")
    parser.add_argument("--layers", action="store_true", help="list every kernel, too")
    parser.add_argument(
        "--json", action="store_true", help="print the predictions as JSON, and nothing else, on stdout"
    )


def run(arguments: argparse.Namespace, _interrupts: Uninterrupted) -> int:
    """Prints a line for each file, card and batch.

    Raises:
        UsageError: a card, batch or size that there is not.
        InputRejected: a file cannot be read, or its work cannot be counted.
    """
    from engines.bench.options import Options, check_options
    from engines.roofline import works_of_file

    batches = tuple(dict.fromkeys(integers_from_text("--batch", arguments.batch, ",")))
    cards = _cards(arguments.gpu)
    size = None if arguments.size is None else size_from_text(arguments.size)
    check_options(Options(batches=batches, size=size))
    counted = [(path, works_of_file(path, size)) for path in arguments.files]
    files = [_file(path, works, cards, batches, layers=arguments.layers) for path, works in counted]
    if arguments.json:
        json.dump({"schema": SCHEMA, "measured": False, "note": SAID, "files": files}, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(printable(line) for line in _lines(files, cards)))
    return 0


def _cards(text: str | None) -> tuple[Card, ...]:
    from engines.roofline.cards import CARDS, card_from_key

    return CARDS if text is None else tuple({card.key: card for card in map(card_from_key, text.split(","))}.values())


def _file(
    path: pathlib.Path, works: Sequence[Work], cards: Sequence[Card], batches: Sequence[int], *, layers: bool
) -> dict[str, Any]:
    """Everything about a file, as it stands in the JSON."""
    from engines.roofline import operations_per_image

    return {
        "file": str(path),
        "kernels": len(works),
        "operations_per_image": operations_per_image(works),
        "activation_bytes_per_image": sum(work.read_bytes + work.written_bytes for work in works),
        "weight_bytes": sum(work.weight_bytes for work in works),
        "precisions": sorted({work.dtype for work in works if work.operations}),
        "predictions": [_prediction(works, card, batch, layers=layers) for card in cards for batch in batches],
    }


def _prediction(works: Sequence[Work], card: Card, batch: int, *, layers: bool) -> dict[str, Any]:
    from engines.roofline import PeakUnknown, bound_of

    found: dict[str, Any] = {"card": card.key, "title": card.title, "batch": batch}
    try:
        bound = bound_of(works, card, batch)
    except PeakUnknown as unknown:
        return found | {"unknown": str(unknown)}
    found |= {
        "unknown": None,
        "milliseconds_at_least": bound.seconds * MILLI,
        "images_per_second_at_most": batch / bound.seconds,
        "arithmetic_share": bound.arithmetic_seconds / bound.seconds,
        "memory_share": bound.memory_seconds / bound.seconds,
        "binds": bound.binds,
        "kernels_bound_by": {"arithmetic": bound.arithmetic_kernels, "memory": bound.memory_kernels},
    }
    return found | ({"layers": [_layer(work, card, batch) for work in works]} if layers else {})


def _layer(work: Work, card: Card, batch: int) -> dict[str, Any]:
    from engines.roofline import binding_limit, seconds_of_kernel

    arithmetic, memory = seconds_of_kernel(work, card, batch)
    return {
        "name": work.name,
        "precision": work.dtype,
        "operations": batch * work.operations,
        "activation_bytes": batch * (work.read_bytes + work.written_bytes),
        "weight_bytes": work.weight_bytes,
        "arithmetic_milliseconds": arithmetic * MILLI,
        "memory_milliseconds": memory * MILLI,
        "binds": binding_limit(arithmetic, memory),
    }


def _lines(files: Sequence[dict[str, Any]], cards: Sequence[Card]) -> Iterator[str]:
    yield SAID
    for file in files:
        yield (
            f"{file['file']}: {file['kernels']} kernels, {file['operations_per_image'] / GIGA:.3g} G operations in "
            f"{', '.join(file['precisions']) or 'no precision'} and "
            f"{file['activation_bytes_per_image'] / MEGA:.3g} MB of activations an image, "
            f"{file['weight_bytes'] / MEGA:.3g} MB of weights"
        )
        header = ("card", "batch", "at least ms", "at most images/s", "arithmetic", "memory", "bound by")
        yield from _table([header, *(_row(prediction, file["kernels"]) for prediction in file["predictions"])], words=1)
        for prediction in file["predictions"]:
            if "layers" in prediction:
                yield f"{file['file']} on {prediction['title']}, batch {prediction['batch']}:"
                yield from _table(list(_layer_rows(prediction["layers"])), words=2)
    for card in cards:
        noted = f"; {card.notes}" if card.notes else ""
        yield f"{card.title}: {'; '.join(card.sources)}{noted}"


def _row(prediction: dict[str, Any], kernels: int) -> tuple[str, ...]:
    named = (prediction["title"], str(prediction["batch"]))
    if prediction["unknown"] is not None:
        return (*named, "-", "-", "-", "-", prediction["unknown"])
    binds = prediction["binds"]
    return (
        *named,
        _figure(prediction["milliseconds_at_least"]),
        f"{prediction['images_per_second_at_most']:.0f}",
        f"{prediction['arithmetic_share']:.0%}",
        f"{prediction['memory_share']:.0%}",
        f"{binds} in {prediction['kernels_bound_by'][binds]} of {kernels} kernels",
    )


def _layer_rows(layers: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    yield (
        "kernel",
        "precision",
        "M operations",
        "kB activations",
        "kB weights",
        "arithmetic ms",
        "memory ms",
        "bound by",
    )
    for layer in layers:
        yield (
            layer["name"],
            layer["precision"],
            _figure(layer["operations"] / MEGA),
            _figure(layer["activation_bytes"] / KILO),
            _figure(layer["weight_bytes"] / KILO),
            _figure(layer["arithmetic_milliseconds"]),
            _figure(layer["memory_milliseconds"]),
            layer["binds"],
        )


def _figure(value: float) -> str:
    """Three digits, or all that stand before the point; a kernel of a small network takes nanoseconds."""
    return "0" if value == 0 else f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _table(rows: Sequence[tuple[str, ...]], words: int) -> Iterator[str]:
    """Columns of words, the first ``words`` and the last, stand to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    for row in rows:
        cells = [
            cell.ljust(width) if index < words or index == last else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'  '.join(cells)}".rstrip()
