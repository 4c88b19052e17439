"""Starts what can start early, then runs the pipeline.

The compiler processes are started before torch is imported, so that both happen at the same time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from engines.build import CompilerProcess, Progress
from engines.sdk import sdk_for_build
from exporter.request import Request

if TYPE_CHECKING:
    from exporter.report import Report


def report_from_request(request: Request, notify: Callable[[str], None], progress: Progress) -> Report:
    """Runs one export; see ``exporter.pipeline.report_from_checkpoint``."""
    with contextlib.ExitStack() as stack:
        compilers = {}
        if request.trt:
            sdk = sdk_for_build(request.sdk, request.gpu)
            compilers = {precision: stack.enter_context(CompilerProcess(sdk)) for precision in request.trt}
        from exporter.pipeline import report_from_checkpoint

        return report_from_checkpoint(request, compilers, notify, progress)
