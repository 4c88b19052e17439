"""``python -m exporter.verify A B``: do two of checkpoint, ONNX file and engine compute the same network?"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engines.console import Parser, exit_code_of
from exporter.cli import MEMORY_HINT, add_assumptions, add_output, assumptions_from
from exporter.errors import UsageError, VerificationFailed
from exporter.request import Request, features_from_text, floats_from_text, sizes_from_text

if TYPE_CHECKING:
    from engines.interrupts import Interrupts
    from engines.parity import Gate
    from exporter.verdict import Verdict

DESCRIPTION = """\
Says whether two files compute the same network: any two of checkpoint, ONNX file and engine.

  python -m exporter.verify model.pt model/model.onnx
  python -m exporter.verify model/model.onnx model/model.fp16.onnx --inputs images.npz

The more exact one is the reference. What a checkpoint does not tell (strides, epsilon, size, normalisation) is read
from the other file; flags override it. An engine needs its GPU.
"""

EPILOG = """\
exit codes: 0 the same; 1 not the same, or not a RepVGG; 2 usage; 3 a file cannot be used; 4 an SDK or GPU is missing
"""


def verdict_of(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    inputs: str | os.PathLike[str] | None = None,
    gate: Gate | None = None,
    told: Request | None = None,
    size: tuple[int, int] | None = None,
) -> Verdict:
    """Compares two of checkpoint, ONNX file and engine; what the command line calls.

    Args:
        a: a file.
        b: another.
        inputs: an ``.npz`` with ``images`` to compare on; None for seeded noise.
        gate: how near is near enough; None for the gate of the coarser precision.
        told: assumptions about a checkpoint that override those of the other file; its paths do not matter.
        size: (height, width) of the images, where no file fixes it; None for the one that a file was made for.

    Returns:
        The verdict; look at ``passed``.

    Raises:
        ReportedError: a file cannot be used, holds what no RepVGG does, or cannot be run here.
    """
    from exporter.processes import require_packages

    require_packages()
    from exporter.verdict import verdict_from_files

    first, second = pathlib.Path(a), pathlib.Path(b)
    given = told or Request(path=first, out=pathlib.Path())
    return verdict_from_files(first, second, given, None if inputs is None else pathlib.Path(inputs), gate, size)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m exporter.verify",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("a", type=pathlib.Path, metavar="A", help="a checkpoint, an ONNX file or an engine")
    parser.add_argument("b", type=pathlib.Path, metavar="B", help="another")
    parser.add_argument("--inputs", type=pathlib.Path, metavar="NPZ", help="images to compare on, instead of noise")
    parser.add_argument(
        "--size", metavar="N|HxW", help="image size, where no file fixes it (default: the one it was made for, or 224)"
    )
    parser.add_argument("--features", metavar="S[,S]", help="stages whose results a checkpoint's outputs are")
    parser.add_argument("--gate", metavar="E", help="largest relative error (default: 5e-6 for fp32, 5e-3 for fp16)")
    add_assumptions(parser)
    add_output(parser)
    return parser


def _run(arguments: argparse.Namespace, _interrupts: Interrupts) -> int:
    gate = None
    if arguments.gate is not None:
        from engines.parity import Gate

        numbers = floats_from_text("--gate", arguments.gate)
        if len(numbers) != 1 or numbers[0] < 0:
            raise UsageError(f"--gate: {arguments.gate!r} is not one number from 0 on, as in 1e-3")
        gate = Gate(numbers[0], top1=True)
    features = () if arguments.features is None else features_from_text(arguments.features)
    size, size_range = (None, None) if arguments.size is None else sizes_from_text(arguments.size)
    if size_range is not None:
        raise UsageError(f"--size {arguments.size}: two files are compared at one size; give one")
    told = Request(path=arguments.a, out=pathlib.Path(), features=features, **assumptions_from(arguments))
    verdict = verdict_of(arguments.a, arguments.b, inputs=arguments.inputs, gate=gate, told=told, size=size)
    if arguments.json:
        from exporter.report import plain_json

        print(json.dumps(plain_json({"passed": verdict.passed, **vars(verdict)}), indent=2))
    elif not arguments.quiet:
        _tell(verdict)
    if not verdict.passed:
        raise VerificationFailed(verdict.failure_line)
    return 0


def _tell(verdict: Verdict) -> None:
    from exporter.report import lines_from_ledger

    print(f"reference: {verdict.reference}; inputs: {verdict.inputs}")
    for name, value in verdict.assumptions.items():
        print(f"assumed: {name} {value}")
    for check in verdict.checks:
        print(f"{'ok  ' if check.passed else 'FAIL'} {check.stage}: {check.detail}")
    for line in lines_from_ledger(verdict.rows):
        print(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; every expected error is one line on stderr."""
    return exit_code_of(_parser, _run, argv, memory_hint=MEMORY_HINT)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
