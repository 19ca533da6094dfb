"""WUDI-Merging: a few steps of Adam away from the sum of the updates, without data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.adam import Adam, warn_if_raised
from dcmerge_ext.methods.base import Context, Method, Preset
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.stacks import dense_update
from dcmerge_ext.methods.sums import sum_updates
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.updates import Updates, UpdateSpec

_PANEL = 1 << 17
"""Elements of a panel of rows on the CPU, whose moments and step are worked on while they are in a cache."""
_ROWS = 64
"""Of a panel at least: below, reading C costs more than the arithmetic."""


class Wudi(Method, frozen=True):
    """Move the sum of the updates to where it interferes least with each task's input subspace (WUDI-Merging).

    Source: Cheng et al., arXiv 2503.08099, with the settings of the published code. Per matrix, M starts at the sum of
    the updates D_i and takes 300 steps of Adam (betas 0.9 and 0.999, eps 1e-8, no decay) down
        L(M) = sum_i |(M - D_i) D_i'|^2 / |D_i|^2
    The gradient is evaluated as 2 (E C + G) with M = sum D_i + E, C = sum C_i, C_i = D_i' D_i / |D_i|^2 and
    G = sum_i (sum of the other D_j) C_i, found once: one product per step instead of 4 T. The method is the
    early-stopped path, not its limit: the minimizers of L are those of RegMean with D_i' D_i for the inputs' Grams.

    A step is absolute, at most about ``lr`` per entry: 300 steps of 1e-5 move an entry by 3e-3 at most, and updates of
    another size need another ``lr`` (weights change the size, the scale does not). No random numbers, no data. The
    published code leaves embeddings, norms and biases at the base model (overrides with ``action: copy`` do); tensors
    that are no matrices take the mean here, as everywhere. The scale is 1.

    Cost per m x n matrix: 2 m n^2 flops per step, or 4 m n r where the updates have r < n / 2 rows of factors together.
    LowRank updates are multiplied out, for the result has full rank. Rows are independent of each other: on the CPU
    panels of them stay in cache throughout. Memory: two matrices, an update and C.
    Deviations from the published code: a zero update takes no part (there: NaN everywhere), and a gradient that is
    zero up to round-off is zero, where Adam would make whole steps of it.
    """

    name = "wudi"
    paper = "https://arxiv.org/abs/2503.08099"
    presets: ClassVar = {
        "vit": Preset({"iterations": 300, "lr": 1e-5}),
        "roberta": Preset({"iterations": 300, "lr": 2e-5}),
    }

    official: Annotated[
        Literal["vit", "roberta"] | None,
        Meta(description="the published code's settings for vision encoders or RoBERTa: a named set of these options"),
    ] = None
    iterations: Annotated[int, Meta(ge=0, description="steps of Adam; 0 gives the sum of the updates")] = 300
    lr: Annotated[
        float,
        Meta(
            gt=0,
            description="learning rate of Adam: about how far one step moves an entry of the merged update. The published "
            "code takes 1e-5 for vision encoders, the default, and 2e-5 for RoBERTa",
        ),
    ] = 1e-5

    def __post_init__(self) -> None:
        if not math.isfinite(self.lr):
            raise ValueError(f"lr must be a finite number above 0, got {self.lr}")

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        if len(specs[0].shape) < 2:
            raise InputError(f"wudi merges matrices (..., m, n), got an update of shape {specs[0].shape}")

    def merge(self, updates: Updates, ctx: Context) -> Update:
        merged = dense_update(sum_updates(updates)).to(updates.dtype)
        if not self.iterations or not merged.numel():
            return merged
        half, gram, before = _start(updates, merged)
        if not half.any():  # one task, or tasks orthogonal to each other
            return merged
        step = _descend(half, gram, self.iterations, self.lr)
        after = before + float((half.mul_(2).add_(gram.after(step)) * step).sum(dtype=torch.float64))
        ctx.facts["loss"] = [before, after]
        warn_if_raised(ctx.key or self.name, self.iterations, self.lr, before, after)
        return merged.add_(step)

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        *leading, m, n = specs[0].shape
        rows = sum(map(_rows, specs))
        per_step = m * n * (2 * min(n, 2 * rows) + 30)  # 30: Adam itself, bound by the caches
        start = 4 * m * n * rows
        return float(math.prod(leading) * (self.iterations * per_step + start))

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        *leading, m, n = specs[0].shape
        return math.prod(leading) * (6 * m * n + 2 * n * n)


wudi = register(Wudi)


class _Gram(NamedTuple):
    """C = left, or left @ right where that multiplies faster. (..., n, n)"""

    left: Tensor
    right: Tensor | None = None

    @classmethod
    def of(cls, X: Tensor) -> _Gram:
        """C = X'X."""
        rows, n = X.shape[-2:]
        return cls(X.mT, X) if 2 * rows < n else cls(X.mT @ X)

    def after(self, M: Tensor) -> Tensor:
        """M C"""
        return M @ self.left if self.right is None else (M @ self.left) @ self.right

    def each(self) -> list[_Gram]:
        """Of every matrix of the batch."""
        lefts = _matrices(self.left)
        rights = [None] * len(lefts) if self.right is None else _matrices(self.right)
        return [_Gram(left, right) for left, right in zip(lefts, rights, strict=True)]


