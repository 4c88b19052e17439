"""The exporter's errors: the tree of ``engines.errors``, with what only an exporter can find wrong.

ReportedError
 |- VerificationFailed   1
 |- UsageError           2
 |- InputRejected        3
 |   |- CheckpointRejected     the file, or what it holds
 |   |   '- NotFinite          it holds NaN or infinity
 |   '- ArchitectureRejected   the tensors do not make a RepVGG, or not the one asked for
 |- SdkMissing           4
 |- CompilerRefused      4
 |- DeviceFailed         4
 '- OutputFailed         5
"""

from __future__ import annotations

from engines.errors import (
    INTERRUPTED_EXIT_CODE,
    CompilerRefused,
    DeviceFailed,
    InputRejected,
    OutputFailed,
    ReportedError,
    SdkMissing,
    UsageError,
    VerificationFailed,
    first_line,
    listed,
)

__all__ = [
    "INTERRUPTED_EXIT_CODE",
    "ArchitectureRejected",
    "CheckpointRejected",
    "CompilerRefused",
    "DeviceFailed",
    "InputRejected",
    "NotFinite",
    "OutputFailed",
    "ReportedError",
    "SdkMissing",
    "UsageError",
    "VerificationFailed",
    "first_line",
    "listed",
]


class CheckpointRejected(InputRejected):
    """The checkpoint file cannot be read, or holds no usable weights."""


class NotFinite(CheckpointRejected):
    """A weight is NaN or infinite."""


class ArchitectureRejected(InputRejected):
    """The tensors do not make a RepVGG, contradict each other, or are not the network that was named."""
