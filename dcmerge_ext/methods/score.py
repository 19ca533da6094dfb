"""SCORE: diagonal and trimmed off-diagonal of every task in one shared basis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.base import Context, Preset
from dcmerge_ext.methods.cover import Cover
from dcmerge_ext.methods.cover_method import CoverMethod
from dcmerge_ext.methods.registry import register
from dcmerge_ext.updates import Updates, UpdateSpec


class Score(CoverMethod, frozen=True):
    """See every task in one shared basis, drop its off-diagonal outliers, sum, map back (SCORE).

    Source: SCORE (arXiv 2603.05768, CVPR 2026), with the rules of the published code where they are known. Per matrix,
    with k the sum of the ranks, from the truncated SVDs of all tasks:
        U~ = polar([U_1 .. U_T]),  V~ = polar([V_1 .. V_T])
        C_i = U~' D_i V~                   k x k, of the whole update D_i, not of its truncation
        off_i = C_i without its diagonal;  keep the entries with |off_i - mu| <= theta
        merged = U~ (sum of diag(C_i) + kept off_i) V~'
    theta = 1.96 sd over all k^2 entries of off_i, its zero diagonal included, divided by k^2 - 1. The scale is 1.

    mu = 0 (the default): the result does not depend on the arbitrary signs of singular vectors. The published code
    subtracts the mean of off_i, which does: flipping one pair (u_j, v_j) changes the merged matrix by 10 to 20 %. With
    ``center="mean"`` each u_j has a positive sum here, which repeats the result, but is not the choice of any LAPACK.

    LowRank updates keep all their components by default and give a LowRank of rank k. Where a task's components are
    all kept, C_i = H_u[:, I_i] diag(s_i) H_v[:, I_i]' from the polar factors H, without the matrix. Otherwise the cost
    beside that of the cover is T (2 m n k + 2 min(m, n) k^2) flops.
    Memory: the singular vectors kept and a few k x k matrices, whatever T. In float32 an entry within round-off of its
    threshold may be decided otherwise than in float64; each changes the merged matrix by about 1 / k.

    Deviations from the published code, which pads the basis with arbitrary directions up to min(m, n), on input where
    its result is arbitrary: the basis ends with the components (T r < min(m, n)), rank-deficient bases and null
    components add no made-up directions and are not counted, and fewer rows than tasks gives the mean, with a warning,
    not zero. Its ablations "off-diagonal" and "full matrix" do not compute what they are named for, and are left out.
    """

    name = "score"
    paper = "https://arxiv.org/abs/2603.05768"
    presets: ClassVar = {
        "natural": Preset({"deviations": 1.96, "threshold": "sd/T", "center": "mean"}, mean_tensors=r"text_projection"),
        "medical": Preset({"deviations": 1.96, "threshold": "sd", "center": "mean"}, mean_tensors=r"text_projection"),
    }

    official: Annotated[
        Literal["natural", "medical"] | None,
        Meta(
            description="the published code's settings for natural images, or for its two medical datasets: a named set "
            "of these options"
        ),
    ] = None
    deviations: Annotated[
        float,
        Meta(
            ge=0,
            description="off-diagonal entries further than this many standard deviations from the center are dropped; "
            "0 keeps the diagonal alone",
        ),
    ] = 1.96
    threshold: Annotated[
        Literal["sd", "sd/T"],
        Meta(
            description="what the deviations count: the standard deviation (the paper; the published code for medical "
            "data), or that divided by the number of tasks (the published code for all other data)"
        ),
    ] = "sd"
    center: Annotated[
        Literal["zero", "mean"],
        Meta(
            description="of the entries kept. zero: no dependence on signs of singular vectors; mean: of all entries, as "
            "the published code"
        ),
    ] = "zero"

    def __post_init__(self) -> None:
        if not math.isfinite(self.deviations):
            raise ValueError(f"deviations must be a finite number, 0 or more, got {self.deviations}")
        super().__post_init__()

    def cover_of(self, updates: Updates, ranks: Sequence[int], ctx: Context, **settings: Any) -> Cover:
        return super().cover_of(updates, ranks, ctx, oriented=self.center == "mean", **settings)

    def blocks(self, cover: Cover, live: Tensor, updates: Updates, ranks: Sequence[int], ctx: Context) -> list[Tensor]:
        deviations = self.deviations / (ctx.num_tasks if self.threshold == "sd/T" else 1)
        core, ctx.facts["trimmed"] = _merged_core(updates, ranks, cover, live.sum(-1), deviations, self.center)
        return [core]

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        *leading, m, n = specs[0].shape
        k = sum(self.ranks(specs, num_tasks) or [])
        return super().workspace(specs, num_tasks) + math.prod(leading) * ((m + n) * k + 4 * k * k)  # bases and cores

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        ranks = self.ranks(specs, num_tasks)
        if ranks is None:
            return 0.0
        *leading, m, n = specs[0].shape
        k, q = sum(ranks), min(m, n)
        cores = sum(
            2 * k * k * rank
            if rank == q or rank == spec.rank
            else 2 * m * n * k + 2 * q * k * k
            if spec.rank is None
            else 2 * k * (m + n + k) * spec.rank
            for spec, rank in zip(specs, ranks, strict=True)
        )
        return super().flops(specs, num_tasks) + math.prod(leading) * cores


score = register(Score)


def _merged_core(
    updates: Updates, ranks: Sequence[int], cover: Cover, live: Tensor, deviations: float, center: str
) -> tuple[Tensor, list[int]]:
    """The sum over the tasks of the trimmed cores (..., k, k), one at a time, and the entries trimmed from each. ``live``: (...,) components not null."""
    q = min(updates.shape[-2:])
    spectra = iter(cover.spectra)
    total, trimmed, begin = torch.zeros_like(cover.u.root), [], 0
    bases: tuple[Tensor, Tensor] | None = None
    for i, (spec, rank) in enumerate(zip(updates.specs, ranks, strict=True)):
        if not rank:
            continue
        S, slots = next(spectra), slice(begin, begin + rank)
        begin += rank
        if rank == q or rank == spec.rank:  # no component is left out
            core = (cover.u.root[..., slots] * S[..., None, :]) @ cover.v.root[..., slots].mT
        else:
            if bases is None:
                bases = cover.u.basis().to(total.dtype), cover.v.basis().to(total.dtype)
            core = _projected(updates[i], *bases)
        total += (diagonal := torch.diag_embed(core.diagonal(dim1=-2, dim2=-1)))
        off = core.sub_(diagonal)
        limits = _limits(off, live, deviations, center)
        outliers = (off < limits[0]) | (off > limits[1])
        total += off.masked_fill_(outliers, 0)
        trimmed.append(outliers.sum())
    return total, torch.stack(trimmed).tolist()


def _projected(update: Update, U: Tensor, V: Tensor) -> Tensor:
    """U' D V, the smaller side first."""
    update = update.to(U.dtype)
    if isinstance(update, LowRank):
        return (U.mT @ update.left) @ (update.right @ V)
    m, n = update.shape[-2:]
    return U.mT @ (update @ V) if m <= n else (U.mT @ update) @ V


def _limits(off: Tensor, live: Tensor, deviations: float, center: str) -> tuple[Tensor, Tensor]:
    """Smallest and largest off-diagonal entry that is kept, (..., 1, 1), from moments in float64.

    ``live``: (...,) order of the part of ``off`` that counts; the rest, null components, is zero.
    """
    count = live.double()[..., None, None] ** 2
    total = off.sum((-2, -1), dtype=torch.float64, keepdim=True)
    squares = torch.linalg.vector_norm(off, dim=(-2, -1), keepdim=True, dtype=torch.float64) ** 2
    mean = total / count.clamp(min=1) if center == "mean" else torch.zeros_like(total)
    deviation = ((squares - count * mean**2).clamp(min=0) / (count - 1).clamp(min=1)).sqrt()
    low, high = mean - deviations * deviation, mean + deviations * deviation
    return low.to(off.dtype), high.to(off.dtype)
