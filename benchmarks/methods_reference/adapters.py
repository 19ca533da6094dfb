"""KnOTS, Core Space and RobustMerge, which are defined for LoRA adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from reference import Parts, full_svd
from torch import Tensor

from dcmerge_ext import LowRank
from methods_reference.elementwise import ties_limits, ties_merge
from methods_reference.spectral import iso_c, tsv_m

ROBUST_KEEP = ROBUST_TOP = 0.2


def knots(stack: Parts, tasks: int) -> Tensor:
    """From the SVD of all updates side by side: TIES of diag(s) V_i', and back."""
    aligned = knots_aligned(stack, tasks)
    limits = ties_limits(aligned)
    return stack.U @ ties_merge(aligned.masked_fill(aligned.abs() < limits[:, None, None], 0))


def knots_aligned(stack: Parts, tasks: int) -> Tensor:
    """M_i (T, k, n)"""
    k = len(stack.S)
    return (stack.S[:, None] * stack.Vh).view(k, tasks, -1).transpose(0, 1)


def core_space(updates: Sequence[LowRank]) -> Tensor:
    """TSV-M of the cores, made isotropic. In float64 as published, returned in the dtype of the updates."""
    lefts, rights = (torch.stack([getattr(u, side).double() for u in updates]) for side in ("left", "right"))
    U = torch.linalg.svd(torch.cat(list(lefts), 1), full_matrices=False).U
    Vh = torch.linalg.svd(rights.flatten(0, 1), full_matrices=False).Vh
    cores = (U.mT @ lefts) @ (rights @ Vh.mT)
    rank = int(cores.shape[-1] / len(updates))
    merged = tsv_m([full_svd(core, rank) for core in cores])
    dtype = updates[0].dtype
    return (U @ iso_c(full_svd(merged, len(merged)))).to(dtype) @ Vh.to(dtype)


def robust_merge(updates: Sequence[LowRank]) -> LowRank:
    """Without the published factors of 2."""
    A, B = torch.stack([u.right for u in updates]), torch.stack([u.left for u in updates])
    pruned_a, pruned_b = _pruned(A), _pruned(B)
    scales = A.abs().sum(-1) / pruned_a.abs().sum(-1)
    low = scales.sort(-1).values[:, int(scales.shape[-1] * (1 - ROBUST_TOP))]
    scales = scales.maximum(low[:, None])
    left = (pruned_b * scales[:, None]).sum(0) / scales.sum(0)
    return LowRank(left, pruned_a.sum(0))


def _pruned(factors: Tensor) -> Tensor:
    """(T, ., .) without the magnitudes below the int(N (1 - keep))-th smallest of each."""
    magnitudes = factors.abs()
    count = factors[0].numel()
    limits = magnitudes.flatten(1).topk(count - int(count * (1 - ROBUST_KEEP)) + 1, sorted=False).values.amin(1)
    return factors.masked_fill(magnitudes < limits[:, None, None], 0)
