"""The sidecar of an engine: ``<engine>.json``, which says what the engine is and what it must answer.

It stands beside the engine and never inside it, so that every other tool can still read the engine.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a serving machine needs to know, and to check, before it loads an engine.

    ``profile`` holds the minimum, optimum and maximum shape of each input; ``preprocessing`` is in units of pixels
    scaled to 0..1; ``tolerance`` is the largest relative error against ``golden`` (see ``engines.parity``).
    """

    name: str
    precision: str
    sha256: dict[str, str]
    sdk: dict[str, str]
    compute_capabilities: tuple[int, ...]
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    profile: dict[str, tuple[tuple[int, ...], ...]]
    preprocessing: dict[str, Any]
    assumptions: dict[str, str]
    tolerance: float
    audit: dict[str, Any]
    golden: str

    def to_json(self) -> str:
        """The sidecar's text, with its schema number."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=2) + "\n"


def sidecar_path(engine: pathlib.Path) -> pathlib.Path:
    """``model.fp16.engine`` to ``model.fp16.engine.json``."""
    return engine.with_name(engine.name + ".json")
