"""The knowledge components of all tasks of one tensor: the first step of every SVD-based method."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from dcmerge_ext.lowrank import LowRank
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.svd import Accuracy, Components, Evidence, Start, decompose, summarize
from dcmerge_ext.updates import Updates

_SIDE_BY_SIDE_BYTES = 64 << 20
"""Updates decomposed at the same time hold at most this much; larger ones follow in turn, on all threads."""


def components_of(
    updates: Updates,
    ranks: Sequence[int],
    *,
    accuracy: Accuracy = "exact",
    tol: float | None = None,
    seed: int = 0,
    key: str = "",
) -> tuple[list[Components], dict[str, Any]]:
    """Truncated SVDs of the T updates, and facts for the run record.

    Dense updates are loaded, reduced and dropped side by side; LowRank updates of equal rank are decomposed in one
    batch. ``ranks[i]`` components of task i; tasks of rank 0 are left out.
    """
    found: dict[int, tuple[Components, list[Evidence]]] = {}

    def reduce(i: int) -> None:
        (U, S, Vh), evidence = decompose(updates[i], ranks[i], accuracy=accuracy, tol=tol, start=Start(seed, key))
        # a copy: a view would keep the full decomposition alive
        found[i] = Components(*(x.clone(memory_format=torch.contiguous_format) for x in (U, S, Vh))), evidence

    dense = [i for i, rank in enumerate(ranks) if rank and updates.specs[i].rank is None]
    size = math.prod(updates.shape) * updates.dtype.itemsize
    side_by_side(reduce, dense, at_most=_SIDE_BY_SIDE_BYTES // max(size, 1))

    alike: dict[tuple[int, int | None, torch.dtype], list[int]] = defaultdict(list)
    for i, rank in enumerate(ranks):
        if rank and updates.specs[i].rank is not None:
            alike[rank, updates.specs[i].rank, updates.specs[i].dtype].append(i)
    for (rank, _, _), tasks in alike.items():
        batch = [updates[i] for i in tasks]
        factors = [(u.left, u.right) for u in batch if isinstance(u, LowRank)]
        left, right = (torch.stack(side) for side in zip(*factors, strict=True))
        stacked, evidence = decompose(LowRank(left, right), rank)
        for j, i in enumerate(tasks):
            found[i] = Components(*(x[j] for x in stacked)), evidence

    facts = summarize([e for _, (_, evidence) in sorted(found.items()) for e in evidence])
    return [components for _, (components, _) in sorted(found.items())], facts
