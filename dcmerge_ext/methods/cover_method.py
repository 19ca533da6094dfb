"""What the methods that merge in a shared cover basis have in common: DC-Merge, SCORE, TSV-M."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta
from torch import Tensor

from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.cover import (
    SIDES_TOGETHER,
    Cover,
    basis_facts,
    cover_of_updates,
    live_components,
    warn_of_ties,
)
from dcmerge_ext.methods.spectral import Rank, check_ranks, component_ranks, concurrent_updates
from dcmerge_ext.methods.sums import mean_instead, zero_update
from dcmerge_ext.methods.tall import Panels, is_tall, tall_cover
from dcmerge_ext.stages import stage
from dcmerge_ext.svd import cost, summarize
from dcmerge_ext.updates import Updates, UpdateSpec


class CoverMethod(Method, frozen=True):
    """Truncate each update, find the cover of all components, fill it with a block-diagonal core, multiply out.

    A method says what the core is (:meth:`blocks`).
    """

    keeps_rank = True
    core_from_cover: ClassVar[bool] = False
    """:meth:`blocks` needs no more of the updates than their cover and spectra."""

    official: Annotated[str | None, Meta(description="a named set of these options")] = None
    rank: Annotated[
        Rank | tuple[Rank, ...] | None,
        Meta(
            description="components kept per task, or a list with one number per task. None: the numerical rank of a LowRank; "
            "int(q / T) for dense updates, q = min(m, n); int((q - sum of LoRA ranks) / number of dense) when mixed"
        ),
    ] = None
    basis_tol: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(
            description="directions of the concatenated bases with singular values at or below this fraction of the largest "
            "are dropped (published code keeps all). None: 2 sqrt(max(m, k)) eps in float64; in float32 eps, seen in float64 where float32 does not tell",
        ),
    ] = None
    accuracy: Annotated[Literal["exact", "fast"], Meta(description="of the truncated SVD of dense updates")] = "exact"
    tol: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="accuracy=exact: accepted residual relative to the gap of singular values at the cut. None: round-off"
        ),
    ] = None
    seed: Annotated[int, Meta(ge=0, description="of the random directions of the truncated SVD")] = 0

    def __post_init__(self) -> None:
        if self.tol is not None and self.accuracy != "exact":
            raise ValueError(f"tol belongs to accuracy='exact', and accuracy is {self.accuracy!r}")

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        if len(specs[0].shape) < 2:
            raise InputError(f"{self.name} merges matrices (..., m, n), got an update of shape {specs[0].shape}")
        preset_rank = self.official is not None and "rank" in self.presets[self.official].options
        # a preset's 16 is the authors' number for any adapter; smaller matrices have fewer components
        check_ranks(specs, num_tasks, self.rank, at_most_q=not preset_rank)

    def ranks(self, specs: Sequence[UpdateSpec], num_tasks: int) -> list[int] | None:
        """Components (slots) kept per task; None where the rule leaves a task none, and the mean is taken instead."""
        return component_ranks(specs, num_tasks, self.rank)

    def merged_rank(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int | None:
        ranks = self.ranks(specs, num_tasks)
        return super().merged_rank(specs, num_tasks) if ranks is None else sum(ranks)

    def merge(self, updates: Updates, ctx: Context) -> Update:
        ranks = self.ranks(updates.specs, ctx.num_tasks)
        if ranks is None:
            return mean_instead(self.name, updates, ctx)
        if sum(ranks) == 0 or 0 in updates.shape:
            return zero_update(updates)
        cover = self.cover_of(updates, ranks, ctx)
        blocks = self._core(cover, updates, ranks, ctx)
        with stage("back-project", _back_flops(cover, blocks, dense=not updates.all_lowrank)):
            left, right = cover.u.times_blocks(blocks), cover.v.basis().mT
            return LowRank(left, right).to(updates.dtype) if updates.all_lowrank else left @ right

    def in_panels(self, specs: Sequence[UpdateSpec], num_tasks: int) -> bool:
        return self.core_from_cover and is_tall(specs) and bool(sum(self.ranks(specs, num_tasks) or []))

    def prepare(self, specs: Sequence[UpdateSpec], panels: Panels, ctx: Context) -> Callable[[Updates], Update]:
        ranks = self.ranks(specs, ctx.num_tasks)
        assert ranks is not None
        tall = tall_cover(panels, specs, ranks, self.basis_tol)
        ctx.facts["svd"] = summarize(tall.evidence)
        warn_of_ties(ctx.facts["svd"], ctx.key or self.name)
        blocks = self._core(tall.cover, Updates(specs, _not_at_hand), ranks, ctx)
        with stage("back-project", _back_flops(tall.cover, blocks, dense=True)):
            through = tall.cover.u.times_blocks(blocks) @ tall.cover.v.basis().mT
        tasks = [i for i, rank in enumerate(ranks) if rank]

        def merge_rows(panel: Updates) -> Update:
            rows, n = panel.shape
            with stage("back-project", 2.0 * rows * n * 2 * len(through)):
                return tall.rows_of(panel, tasks).float() @ through

        return merge_rows

    def _core(self, cover: Cover, updates: Updates, ranks: Sequence[int], ctx: Context) -> list[Tensor]:
        """Diagonal blocks of the merged core, and the facts about the cover."""
        live = live_components(cover.spectra)
        blocks = self.blocks(cover, live, updates, ranks, ctx)
        ctx.facts.update(
            rank=live.reshape(-1, live.shape[-1]).amax(0).tolist(),
            cover_rank=sum(ranks),
            cover_u=basis_facts(cover.u.values, live),
            cover_v=basis_facts(cover.v.values, live),
        )
        return blocks

    def cover_of(self, updates: Updates, ranks: Sequence[int], ctx: Context, **settings: Any) -> Cover:
        """The cover of the updates' components; ``settings`` as :func:`~dcmerge_ext.methods.cover.cover_of_updates`."""
        cover, ctx.facts["svd"] = cover_of_updates(
            updates,
            ranks,
            name=self.name,
            basis_tol=self.basis_tol,
            accuracy=self.accuracy,
            tol=self.tol,
            seed=self.seed,
            key=ctx.key,
            **settings,
        )
        return cover

    def blocks(self, cover: Cover, live: Tensor, updates: Updates, ranks: Sequence[int], ctx: Context) -> list[Tensor]:
        """Diagonal blocks (..., b, b) of the merged core, together of the order of the cover.

        ``live``: (..., T) components of each task with any that are not null.
        """
        raise TypeError(f"{type(self).__name__} does not implement blocks")

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        ranks = self.ranks(specs, num_tasks)
        if ranks is None:
            return 0.0
        return tall_flops(specs, ranks) if self.in_panels(specs, num_tasks) else cover_flops(specs, ranks)

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        ranks = self.ranks(specs, num_tasks)
        if ranks is None:
            return super().workspace(specs, num_tasks)
        return tall_workspace(specs, ranks) if self.in_panels(specs, num_tasks) else cover_workspace(specs, ranks)


