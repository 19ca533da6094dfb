"""Merge fine-tuned models and LoRA adapters of one base, without training: DC-Merge and its baselines."""

from dcmerge_ext import linalg, methods, metrics, ops, torch_library
from dcmerge_ext.backends import backends, use_backend
from dcmerge_ext.checkpoints.run import MergeReport, merge_checkpoints
from dcmerge_ext.checkpoints.state_dicts import merge_state_dicts
from dcmerge_ext.checkpoints.sweep import SweepReport, sweep
from dcmerge_ext.comparison import Comparison, compare
from dcmerge_ext.linalg.swap import accelerate
from dcmerge_ext.lowrank import LowRank
from dcmerge_ext.merging import merge_updates
from dcmerge_ext.methods.registry import list_methods
from dcmerge_ext.smoothing import smooth_energy
from dcmerge_ext.svd import Components, truncated_svd
from dcmerge_ext.version import __version__

__all__ = [
    "Comparison",
    "Components",
    "LowRank",
    "MergeReport",
    "SweepReport",
    "__version__",
    "accelerate",
    "backends",
    "compare",
    "linalg",
    "list_methods",
    "merge_checkpoints",
    "merge_state_dicts",
    "merge_updates",
    "methods",
    "metrics",
    "ops",
    "smooth_energy",
    "sweep",
    "torch_library",
    "truncated_svd",
    "use_backend",
]
