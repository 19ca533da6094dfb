"""SCORE: diagonal and trimmed off-diagonal of every task in one shared basis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.base import Context, Method, Preset
from dcmerge_ext.methods.cover import (
    Cover,
    basis_facts,
    cover_flops,
    cover_of_updates,
    cover_workspace,
    live_components,
)
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.spectral import Rank, check_ranks, component_ranks
from dcmerge_ext.methods.sums import mean_instead, zero_update
from dcmerge_ext.updates import Updates, UpdateSpec

Fraction = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]


class Score(Method, frozen=True):
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
    keeps_rank = True
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
    rank: Annotated[
        Rank | tuple[Rank, ...] | None,
        Meta(
            description="components per task that make the basis, or a list with one number per task. None: the rank of "
            "a LowRank; int(q / T) for dense updates, q = min(m, n); int((q - sum of LoRA ranks) / number of dense) "
            "when mixed"
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
    basis_tol: Annotated[
        Fraction | None,
        Meta(
            description="directions of the concatenated bases with singular values at or below this fraction of the largest "
            "are dropped. None: 2 sqrt(max(m, k)) eps",
        ),
    ] = None
    accuracy: Annotated[Literal["exact", "fast"], Meta(description="of the truncated SVD of dense updates")] = "exact"
    tol: Annotated[
        Positive | None,
        Meta(
            description="accuracy=exact: accepted residual relative to the gap of singular values at the cut. None: round-off"
        ),
    ] = None
    seed: Annotated[int, Meta(ge=0, description="of the random directions of the truncated SVD")] = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.deviations):
            raise ValueError(f"deviations must be a finite number, 0 or more, got {self.deviations}")
        if self.tol is not None and self.accuracy != "exact":
            raise ValueError(f"tol belongs to accuracy='exact', and accuracy is {self.accuracy!r}")

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        if len(specs[0].shape) < 2:
            raise InputError(f"score merges matrices (..., m, n), got an update of shape {specs[0].shape}")
        check_ranks(specs, num_tasks, self.rank)

    def merged_rank(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int | None:
        ranks = component_ranks(specs, num_tasks, self.rank)
        return super().merged_rank(specs, num_tasks) if ranks is None else sum(ranks)

    def merge(self, updates: Updates, ctx: Context) -> Update:
        ranks = component_ranks(updates.specs, ctx.num_tasks, self.rank)
        if ranks is None:
            return mean_instead(self.name, updates, ctx)
        if sum(ranks) == 0 or 0 in updates.shape:
            return zero_update(updates)

        cover, ctx.facts["svd"] = cover_of_updates(
            updates,
            ranks,
            name=self.name,
            basis_tol=self.basis_tol,
            accuracy=self.accuracy,
            tol=self.tol,
            seed=self.seed,
            key=ctx.key,
            oriented=self.center == "mean",
        )
        live = live_components(cover.spectra)
        deviations = self.deviations / (ctx.num_tasks if self.threshold == "sd/T" else 1)
        core, facts = _merged_core(updates, ranks, cover, live.sum(-1), deviations, self.center)
        ctx.facts.update(
            facts,
            rank=live.reshape(-1, live.shape[-1]).amax(0).tolist(),
            cover_rank=sum(ranks),
            cover_u=basis_facts(cover.u.values, live),
            cover_v=basis_facts(cover.v.values, live),
        )
        left, right = cover.u.times_blocks([core]), cover.v.basis().mT
        return LowRank(left, right).to(updates.dtype) if updates.all_lowrank else left @ right

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        ranks = component_ranks(specs, num_tasks, self.rank)
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
        return cover_flops(specs, ranks) + math.prod(leading) * cores

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        ranks = component_ranks(specs, num_tasks, self.rank)
        return super().workspace(specs, num_tasks) if ranks is None else cover_workspace(specs, ranks)


score = register(Score)


def _merged_core(
    updates: Updates, ranks: Sequence[int], cover: Cover, live: Tensor, deviations: float, center: str
) -> tuple[Tensor, dict[str, Any]]:
    """The sum over the tasks of the trimmed cores (..., k, k), one at a time. ``live``: (...,) components not null."""
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
    return total, {"trimmed": torch.stack(trimmed).tolist()}


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
