"""vlm_merge/llava/model/builder.py of the DC-Merge authors: the merging functions in it.

As in their file all work is in float32 on the CUDA device, where there is one. LowRank factors are taken in place of dense
deltas.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dcmerge_ext.compat.official.shared import (
    Deltas,
    cuda_or,
    dc_merge_adapters,
    keep_topk_percent,
    sorted_by_name,
    ties_small,
)
from dcmerge_ext.lowrank import Update
from dcmerge_ext.svd import truncated_svd

__all__ = ["dc_merge", "delta_to_AB", "keep_topk_percent", "ties_small"]

_MERGED_RANK = 128


def dc_merge(deltas_dict: Deltas, smoothing_strategy: str = "avg", rho: float = 5.0) -> OrderedDict[str, Tensor]:
    """DC-Merge of LLaVA adapters (arXiv 2603.06242): 16 components per task, "avg" or "linear" smoothing, 0.1 % kept.

    Mirrors ``dc_merge``; runs ``methods.dc_merge``. Mapping from names to the T deltas of that matrix, any floating dtype;
    returns an OrderedDict in alphabetical order of the names, float32. Differs as that of :mod:`.vision_lora` does, and
    for adapters of rank above 16: theirs takes ``torch.svd_lowrank``, whose subspace depends on the global random
    generator, here it is the exact one and the generator is left alone.

    Raises:
        InputError: shapes that differ, non-finite values, no deltas, another smoothing, rho below 1.
    """

    def merge(key: str, deltas: Sequence[Update]) -> Tensor:
        return dc_merge_adapters(key, [x.to(cuda_or(x.device), torch.float32) for x in deltas], smoothing_strategy, rho)

    return sorted_by_name(deltas_dict, merge)


def delta_to_AB(task_parameters: Mapping[str, Update]) -> OrderedDict[str, Tensor]:
    """The merged matrices (m, n) as a PEFT state dict: lora_B = U diag(s) (m, 128) and lora_A = V' (128, n), bfloat16.

    Mirrors ``delta_to_AB`` of the versions that save an adapter. Names: every "model" becomes "base_model.model.model" and
    "weight" becomes "lora_A.weight" and "lora_B.weight", in alphabetical order. The factors are unique up to signs and
    rotations of equal singular values, their product is not; slots beyond the rank are 0 in both (theirs: arbitrary
    directions in A).

    Raises:
        ValueError: min(m, n) below 128.
    """
    factors = {}
    for name, delta in task_parameters.items():
        U, S, Vh = truncated_svd(delta.to(torch.float32), _MERGED_RANK)
        prefix, key = "base_model.model.model", "weight"
        peft_name = name.replace("model", prefix)
        factors[peft_name.replace(key, "lora_B.weight")] = (U * S).to(torch.bfloat16)
        factors[peft_name.replace(key, "lora_A.weight")] = Vh.to(torch.bfloat16)
    return OrderedDict(sorted(factors.items()))
