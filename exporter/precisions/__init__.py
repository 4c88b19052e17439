"""Precisions are graph rewrites: a float32 graph in, a typed graph out, and nothing about it left to the compiler.

A new precision is one file with a ``Precision`` and one line here.
"""

from __future__ import annotations

from exporter.precisions.fp16 import FP16
from exporter.precisions.fp32 import FP32
from exporter.precisions.int8 import INT8
from exporter.precisions.precision import Exponents, Precision, Rewritten

__all__ = ["INT8", "PRECISIONS", "Exponents", "Precision", "Rewritten"]

PRECISIONS: tuple[Precision, ...] = (FP32, FP16, INT8)
