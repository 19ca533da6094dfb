"""Merging checkpoints: reading, planning, executing, writing. Knows nothing of the mathematics of a method."""
