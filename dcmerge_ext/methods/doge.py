"""DOGE: task arithmetic with one shared correction per matrix, found by projected gradient descent without data."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.adam import EPS, Adam, warn_if_raised
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.selection import Selection
from dcmerge_ext.methods.spectral import components_of
from dcmerge_ext.methods.stacks import stack_updates
from dcmerge_ext.methods.ties import Ties
from dcmerge_ext.svd import cost, decompose
from dcmerge_ext.updates import Updates, UpdateSpec

logger = logging.getLogger(__name__)


class Doge(Method, frozen=True):
    """Give the tasks one shared correction per matrix that brings their sum closer to each of them (DOGE, DOGE-TA).

    Source: Wei et al., Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent, arXiv 2501.01230, with
    the rules of the port in FusionBench (DOGE-TA). Per matrix, with l_i = coefficient / |D_i| (Frobenius), l = sum_i l_i:

        L(X) = sum_j sum_rows <D_j, D_j - sum_i l_i D_i - l X>_row^2
        X: 400 steps of Adam from 0 (lr 1e-4, betas 0.9 and 0.999, eps 1e-8) along the gradient less its projection on P
        merged = sum_i l_i mask_i (D_i + X),  mask_i the int(N keep) + 1 largest entries of D_i in the whole model, and ties

    P: the int(q / 6) leading left singular vectors of the concatenation of each task's int(q / T) leading ones,
    q = min(m, n). Where q < 6, or T > q, there is none, and nothing is projected; with fewer directions than that in the
    tasks (adapters), P is those there are. Each matrix is a problem of its own, but for the mask: one threshold per task,
    found by counting digits of magnitudes in two passes (four over float64) without holding any model.

    Each D_i is divided by its norm, matrix by matrix: the sizes of the tasks do not matter, nor do their weights (only a
    weight's sign, and 0). The steps are absolute, at most about ``lr`` per entry: updates of another size need another
    ``lr``. Where the loss rises instead, a warning says so. No random numbers, no data. The scale is 1.

    The published code merges the encoder's weight matrices alone and leaves everything else at the base model (overrides
    with ``action: copy`` do); here the tensors that are no matrices take the mean. Cost per m x n matrix: T truncated SVDs,
    one of their bases, and 4 m n (T + q / 6) flops per step. The result of LowRank updates is dense. Memory: 2 T + 10 matrices.

    Deviations from the published code: an update that is zero, or round-off beside the largest, takes no part (there:
    division by zero); a single task comes back as it is; null directions of the tasks do not enter P (there: what the SVD
    fills them with).
    """

    name = "doge"
    paper = "https://arxiv.org/abs/2501.01230"
    scope = "model"

    coefficient: Annotated[
        float, Meta(gt=0, description="norm of each task's share of the merged matrix, l_i |D_i|; published: 0.07")
    ] = 0.07
    keep: Annotated[
        float, Meta(gt=0, le=1, description="fraction of each task vector that the mask keeps; published: 0.3")
    ] = 0.3
    subspace: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="the gradient is projected off int(min(m, n) / subspace) shared directions; published: 6. None: no "
            "projection",
        ),
    ] = 6
    iterations: Annotated[int, Meta(ge=0, description="steps of Adam, 400 as published; 0: no correction")] = 400
    lr: Annotated[
        float,
        Meta(gt=0, description="learning rate of Adam: about how far one step moves an entry of X; published: 1e-4"),
    ] = 1e-4

    def __post_init__(self) -> None:
        for option in ("coefficient", "lr"):
            if not math.isfinite(value := getattr(self, option)):
                raise ValueError(f"{option} must be a finite number above 0, got {value}")

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        if len(specs[0].shape) < 2:
            raise InputError(f"doge merges matrices (..., m, n), got an update of shape {specs[0].shape}")

    def num_surveys(self, dtype: torch.dtype) -> int:
        return 0 if self.keep == 1 else Selection.num_passes(dtype)

    def begin(self, num_tasks: int, dtype: torch.dtype) -> Selection | Tensor:
        if self.keep == 1:  # nothing is masked
            return torch.zeros(num_tasks, dtype=dtype)
        return Selection.begin(num_tasks, dtype)

    def survey(self, key: str, updates: Updates, state: Selection) -> None:
        Ties(keep=self.keep).survey(key, updates, state)  # the same counting, and below the same rule

    def finish(self, state: Selection) -> Selection | Tensor:
        return state.finish(lambda total: int(total * self.keep) + 1)

    def merge(self, updates: Updates, ctx: Context) -> Update:
        thresholds: Tensor = ctx.state
        *leading, m, n = updates.shape
        stack = stack_updates(updates, updates.dtype).reshape(len(updates), math.prod(leading), m, n)
        if ctx.num_tasks == 1 or not stack.numel():
            return stack[0].reshape(updates.shape)
        norms = torch.linalg.vector_norm(stack, dim=(-2, -1), dtype=torch.float64)  # (T, batch)
        present = norms > torch.finfo(stack.dtype).eps * norms.amax(0)
        bases, svd_facts = self._shared_bases(updates, present, ctx)
        merged, losses = torch.zeros_like(stack[0]), [0.0, 0.0]
        for i, basis in enumerate(bases):
            tasks = present[:, i].nonzero().flatten().tolist()
            if not tasks:
                continue
            own = norms[tasks, i]
            lambdas = self.coefficient / own
            correction, loss = _descend(
                [stack[t, i] for t in tasks], own, lambdas, basis, iterations=self.iterations, lr=self.lr
            )
            total = torch.zeros_like(correction, dtype=torch.float64)
            for t, factor in zip(tasks, lambdas.tolist(), strict=True):
                # compared in the dtype of the thresholds: rounding one could move an entry across
                kept = stack[t, i].to(thresholds.dtype).abs() >= thresholds[t].to(stack.device)
                total.add_(torch.where(kept, stack[t, i] + correction, 0), alpha=factor)
            merged[i] = total
            losses = [added + one for added, one in zip(losses, loss, strict=True)]
        ctx.facts.update(svd_facts, loss=losses)
        warn_if_raised(ctx.key or self.name, self.iterations, self.lr, *losses)
        return merged.reshape(updates.shape)

    def _directions(self, shape: Sequence[int]) -> int:
        """Shared directions the gradient is projected off."""
        return 0 if self.subspace is None else min(shape[-2:]) // self.subspace

    def _ranks(self, specs: Sequence[UpdateSpec], num_tasks: int) -> list[int]:
        """Components of each task that the shared directions are found among."""
        each = min(specs[0].shape[-2:]) // num_tasks
        return [each if spec.rank is None else min(each, spec.rank) for spec in specs]

    def _shared_bases(
        self, updates: Updates, present: Tensor, ctx: Context
    ) -> tuple[list[Tensor | None], dict[str, Any]]:
        """Orthonormal columns (m, p) for each matrix of the batch; zero columns where the tasks have fewer directions.

        ``present``: (T, batch), which tasks take part.
        """
        count = math.prod(updates.shape[:-2])
        ranks = self._ranks(updates.specs, ctx.num_tasks)
        directions = min(self._directions(updates.shape), sum(ranks))
        if not directions or not self.iterations:
            return [None] * count, {}
        components, facts = components_of(updates, ranks, key=ctx.key)
        takes_part = present.reshape(len(ranks), *updates.shape[:-2], 1, 1)
        tasks = [i for i, rank in enumerate(ranks) if rank]
        columns = [c.U.to(updates.dtype) * takes_part[i] for i, c in zip(tasks, components, strict=True)]
        together = torch.cat(columns, dim=-1)
        components.clear()
        (U, _, _), evidence = decompose(together, directions)
        if any(e.tie for e in evidence):
            logger.warning(
                "%s: shared directions tie at the cut; one of several equally good subspaces is used",
                ctx.key or self.name,
            )
        return list(U.reshape(count, *U.shape[-2:]).unbind()), {"svd": facts}

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        *leading, m, n = specs[0].shape
        ranks, directions = self._ranks(specs, num_tasks), self._directions(specs[0].shape)
        per_step = m * n * (4 * (num_tasks + directions) + 30)  # 30: Adam, bound by the caches
        start = sum(
            cost.plan(m, n, rank).cost if spec.rank is None else 28 * (m + n) * spec.rank**2
            for spec, rank in zip(specs, ranks, strict=True)
            if rank
        )
        if directions := min(directions, sum(ranks)):
            start += cost.plan(m, sum(ranks), directions).cost
        return float(math.prod(leading) * (self.iterations * per_step + start))

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        # the updates, and once more those of the matrix in descent; X, its moments, a step, a sum in float64
        *leading, m, n = specs[0].shape
        return math.prod(leading) * (num_tasks + 1) * m * n + (num_tasks + 9) * m * n


doge = register(Doge)


def _descend(
    task_vectors: Sequence[Tensor],
    norms: Tensor,
    lambdas: Tensor,
    basis: Tensor | None,
    *,
    iterations: int,
    lr: float,
) -> tuple[Tensor, list[float]]:
    """X (m, n) after the last step, and L(X) before the first and after the last.

    With V_j = D_j / s, s the largest norm, and b_j = l_j s the residuals of a row are b V_j X - s V_j (s V_j - sum_i b_i V_i),
    b = sum_i b_i: nothing leaves the range of float32 whatever the size of the updates, once all is divided by
    max(1, s^2). Adam does not see that factor, except in its eps.

    Args:
        task_vectors: T of (m, n).   norms, lambdas: (T,) in float64, norms above 0.   basis: (m, p).
    """
    largest = float(norms.max())
    if not iterations:
        return torch.zeros_like(task_vectors[0]), [0.0, 0.0]
    unit = max(1.0, largest * largest)
    V = torch.stack(list(task_vectors), dim=1).div_(largest)  # rows first: (m, T, n)
    shares = lambdas * largest
    total = torch.einsum("t,mtn->mn", shares.to(V.dtype), V)
    gaps = ((v * (largest * largest / unit)).sub_(total, alpha=largest / unit).mul_(v) for v in V.unbind(1))
    target = torch.stack([gap.sum(-1) for gap in gaps], dim=1)  # (m, T)
    V *= float(shares.sum())
    X = torch.zeros_like(total)
    adam = Adam(X, lr, max(EPS / unit, torch.finfo(V.dtype).tiny))

    def residuals() -> Tensor:
        return torch.bmm(X[:, None], V.mT)[:, 0].div_(unit).sub_(target)

    def loss() -> float:
        return float(residuals().double().square().sum()) * unit * unit

    before = loss()
    for i in range(iterations):
        gradient = torch.bmm(residuals()[:, None].mul_(2), V)[:, 0]
        if basis is not None:
            whole = gradient.norm() if i == 0 else None
            gradient.addmm_(basis, basis.mT @ gradient, alpha=-1)
            if whole is not None and gradient.norm() <= _round_off(basis) * whole:
                break  # all of it is shared: Adam would make whole steps of the rest
        adam.step(gradient)
    return X, [before, loss()]


def _round_off(basis: Tensor) -> float:
    """Of a projection off ``basis``, relative to what is projected."""
    return float(torch.finfo(basis.dtype).eps * 4 * basis.shape[0] ** 0.5)
