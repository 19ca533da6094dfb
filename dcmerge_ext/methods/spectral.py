"""The knowledge components of all tasks of one tensor: the first step of every SVD-based method."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from msgspec import Meta

from dcmerge_ext.errors import OptionError
from dcmerge_ext.lowrank import LowRank
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.svd import Accuracy, Components, Evidence, Start, decompose, summarize
from dcmerge_ext.updates import Updates, UpdateSpec

Rank = Annotated[int, Meta(ge=1)]

_SIDE_BY_SIDE_BYTES = 64 << 20
"""Updates decomposed at the same time hold at most this much; larger ones follow in turn, on all threads."""


def concurrent_updates(elements: int, count: int) -> int:
    """How many of ``count`` dense float32 updates of that many elements are decomposed at the same time."""
    return max(1, min(count, torch.get_num_threads(), _SIDE_BY_SIDE_BYTES // max(4 * elements, 1)))


def component_ranks(
    specs: Sequence[UpdateSpec], num_tasks: int, rank: int | tuple[int, ...] | None
) -> list[int] | None:
    """Components (slots) kept per task; None where the rule leaves a task none, and the mean is taken instead.

    ``rank``: the option of that name, one number, one per task, or None: the rank of a LowRank; int(q / T) for dense
    updates, q = min(m, n); int((q - sum of LoRA ranks) / number of dense) where both occur.
    """
    q = min(specs[0].shape[-2:])
    if num_tasks > q:
        return None
    dense = sum(spec.rank is None for spec in specs)
    lora = sum(min(spec.rank, q) for spec in specs if spec.rank is not None)
    # All dense: as the authors write it, a float product, truncated.
    dense_rank = int(q * (1 / num_tasks)) if dense == len(specs) else int((q - lora) / max(dense, 1))
    ranks = []
    for spec, asked in zip(specs, _asked(specs, rank), strict=True):
        if spec.rank is None:
            ranks.append(min(asked or dense_rank, q))
            if ranks[-1] < 1:
                return None
        else:
            ranks.append(min(asked or q, spec.rank, q))
    return ranks


def check_ranks(
    specs: Sequence[UpdateSpec], num_tasks: int, rank: int | tuple[int, ...] | None, *, at_most_q: bool = True
) -> None:
    """Raise OptionError where the option ``rank`` does not suit these updates.

    ``at_most_q``: refuse more components than min(m, n), rather than keep what there is.
    """
    if isinstance(rank, tuple) and len(rank) != num_tasks:
        raise OptionError(f"rank has {len(rank)} entries for {num_tasks} tasks; give one number, or one per task")
    q = min(specs[0].shape[-2:])
    for spec, asked in zip(specs, _asked(specs, rank), strict=True):
        if asked is not None and asked > q and at_most_q and spec.rank != 0:
            raise OptionError(
                f"rank {asked} exceeds min(m, n) = {q} of a {' x '.join(map(str, spec.shape))} update; "
                "lower it, or give such tensors other options (overrides)"
            )


def _asked(specs: Sequence[UpdateSpec], rank: int | tuple[int, ...] | None) -> Sequence[int | None]:
    return rank if isinstance(rank, tuple) else [rank] * len(specs)


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
