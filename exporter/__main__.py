"""``python -m exporter``."""

from __future__ import annotations

import os
import sys

from exporter.cli import main


def run() -> None:
    """Runs the command of ``sys.argv`` and ends the process, without the time that taking torch down costs."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would slow the compilers down
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
