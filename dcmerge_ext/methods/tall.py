"""The cover of tall matrices (m x n, m much larger than n) that are seen by row panels and never held whole.

Embeddings and output heads are the largest matrices of a model: those of Llama-3-70B have 10^9 elements each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dcmerge_ext import flops
from dcmerge_ext.linalg.polar import default_tolerance, polar_with_values
from dcmerge_ext.lowrank import LowRank
from dcmerge_ext.methods.cover import Cover, Side
from dcmerge_ext.products import gram_float64
from dcmerge_ext.stages import stage
from dcmerge_ext.svd import Evidence
from dcmerge_ext.svd.components import is_tie, null_tolerance
from dcmerge_ext.svd.dense import eigh
from dcmerge_ext.updates import Updates, UpdateSpec

TALL = 1 << 26
"""Elements above which a tall matrix goes by panels: 256 MB in float32, of which a merge at once holds ten or so."""
Panels = Callable[[], Iterable[Updates]]
"""Starts a pass over all panels, in order; updates are read when they are asked for."""


class TallCover(NamedTuple):
    """The cover of X = [U_1 .. U_T] with U_i = Delta_i frame_i."""

    cover: Cover
    """``cover.u`` in terms of X: U~ = X factor."""
    frames: list[Tensor]
    """(n, r_i) float64 of each task: V_i / s_i."""
    evidence: list[Evidence]

    def rows_of(self, panel: Updates, tasks: Sequence[int]) -> Tensor:
        """The panel's rows of X, in float64."""
        parts = [_dense(panel, i).double() @ frame for i, frame in zip(tasks, self.frames, strict=True)]
        return torch.cat(parts, dim=-1)


def is_tall(specs: Sequence[UpdateSpec]) -> bool:
    """Whether float32 updates, at least one of them dense, are matrices that had better not be held whole."""
    *leading, m, n = specs[0].shape
    dense = any(spec.rank is None for spec in specs) and all(spec.dtype == torch.float32 for spec in specs)
    return dense and not leading and m >= 2 * n and m * n > TALL


def tall_cover(panels: Panels, specs: Sequence[UpdateSpec], ranks: Sequence[int], tol: float | None) -> TallCover:
    """Components and cover from Gram matrices, in float64.

    A pass per task for Delta_i'Delta_i = V_i S_i^2 V_i', and one for X'X = Z S^2 Z' with the rows of X computed panel by
    panel. Squaring halves float64's digits, which leaves float32's. The other side, V, is small and decomposed as it is.

    Args:
        ranks: components of each task; those of rank 0 take no part.
        tol: as ``basis_tol``.
    """
    m, n = specs[0].shape[-2:]
    tasks = [i for i, rank in enumerate(ranks) if rank]
    vectors, spectra, evidence = [], [], []
    for i in tasks:
        with stage("truncated SVD", flops.svd(m, n, ranks[i])):
            V, S, found = _right_components((_dense(panel, i) for panel in panels()), m, n, ranks[i])
        vectors.append(V)
        spectra.append(S)
        evidence.append(found)
    frames = [V * torch.where(S > 0, 1 / S, 0) for V, S in zip(vectors, spectra, strict=True)]
    v = Side(*_polar(vectors, torch.finfo(torch.float32).eps if tol is None else tol))
    partial = TallCover(Cover(v, v, []), frames, evidence)
    k = sum(ranks)
    with stage("whiten", flops.polar(m, k)):
        total = frames[0].new_zeros(k, k)
        for panel in panels():
            rows = partial.rows_of(panel, tasks)
            total.addmm_(rows.mT, rows)
        u = Side(*_inverse_root(total, default_tolerance(m, k, torch.float32) if tol is None else tol))
    return TallCover(Cover(u, v, [S.float() for S in spectra]), frames, evidence)


def _right_components(panels: Iterable[Tensor], m: int, n: int, rank: int) -> tuple[Tensor, Tensor, Evidence]:
    """V (n, rank) and S of a float32 matrix given by panels, in float64; null components are 0."""
    total: Tensor | None = None
    for panel in panels:
        gram = gram_float64(panel.mT)
        total = gram if total is None else total.add_(gram)
    assert total is not None
    values, Z = eigh(total)
    S = values.flip(0).clamp_(min=0).sqrt_()
    tolerance = null_tolerance(m, n, torch.float32)
    live = S[:rank] > tolerance * S[0]
    V = Z[:, n - rank :].flip(1) * live
    return V, S[:rank] * live, Evidence("gram panels", n, tie=is_tie(S, rank, tolerance))


def _polar(vectors: list[Tensor], tol: float) -> tuple[Tensor, None, Tensor, Tensor]:
    basis = torch.cat(vectors, dim=-1)
    vectors.clear()
    Q, H, values = polar_with_values(basis, tol)
    return Q.float(), None, H.float(), values.float()


def _inverse_root(gram: Tensor, tol: float) -> tuple[Tensor, None, Tensor, Tensor]:
    """(X'X)^(-1/2), no mix, (X'X)^(1/2) and the singular values of X, those at or below ``tol`` of the largest dropped."""
    values, Z = eigh(gram)
    S = values.clamp_(min=0).sqrt_()
    kept = tol * S[-1] < S
    factor = (Z * torch.where(kept, 1 / S, 0)) @ Z.mT
    return factor.float(), None, ((Z * S) @ Z.mT).float(), (S * kept).flip(0).float()


def _dense(panel: Updates, i: int) -> Tensor:
    update = panel[i]
    return update.dense() if isinstance(update, LowRank) else update
