"""The commands of ``python -m engines``."""
