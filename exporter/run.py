"""One run from a request: what the command line and ``exporter.export`` call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engines.compilation import Progress
from engines.interrupts import Uninterrupted
from exporter.processes import started
from exporter.request import Request

if TYPE_CHECKING:
    from exporter.report import Report


def report_from_request(
    request: Request,
    notify: Callable[[str], None],
    progress: Progress,
    interrupts: Uninterrupted,
) -> Report:
    """Starts the helping processes, and only then imports torch with the pipeline; see ``exporter.pipeline``."""
    with started(request) as processes:
        with interrupts.held():
            from exporter.pipeline import report_from_checkpoint

        return report_from_checkpoint(request, processes, notify, progress, interrupts)
