"""Matrix functions of merging: the polar factor, and singular values with the signatures of torch."""

from dcmerge_ext.linalg.polar import Polar, polar
from dcmerge_ext.linalg.svd import svd, svd_lowrank

__all__ = ["Polar", "polar", "svd", "svd_lowrank"]
