"""onnxsim in a process of its own: ``python -m exporter.simplifier`` reads a model from stdin and answers on stdout.

Only a graph's structure goes through it: weights are declared as inputs, so none can be changed, and a crash in native
code is a message. ``exporter.processes.SimplifierProcess`` is the other end.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import onnx


def _onnxsim() -> ModuleType:
    """Imports onnxsim without torch, which it would load, in a second or two, for integrations not used here."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("onnxsim")
    except ImportError:
        del sys.modules["torch"]
        return importlib.import_module("onnxsim")


def main() -> int:
    """Serves one request."""
    onnxsim = _onnxsim()
    structure, same = onnxsim.simplify(onnx.ModelProto.FromString(sys.stdin.buffer.read()))
    if not same:
        sys.stderr.write("its own check of the simplified graph failed")
        return 1
    sys.stdout.buffer.write(structure.SerializeToString())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
