"""The updates of one tensor side by side as vectors: shared by the methods that work element by element."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.updates import Updates


def stack_updates(updates: Updates, dtype: torch.dtype) -> Tensor:
    """(T, 1, N)"""
    stack = None
    for i, spec in enumerate(updates.specs):
        if spec.rank == 0:
            continue
        dense = dense_update(updates[i])
        if stack is None:
            stack = torch.zeros(len(updates), 1, dense.numel(), dtype=dtype, device=dense.device)
        stack[i, 0] = dense.reshape(-1)
    return torch.zeros(len(updates), 1, math.prod(updates.shape), dtype=dtype) if stack is None else stack


def dense_update(update: Update) -> Tensor:
    return update.dense() if isinstance(update, LowRank) else update
