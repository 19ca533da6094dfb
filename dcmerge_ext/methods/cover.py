"""The shared cover basis of all tasks' components (DC-Merge, arXiv 2603.06242, section 3.2), and how it is applied.

With U = [U_1 .. U_T] the cover is the polar factor U~ = U (U'U)^(-1/2); in it the components of task i have the
coordinates U~' U_i = H[:, I_i] with H = (U'U)^(1/2).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcmerge_ext.linalg.polar import polar_decided
from dcmerge_ext.lowrank import LowRank, Update, times
from dcmerge_ext.methods.spectral import components_of
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.products import gram_float64, wide_product
from dcmerge_ext.stages import Work, staged
from dcmerge_ext.svd import Accuracy, Components, Evidence, summarize
from dcmerge_ext.svd.dense import eigh
from dcmerge_ext.updates import Updates

logger = logging.getLogger(__name__)

SIDES_TOGETHER = range(256, 2049)
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
    """(..., K, k) in float64; None is the identity."""
    root: Tensor
    """(..., k, k): U~'U, which is H for a polar cover."""
    values: Tensor
    """(..., k) singular values of U, descending, dropped ones 0."""

    def basis(self) -> Tensor:
        return self.factor if self.mix is None else wide_product(self.factor, self.mix)

    def times_blocks(self, blocks: Sequence[Tensor]) -> Tensor:
        """U~ times the block-diagonal matrix of ``blocks``, (..., m, k)."""
        inner = self.factor if self.mix is None else self.mix
        columns = torch.split(inner, [block.shape[-1] for block in blocks], dim=-1)
        product = torch.cat([c @ block for c, block in zip(columns, blocks, strict=True)], dim=-1)
        return product if self.mix is None else wide_product(self.factor, product)


class Cover(NamedTuple):
    u: Side
    v: Side
    spectra: list[Tensor]
    """(..., r_i) singular values of each task; 0 marks a null component."""


def cover_of_updates(
    updates: Updates,
    ranks: Sequence[int],
    *,
    name: str,
    basis_tol: float | None = None,
    accuracy: Accuracy = "exact",
    tol: float | None = None,
    seed: int = 0,
    key: str = "",
    oriented: bool = False,
) -> tuple[Cover, dict[str, Any]]:
    """The cover of the updates' components by the cheapest route, and facts about the SVDs for the run record.

    In float64 where all updates are LowRank. ``name``: the method's, for warnings where ``key`` is empty. The other
    arguments are those of :func:`cover_of` and :func:`components_of`. ``oriented``: each pair of singular vectors has
    the sign that makes the sum of the left one positive, for methods whose result depends on signs.
    """
    if updates.all_lowrank and basis_tol is None and not oriented and (cover := factored_cover(updates, ranks)):
        return cover, summarize([Evidence("factors", ranks[0])] * len(ranks))
    components, facts = components_of(updates, ranks, accuracy=accuracy, tol=tol, seed=seed, key=key)
    warn_of_ties(facts, key or name)
    if oriented:
        components = [_oriented(c) for c in components]
    dtype = torch.float64 if updates.all_lowrank else updates.dtype
    round_off = torch.finfo(updates.dtype).eps  # LowRank updates: float64 work on factors of that precision
    kept = [i for i, rank in enumerate(ranks) if rank]
    return cover_of(components, dtype, basis_tol, round_off, lambda i: updates[kept[i]]), facts


def warn_of_ties(facts: dict[str, Any], where: str) -> None:
    if facts.get("ties"):
        logger.warning("%s: singular values tie at the cut; one of several equally good truncations is used", where)


def cover_of(
    components: list[Components],
    dtype: torch.dtype,
    tol: float | None,
    round_off: float,
    source: Callable[[int], Update] | None = None,
) -> Cover:
    """The cover of the components, in ``dtype``; empties the list, for together they are as large as the matrix.

    ``source(i)``: the matrix (..., m, n) that components i are of, asked for where float32 leaves it open whether
    directions of the bases are dependent.  None: for components in float64.
    """
    spectra = [c.S.to(dtype) for c in components]
    bases = [
        torch.cat([c.U.to(dtype) for c in components], dim=-1),
        torch.cat([c.Vh.mT.to(dtype) for c in components], dim=-1),
    ]
    components.clear()
    order = bases[0].shape[-1]
    live = live_components(spectra).sum(-1)

    def side(i: int) -> Side:
        def wide() -> Tensor:
            assert source is not None
            return _wide_basis(spectra, bases[1 - i], source, left=i == 0)

        Q, H, values = polar_decided(bases[i], tol, wide, live=live, round_off=round_off)
        return Side(Q, None, H, values)

    u, v = side_by_side(side, range(2), at_most=2 if order in SIDES_TOGETHER else 1)
    return Cover(u, v, spectra)


def _wide_basis(spectra: Sequence[Tensor], opposite: Tensor, source: Callable[[int], Update], *, left: bool) -> Tensor:
    """[U_1 .. U_T] in float64 from the other side's vectors in float32, U_i = Delta_i V_i / S_i (``left``), or V likewise.

    Their span is that of Delta_i: dependent to the precision of the entries of Delta_i, not to that of the decomposition.
    """
    parts = []
    for i, (S, V) in enumerate(
        zip(spectra, torch.split(opposite, [S.shape[-1] for S in spectra], dim=-1), strict=True)
    ):
        matrix = source(i).mT if left else source(i)
        scaled = V.double() * torch.where(S > 0, 1 / S.double(), 0)[..., None, :]
        parts.append(times(scaled.mT, matrix).mT)
    return torch.cat(parts, dim=-1)


