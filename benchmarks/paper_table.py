"""The RepVGG paper's table of speeds, measured here: what re-parameterization gains, and where that leaves ResNet.

    python -m benchmarks.paper_table [--networks A0,B0,ResNet-18] [--batch N] [--size 224] [--duration 3]
                                     [--provider cpu|cuda|tensorrt] [--out DIR]

Networks have random weights, one is in memory at a time, and its files are removed before the next. Of each RepVGG:

    training, PyTorch   the module with three branches and a batch norm each, eval mode, operation by operation
    deployed, PyTorch   the same with one convolution a block: the speed-up is the paper's own comparison
    training, file      the same branches as a graph of Conv, BatchNormalization and Add. ONNX Runtime folds batch norms
                        into convolutions when it opens the file; what is left to gain is the branches
    deployed, file      what the exporter writes in float32
    fp16, int8          the exporter's files of those precisions, by whatever computes them here

The modules take turns, and so do the files (``engines.bench``), so that a speed-up is of one moment; it is told only
where both forms gave the golden answers of the float64 network and its interval does not hold 1. ResNets are there
where timm is installed. On a CPU there is no fp16, since ONNX Runtime computes it in float32; with --provider, ONNX
files run on the GPU; where a GPU answers, engines are built for it and run, too.

--out writes table.md, table.json with the records, and accuracy_speed.svg (published accuracy against the speed of the
deployed float32 file here), and does so after every network.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch

from benchmarks.paper_table_measure import STEP, Wanted, found_of_repvgg, found_of_resnet
from benchmarks.paper_table_networks import RESNETS, timm_problem, variant_from_title
from benchmarks.paper_table_text import FP16, Found, Table, json_from_table, markdown_from_table, svg_from_table
from engines.backends.onnx_runtime import check_provider
from engines.bench.plot import drawing
from engines.errors import ReportedError, UsageError
from engines.files import reported_write_errors
from engines.replacement import write_together
from engines.sdk import gpu_compute_capability

NETWORKS = (
    *(f"RepVGG-{name}" for name in ("A0", "A1", "A2", "B0", "B1", "B1g2", "B1g4", "B2", "B2g4")),
    *RESNETS,
)
PAPERS_BATCH = 128
NO_FP16 = (
    "There are no fp16 rows: on a CPU, ONNX Runtime computes a float16 graph in float32, with conversions on the way, "
    "which says nothing of float16."
)
NO_TIMM = "There are no ResNets: {problem}."
Notify = Callable[[str], None]


def table_from_networks(
    networks: Sequence[str], wanted: Wanted, told: Notify, keep: Callable[[Table], None] = lambda table: None
) -> tuple[Table, list[ReportedError]]:
    """Measures one network after the other; what goes wrong with one is told, and is no reason to lose the others.

    Args:
        networks: their titles.
        wanted: how.
        told: given a line for each.
        keep: given the table so far, whenever it has grown.

    Raises:
        ReportedError: nothing could be measured, or kept.
    """
    found: list[Found] = []
    errors: list[ReportedError] = []
    for number, title in enumerate(networks, 1):
        try:
            with tempfile.TemporaryDirectory(prefix="paper-table-") as directory:
                found.append(_found(title, wanted, pathlib.Path(directory)))
        except ReportedError as error:
            errors.append(error)
            told(f"{number} of {len(networks)}: {title} left out: {error}")
            continue
        told(f"{number} of {len(networks)}: {title} measured")
        keep(_table(found, errors, networks, wanted))
    if not found:
        raise errors[0]
    return _table(found, errors, networks, wanted), errors


def networks_from_text(text: str | None) -> tuple[str, ...]:
    """The networks named, with commas; all of them for None, ResNets if timm is here.

    Raises:
        UsageError: one is unknown, or named twice, or needs timm, which is not here.
    """
    if text is None:
        return tuple(name for name in NETWORKS if name not in RESNETS or timm_problem() is None)
    titles = [part.strip() for part in text.split(",")]
    named = tuple(title if title in RESNETS else variant_from_title(title).title for title in titles)
    if len(set(named)) < len(named):
        raise UsageError("--networks: one is named twice; name each once")
    if set(named) & set(RESNETS) and (problem := timm_problem()) is not None:
        raise UsageError(f"--networks: {problem}; leave ResNets out")
    return named


def _found(title: str, wanted: Wanted, directory: pathlib.Path) -> Found:
    if title in RESNETS:
        return found_of_resnet(title, wanted, directory)
    return found_of_repvgg(variant_from_title(title), wanted, directory)


def _table(found: Sequence[Found], errors: Sequence[ReportedError], networks: Sequence[str], wanted: Wanted) -> Table:
    left_out = [f"Left out: {error}" for error in errors]
    return Table(tuple(found), tuple(_settings(wanted)), tuple(_notes(found, networks, wanted) + left_out))


def _write(table: Table, folder: pathlib.Path) -> None:
    contents = {
        "table.md": markdown_from_table(table, with_plot=True).encode(),
        "table.json": json_from_table(table).encode(),
        "accuracy_speed.svg": svg_from_table(table),
    }
    write_together(folder, contents)


def _settings(wanted: Wanted) -> list[tuple[str, str]]:
    """What PyTorch adds to the settings in the record of the files."""
    return [
        ("images", f"blocks of colour and noise, {wanted.size}x{wanted.size}, batch {wanted.batch}"),
        ("PyTorch", f"{torch.__version__} on {wanted.device}, {torch.get_num_threads()} threads, eager"),
        ("Python", platform.python_version()),
    ]


def _notes(found: Sequence[Found], networks: Sequence[str], wanted: Wanted) -> list[str]:
    has_fp16 = any(row.form == FP16 for one in found for row in one.rows)
    notes = [NO_FP16] if not has_fp16 and wanted.provider in (None, "cpu") else []
    if not set(networks) & set(RESNETS):
        problem = timm_problem()
        notes += [NO_TIMM.format(problem=problem)] if problem is not None else []
    return notes + [warning for one in found for warning in one.warnings]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--networks", metavar="A0,ResNet-18", help=f"default: {', '.join(NETWORKS)}")
    arguments.add_argument("--batch", type=_count, metavar="N", help="images at once (default: 1 on a CPU, else 128)")
    arguments.add_argument("--size", type=_count, default=224, metavar="N", help="height and width (default: 224)")
    arguments.add_argument("--duration", type=float, default=3.0, metavar="S", help="seconds for each row (default: 3)")
    arguments.add_argument("--provider", help="ONNX Runtime's: cpu (the default), cuda, tensorrt")
    arguments.add_argument("--out", type=pathlib.Path, metavar="DIR", help="write the table, its JSON and the plot")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code of the first error otherwise."""
    arguments = parser().parse_args(argv)
    on_cpu = arguments.provider in (None, "cpu") and gpu_compute_capability() is None
    batch = arguments.batch or (1 if on_cpu else PAPERS_BATCH)
    wanted = Wanted(batch, arguments.size, arguments.duration, arguments.provider)
    try:
        networks = networks_from_text(arguments.networks)
        check_provider(arguments.provider)
        if wanted.size % STEP:
            raise UsageError(f"--size {wanted.size}: give a multiple of {STEP}, by which the networks divide it")
        if arguments.out is not None:
            with drawing(), reported_write_errors(arguments.out):
                arguments.out.mkdir(parents=True, exist_ok=True)
        keep = (lambda table: None) if arguments.out is None else functools.partial(_write, folder=arguments.out)
        table, errors = table_from_networks(
            networks, wanted, lambda line: print(line, file=sys.stderr, flush=True), keep
        )
        print(markdown_from_table(table, with_plot=arguments.out is not None), end="")
        if arguments.out is not None:
            _write(table, arguments.out)  # once more, with what was left out at the end
    except ReportedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return errors[0].exit_code if errors else 0


if __name__ == "__main__":
    sys.exit(main())
