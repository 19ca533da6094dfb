"""DC-Merge: directionally consistent merging in a shared cover basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext import ops
from dcmerge_ext.methods.base import Context, Preset
from dcmerge_ext.methods.cover import Cover
from dcmerge_ext.methods.cover_method import CoverMethod
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.stiefel import stiefel_cover, stiefel_flops
from dcmerge_ext.smoothing import smooth_energy
from dcmerge_ext.updates import Updates, UpdateSpec

_AUTHORS_MATRICES = r"text_projection"

Size = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
PositiveFraction = Annotated[float, Meta(gt=0, le=1)]
Steps = Annotated[int, Meta(ge=1)]
AtLeastOne = Annotated[float, Meta(ge=1)]


class DCMerge(CoverMethod, frozen=True):
    """Smooth each task's singular values, merge all tasks in one shared orthonormal cover basis, mask, map back.

    Source: DC-Merge (arXiv 2603.06242, CVPR 2026), section 3 and algorithm 1. Per matrix, with k the sum of the ranks:
        Delta_i ~ U_i diag(s_i) V_i'          truncated to r_i components, s_i smoothed
        U~ = polar([U_1 .. U_T]),  V~ = polar([V_1 .. V_T])          the cover basis
        M_i = U~' U_i diag(s_i) V_i' V~ = H_u[:, I_i] diag(s_i) H_v[:, I_i]'      k x k
        M = TIES(M_1 .. M_T), masked to its diagonal blocks;   merged = U~ M V~'
    H_u = (U'U)^(1/2) comes with the polar factor, so no truncated matrix is rebuilt and no dense product of LoRA factors
    is formed. LowRank updates give a LowRank of rank k, exactly.

    Cost per m x n matrix: T truncated SVDs, the polar factors of m x k and n x k, 2 T k^2 max(r_i) flops for the M_i.
    Memory: the singular vectors kept, one k x k core at a time, whatever T, and the T cores' diagonal blocks.
    Deviations from the authors' code, on input where its result is arbitrary: null components and rank-deficient bases
    add no made-up directions (partial isometry), and fewer rows than tasks gives the mean, with a warning, not zero.
    """

    name = "dc_merge"
    core_from_cover = True
    paper = "https://arxiv.org/abs/2603.06242"
    presets: ClassVar = {
        "fft": Preset(
            {"smoothing": "none", "aggregate": "ties", "keep": 1e-3, "count_base": "min_dim"},
            "apply",
            _AUTHORS_MATRICES,
        ),
        "lora": Preset(
            {"rank": 16, "smoothing": "average", "aggregate": "ties", "keep": 1e-3, "count_base": "cover"}, "ignore"
        ),
        "vlm": Preset(
            {"rank": 16, "smoothing": "average", "aggregate": "ties", "keep": 1e-3, "count_base": "cover"}, "ignore"
        ),
    }

    official: Annotated[
        Literal["fft", "lora", "vlm"] | None,
        Meta(
            description="the authors' settings for full fine-tunes, vision LoRA, or LLaVA LoRA: a named set of these options"
        ),
    ] = None
    smoothing: Annotated[
        Literal["none", "average", "linear", "interpolate"] | None,
        Meta(description="of the retained singular values. None: average when all updates are LowRank, none otherwise"),
    ] = None
    rho: Annotated[AtLeastOne | None, Meta(description="linear smoothing: cap of s_1 / s_r, default 5.0")] = None
    tau: Annotated[
        Fraction | None, Meta(description="interpolate smoothing, required there: 1 none, 0 average (eq. 41)")
    ] = None
    aggregate: Annotated[Literal["ties", "sum", "mean"], Meta(description="of the cores M_i in the cover space")] = (
        "ties"
    )
    keep: Annotated[
        PositiveFraction | None,
        Meta(
            description="fraction of the N entries of each M_i that TIES keeps, max(1, int(keep N)). "
            "None: max(int(1e-3 N), r_i) entries",
        ),
    ] = None
    count_base: Annotated[
        Literal["cover", "min_dim"] | None,
        Meta(description="N = k^2 (cover, the default) or q^2 (min_dim, the authors' full fine-tune code)"),
    ] = None
    block_size: Annotated[
        Size | None,
        Meta(description="structural mask. None: one block per task, of size r_i; an int: uniform blocks; 0: no mask"),
    ] = None
    cover: Annotated[
        Literal["polar", "stiefel"],
        Meta(
            description="basis: the polar factors, or those turned step by step to a maximum of what it keeps of the "
            "tasks' components (algorithm 2 of the paper, not in the authors' code; the run record holds the objective)"
        ),
    ] = "polar"
    cover_steps: Annotated[
        Steps | None,
        Meta(description="cover=stiefel: most steps, 90 k^3 flops each. None: 250, as in the paper's figure"),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, owner, belongs in (
            ("rho", "linear", self.smoothing == "linear"),
            ("tau", "interpolate", self.smoothing == "interpolate"),
        ):
            if getattr(self, option) is not None and not belongs:
                raise ValueError(f"{option} belongs to smoothing={owner!r}, and smoothing is {self.smoothing!r}")
        if self.smoothing == "interpolate" and self.tau is None:
            raise ValueError("smoothing='interpolate' needs tau, 0 .. 1")
        if self.cover_steps is not None and self.cover != "stiefel":
            raise ValueError(f"cover_steps belongs to cover='stiefel', and cover is {self.cover!r}")
        for option in ("keep", "count_base"):
            if getattr(self, option) is not None and self.aggregate != "ties":
                raise ValueError(f"{option} belongs to aggregate='ties', and aggregate is {self.aggregate!r}")

    def default_scale(self, num_tasks: int) -> float:
        return 2.0 if num_tasks > 1 else 1.0

    def in_panels(self, specs: Sequence[UpdateSpec], num_tasks: int) -> bool:
        return self.cover == "polar" and super().in_panels(specs, num_tasks)

    def cover_of(self, updates: Updates, ranks: Sequence[int], ctx: Context, **settings: Any) -> Cover:
        cover = super().cover_of(updates, ranks, ctx, **settings)
        if self.cover == "stiefel":
            cover, ctx.facts["cover_objective"] = stiefel_cover(cover, self._steps())
        return cover

    def blocks(self, cover: Cover, live: Tensor, updates: Updates, ranks: Sequence[int], ctx: Context) -> list[Tensor]:
        slots = [r for r in ranks if r]
        spectra, sizes = self.smoothed(cover.spectra, updates.all_lowrank), self._block_sizes(slots)
        if self.aggregate == "ties":
            counts = self._counts(live, min(updates.shape[-2:])).clamp(max=sum(slots) ** 2)
            return _ties_blocks(cover, spectra, slots, sizes, counts)
        blocks = _sum_blocks(cover, spectra, sizes)
        return [block / ctx.num_tasks for block in blocks] if self.aggregate == "mean" else blocks

    def smoothed(self, spectra: Sequence[Tensor], all_lowrank: bool) -> list[Tensor]:
        """The retained singular values of each task, (..., r_i), as they enter the merge."""
        kind = self.smoothing or ("average" if all_lowrank else "none")
        rho, tau = 5.0 if self.rho is None else self.rho, 1.0 if self.tau is None else self.tau
        if len({S.shape[-1] for S in spectra}) == 1:  # all tasks at once: small operations cost their call
            return list(smooth_energy(torch.stack(list(spectra)), kind, rho=rho, tau=tau).unbind())
        return [smooth_energy(S, kind, rho=rho, tau=tau) for S in spectra]

    def _counts(self, live: Tensor, q: int) -> Tensor:
        """Entries of each core that TIES keeps, (..., T): null components take no part in N."""
        cover_rank = live.sum(-1, keepdim=True)
        total = torch.full_like(cover_rank, q * q) if self.count_base == "min_dim" else cover_rank**2
        if self.keep is None:
            # the authors' int(1e-3 N), a double product truncated, but never fewer than the components
            counts = torch.maximum((total.double() * 1e-3).long().expand_as(live), live)
        else:
            counts = (total.double() * self.keep).long().expand_as(live)
        return counts.clamp(min=1)

    def _block_sizes(self, slots: Sequence[int]) -> list[int]:
        cover_rank = sum(slots)
        if self.block_size is None:
            return list(slots)
        if self.block_size == 0:
            return [cover_rank]
        whole, rest = divmod(cover_rank, self.block_size)
        return [self.block_size] * whole + ([rest] if rest else [])

    def _steps(self) -> int:
        return 250 if self.cover_steps is None else self.cover_steps

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        ranks = self.ranks(specs, num_tasks)
        turning = stiefel_flops(specs, ranks, self._steps()) if self.cover == "stiefel" and ranks else 0.0
        return super().flops(specs, num_tasks) + turning


dc_merge = register(DCMerge)


def _ties_blocks(
    cover: Cover, spectra: Sequence[Tensor], ranks: Sequence[int], sizes: Sequence[int], counts: Tensor
) -> list[Tensor]:
    """Diagonal blocks of the trimmed, elected and merged core. ``counts``: (..., T) entries kept per core."""
    blocks, thresholds, largest = ops.project(
        cover.u.root, cover.v.root, torch.cat(list(spectra), dim=-1), ranks=ranks, counts=counts, sizes=sizes
    )
    round_off = largest * (2 * cover.u.root.shape[-1] ** 0.5 * torch.finfo(blocks.dtype).eps)  # must not vote
    merged = ops.elect(blocks.unsqueeze(-2), torch.maximum(thresholds, round_off)).squeeze(-2)
    cells = torch.split(merged, [size * size for size in sizes], dim=-1)
    return [block.reshape(*block.shape[:-1], size, size) for block, size in zip(cells, sizes, strict=True)]


def _sum_blocks(cover: Cover, spectra: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Diagonal blocks of the sum of all cores, H_u diag(s) H_v'."""
    left = cover.u.root * torch.cat(list(spectra), dim=-1)[..., None, :]
    rows = zip(torch.split(left, list(sizes), dim=-2), torch.split(cover.v.root, list(sizes), dim=-2), strict=True)
    return [u @ v.mT for u, v in rows]
