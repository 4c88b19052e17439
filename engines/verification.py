"""Is what lies here what was exported, and does it still compute the network? Answered without torch.

    listed      every file that ``report.json`` lists is there with its size and SHA-256
    golden      the golden vectors can be read, and differ enough that a wrong answer can be seen in them
    integrity   an engine, its sidecar and its header agree
    audit       an engine's file against its typed ONNX file: kernels, dtypes, fusion, every weight bit for bit
    run         the file computes the golden vectors within the gate, in a batch of one and a batch of the rest, and
                each answer is nearest to that of its own image

A finding is a pass, a failure, or, where this machine cannot tell, neither. No failure ends the others' checks.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from engines.audit import audit_of_file, expected_from_onnx
from engines.errors import InputRejected, ReportedError, SdkMissing, listed
from engines.golden import GOLDEN_NAME, Golden
from engines.integrity import cards_text, check_sdk_installed, checked_engine
from engines.judgement import gate_of_engine, gate_with_tolerance, judgement, telling_golden
from engines.kind import ENGINE_SUFFIX, ONNX, graph_of_engine, graphs_beside, kind_of_file
from engines.manifest import Manifest, manifest_from_file, sidecar_path
from engines.onnx_file import onnx_file_from_path
from engines.parity import GATES, Gate
from engines.plan import Header
from engines.report_file import REPORT_NAME, ReportFile, report_from_file
from engines.runner import Runner, load
from engines.sdk import gpu_compute_capability

LISTED, GOLDEN, INTEGRITY, AUDIT, RUN = "listed", "golden", "integrity", "audit", "run"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check of one file; ``detail`` says what was found.

    ``passed`` is None where it could not be made here. ``engine`` tells an engine's own checks from the others.
    """

    file: str
    check: str
    passed: bool | None
    detail: str
    value: float | None = None
    gate: float | None = None
    engine: bool = False

    @property
    def stage(self) -> str:
        """As in ``model.fp16.engine, integrity``."""
        return f"{self.file}, {self.check}"


