"""TSV-M: task singular vectors, decorrelated across tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

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


class TsvM(Method, frozen=True):
    """Truncate each task's update, make the singular vectors of all tasks orthonormal together, add up (TSV-Merge).

    Source: Task Singular Vectors (Gargiulo et al., arXiv 2412.00081), TSV-Merge. Per matrix, q = min(m, n):
        Delta_i ~ U_i diag(s_i) V_i'          truncated to r_i components, int(q / T) of each full fine-tune
        U = [U_1 .. U_T],  V = [V_1 .. V_T],  s = [s_1 .. s_T];   merged = polar(U) diag(s) polar(V)'
    The singular values of the result are those that were kept. A full-rank variant (r_i = q) is ``rank`` = q. LowRank
    updates give a LowRank of rank k, the sum of the r_i, exactly and without a dense product.

    Scale: 1, which the authors use where there is no validation data; they search 0.1, 0.2 .. 3.0 where there is.
    Cost per m x n matrix: T truncated SVDs, the polar factors of m x k and n x k, 2 k m n flops for the product.
    Deviations from the authors' code, on input where its result is arbitrary: null components and directions that
    tasks share add nothing made up (partial isometry), and fewer rows than tasks gives the mean, with a warning, not zero.
    """

    name = "tsv_m"
    paper = "https://arxiv.org/abs/2412.00081"
    keeps_rank = True
    presets: ClassVar = {
        "fft": Preset({}, "apply", r"text_projection"),
        "lora": Preset({"rank": 16}, "ignore"),
    }

    official: Annotated[
        Literal["fft", "lora"] | None,
        Meta(
            description="published settings: fft, the authors' (text projections take the mean); lora, those of the "
            "comparison in DC-Merge (16 components, lora_alpha ignored)"
        ),
    ] = None
    rank: Annotated[
        Rank | tuple[Rank, ...] | None,
        Meta(
            description="components kept per task, or a list with one number per task. None: the numerical rank of a LowRank; "
            "int(q / T) for dense updates (paper and code), q = min(m, n); int((q - sum of LoRA ranks) / number of dense) "
            "when mixed"
        ),
    ] = None
    basis_tol: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(
            description="directions of the concatenated bases with singular values at or below this fraction of the largest "
            "are dropped (the published code keeps all). None: 2 sqrt(max(m, k)) eps",
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
            raise InputError(f"tsv_m merges matrices (..., m, n), got an update of shape {specs[0].shape}")
        preset_rank = self.official is not None and "rank" in self.presets[self.official].options
        check_ranks(specs, num_tasks, self.rank, at_most_q=not preset_rank)

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
        )
        live = live_components(cover.spectra)
        ctx.facts.update(
            rank=live.reshape(-1, live.shape[-1]).amax(0).tolist(),
            cover_rank=sum(ranks),
            cover_u=basis_facts(cover.u.values, live),
            cover_v=basis_facts(cover.v.values, live),
        )
        left, right = cover.u.times_blocks([torch.diag_embed(S) for S in self.spectra(cover)]), cover.v.basis().mT
        return LowRank(left, right).to(updates.dtype) if updates.all_lowrank else left @ right

    def spectra(self, cover: Cover) -> list[Tensor]:
        """(..., r_i) the singular values that the pairs of orthonormal vectors get."""
        return cover.spectra

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        ranks = component_ranks(specs, num_tasks, self.rank)
        return 0.0 if ranks is None else cover_flops(specs, ranks)

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        ranks = component_ranks(specs, num_tasks, self.rank)
        return super().workspace(specs, num_tasks) if ranks is None else cover_workspace(specs, ranks)


tsv_m = register(TsvM)
