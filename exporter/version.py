"""The version; the same as that of ``engines``, which a test holds. The build reads this file by itself."""

VERSION = "0.1.0"
