"""The version, where a serving machine reads it."""

VERSION = "0.1.0"
