"""TSV-M: task singular vectors, decorrelated across tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.methods.base import Context, Preset
from dcmerge_ext.methods.cover import Cover
from dcmerge_ext.methods.cover_method import CoverMethod
from dcmerge_ext.methods.registry import register
from dcmerge_ext.updates import Updates


class TsvM(CoverMethod, frozen=True):
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
    core_from_cover = True
    paper = "https://arxiv.org/abs/2412.00081"
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

    def blocks(self, cover: Cover, live: Tensor, updates: Updates, ranks: Sequence[int], ctx: Context) -> list[Tensor]:
        return [torch.diag_embed(S) for S in cover.spectra]


tsv_m = register(TsvM)
