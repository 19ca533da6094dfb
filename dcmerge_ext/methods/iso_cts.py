"""Iso-CTS: a flat spectrum over common and task-specific subspaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.errors import InputError
from dcmerge_ext.linalg.polar import default_tolerance
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.base import Context, Method, Preset
from dcmerge_ext.methods.cover import basis_facts, cover_of, live_components
from dcmerge_ext.methods.iso_c import MeanOver, mean_value, round_off
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.spectral import components_of
from dcmerge_ext.methods.sums import sum_updates, zero_update
from dcmerge_ext.svd import Components, cost, decompose
from dcmerge_ext.updates import Updates, UpdateSpec


class IsoCTS(Method, frozen=True):
    """Common directions of the sum plus each task's own, made orthonormal together, with one singular value (Iso-CTS).

    Source: No Task Left Behind (Marczak et al., arXiv 2502.04959), Iso-CTS. Per matrix, q = min(m, n):
        S = sum_i Delta_i ~ U_c diag(s_c) V_c'              its c largest components, the common subspace
        R_i = Delta_i - U_c U_c' Delta_i ~ U_i diag(s_i) V_i'      the p largest of each task's rest
        merged = mean(s) polar([U_1 .. U_T U_c]) polar([V_1 .. V_T V_c])',   s = [s_1 .. s_T s_c]
    with p = round((q - int(gamma q)) / T), half to even, and c = q - p T. With p = 0 or one task it is Iso-C.

    LowRank updates share a budget of k, the sum of their ranks (at most q), in place of q: c + p T = k, p at least 1
    (as the authors of DC-Merge compare with it on adapters), no more than a task's rank, and the mean is over the
    components that are not null; they give a LowRank of rank k. A LowRank of rank 0 does not count in T.

    Scale: 1; the authors search 0.1, 0.2 .. 3.0 on validation data. Cost per m x n matrix: one SVD for c components, T
    truncated SVDs for p, 4 T m n c flops for the R_i, and the polar factors of m x q and n x q.
    Deviations from the published code, where its result is arbitrary: null components, parts of R_i at the round-off of
    Delta_i, and dependent directions add nothing made up (partial isometry); p T never exceeds the budget.
    """

    name = "iso_cts"
    paper = "https://arxiv.org/abs/2502.04959"
    keeps_rank = True
    presets: ClassVar = {"fft": Preset({"gamma": 0.8, "mean_over": "min_dim"}, "apply", r"text_projection")}

    official: Annotated[
        Literal["fft"] | None,
        Meta(description="the authors' settings for full fine-tunes (text projections take the mean)"),
    ] = None
    gamma: Annotated[
        float, Meta(ge=0, le=1, description="fraction of common directions (paper and code 0.8); 1 gives Iso-C")
    ] = 0.8
    mean_over: Annotated[
        MeanOver,
        Meta(
            description="what the sum of the singular values is divided by: rank, the number of those that are not null; "
            "min_dim, q = min(m, n) (paper and code). None: rank when all updates are LowRank, min_dim otherwise"
        ),
    ] = None
    basis_tol: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(
            description="directions of the concatenated bases with singular values at or below this fraction of the largest "
            "are dropped (the published code keeps all). None: 2 sqrt(max(m, k)) eps in float64; in float32 eps, seen in float64 where float32 does not tell",
        ),
    ] = None
    accuracy: Annotated[
        Literal["exact", "fast"], Meta(description="of the SVDs of dense R_i; that of their sum is always exact")
    ] = "exact"
    seed: Annotated[int, Meta(ge=0, description="of the random directions of the truncated SVD")] = 0

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        if len(specs[0].shape) < 2:
            raise InputError(f"iso_cts merges matrices (..., m, n), got an update of shape {specs[0].shape}")

    def sizes(self, specs: Sequence[UpdateSpec]) -> tuple[int, list[int]]:
        """c, and components of each task's own."""
        q = min(specs[0].shape[-2:])
        lowrank = all(spec.rank is not None for spec in specs)
        budget = min(q, sum(spec.rank or 0 for spec in specs)) if lowrank else q
        tasks = sum(spec.rank != 0 for spec in specs)
        if tasks == 0:
            return 0, [0] * len(specs)
        own = round((budget - int(budget * self.gamma)) / tasks)
        if lowrank and self.gamma < 1:
            own = max(1, own)
        own = min(own, budget // tasks)
        each = [own if spec.rank is None else min(own, spec.rank) for spec in specs]
        return budget - sum(each), each

    def merged_rank(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int | None:
        return min(sum(spec.rank or 0 for spec in specs), *specs[0].shape[-2:])

    def merge(self, updates: Updates, ctx: Context) -> Update:
        common, own = self.sizes(updates.specs)
        if 0 in updates.shape or common + sum(own) == 0:
            return zero_update(updates)
        components = []
        if common:
            total = sum_updates(updates)
            shared, _ = decompose(total, common)
            components.append(_without_null(shared, round_off(total)) if isinstance(total, LowRank) else shared)
        basis = components[0].U if common else None
        if any(own):
            specific, ctx.facts["svd"] = _own_components(updates, own, basis, self.accuracy, self.seed, ctx.key)
            components = specific + components
        dtype = torch.float64 if updates.all_lowrank else updates.dtype
        tasks = [i for i, rank in enumerate(own) if rank]

        def source(i: int) -> Update:
            return _rest(updates[tasks[i]].double(), basis) if i < len(tasks) else sum_updates(updates)

        cover = cover_of(components, dtype, self.basis_tol, torch.finfo(updates.dtype).eps, source)
        live = live_components(cover.spectra)
        over = self.mean_over or ("rank" if updates.all_lowrank else "min_dim")
        mean = mean_value(torch.cat(cover.spectra, dim=-1), over, min(updates.shape[-2:]), ctx.facts)
        ctx.facts.update(
            common=common,
            own=own,
            cover_u=basis_facts(cover.u.values, live),
            cover_v=basis_facts(cover.v.values, live),
        )
        left, right = cover.u.basis() * mean[..., None, None], cover.v.basis().mT
        return LowRank(left, right).to(updates.dtype) if updates.all_lowrank else left @ right

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        *leading, m, n = specs[0].shape
        common, own = self.sizes(specs)
        k = common + sum(own)
        if all(spec.rank is not None for spec in specs):
            return float(math.prod(leading) * (40 * (m + n) * k * k + 50 * k**3))
        decompositions = cost.dense(m, n, max(common, 1)).cost
        for spec, rank in zip(specs, own, strict=True):
            if rank:
                decompositions += 4 * m * n * common + cost.plan(m, n, rank).cost if spec.rank is None else 0
        return float(math.prod(leading) * (decompositions + 6 * (m + n) * k * k + 24 * k**3 + 2 * k * m * n))

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        *leading, m, n = specs[0].shape
        common, own = self.sizes(specs)
        batch, k, q = math.prod(leading), common + sum(own), min(m, n)
        if all(spec.rank is not None for spec in specs):
            return batch * (12 * (m + n) * k + 12 * k * k)
        return batch * (7 * m * n + 4 * (m + n) * k + 6 * q * q)


iso_cts = register(IsoCTS)


def _own_components(
    updates: Updates,
    ranks: Sequence[int],
    basis: Tensor | None,
    accuracy: Literal["exact", "fast"],
    seed: int,
    key: str,
) -> tuple[list[Components], dict[str, Any]]:
    """Components of R_i = (I - U U') Delta_i, U (..., m, c) the common basis. What is round-off of Delta_i is null."""
    m, n = updates.shape[-2:]
    tolerance = default_tolerance(m, n, updates.dtype)
    limits: dict[int, Tensor] = {}

    def rest(i: int) -> Update:
        update = updates[i]
        if isinstance(update, LowRank):  # in float64, as all that is done with factors
            limits[i] = round_off(update)
            return _rest(update.double(), basis)
        limits[i] = torch.linalg.matrix_norm(update, dtype=torch.float64) * tolerance
        return _rest(update, basis)

    components, facts = components_of(Updates(updates.specs, rest), ranks, accuracy=accuracy, seed=seed, key=key)
    tasks = [i for i, rank in enumerate(ranks) if rank]
    return [_without_null(found, limits[i]) for i, found in zip(tasks, components, strict=True)], facts


def _without_null(components: Components, limit: Tensor) -> Components:
    """Those with singular values at or below ``limit`` (...) become null components."""
    U, S, Vh = components
    null = limit[..., None].to(S) >= S
    return Components(U.masked_fill(null[..., None, :], 0), S.masked_fill(null, 0), Vh.masked_fill(null[..., None], 0))


def _rest(X: Update, basis: Tensor | None) -> Update:
    """(I - U U') X."""
    if basis is None:
        return X
    if isinstance(X, LowRank):
        left = _rest(X.left, basis)
        assert isinstance(left, Tensor)
        return LowRank(left, X.right)
    U = basis.to(X.dtype)
    return X - U @ (U.mT @ X)
