"""The sum of the updates, kept in factors where all of them are: shared by the linear methods."""

from __future__ import annotations

from dcmerge_ext.lowrank import LowRank, Update, concatenate
from dcmerge_ext.updates import Updates


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
