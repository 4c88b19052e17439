"""The report's data."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Check:
    """One postcondition: the stage it belongs to, whether it held, what was measured against which gate, in words."""

    stage: str
    passed: bool
    value: float | None
    gate: float | None
    detail: str


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file of the run, by its name in the output directory."""

    name: str
    bytes: int
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class EngineRecord:
    """A compiled engine: who made it, for which cards, and what the audit of the file found."""

    name: str
    precision: str
    sdk: str
    sdk_version: str
    compute_capabilities: tuple[int, ...]
    seconds: float
    kept_in_float32: dict[str, str]
    audit: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a run found. ``passed`` is the verdict: no check failed."""

    version: str
    checkpoint: dict[str, Any]
    architecture: dict[str, Any]
    assumptions: dict[str, str]
    inputs: str
    certificates: tuple[dict[str, Any], ...]
    checks: tuple[Check, ...]
    engines: tuple[EngineRecord, ...]
    files: tuple[FileRecord, ...]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every check held, and there was one."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that did not hold."""
        return [check for check in self.checks if not check.passed]

    @property
    def verdict(self) -> str:
        """``PASS`` or ``FAIL`` with the count."""
        held = len(self.checks) - len(self.failures)
        return f"{'PASS' if self.passed else 'FAIL'}: {held} of {len(self.checks)} checks hold"

    @property
    def failure_line(self) -> str:
        """The checks that did not hold, in one line."""
        return "; ".join(f"{check.stage}: {check.detail}" for check in self.failures)

    def to_json(self) -> str:
        """``report.json``. Numbers that JSON has no word for (NaN, infinity) become null."""
        fields = {"schema": SCHEMA, "passed": self.passed, "verdict": self.verdict, **dataclasses.asdict(self)}
        return json.dumps(_plain(fields), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
