"""Merge fine-tuned models and LoRA adapters of one base, without training: DC-Merge and its baselines."""

from dcmerge_ext import linalg, methods, ops
from dcmerge_ext.backends import backends, use_backend
from dcmerge_ext.lowrank import LowRank
from dcmerge_ext.merging import merge_updates
from dcmerge_ext.methods.base import list_methods
from dcmerge_ext.smoothing import smooth_energy
from dcmerge_ext.svd import Components, truncated_svd

__version__ = "0.1.0"

__all__ = [
    "Components",
    "LowRank",
    "backends",
    "linalg",
    "list_methods",
    "merge_updates",
    "methods",
    "ops",
    "smooth_energy",
    "truncated_svd",
    "use_backend",
]
