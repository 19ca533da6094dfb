"""The sum of the updates, kept in factors where all of them are: shared by the linear methods."""

from __future__ import annotations

import logging

import torch

from dcmerge_ext.lowrank import LowRank, Update, concatenate
from dcmerge_ext.methods.base import Context
from dcmerge_ext.updates import Updates

logger = logging.getLogger(__name__)


def sum_updates(updates: Updates) -> Update:
    """Sum over the tasks: a LowRank of rank sum of the ranks if all are LowRank, else dense, one task at a time."""
    if updates.all_lowrank:
        parts = [u.to(updates.dtype) for u in updates if isinstance(u, LowRank)]
        return concatenate(parts)
    total = None
    for i, spec in enumerate(updates.specs):
        if spec.rank == 0:
            continue
        update = updates[i]
        if total is None:
            total = (
                update.dense().to(updates.dtype) if isinstance(update, LowRank) else update.to(updates.dtype, copy=True)
            )
        elif isinstance(update, LowRank):
            total += update.dense()
        else:
            total += update
    assert total is not None  # not all are LowRank, so one is dense
    return total


def mean_updates(updates: Updates, num_tasks: int) -> Update:
    """Sum over the tasks, divided by T of the run."""
    total = sum_updates(updates)
    return total * (1 / num_tasks) if isinstance(total, LowRank) else total.div_(num_tasks)


def mean_instead(method: str, updates: Updates, ctx: Context) -> Update:
    """The mean, with a warning: for methods that keep T components or more, where min(m, n) has room for fewer."""
    ctx.facts["fallback"] = "mean: no component per task fits in min(m, n)"
    logger.warning(
        "%s: %d tasks leave a %s matrix no component each; it takes the mean of the updates",
        ctx.key or method,
        ctx.num_tasks,
        " x ".join(map(str, updates.shape)),
    )
    return mean_updates(updates, ctx.num_tasks)


def zero_update(updates: Updates) -> Update:
    """Of no components, or of an empty batch."""
    if not updates.all_lowrank:
        return torch.zeros(updates.shape, dtype=updates.dtype, device=updates[0].device)
    *leading, m, n = updates.shape
    left = torch.zeros(*leading, m, 0, dtype=updates.dtype, device=updates[0].device)
    return LowRank(left, left.new_zeros(*leading, 0, n))
