"""Thousands of damaged, foreign and hostile checkpoints: every one ends in checked weights or in one line.

    python benchmarks/fuzz_checkpoints.py [--mutations 10000] [--seed 0] [--whole 4]

Each mutation (``benchmarks.mutations``) is written to a file and read, checked against its checksums and made into an
architecture; a share of them goes through the whole export to ONNX. ``benchmarks.harness`` says what is wrong with how
that ends.

Prints how many ended how, and every defect with the seed and number that makes it again; exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch

from benchmarks.harness import Canary, Harness, Outcome
from benchmarks.mutations import mutation
from benchmarks.originals import Original, originals

MEMORY_GROWTH = 1 << 30
"""Bytes that the process may grow by during the run."""
RAW = 99
"""Stands for the exit code of what was not reported."""


def run(
    numbers: Sequence[int], seed: int, whole: float, harness: Harness, pool: list[Original], show: Callable[[str], None]
) -> list[Outcome]:
    """Tries the mutations of these numbers, of which a share of ``whole`` in a hundred is exported as well."""
    outcomes = []
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        torch.manual_seed(number)
        case = mutation(rng, pool)
        outcomes.append(harness.attempt(case, whole=rng.random() < whole / 100))
        for defect in outcomes[-1].defects:
            show(f"DEFECT seed {seed} number {number} ({case.kind}): {defect}")
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes by exit code and kind of error, and by kind of mutation."""
    lines = ["exit code  how it ended            files  of them exported"]
    by_end = collections.Counter((RAW if o.code is None else o.code, o.what) for o in outcomes)
    whole = collections.Counter((RAW if o.code is None else o.code, o.what) for o in outcomes if o.whole)
    lines += [f"{code:9}  {what:22}  {by_end[code, what]:5}  {whole[code, what]:16}" for code, what in sorted(by_end)]
    lines += ["", "mutation                        files  accepted  refused"]
    for kind in sorted({o.kind for o in outcomes}):
        accepted = sum(o.code == 0 for o in outcomes if o.kind == kind)
        total = sum(o.kind == kind for o in outcomes)
        lines.append(f"{kind:30}  {total:5}  {accepted:8}  {total - accepted:7}")
    return "\n".join(lines)


def _show(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    """Runs the command; 1 if there is a defect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", type=float, default=4, metavar="PERCENT", help="how many are exported as well")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one mutation, to see it again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        harness = Harness(pathlib.Path(directory), Canary())
        numbers = range(arguments.mutations) if arguments.only is None else [arguments.only]
        outcomes = run(numbers, arguments.seed, arguments.whole, harness, originals(), _show)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(table(outcomes))
    defects = sum(bool(outcome.defects) for outcome in outcomes) + (grown > MEMORY_GROWTH)
    print(
        f"\n{len(outcomes)} mutations, seed {arguments.seed}, {time.monotonic() - began:.0f} s, "
        f"memory grew by {grown / 1e6:.0f} MB, {defects} with defects"
    )
    return int(defects > 0)


if __name__ == "__main__":
    sys.exit(main())
