"""What the authors' three files have in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dcmerge_ext import ops
from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.merging import merge_updates
from dcmerge_ext.precision import without_autocast

RANK = 16
"""Components per task in both of their LoRA files, whatever the adapter's rank."""
KEEP = 1e-3
"""The fraction that all their calls of ``keep_topk_percent`` pass."""

Deltas = Mapping[str, Sequence[Update]]
"""Name -> the T updates of that matrix: their dense deltas, or LowRank factors in place of any of them."""


def keep_topk_percent(tensor_list: Sequence[Tensor], percent: float = 0.1) -> list[Tensor]:
    """Of each tensor the entries at or above the max(1, int(percent N))-th largest magnitude; the others are 0.

    Mirrors ``keep_topk_percent`` of all three files, and equals it. ``percent`` is a fraction. Ties at the threshold all
    stay. Floating tensors of any shape and strides, each of its own; the results are new.

    Raises:
        ValueError: an empty tensor, or percent above 1.   TypeError: a tensor that is not floating point.
    """
    trimmed = []
    for x in tensor_list:
        threshold = ops.kth_magnitude(x.reshape(-1), max(1, int(percent * x.numel())))
        trimmed.append(torch.where(x.abs() >= threshold, x, 0))
    return trimmed


def ties_small(mat_list: Sequence[Tensor]) -> Tensor:
    """Per entry the mean of those that have the sign of the sum over the tensors; 0 where that sum is 0.

    Mirrors ``ties_small`` of all three files. Floating tensors of one shape, any number of dimensions. Half precision is
    merged in float32 and rounded once; tensors are added in their order.

    Raises:
        RuntimeError: shapes that differ, or no tensors.   TypeError: not floating point.
    """
    stack = torch.stack(list(mat_list))
    return ops.elect(stack.reshape(len(stack), 1, -1)).reshape(stack.shape[1:])


def merged_matrix(key: str, updates: Sequence[Update], method: str, **options: Any) -> Tensor:
    """The merged update of one matrix, dense, in the dtype of the first update."""
    with torch.no_grad():
        return dense_like(merge_updates({key: updates}, method, **options)[key], updates[0])


@without_autocast
def dense_like(merged: Update, update: Update) -> Tensor:
    """``merged`` as a tensor of the dtype of ``update``."""
    return (merged.dense() if isinstance(merged, LowRank) else merged).to(update.dtype)


def sorted_by_name(deltas_dict: Deltas, merge: Callable[[str, Sequence[Update]], Tensor]) -> OrderedDict[str, Tensor]:
    """``merge`` of every entry, in alphabetical order of the names."""
    if not isinstance(deltas_dict, Mapping):
        raise InputError(
            f"needs a mapping from each name to the deltas of all tasks, got a {type(deltas_dict).__name__}"
        )
    return OrderedDict((key, merge(key, deltas_dict[key])) for key in sorted(deltas_dict))


def dc_merge_adapters(key: str, updates: Sequence[Update], smoothing_strategy: str, rho: float) -> Tensor:
    """DC-Merge of one matrix with the settings of their LoRA files."""
    smoothing: dict[str, dict[str, Any]] = {
        "avg": {"smoothing": "average"},
        "linear": {"smoothing": "linear", "rho": rho},
    }
    if smoothing_strategy not in smoothing:
        raise InputError(f"{key}: smoothing_strategy must be 'avg' or 'linear', got {smoothing_strategy!r}")
    rank = min((RANK, *updates[0].shape)) if len(updates) else RANK
    options = smoothing[smoothing_strategy]
    return merged_matrix(key, updates, "dc_merge", rank=rank, keep=KEEP, count_base="cover", **options)


def wudi_of(vectors: Sequence[Update], iter_num: int, key: str = "") -> Tensor:
    """WUDI of one matrix with their learning rate, on the CUDA device where there is one, as theirs."""
    device = cuda_or(vectors[0].device) if len(vectors) else None
    return merged_matrix(key, [x.to(device) for x in vectors], "wudi", iterations=iter_num, lr=1e-5)


def cuda_or(device: torch.device) -> torch.device:
    """The current CUDA device, where theirs always computes; ``device`` on a machine without one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else device
