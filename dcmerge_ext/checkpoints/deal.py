"""Which process works on which tensor: decided from headers alone, so that all processes know."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from dcmerge_ext.checkpoints.plan import TensorPlan

_FLOPS_PER_BYTE = 30.0
"""What a machine computes while it reads and writes a byte. Rough: it must be the same in every process."""


def cost(tensor: TensorPlan) -> float:
    """Of merging a tensor, in floating point operations."""
    dense = sum(spec.rank is None for spec in tensor.specs)
    traffic = _FLOPS_PER_BYTE * tensor.base.nbytes * (2 + dense)
    if tensor.action != "merge" or tensor.method is None:
        return traffic
    return traffic + tensor.method.flops(tensor.specs, len(tensor.specs))


def deal(tensors: Sequence[TensorPlan], size: int) -> list[list[TensorPlan]]:
    """The tensors of each of ``size`` processes: the most expensive first, each to the process with the least to do."""
    hands: list[list[TensorPlan]] = [[] for _ in range(size)]
    loads = [(0.0, rank) for rank in range(size)]
    for tensor in sorted(tensors, key=lambda t: (-cost(t), t.name)):
        load, rank = heapq.heappop(loads)
        hands[rank].append(tensor)
        heapq.heappush(loads, (load + cost(tensor), rank))
    return hands
