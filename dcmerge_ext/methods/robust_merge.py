"""RobustMerge: LoRA adapters merged factor by factor, pruned and rescaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext import ops
from dcmerge_ext.errors import OptionError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.sums import zero_update
from dcmerge_ext.updates import Updates, UpdateSpec


class RobustMerge(Method, frozen=True):
    """Prune the LoRA factors A and B, weight the columns of B by what pruning took from A, add up (RobustMerge).

    Source: Zeng et al., arXiv 2502.17159, with the rules of the published code. Per matrix, Delta_t = B_t A_t:

        A'_t, B'_t      the entries of A_t and of B_t of largest magnitude, N - int(N (1 - keep)) + 1 of N, and all ties
        S_t[j] = sum |A_t[j, :]| / sum |A'_t[j, :]|,  those below the value of rank int(r (1 - top_scales)) raised to it
        A = sum_t A'_t        B[:, j] = sum_t S_t[j] B'_t[:, j] / sum_t S_t[j]        merged = B A

    A is summed and B averaged, as in the published code. Its factor 2 on A and on B is the default scale here, 4.

    For LoRA alone: the factors are merged, not their product, so the same update in other factors (B G, G^-1 A) merges
    differently, as does an adapter stored the other way round: where the base has its weight as (in, out), as GPT-2 and
    embeddings do, A and B change places. Weights, and each adapter's lora_alpha / r, lie on the smaller factor (B where
    they are equal); that only matters where they differ between tasks. The result is a LowRank of the largest rank of
    the adapters. Adapters of lower rank take part in their first components, pruned and ranked over their own entries
    (the published code needs equal ranks). Cost: two selections and a few operations per entry of the factors.

    Deviations from the published code, which divides by zero there: a row of A that is pruned entirely takes no part
    in its component, nor does a task with B = 0 or A = 0 in any. What adapters train besides the factors takes the mean
    in the published code; matrices among it are refused here, until an override says ``action: mean``.
    """

    name = "robust_merge"
    paper = "https://arxiv.org/abs/2502.17159"

    keep: Annotated[
        float,
        Meta(gt=0, le=1, description="rho, fraction of the entries of each A and each B that survives; published: 0.2"),
    ] = 0.2
    top_scales: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="fraction of each task's scales S that stay as they are, the others are raised to the smallest of "
            "these; published: 0.2",
        ),
    ] = 0.2

    def default_scale(self, num_tasks: int) -> float:
        """The published factors of 2 on A and on B."""
        return 4.0 if num_tasks > 1 else 1.0

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        full = [i for i, spec in enumerate(specs) if spec.rank is None]
        if full:
            raise OptionError(
                f"robust_merge merges the factors A and B of LoRA adapters, and update {full[0]} is a full "
                f"{' x '.join(map(str, specs[0].shape))} tensor; choose another method, or give such tensors one of their "
                "own or 'action: mean' (overrides)"
            )

    def merged_rank(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int | None:
        return max(spec.rank or 0 for spec in specs)

    def merge(self, updates: Updates, ctx: Context) -> Update:
        rank = self.merged_rank(updates.specs, ctx.num_tasks)
        if not rank or 0 in updates.shape:
            return zero_update(updates)
        *leading, m, n = updates.shape
        total: _Total | None = None
        for i, spec in enumerate(updates.specs):
            if not spec.rank:
                continue
            update = updates[i]
            assert isinstance(update, LowRank)
            if total is None:
                total = _Total.zeros(leading, m, rank, n, update.device)
            self._add(update, total)
        assert total is not None  # rank is above 0
        left = total.left / torch.where(total.scales > 0, total.scales, 1)[..., None, :]
        return LowRank(left, total.right).to(updates.dtype)

    def _add(self, update: LowRank, total: _Total) -> None:
        """One task, in float64: its factors are small."""
        A, B = (_pruned(factor, self.keep).double() for factor in (update.right, update.left))
        before, after = update.right.double().abs().sum(-1), A.abs().sum(-1)
        takes_part = (after > 0) & update.left.any(-1).any(-1)[..., None]
        scales = _raised(
            torch.where(takes_part, before / torch.where(takes_part, after, 1), torch.inf), self.top_scales
        )
        scales = torch.where(takes_part, scales, 0)
        r = update.rank
        total.right[..., :r, :] += torch.where(takes_part[..., None], A, 0)
        total.left[..., :r] += scales[..., None, :] * B
        total.scales[..., :r] += scales

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        # what a product of matrices does in the time of two passes of a selection
        return 30.0 * sum(_entries(spec) for spec in specs)

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        return 8 * max(map(_entries, specs))  # float64 counts twice


robust_merge = register(RobustMerge)


class _Total(NamedTuple):
    """What the tasks add up to, in float64."""

    left: Tensor
    """(..., m, r): sum of S B'"""
    right: Tensor
    """(..., r, n): sum of A'"""
    scales: Tensor
    """(..., r): sum of S"""

    @classmethod
    def zeros(cls, leading: Sequence[int], m: int, rank: int, n: int, device: torch.device) -> _Total:
        shapes = ((m, rank), (rank, n), (rank,))
        return cls(*(torch.zeros(*leading, *shape, dtype=torch.float64, device=device) for shape in shapes))


def _pruned(factor: Tensor, keep: float) -> Tensor:
    """The published rule: magnitudes below the int(N (1 - keep))-th smallest of the factor's N are set to 0."""
    count = factor.shape[-2] * factor.shape[-1]
    kept = min(count, count - int(count * (1 - keep)) + 1)
    threshold = ops.kth_magnitude(factor.flatten(-2), kept)
    return torch.where(factor.abs() >= threshold[..., None, None], factor, 0)


def _raised(scales: Tensor, top: float) -> Tensor:
    """(..., r) raised to the value of rank int(count (1 - top)), counted from 0 upwards, of the ``count`` finite ones."""
    ascending, count = scales.sort(-1).values, scales.isfinite().sum(-1, keepdim=True)
    index = (count.double() * (1 - top)).long().minimum(count - 1).clamp(min=0)
    return torch.maximum(scales, ascending.gather(-1, index))


def _entries(spec: UpdateSpec) -> int:
    """Of both factors."""
    *leading, m, n = spec.shape
    return math.prod(leading) * (m + n) * (spec.rank or 0)
