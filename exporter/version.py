"""The version; ``engines`` has it, since a serving machine knows nothing of ``exporter``."""

from engines.version import VERSION

__all__ = ["VERSION"]
