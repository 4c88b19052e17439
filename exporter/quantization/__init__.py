"""INT8 for re-parameterized networks: equalization, ranges, rounding, correction, and the proof of what they cost."""
