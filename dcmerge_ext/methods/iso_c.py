"""Iso-C: the sum of the updates with a flat spectrum; and the mean that Iso-CTS shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.errors import InputError
from dcmerge_ext.linalg.polar import default_tolerance, polar_with_values
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.base import Context, Method, Preset
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.sums import sum_updates, zero_update
from dcmerge_ext.svd.factors import thin_qr
from dcmerge_ext.updates import Updates, UpdateSpec

MeanOver = Literal["rank", "min_dim"] | None


class IsoC(Method, frozen=True):
    """Sum the updates and give all singular values of the sum their mean (isotropic merging, common subspace).

    Source: No Task Left Behind (Marczak et al., arXiv 2502.04959), Iso-C. Per matrix, q = min(m, n):
        S = sum_i Delta_i = U diag(s) V';   merged = mean(s) U V' = (|S|_* / q) polar(S)
    by one polar factor, which takes an SVD only where the spectrum of S is wide. A single task is flattened, too. For
    full-rank sums |merged|_* = |S|_*.

    LowRank updates give a LowRank, by the polar factor of a k x k matrix, k the sum of their ranks (at most q). There the
    mean is taken over the rank of S, k unless tasks share directions, so that it depends on S alone, not on its factors.
    The published formula divides by q there, too (``mean_over`` = min_dim), and fills the other q - k directions with
    arbitrary vectors: Core Space and DC-Merge, which compare with Iso-C on adapters, do not either. Null directions of a
    rank-deficient dense sum add nothing here (partial isometry), while the mean remains over q, as published.

    Scale: 1; the authors search 0.1, 0.2 .. 3.0 on validation data. Cost per m x n matrix: T m n additions and a polar
    factor; LowRank: 8 (m + n) k^2 flops. Noise is amplified: a direction with sigma_j is known to eps sigma_1 / sigma_j, whatever its weight becomes.
    """

    name = "iso_c"
    paper = "https://arxiv.org/abs/2502.04959"
    keeps_rank = True
    presets: ClassVar = {"fft": Preset({"mean_over": "min_dim"}, "apply", r"text_projection")}

    official: Annotated[
        Literal["fft"] | None,
        Meta(description="the authors' settings for full fine-tunes (text projections take the mean)"),
    ] = None
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
            description="singular values of the sum at or below this fraction of the largest count as null, and their "
            "directions are dropped (the published code keeps all). None: 2 sqrt(max(m, n)) eps in float64, eps in float32",
        ),
    ] = None

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        if len(specs[0].shape) < 2:
            raise InputError(f"iso_c merges matrices (..., m, n), got an update of shape {specs[0].shape}")

    def merged_rank(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int | None:
        return min(sum(spec.rank or 0 for spec in specs), *specs[0].shape[-2:])

    def merge(self, updates: Updates, ctx: Context) -> Update:
        if 0 in updates.shape or (updates.all_lowrank and not any(spec.rank for spec in updates.specs)):
            return zero_update(updates)
        total = sum_updates(updates)
        if isinstance(total, LowRank):
            q = min(updates.shape[-2:])
            return _flat_factors(total, self.basis_tol, self.mean_over or "rank", q, ctx.facts)
        return flattened(total, self.basis_tol, self.mean_over or "min_dim", ctx.facts)

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        *leading, m, n = specs[0].shape
        q, long = min(m, n), max(m, n)
        if all(spec.rank is not None for spec in specs):
            k = sum(spec.rank or 0 for spec in specs)
            return float(math.prod(leading) * (10 * (m + n) * k * k + 12 * k**3))
        # the polar factor of a wide spectrum: eigenvectors tried, then QR and SVD
        return float(math.prod(leading) * (len(specs) * m * n + 6 * long * q * q + 40 * q**3))

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        *leading, m, n = specs[0].shape
        batch, q = math.prod(leading), min(m, n)
        if all(spec.rank is not None for spec in specs):
            k = sum(spec.rank or 0 for spec in specs)
            return batch * (8 * (m + n) * k + 12 * k * k)  # factors, bases and result in float64
        return batch * (6 * m * n + 6 * q * q)  # the sum, its SVD or QR and SVD, weak directions in float64


iso_c = register(IsoC)


def mean_value(values: Tensor, over: Literal["rank", "min_dim"], q: int, facts: dict[str, Any]) -> Tensor:
    """(...) mean of the singular values (..., any number), of which null ones are 0. Leaves the rank in ``facts``."""
    live = (values > 0).sum(-1)
    facts["rank"] = int(live.amax())
    count = live.clamp(min=1) if over == "rank" else torch.full_like(live, q)
    return (values.double().sum(-1) / count).to(values.dtype)


def flattened(X: Tensor, tol: float | None, over: Literal["rank", "min_dim"], facts: dict[str, Any]) -> Tensor:
    """mean(s) U V' of X = U diag(s) V' (..., m, n). ``tol`` as in :func:`dcmerge_ext.linalg.polar`."""
    wide = X.shape[-1] > X.shape[-2]  # the routes to a polar factor take tall matrices
    X = X.mT if wide else X
    if tol is None and X.dtype == torch.float32:
        tol = torch.finfo(X.dtype).eps  # X is data, of which rounding has left no more than that of an exact zero
    Q, _, values = polar_with_values(X, tol)
    Q *= mean_value(values, over, X.shape[-1], facts)[..., None, None]
    return Q.mT if wide else Q


def round_off(update: LowRank) -> Tensor:
    """(...) float64 singular values of B A that round-off explains, that of its factors and of float64 work on them.

    (eps sqrt(k) + 2 sqrt(max(m, n)) eps64) (sum_j |b_j|^2 |a_j|^2)^(1/2): relative to the summands b_j a_j', not to the
    sum, so that updates that cancel leave no direction.
    """
    left, right = (torch.linalg.vector_norm(x.double(), dim=d) for x, d in ((update.left, -2), (update.right, -1)))
    size: Tensor = torch.linalg.vector_norm(left * right, dim=-1)
    m, n = update.shape[-2:]
    size *= torch.finfo(update.dtype).eps * update.rank**0.5 + default_tolerance(m, n, torch.float64)
    return size


def _flat_factors(
    total: LowRank, tol: float | None, over: Literal["rank", "min_dim"], q: int, facts: dict[str, Any]
) -> LowRank:
    """mean(s) U V' of B A: with B = Q_B R_B and A' = Q_A R_A it is Q_B (mean(s) polar(R_B R_A')) Q_A'. In float64."""
    left_q, left_r = thin_qr(total.left.double())
    right_q, right_r = thin_qr(total.right.double().mT)
    core = left_r @ right_r.mT
    *leading, rows, cols = core.shape
    least = torch.finfo(total.dtype).eps * total.rank**0.5  # as the truncated SVD of a LowRank has it
    # the Frobenius norm bounds the largest singular value, which the tolerance is relative to
    tolerances = (round_off(total) / torch.linalg.matrix_norm(core)).nan_to_num(1.0).clamp(least, 1).reshape(-1)
    found = [
        polar_with_values(X, t if tol is None else tol)
        for X, t in zip(core.reshape(-1, rows, cols), tolerances.tolist(), strict=True)
    ]
    flat, values = torch.stack([Q for Q, _, _ in found]), torch.stack([S for _, _, S in found])
    flat *= mean_value(values, over, q, facts)[..., None, None]
    flat = flat.reshape(*leading, rows, cols)
    if rows <= cols:
        return LowRank(left_q, flat @ right_q.mT).to(total.dtype)
    return LowRank(left_q @ flat, right_q.mT).to(total.dtype)
