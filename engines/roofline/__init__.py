"""How fast a graph could be at best on a card; ``engines.roofline.bound`` is the page to read first."""

from __future__ import annotations

from engines.roofline.bound import (
    Bound,
    PeakUnknown,
    binding_limit,
    bound_of,
    bytes_per_image,
    operations_per_image,
    seconds_of_kernel,
    works_of_file,
)
from engines.roofline.fused_kernels import Work, works_from_onnx

__all__ = [
    "Bound",
    "PeakUnknown",
    "Work",
    "binding_limit",
    "bound_of",
    "bytes_per_image",
    "operations_per_image",
    "seconds_of_kernel",
    "works_from_onnx",
    "works_of_file",
]
