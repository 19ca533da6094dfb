"""vision_lora_merge/merging_functions.py of the DC-Merge authors: what their eval.py imports, and its helpers.

Every function takes a mapping from names to the T deltas B A of that matrix and returns an OrderedDict of merged
matrices in alphabetical order of the names, on the deltas' device, in the dtype of the first. Inputs stay as they are.
LowRank factors are taken in place of dense deltas: the same merge, and nothing dense is decomposed.

All raise InputError for shapes that differ, non-finite values or no deltas.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from dcmerge_ext.compat.official.shared import (
    RANK,
    Deltas,
    dc_merge_adapters,
    dense_like,
    keep_topk_percent,
    merged_matrix,
    sorted_by_name,
    ties_small,
    wudi_of,
)
from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.apply import merge_with
from dcmerge_ext.methods.iso_cts import IsoCTS
from dcmerge_ext.updates import UpdateSpec

__all__ = [
    "TA",
    "TSVM",
    "dc_merge",
    "get_redundant_task_vector",
    "iso_cts",
    "keep_topk_percent",
    "ties_small",
    "wudi_merge",
]


def dc_merge(deltas_dict: Deltas, smoothing_strategy: str = "avg", rho: float = 5.0) -> OrderedDict[str, Tensor]:
    """DC-Merge of adapters (arXiv 2603.06242): 16 components per task, "avg" or "linear" smoothing, 0.1 % kept.

    Mirrors ``dc_merge``; runs ``methods.dc_merge``. Differs where theirs is arbitrary (adapters of rank below 16,
    dependent bases, round-off among the kept) or fails (16 T above min(m, n)); and ``rho`` below 1, with which theirs
    lets the spectrum rise, is an InputError.
    """
    return sorted_by_name(deltas_dict, lambda key, deltas: dc_merge_adapters(key, deltas, smoothing_strategy, rho))


def TSVM(deltas_dict: Deltas) -> OrderedDict[str, Tensor]:
    """TSV-M of adapters (arXiv 2412.00081), 16 components per task.

    Mirrors ``TSVM``; runs ``methods.tsv_m(official="lora")``. Differs as :func:`dc_merge` does.
    """
    return sorted_by_name(deltas_dict, lambda key, deltas: merged_matrix(key, deltas, "tsv_m", official="lora"))


def iso_cts(deltas_dict: Deltas, k_frac: float = 0.8) -> OrderedDict[str, Tensor]:
    """Iso-CTS of adapters (arXiv 2502.04959): 16 T directions in all, of which about ``k_frac`` are common.

    Mirrors ``iso_cts``; runs ``methods.iso_cts``. The mean singular value is over the 16 T directions, null or not.
    Differs where theirs is arbitrary or fails, as :func:`dc_merge` does; and where ``k_frac`` is so near 1
    (about 0.97) that a task's own share rounds to 0: here each keeps one direction and the common ones are 16 T - T, there
    T of all are cut off after orthogonalization.
    """
    if not 0 <= k_frac <= 1:
        raise InputError(f"iso_cts: k_frac must lie in 0 .. 1, got {k_frac}")

    def merge(key: str, deltas: Sequence[Update]) -> Tensor:
        with torch.no_grad():
            merged = merge_with(_IsoCTS(gamma=k_frac, mean_over="min_dim"), {key: deltas}, None)[key]
            q = min(deltas[0].shape)
            return dense_like(merged * (q / _budget(q, len(deltas))), deltas[0])

    return sorted_by_name(deltas_dict, merge)


def wudi_merge(deltas_dict: Deltas, iter_num: int = 300) -> OrderedDict[str, Tensor]:
    """WUDI-Merging (arXiv 2503.08099) of every matrix; results on the CPU.

    Mirrors ``wudi_merge``; runs ``methods.wudi``. Differs for a delta that is zero, which takes no part (theirs: NaN).
    """
    return sorted_by_name(deltas_dict, lambda key, deltas: wudi_of(deltas, iter_num, key).cpu())


def get_redundant_task_vector(vectors: Tensor, iter_num: int = 300) -> Tensor:
    """WUDI of T stacked updates (T, m, n) of one matrix, (m, n) on the CPU; as in :func:`wudi_merge`."""
    return wudi_of(vectors.unbind(), iter_num).cpu()


def TA(deltas_dict: Deltas) -> OrderedDict[str, Tensor]:
    """Task arithmetic (arXiv 2212.04089): the sum of the deltas. Mirrors ``TA``."""
    return sorted_by_name(deltas_dict, lambda key, deltas: merged_matrix(key, deltas, "task_arithmetic"))


class _IsoCTS(IsoCTS, frozen=True):
    """Iso-CTS with 16 directions per task, dense or not."""

    def sizes(self, specs: Sequence[UpdateSpec]) -> tuple[int, list[int]]:
        tasks = len(specs)
        budget = _budget(min(specs[0].shape), tasks)
        own = min(max(1, round((budget - int(budget * self.gamma)) / tasks)), budget // tasks)
        each = [own if spec.rank is None else min(own, spec.rank) for spec in specs]
        return budget - sum(each), each


def _budget(q: int, tasks: int) -> int:
    """Directions of all tasks together; theirs fails where 16 T exceed min(m, n)."""
    return min(RANK * tasks, q)
