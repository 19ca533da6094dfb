"""Matrix functions of merging that torch.linalg lacks."""

from dcmerge_ext.linalg.polar import Polar, polar

__all__ = ["Polar", "polar"]
