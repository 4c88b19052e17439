"""Measurements of the exporter against what it replaces."""
