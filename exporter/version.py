"""The version, in the one place that pyproject.toml also reads."""

VERSION = "0.1.0"