@dataclasses.dataclass(frozen=True)
class Verification:
    """How to verify: ``static`` leaves engines unrun, ``device`` is their GPU, ``provider`` is ONNX Runtime's."""

    static: bool = False
    device: int = 0
    provider: str | None = None

    def findings_of_folder(self, folder: pathlib.Path) -> Iterator[Finding]:
        """Everything that an export wrote to ``folder``, and every other engine and ONNX file of ours in it.

        Raises:
            InputRejected: no export was written there.
            SdkMissing: the provider asked for is not here.
        """
        if not (folder / REPORT_NAME).is_file():
            raise InputRejected(f"{folder}: has no {REPORT_NAME}, so no export wrote it; give its directory, or a file")
        report = None
        try:
            report = report_from_file(folder / REPORT_NAME)
            yield from _listed_findings(report, folder)
        except InputRejected as error:
            yield Finding(REPORT_NAME, LISTED, passed=False, detail=str(error))
        yield _golden_finding(folder / GOLDEN_NAME)
        for path in sorted(folder.glob(f"*{ENGINE_SUFFIX}")):
            yield from self._engine_findings(path)
        for path in sorted(folder.glob("*.onnx")):
            yield self._onnx_finding(path, report, foreign_allowed=report is not None and path.name not in report.names)

    def findings_of_file(self, path: pathlib.Path) -> Iterator[Finding]:
        """One engine or ONNX file, with the golden vectors, and the report if there is one, beside it.

        Raises:
            InputRejected: there is no such file, or it is neither.
            SdkMissing: the provider asked for is not here.
        """
        kind = kind_of_file(path)
        report = None
        if (path.parent / REPORT_NAME).is_file():
            try:
                report = report_from_file(path.parent / REPORT_NAME)
                graphs = {graph.name for graph in graphs_beside(path)}
                names = {path.name, sidecar_path(path).name, *graphs, GOLDEN_NAME}
                yield from _listed_findings(report, path.parent, names)
            except InputRejected as error:
                yield Finding(REPORT_NAME, LISTED, passed=False, detail=str(error))
        yield _golden_finding(path.parent / GOLDEN_NAME)
        if kind == ONNX:
            yield self._onnx_finding(path, report, foreign_allowed=False)
        else:
            yield from self._engine_findings(path)

    def _engine_findings(self, path: pathlib.Path) -> Iterator[Finding]:
        finding = functools.partial(Finding, path.name, engine=True)
        try:
            header, manifest = checked_engine(path)
            if manifest is None:
                raise InputRejected(f"{path}: has no sidecar")
        except InputRejected as error:
            yield finding(INTEGRITY, passed=False, detail=_without(path, error))
            return
        detail = f"SHA-256, {header.sdk} {manifest.sdk['version']}, {cards_text(manifest.compute_capabilities)}"
        yield finding(INTEGRITY, passed=True, detail=detail)
        yield _audit_finding(path, manifest)
        yield self._engine_run(path, header, manifest)

    def _engine_run(self, path: pathlib.Path, header: Header, manifest: Manifest) -> Finding:
        finding = functools.partial(Finding, path.name, RUN, engine=True)
        if self.static:
            return finding(passed=None, detail="left out by --static")
        gate = gate_of_engine(manifest.precision, manifest.tolerance)
        try:
            check_sdk_installed(path, header, manifest)
            if gpu_compute_capability(self.device) is None:
                which = f" of index {self.device}" if self.device else ""
                return finding(passed=None, detail=f"no GPU{which} answers here")
            with load(path, device=self.device) as runner:
                return _compared(finding, runner, path.parent / manifest.golden, gate)
        except SdkMissing as error:
            return finding(passed=None, detail=_without(path, error))
        except ReportedError as error:
            return finding(passed=False, detail=_without(path, error))

    def _onnx_finding(self, path: pathlib.Path, report: ReportFile | None, *, foreign_allowed: bool) -> Finding:
        finding = functools.partial(Finding, path.name, RUN)
        try:
            with load(path, provider=self.provider) as runner:
                precision = runner.metadata.get("precision", "")
                gate = gate_of_precision(precision, report)
                if not precision and foreign_allowed:
                    return finding(passed=None, detail="not of an export: its metadata name no precision")
                if gate is None:
                    return finding(passed=False, detail=f"there is no gate for its precision, {precision or 'unnamed'}")
                return _compared(finding, runner, path.parent / GOLDEN_NAME, gate)
        except SdkMissing as error:
            if self.provider is not None:
                raise
            return finding(passed=None, detail=_without(path, error))
        except ReportedError as error:
            return finding(passed=False, detail=_without(path, error))


def _listed_findings(
    report: ReportFile, folder: pathlib.Path, names: Collection[str] | None = None
) -> Iterator[Finding]:
    """All files of the report, or those of these names."""
    if not report.passed:
        yield Finding(REPORT_NAME, LISTED, passed=False, detail=f"the export itself failed: {report.verdict}")
    files = [file for file in report.files if names is None or file.name in names]
    problems = {file.name: problem for file in files if (problem := file.problem(folder)) is not None}
    rebuilt = [
        name for name in problems if name.endswith(ENGINE_SUFFIX) and _built_again(folder, name, problems, report)
    ]
    for name in rebuilt:
        del problems[name], problems[sidecar_path(folder / name).name]
    if problems:
        yield Finding(REPORT_NAME, LISTED, passed=False, detail=listed(list(problems.values()), 3))
    elif files:
        again = f"; built again since, from the listed graph: {listed(rebuilt)}" if rebuilt else ""
        detail = f"{listed([file.name for file in files])}: size and SHA-256 as listed{again}"
        yield Finding(REPORT_NAME, LISTED, passed=True, detail=detail)


