"""Truncated singular value decompositions of dense and low-rank updates."""

from dcmerge_ext.svd.components import Accuracy, Components, Evidence, summarize
from dcmerge_ext.svd.start import Start
from dcmerge_ext.svd.truncated import decompose, truncated_svd

__all__ = ["Accuracy", "Components", "Evidence", "Start", "decompose", "summarize", "truncated_svd"]