def _work(updates: Updates, ranks: Sequence[int]) -> Work:
    """Gram matrices of both stacks of factors, and a k x k eigenproblem."""
    *leading, m, n = updates.shape
    k = sum(ranks)
    return Work(math.prod(leading) * ((m + n) * k**2 + 32 / 3 * k**3))


@staged("whiten", _work)
def factored_cover(updates: Updates, ranks: Sequence[int]) -> Cover | None:
    """The cover of float32 LowRank updates of one rank, from the Gram matrices of their factors alone, in float64.

    With B = [B_1 .. B_T] and L_i L_i' = B_i' B_i, orthonormal bases are B_i L_i^-T, so components, cover and coordinates
    all are k x k matrices, and the long factors take part in two products only: B'B and B times the result. The k x k
    work is small enough for the calls to cost as much as the arithmetic: both sides, of all tasks, go together.
    None where the factors are too ill conditioned for that (or are not all alike): decompose them one by one.
    """
    stored = {spec.rank for spec in updates.specs}
    if len(stored) != 1 or len(set(ranks)) != 1 or updates.dtype != torch.float32 or not ranks[0]:
        return None
    loaded = [update for update in updates if isinstance(update, LowRank)]
    tasks, rank, kept = len(loaded), loaded[0].rank, ranks[0]
    if not 0 < rank <= min(updates.shape[-2:]):
        return None
    factors = [torch.cat([u.left for u in loaded], -1), torch.cat([u.right for u in loaded], -2).mT]
    grams = torch.stack([gram_float64(factor.mT) for factor in factors])  # (2, ..., k, k), as everything below
    L, failed = torch.linalg.cholesky_ex(_diagonal_blocks(grams, tasks, rank))
    if not _sound(L.diagonal(dim1=-2, dim2=-1), _WORST_PIVOT) or failed.any():
        return None
    between = L[0].mT @ L[1]  # (..., T, r, r), u diag(S) v'
    values, v = (found.flip(-1)[..., :kept] for found in eigh(between.mT @ between))
    if not _sound(values, _WORST_PIVOT**2):
        return None
    S = values.sqrt()
    rotations = torch.stack([(between @ v) / S[..., None, :], v])
    # U_i = B_i L_i^-T rotation_i = B_i frame_i
    frames = torch.linalg.solve_triangular(L.mT, rotations, upper=True)
    values, Z = eigh(_by_blocks(frames.mT, _by_blocks(frames.mT, grams).mT))  # of U'U
    if not _sound(values, _WORST_EIGENVALUE):
        return None
    values = values.sqrt()
    roots = (Z * values[..., None, :]) @ Z.mT
    mixes = _by_blocks(frames, (Z / values[..., None, :]) @ Z.mT)
    left, right = (Side(factors[i], mixes[i], roots[i], values[i].flip(-1)) for i in range(2))
    return Cover(left, right, list(S.unbind(-2)))


def _oriented(components: Components) -> Components:
    U, S, Vh = components
    signs = torch.where(U.sum(-2) < 0, -1.0, 1.0).to(U.dtype)
    return Components(U * signs[..., None, :], S, Vh * signs[..., :, None])


def live_components(spectra: Sequence[Tensor]) -> Tensor:
    """(..., T) components of each task that are not null."""
    if len({S.shape[-1] for S in spectra}) == 1:
        return (torch.stack(list(spectra), dim=-2) > 0).sum(-1)
    return torch.stack([(S > 0).sum(-1) for S in spectra], dim=-1)


def basis_facts(values: Tensor, live: Tensor) -> dict[str, float | int]:
    """Smallest singular value kept in a cover basis, and directions of live components dropped (worst of a batch)."""
    kept = values > 0
    expected = live.sum(-1).clamp(max=values.shape[-1])
    smallest = torch.where(kept, values, torch.inf).amin()
    return {
        "smallest_kept": float(smallest) if torch.isfinite(smallest) else 0.0,
        "dropped": int((expected - kept.sum(-1)).clamp(min=0).amax()),
    }


def _sound(values: Tensor, worst: float) -> bool:
    """Whether the smallest of (..., r) is above ``worst`` times the largest, throughout the batch. NaN is not."""
    low, high = values.aminmax(dim=-1)
    return bool((low > worst * high).all())


def _diagonal_blocks(gram: Tensor, tasks: int, rank: int) -> Tensor:
    """(..., T, r, r) of (..., T r, T r)."""
    blocks = gram.reshape(*gram.shape[:-2], tasks, rank, tasks, rank)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _by_blocks(blocks: Tensor, X: Tensor) -> Tensor:
    """The block-diagonal matrix of (..., T, p, q) times X (..., T q, n)."""
    *leading, tasks, p, q = blocks.shape
    product = blocks @ X.reshape(*leading, tasks, q, X.shape[-1])
    return product.reshape(*leading, tasks * p, X.shape[-1])
