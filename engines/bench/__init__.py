"""How fast files compute, side by side; ``engines.bench.comparison`` is the page to read first."""

from __future__ import annotations

from engines.bench.comparison import bench
from engines.bench.options import Options
from engines.bench.record import Record
from engines.bench.text import lines_from_record

__all__ = ["Options", "Record", "bench", "lines_from_record"]
