"""The shared cover basis of all tasks' components (DC-Merge, arXiv 2603.06242, section 3.2), and how it is applied.

With U = [U_1 .. U_T] the cover is the polar factor U~ = U (U'U)^(-1/2); in it the components of task i have the
coordinates U~' U_i = H[:, I_i] with H = (U'U)^(1/2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dcmerge_ext.linalg.polar import polar_with_values
from dcmerge_ext.lowrank import LowRank
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.svd import Components
from dcmerge_ext.svd.dense import eigh, svd
from dcmerge_ext.updates import Updates

_SIDE_BY_SIDE = range(256, 2049)
"""Orders of the cover whose two sides are worked on side by side. Below, handing over costs more (2 ms); above, one side
keeps all cores busy and two would take twice the memory."""
_WORST_PIVOT = 1e-4
_WORST_EIGENVALUE = 1e-8
"""Conditions up to which Gram matrices in float64 keep what float32 factors hold."""


class Side(NamedTuple):
    """One side of a cover, U~ = factor @ mix."""

    factor: Tensor
    """(..., m, K)"""
    mix: Tensor | None
    """(..., K, k); None is the identity."""
    root: Tensor
    """(..., k, k): H"""
    values: Tensor
    """(..., k) singular values of U, descending, dropped ones 0."""

    def basis(self) -> Tensor:
        return self.factor if self.mix is None else self.factor @ self.mix

    def times_blocks(self, blocks: Sequence[Tensor]) -> Tensor:
        """U~ times the block-diagonal matrix of ``blocks``, (..., m, k)."""
        inner = self.factor if self.mix is None else self.mix
        columns = torch.split(inner, [block.shape[-1] for block in blocks], dim=-1)
        product = torch.cat([c @ block for c, block in zip(columns, blocks, strict=True)], dim=-1)
        return product if self.mix is None else self.factor @ product


class Cover(NamedTuple):
    u: Side
    v: Side
    spectra: list[Tensor]
    """(..., r_i) singular values of each task; 0 marks a null component."""


def cover_of(components: list[Components], dtype: torch.dtype, tol: float | None, round_off: float) -> Cover:
    """The cover of the components, in ``dtype``; empties the list, for together they are as large as the matrix."""
    spectra = [c.S.to(dtype) for c in components]
    bases = [
        torch.cat([c.U.to(dtype) for c in components], dim=-1),
        torch.cat([c.Vh.mT.to(dtype) for c in components], dim=-1),
    ]
    components.clear()
    order = bases[0].shape[-1]

    def side(i: int) -> Side:
        basis = bases[i]
        bases[i] = basis.new_empty(0)  # freed as soon as its factors are there
        Q, H, values = polar_with_values(basis, tol, round_off=round_off)
        return Side(Q, None, H, values)

    u, v = side_by_side(side, range(2), at_most=2 if order in _SIDE_BY_SIDE else 1)
    return Cover(u, v, spectra)


def factored_cover(updates: Updates, ranks: Sequence[int]) -> Cover | None:
    """The cover of float32 LowRank updates of one rank, from the Gram matrices of their factors alone, in float64.

    With B = [B_1 .. B_T] and L_i L_i' = B_i' B_i, orthonormal bases are B_i L_i^-T, so components, cover and coordinates
    all are k x k matrices, and the long factors take part in two products only: B'B and B times the result.
    None where the factors are too ill conditioned for that (or are not all alike): decompose them one by one.
    """
    stored = {spec.rank for spec in updates.specs}
    if len(stored) != 1 or len(set(ranks)) != 1 or updates.dtype != torch.float32 or not ranks[0]:
        return None
    loaded = [update for update in updates if isinstance(update, LowRank)]
    tasks, rank, kept = len(loaded), loaded[0].rank, ranks[0]
    if not 0 < rank <= min(updates.shape[-2:]):
        return None
    factors = [torch.cat([u.left for u in loaded], -1), torch.cat([u.right.mT for u in loaded], -1)]
    left, right = (_Frame.of(factor.double(), tasks) for factor in factors)
    if left is None or right is None:
        return None
    u, S, vh = svd(left.L.mT @ right.L)  # (..., T, r, r)
    S = S[..., :kept]
    if not bool((_WORST_PIVOT * S[..., :1] < S).all()):
        return None
    sides = left.side(u[..., :kept]), right.side(vh.mT[..., :kept])
    return Cover(sides[0], sides[1], list(S.unbind(-2))) if sides[0] and sides[1] else None


class _Frame(NamedTuple):
    """The factors B = [B_1 .. B_T] of one side, their Gram matrix, and L_i with L_i L_i' = B_i' B_i."""

    factor: Tensor
    gram: Tensor
    L: Tensor

    @classmethod
    def of(cls, factor: Tensor, tasks: int) -> _Frame | None:
        gram = factor.mT @ factor
        L, failed = torch.linalg.cholesky_ex(_diagonal_blocks(gram, tasks, gram.shape[-1] // tasks))
        pivots = L.diagonal(dim1=-2, dim2=-1)
        sound = not bool(failed.any()) and bool((pivots.amin(-1) > _WORST_PIVOT * pivots.amax(-1)).all())
        return cls(factor, gram, L) if sound else None

    def side(self, rotation: Tensor) -> Side | None:
        """The cover side of the bases U_i = B_i L_i^-T rotation_i."""
        frame = torch.linalg.solve_triangular(self.L.mT, rotation, upper=True)
        values, Z = eigh(_by_blocks(frame.mT, _by_blocks(frame.mT, self.gram).mT))  # of U'U
        if not bool((values[..., 0] > _WORST_EIGENVALUE * values[..., -1]).all()):
            return None
        values = values.sqrt()
        root = (Z * values[..., None, :]) @ Z.mT
        inverse = (Z / values[..., None, :]) @ Z.mT
        return Side(self.factor, _by_blocks(frame, inverse), root, values.flip(-1))


def _diagonal_blocks(gram: Tensor, tasks: int, rank: int) -> Tensor:
    """(..., T, r, r) of (..., T r, T r)."""
    blocks = gram.reshape(*gram.shape[:-2], tasks, rank, tasks, rank)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _by_blocks(blocks: Tensor, X: Tensor) -> Tensor:
    """The block-diagonal matrix of (..., T, p, q) times X (..., T q, n)."""
    *leading, tasks, p, q = blocks.shape
    product = blocks @ X.reshape(*leading, tasks, q, X.shape[-1])
    return product.reshape(*leading, tasks * p, X.shape[-1])
