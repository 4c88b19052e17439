"""``python -m engines verify DIR|FILE``: is it what was exported, and does it still compute the network?"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engines.errors import InputRejected, SdkMissing, UsageError, VerificationFailed
from engines.interrupts import Uninterrupted

if TYPE_CHECKING:
    from engines.verification import Finding

NAME = "verify"
HELP = "check an export, or one file of it, against its hashes, its typed graph and its golden vectors"
SCHEMA = 1
MARKS = {True: "ok  ", False: "FAIL", None: "skip"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("target", type=pathlib.Path, metavar="DIR|FILE", help="an export's directory, or a file of it")
    parser.add_argument("--static", action="store_true", help="leave engines unrun: what needs no GPU is enough")
    parser.add_argument("--require", choices=["trt"], help="trt: fail unless an engine is there, and was run")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="the GPU to run engines on (default: 0)")
    parser.add_argument("--provider", help="ONNX Runtime's, for ONNX files: cpu (the default), cuda, tensorrt")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, and nothing else, on stdout")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run(arguments: argparse.Namespace, _interrupts: Uninterrupted) -> int:
    """Prints a line per finding and the verdict.

    Raises:
        VerificationFailed: a check did not hold.
        SdkMissing: no check failed, but engines were left unrun, or nothing was run at all, without ``--static``.
        InputRejected, UsageError: there is nothing to verify, or arguments that contradict each other.
    """
    from engines.backends.onnx_runtime import check_provider
    from engines.verification import Verification

    target: pathlib.Path = arguments.target
    if arguments.static and arguments.require:
        raise UsageError("--static leaves engines unrun, and --require trt wants one run; give one of them")
    if arguments.device < 0:
        raise UsageError(f"--device {arguments.device}: GPUs are counted from 0")
    check_provider(arguments.provider)
    verification = Verification(arguments.static, arguments.device, arguments.provider)
    if not target.exists():
        raise InputRejected(f"{target}: no such file or directory; check the path")
    found = []
    for finding in (
        verification.findings_of_folder(target) if target.is_dir() else verification.findings_of_file(target)
    ):
        found.append(finding)
        if not (arguments.json or arguments.quiet):
            print(f"{MARKS[finding.passed]} {finding.stage}: {finding.detail}")
    verdict = _verdict(found)
    if arguments.json:
        json.dump(_json(target, found, verdict), sys.stdout, indent=2)
        print()
    elif not arguments.quiet:
        print(verdict)
    failures = [f"{finding.stage}: {finding.detail}" for finding in found if finding.passed is False]
    if arguments.require and not any(finding.engine for finding in found):
        failures.append("--require trt: there is no engine; export with --trt")
    if failures:
        raise VerificationFailed(f"{target}: {'; '.join(failures)}")
    if not arguments.static:
        _require_runs(target, found)
    return 0


def _require_runs(target: pathlib.Path, found: Sequence[Finding]) -> None:
    """Every engine was run, and something was."""
    from engines.verification import RUN

    runs = [finding for finding in found if finding.check == RUN]
    unrun = [finding for finding in runs if finding.passed is None and finding.engine]
    if not any(finding.passed for finding in runs):
        unrun = unrun or runs
    if unrun:
        reasons = "; ".join(f"{finding.file} was not run: {finding.detail}" for finding in unrun)
        raise SdkMissing(f"{target}: nothing failed, but {reasons}; --static is content with what needs no GPU")


def _verdict(found: Sequence[Finding]) -> str:
    made = [finding for finding in found if finding.passed is not None]
    held = sum(finding.passed is True for finding in made)
    left = f", {len(found) - len(made)} not run" if len(found) > len(made) else ""
    return f"{'PASS' if held == len(made) else 'FAIL'}: {held} of {len(made)} checks hold{left}"


def _json(target: pathlib.Path, found: Sequence[Finding], verdict: str) -> dict[str, object]:
    checks = [
        {
            "file": finding.file,
            "check": finding.check,
            "passed": finding.passed,
            "detail": finding.detail,
            "value": finding.value if finding.value is None or finding.value < float("inf") else None,
            "gate": finding.gate,
        }
        for finding in found
    ]
    passed = all(finding.passed is not False for finding in found)
    return {"schema": SCHEMA, "target": str(target), "passed": passed, "verdict": verdict, "checks": checks}
