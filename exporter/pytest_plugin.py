"""pytest plugin for a model's own repository: the fixture ``assert_parity``, and ``--parity-report PATH``.

    def test_the_engine_is_the_checkpoint(assert_parity):
        assert_parity("model.pt", "model/model.fp16.engine")

pytest loads this module wherever the package is installed, so it imports nothing but what pytest has already; torch,
numpy and the exporter come with the first comparison. A comparison travels from the process that made it to the one
that reports as a property of its test, so that workers of pytest-xdist need nothing of their own, and pytest's
``--junitxml`` has it, too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from engines.parity import Gate
    from exporter.report import LedgerRow

PROPERTY = "parity"
REPORT_SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Parity:
    """One comparison: what was compared, whether it held, the finding in one line, and a row of figures per stage."""

    name: str
    a: str
    b: str
    passed: bool
    line: str
    rows: tuple[LedgerRow, ...] = ()


class AssertParity(Protocol):
    """The type of the fixture ``assert_parity``."""

    def __call__(
        self, a: Any, b: Any, gate: Gate | float | str | None = None, *, inputs: Any = None, name: str | None = None
    ) -> Parity:
        """Fails the test unless ``b`` computes what ``a`` does."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--parity-report``."""
    parser.getgroup("parity").addoption(
        "--parity-report",
        type=pathlib.Path,
        metavar="PATH",
        help="write every comparison of assert_parity to PATH: Markdown where it ends in .md, else JSON",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collects comparisons where a report was asked for, in the one process that writes it."""
    path = config.getoption("parity_report")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(config.invocation_params.dir / path), "parity-report")


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> AssertParity:
    """A function that fails the test unless two networks, or two arrays of outputs, agree.

    ``assert_parity(a, b, gate=None, *, inputs=None, name=None)``: ``a`` is the reference. Both are paths (checkpoint,
    ONNX file or engine) or both numpy arrays (n, classes). ``gate`` is an ``engines.parity.Gate``, a largest relative
    error, a precision such as "fp16", or None for the gate of the coarser precision of the two; arrays have none, so
    theirs must be given. ``inputs`` is an ``.npz`` with ``images``, by default seeded noise. ``name`` is how the report
    calls the comparison, by default the test's own.

    Returns:
        The ``Parity``, with its rows, where it holds.
    """

    def check(
        a: Any, b: Any, gate: Gate | float | str | None = None, *, inputs: Any = None, name: str | None = None
    ) -> Parity:
        __tracebackhide__ = True
        from exporter.errors import ReportedError
        from exporter.report import plain_json

        described = (name or request.node.nodeid, _described(a), _described(b))
        parity = Parity(*described, passed=False, line="it ended with an error")
        try:
            parity = _compared(described, a, b, gate, inputs)
        except ReportedError as error:
            parity = Parity(*described, passed=False, line=str(error))
        finally:  # also where something unforeseen is raised: a report must not lack what did not hold
            request.node.user_properties.append((PROPERTY, json.dumps(plain_json(parity))))
        if not parity.passed:
            pytest.fail(f"{parity.a} and {parity.b} do not agree: {parity.line}")
        return parity

    return check


def _compared(described: tuple[str, str, str], a: Any, b: Any, gate: Gate | float | str | None, inputs: Any) -> Parity:
    kinds = {isinstance(operand, str | os.PathLike) for operand in (a, b)}
    if kinds == {True}:
        from exporter.verify import verdict_of

        verdict = verdict_of(
            pathlib.Path(a),
            pathlib.Path(b),
            inputs=None if inputs is None else pathlib.Path(inputs),
            gate=None if gate is None else _gate(gate),
        )
        line = verdict.line if verdict.passed else verdict.failure_line
        return Parity(*described, passed=verdict.passed, line=line, rows=tuple(verdict.rows))
    return _of_arrays(described, a, b, gate, inputs)


def _of_arrays(described: tuple[str, str, str], a: Any, b: Any, gate: Gate | float | str | None, inputs: Any) -> Parity:
    import numpy as np

    from engines.parity import compare
    from exporter.errors import UsageError
    from exporter.report import LedgerRow

    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        raise UsageError("assert_parity compares two paths or two numpy arrays; give two of one kind")
    if gate is None or inputs is not None:
        raise UsageError("assert_parity of two arrays needs a gate, and takes no inputs: it computes nothing")
    limit = _gate(gate)
    try:
        comparison = compare(a, b)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{error}; give two numeric arrays (n, classes) of one shape") from error
    row = LedgerRow("arrays", comparison, comparison.relative_error, (len(a),))
    failure = limit.failure(comparison)
    figures = f"relative error {comparison.relative_error:.1e} (gate {limit.max_relative_error:.1e})"
    return Parity(
        *described, passed=failure is None, line=f"arrays: {failure}; {figures}" if failure else figures, rows=(row,)
    )


def _gate(gate: Gate | float | str) -> Gate:
    from engines.parity import GATES, Gate
    from exporter.errors import UsageError

    if isinstance(gate, Gate):
        return gate
    if isinstance(gate, str):
        if gate not in GATES:
            raise UsageError(f"gate {gate!r}: unknown precision; choose from {', '.join(GATES)}")
        return GATES[gate]
    if isinstance(gate, bool) or not isinstance(gate, int | float) or not 0 <= gate < math.inf:
        raise UsageError(f"gate {gate!r}: neither a Gate, a precision nor a largest relative error of 0 or more")
    return Gate(max_relative_error=float(gate), top1=True)


def _described(operand: Any) -> str:
    if isinstance(operand, str | os.PathLike):
        return os.fspath(operand)
    return f"{type(operand).__name__} {getattr(operand, 'shape', '')}".strip()


class _Collector:
    """Gathers the comparisons of a session, and writes them when it ends."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._found: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's properties are all there when it is torn down."""
        if report.when == "teardown":
            for key, value in report.user_properties:
                if key == PROPERTY:
                    self._found.append({"test": report.nodeid, **json.loads(str(value))})

    def pytest_sessionfinish(self) -> None:
        """Writes the report whole, or ends pytest with one line and a code that is not 0."""
        from engines.errors import OutputFailed, first_line
        from engines.files import write_whole

        text = self._markdown() if self._path.suffix == ".md" else self._json()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, text.encode())
        except (OSError, OutputFailed) as error:
            reason = first_line(error.__cause__ or error)
            pytest.exit(f"--parity-report {self._path}: cannot be written ({reason}); give another path", returncode=5)

    @property
    def _verdict(self) -> str:
        held = sum(parity["passed"] for parity in self._found)
        if not self._found:
            return "FAIL: nothing was compared"
        return f"{'PASS' if held == len(self._found) else 'FAIL'}: {held} of {len(self._found)} comparisons hold"

    def _json(self) -> str:
        verdict = self._verdict
        fields = {
            "schema": REPORT_SCHEMA,
            "passed": verdict.startswith("PASS"),
            "verdict": verdict,
            "comparisons": self._found,
        }
        return json.dumps(fields, indent=2, allow_nan=False) + "\n"

    def _markdown(self) -> str:
        from engines.markdown_text import Markup
        from exporter.report.markdown import document, section

        failed = Markup("**FAIL**")
        rows = (
            (parity["name"], parity["a"], parity["b"], "pass" if parity["passed"] else failed, parity["line"])
            for parity in self._found
        )
        return document(
            self._verdict, [section("Comparisons", ("name", "reference", "candidate", "result", "found"), rows)]
        )