def _start(updates: Updates, total: Tensor) -> tuple[Tensor, _Gram, float]:
    """G (..., m, n), half the gradient at the sum of the updates; C; and the loss there, added up over a batch."""
    n = total.shape[-1]
    half, loss = torch.zeros_like(total), 0.0
    heights: list[Tensor] = []
    widths: list[Tensor] = []
    narrow = 2 * sum(map(_rows, updates.specs)) < n
    factors: list[Tensor] = []
    square = None if narrow else total.new_zeros(*total.shape[:-2], n, n)
    for i, spec in enumerate(updates.specs):
        if spec.rank == 0:
            continue
        update = updates[i]
        X = _normalized_rows(update, total.dtype)
        dense = dense_update(update).to(total.dtype)
        gram, others = _Gram.of(X), total - dense
        # in float64, where no square overflows or vanishes
        heights.append(torch.linalg.vector_norm(others, dim=-1, dtype=torch.float64).square_())
        widths.append(torch.linalg.vector_norm(X, dim=-2, dtype=torch.float64).square_())
        pull = gram.after(others)
        loss += float((pull * others).sum(dtype=torch.float64))
        half += pull
        if square is None:
            factors.append(X)
        else:
            square += X.mT @ X if gram.right is not None else gram.left
    # zero up to round-off: tasks alone, or orthogonal to the others. What products of orthogonal factors leave stays below
    # two thirds of this, and little of a true gradient is that small: Adam's steps are as long for small entries as for large
    if heights:
        squares = torch.stack(heights, dim=-1) @ torch.stack(widths, dim=-2)
        half.masked_fill_(half.abs() <= squares.sqrt_().mul_(torch.finfo(total.dtype).eps), 0)
    if square is not None:
        return half, _Gram(square), loss
    X = torch.cat(factors, dim=-2) if factors else total.new_zeros(*total.shape[:-2], 0, n)
    return half, _Gram(X.mT, X), loss


def _descend(half: Tensor, gram: _Gram, iterations: int, lr: float) -> Tensor:
    """E after the last step (..., m, n). Rows are independent: on the CPU, panels of them side by side."""
    if not half.is_cpu:
        return _adam(half, gram, iterations, lr)
    m, n = half.shape[-2:]
    halves, grams, rows = _matrices(half), gram.each(), max(_ROWS, _PANEL // n)
    step = torch.empty_like(half)
    steps = _matrices(step)

    def work(panel: tuple[int, int]) -> None:
        i, begin = panel
        span = slice(begin, begin + rows)
        steps[i][span] = _adam(halves[i][span], grams[i], iterations, lr)

    side_by_side(work, [(i, begin) for i in range(len(halves)) for begin in range(0, m, rows)], each=1)
    return step


def _adam(half: Tensor, gram: _Gram, iterations: int, lr: float) -> Tensor:
    """Adam from E = 0 with the gradient 2 (E C + half)."""
    step = torch.zeros_like(half)
    adam = Adam(step, lr)
    for _ in range(iterations):
        adam.step(gram.after(step).add_(half).mul_(2))
    return step


def _normalized_rows(update: Update, dtype: torch.dtype) -> Tensor:
    """X (..., r, n) with X'X = D'D / |D|^2; zero for a zero update. Its scale is taken out first: no norm overflows."""
    update = update.to(dtype)
    # left = Q R with orthonormal Q: D'D = (R right)'(R right)
    X = torch.linalg.qr(update.left, mode="r").R @ update.right if isinstance(update, LowRank) else update
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    return X / torch.where(norm > 0, norm, 1)


def _matrices(batch: Tensor) -> tuple[Tensor, ...]:
    """The matrices of (..., m, n), views."""
    return batch.view(math.prod(batch.shape[:-2]), *batch.shape[-2:]).unbind()


def _rows(spec: UpdateSpec) -> int:
    """Of the X of an update."""
    return spec.shape[-2] if spec.rank is None else min(spec.rank, spec.shape[-2])