def _built_again(folder: pathlib.Path, name: str, problems: Collection[str], report: ReportFile) -> bool:
    """Whether an engine that is not the listed one was built on this machine from the listed graph.

    So a refusal's advice, to build the engine again, makes no failure. Its new sidecar must allow no more than the
    export did; that it agrees with the engine, and the engine with the graph, is what the other checks say.
    """
    sidecar = sidecar_path(folder / name)
    graphs = {graph.name for graph in graphs_beside(folder / name)}.difference(problems)
    if sidecar.name not in problems:
        return False
    try:
        manifest = manifest_from_file(sidecar)
    except InputRejected:
        return False
    gate = gate_of_precision(manifest.precision, report)
    from_listed = any(file.name in graphs and file.sha256 == manifest.sha256["onnx"] for file in report.files)
    return from_listed and gate is not None and manifest.tolerance <= gate.max_relative_error


def _golden_finding(path: pathlib.Path) -> Finding:
    try:
        golden = telling_golden(path)
    except InputRejected as error:
        return Finding(path.name, GOLDEN, passed=False, detail=_without(path, error))
    detail = f"{len(golden.images)} images, answers {golden.contrast:.1e} or more apart"
    return Finding(path.name, GOLDEN, passed=True, detail=detail)


def _audit_finding(path: pathlib.Path, manifest: Manifest) -> Finding:
    finding = functools.partial(Finding, path.name, AUDIT, engine=True)
    there = [graph.name for graph in graphs_beside(path) if graph.is_file()]
    if not there:
        return finding(passed=None, detail=f"its typed graph {graphs_beside(path)[0].name} is not beside it")
    try:
        onnx = graph_of_engine(path, manifest.sha256["onnx"])
        if onnx is None:
            which = "is not the graph" if len(there) == 1 else "are not the graph"
            return finding(passed=False, detail=f"{listed(there)} beside it {which} that it was compiled from")
        audit = audit_of_file(path, *expected_from_onnx(onnx_file_from_path(onnx)))
    except InputRejected as error:
        return finding(passed=False, detail=_without(path, error))
    if not audit.audited:
        return finding(passed=None, detail=audit.line)
    return finding(passed=not audit.problems, detail=listed(list(audit.problems), 3) if audit.problems else audit.line)


def gate_of_precision(precision: str, report: ReportFile | None) -> Gate | None:
    """The report's gate, if it has one for this precision, else the usual one."""
    if report is not None and precision in report.gates:
        return gate_with_tolerance(precision, report.gates[precision])
    return GATES.get(precision)


def _compared(finding: functools.partial[Finding], runner: Runner, golden_path: pathlib.Path, gate: Gate) -> Finding:
    """Runs the golden images and holds the answers against the gate.

    An engine's are run twice: the second time each batch is launched as the CUDA graph that the first left behind.
    """
    try:
        golden = telling_golden(golden_path)
        times = 1 if runner.manifest is None else 2
        found = [judgement(golden, answers_to_golden(runner, golden), gate) for _ in range(times)]
    except (InputRejected, ValueError) as error:
        return finding(passed=False, detail=_without(golden_path, error))
    judged = next((judged for judged in found if judged.failure is not None), found[0])
    return finding(
        passed=judged.failure is None,
        detail=judged.line if judged is found[0] else f"when run again: {judged.line}",
        value=judged.comparison.relative_error,
        gate=judged.gate.max_relative_error,
    )


def answers_to_golden(runner: Runner, golden: Golden) -> dict[str, NDArray[np.floating]]:
    """All outputs for the golden images, one alone and then the others together."""
    if len(runner.inputs) != 1:
        raise InputRejected(f"{len(runner.inputs)} inputs; expected one")
    parts = [images for images in (golden.images[:1], golden.images[1:]) if len(images)]
    outputs = [runner.run({runner.inputs[0].name: images}) for images in parts]
    return {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}


def _without(path: pathlib.Path, error: BaseException) -> str:
    """The error's text without the path that it begins with, which the finding names already."""
    return str(error).removeprefix(f"{path}: ")