def _not_at_hand(task: int) -> Update:
    raise TypeError(f"update {task} is seen by panels only")


def _back_flops(cover: Cover, blocks: Sequence[Tensor], *, dense: bool) -> float:
    """Of :meth:`Cover.times_blocks <Side.times_blocks>`, of the other basis where it is a product, and of both."""
    *leading, m, height = cover.u.factor.shape
    n, k = cover.v.factor.shape[-2], sum(block.shape[-1] for block in blocks)
    squares = sum(block.shape[-1] ** 2 for block in blocks)
    mixing = 0.0 if cover.u.mix is None else 2.0 * (m + n) * height * k
    left = 2.0 * (m if cover.u.mix is None else height) * squares
    return math.prod(leading) * (left + mixing + (2.0 * m * n * k if dense else 0.0))


def cover_flops(specs: Sequence[UpdateSpec], ranks: Sequence[int]) -> float:
    """SVDs, both sides of the cover, T cores, and the way back to the matrix."""
    *leading, m, n = specs[0].shape
    k = sum(ranks)
    decompositions = sum(
        cost.plan(m, n, rank).cost if spec.rank is None else 28 * (m + n) * spec.rank**2
        for spec, rank in zip(specs, ranks, strict=True)
    )
    # an eigenvector costs as much as 5 products
    return float(math.prod(leading) * (decompositions + 6 * (m + n) * k * k + 24 * k**3 + 2 * k * m * n))


def cover_workspace(specs: Sequence[UpdateSpec], ranks: Sequence[int]) -> int:
    """Largest number of float32 elements alive at once: in the truncated SVDs, in the polar factors, or after them."""
    *leading, m, n = specs[0].shape
    batch, k = math.prod(leading), sum(ranks)
    if all(spec.rank is not None for spec in specs):
        return batch * (8 * (m + n) * k + 12 * k * k)  # factors, basis and result in float64
    dense = [rank for spec, rank in zip(specs, ranks, strict=True) if spec.rank is None]
    decompositions = concurrent_updates(m * n, len(dense)) * (m * n + cost.workspace(m, n, max(dense)))
    sides = [3 * side * k + 5 * k * k for side in (m, n)]
    polar = sum(sides) if k in SIDES_TOGETHER else max(sides) + max(m, n) * k + k * k
    after = (m + n) * k + 6 * k * k
    return batch * max((m + n) * k + max(decompositions, polar), after + m * n, 3 * m * n)


def tall_flops(specs: Sequence[UpdateSpec], ranks: Sequence[int]) -> float:
    """As :func:`cover_flops`, of a matrix seen by panels; float64 products count 1.75 times."""
    m, n = specs[0].shape[-2:]
    tasks, k = sum(rank > 0 for rank in ranks), sum(ranks)
    products = 1.75 * (2 * tasks * n * n + 4 * n * k + 2 * k * k) + 2 * k * n
    return float(products * m + 26 * (tasks * n**3 + k**3) + 36 * k**3)


def tall_workspace(specs: Sequence[UpdateSpec], ranks: Sequence[int]) -> int:
    """As :func:`cover_workspace`, of a matrix seen by panels: an eigenproblem in float64 beside the vectors of all tasks."""
    n, k = specs[0].shape[-1], sum(ranks)
    return 12 * max(n, k) ** 2 + 4 * n * k
