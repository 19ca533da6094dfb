"""Certified randomized block Krylov SVD: exact components at the cost of matrix products.

Subspace iteration, the obvious randomized method, fails on full fine-tunes: their spectra are flat around the cut
(sigma_r / sigma_(r+1) - 1 about 1 %), so the subspace it finds is wrong even where it captures 99.9 % of the squared
norm. A block Krylov space of A'A (Golub and Kahan 1965; Musco and Musco, arXiv 1504.05477) of about 3 r directions holds
the r leading right singular vectors to round-off, and its Rayleigh-Ritz problem is small.

    V = orthonormal basis of span{X, A'A X, (A'A)^2 X, ...}       rows, full reorthogonalization
    W = V A'                                                    rows; A' never meets a rounded product of both
    W W' = Z diag(theta^2) Z'                                   float64: squaring would cost half of float32's digits
    S = theta,   U = W' Z / S,   V_r = A' U / S                 the last product also measures the residual

A result is returned only when it is certified:
  residual  |A' u_j - sigma_j v_j| is at the round-off level of LAPACK's own decomposition (backward error), or small
            against the gap sigma_r - sigma_(r+1) that it must resolve;
  probe     fresh random directions, orthogonal to the whole space, grow under power steps of the operator deflated by
            the result, and stay below sigma_r: a residual cannot see a component that the space has missed, such as a
            copy of a repeated singular value.
Otherwise the space grows; where growing costs more than a full decomposition, the caller takes that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcmerge_ext import ops
from dcmerge_ext.products import gram_float64
from dcmerge_ext.svd.block import fill_dependent, independent_basis, orthonormalize, restore_orthonormality
from dcmerge_ext.svd.components import Components, Evidence, is_tie, null_tolerance, truncate
from dcmerge_ext.svd.dense import eigh
from dcmerge_ext.svd.start import Start

_GAP_TOLERANCE = 1e-6
"""Angle, residual over gap, at which a result counts as converged although its residual is above round-off."""
_GROWTH = 0.07
"""Relative growth of the space that wins a decimal digit of the residual, on the flattest spectra measured."""
_CLEAN = 1e-3
"""Norm removed from an orthonormal block that leaves it orthonormal and orthogonal to round-off (its square is)."""
_MOST_PASSES = 5
_MOST_CHECKS = 4
"""Certificates tried before the full decomposition is cheaper; the flattest spectra measured need two."""
_MOST_FILLS = 2
"""Breakdowns after which a full decomposition is cheaper: the matrix has low rank, or its spectrum falls below round-off."""
_EQUAL = 1e-5
"""Distance of singular values, relative to the largest, at which they count as copies of one."""
_PROBES, _PROBE_STEPS = 8, 2
_PROBE_MARGIN = 1e-4
_PROBE, _FILL = 1, 2
"""Streams of random directions: 0 the start block, 1 the probe, 2 and above one for each repaired block."""


class NotCertified(Exception):
    """The space cannot show that the result is right, at a cost below that of a full decomposition."""


def krylov(
    A: Tensor, rank: int, start: Start, *, block: int, dimension: int, limit: int, tol: float | None = None
) -> tuple[Components, Evidence]:
    """The ``rank`` leading triplets of float32 (m, n).

    Args:
        block: directions added per step.   dimension: of the space when it is first looked at.
        limit: largest dimension, at most min(m, n).
        tol: accepted residual relative to sigma_r - sigma_(r+1). None: round-off.
    Raises:
        NotCertified: with the residual reached.
    """
    m, n = A.shape
    if m < n:
        (V, S, Uh), evidence = krylov(A.mT, rank, start, block=block, dimension=dimension, limit=limit, tol=tol)
        return Components(Uh.mT, S, V.mT), evidence
    A = A.contiguous()
    space = _Space(A, block, limit, start)
    checks = 0
    while True:
        space.grow(dimension)
        checks += 1
        found, evidence, converged = _ritz(A, space, rank, tol)
        if converged:
            missed = _missed(A, space, found, start)
            if missed is None:
                return found, evidence
            space.join(missed)
        low_rank = float(found.S[-1]) == 0  # growing finds round-off only
        if low_rank or checks == _MOST_CHECKS or space.size >= limit:
            raise NotCertified(f"residual {evidence.residual:.1e} sigma_1 in a Krylov space of dimension {space.size}")
        decades = math.log10(max(evidence.residual or 0.0, 1e-30) / _round_off(m, A.dtype))
        dimension = min(limit, space.size + max(2 * block, int(_GROWTH * decades * space.size)))


class _Space:
    """Orthonormal rows V and their images W = V A', preallocated; memory is touched as the space grows."""

    def __init__(self, A: Tensor, block: int, limit: int, start: Start) -> None:
        m, n = A.shape
        self._A = A
        self.block = block
        self._start = start
        self._fills = 0
        self._V = A.new_empty(limit, n)
        self._W = A.new_empty(limit, m)
        self._image = self._W[:0]
        self._back: Tensor | None = None
        self.size = 0

    @property
    def V(self) -> Tensor:
        return self._V[: self.size]

    @property
    def W(self) -> Tensor:
        return self._W[: self.size]

    def grow(self, dimension: int) -> None:
        """Add blocks until the space has ``dimension`` directions (or the limit)."""
        limit = self._V.shape[0]
        dimension = min(dimension, limit)
        while self.size < dimension:
            count = min(self.block, limit - self.size)
            if self.size == 0:
                X = orthonormalize(self._start.rows(count, self._V.shape[1], self._V))
            else:
                X = self._next(count)
            self._add(X, returns=self.size + count < dimension)

    def join(self, X: Tensor) -> None:
        """Add the directions of the rows of X that the space lacks, as far as there is room."""
        X = X[: self._V.shape[0] - self.size].clone()
        for _ in range(2):
            _remove(X, self.V)
            X = orthonormalize(X)
        if len(X):
            self._add(X, returns=True)

    def _add(self, X: Tensor, *, returns: bool) -> None:
        """Append a block and its image X A'; with ``returns`` also the way back, X A' A, in the same pass over A."""
        begin, end = self.size, self.size + X.shape[0]
        self._V[begin:end] = X
        self._image = self._W[begin:end]
        if returns:
            self._back = ops.gram_apply(X, self._A, self._image)
        else:
            self._back = None
            torch.mm(X, self._A.mT, out=self._image)
        self.size = end

    def _next(self, count: int) -> Tensor:
        """A' W of the last block, orthonormal to the space and within itself."""
        Y = self._image @ self._A if self._back is None else self._back
        Y = Y[:count]
        # In exact arithmetic only the last two blocks overlap with it (three-term recurrence): taking those out first
        # leaves the pass over the whole space nothing but round-off to remove.
        _remove(Y, self._V[max(0, self.size - 2 * self.block) : self.size])
        for _ in range(_MOST_PASSES):
            X = independent_basis(Y)
            if X is None:
                Y = self._fill(Y)
                continue
            Y = X
            if float(torch.linalg.vector_norm(_remove(Y, self.V))) < _CLEAN:
                return Y
        raise NotCertified(f"no new directions in a Krylov space of dimension {self.size}")

    def _fill(self, Y: Tensor) -> Tensor:
        """Breakdown: the space is (nearly) invariant. Go on with fresh random directions where rows depend on others."""
        if self._fills == _MOST_FILLS:
            raise NotCertified(f"the Krylov space is invariant at dimension {self.size}")
        fresh = self._start.rows(Y.shape[0], Y.shape[1], Y, _FILL + self._fills)
        self._fills += 1
        _remove(fresh, self.V)
        _remove(Y, self.V)
        return fill_dependent(Y, fresh)


def _remove(Y: Tensor, basis: Tensor) -> Tensor:
    """Y -= (Y basis') basis, in place; returns Y basis'."""
    overlap = Y.new_empty(len(Y), len(basis))
    Y -= ops.gram_apply(Y, basis, overlap)
    return overlap


def _ritz(A: Tensor, space: _Space, rank: int, tol: float | None) -> tuple[Components, Evidence, bool]:
    """The leading triplets in the space, and whether their residuals are small enough.

    Raises:
        NotCertified: they are, and a value repeats so often that the space may lack copies of it.
    """
    m, n = A.shape
    values, vectors = eigh(gram_float64(space.W))
    S = values.flip(0).clamp_(min=0).sqrt_()
    Z = vectors[:, space.size - rank :].mT.flip(0).to(A.dtype)
    null = null_tolerance(m, n, A.dtype)
    inverse = torch.where(S[:rank] > null * S[0], 1 / S[:rank], 0).to(A.dtype)[:, None]
    Uh = (Z @ space.W).mul_(inverse)
    Vh = (Uh @ A).mul_(inverse)
    # A' u - sigma v = sigma (V_r - V Z): the residual comes with the last product.
    errors = torch.linalg.vector_norm(Vh - Z @ space.V, dim=1).double() * S[:rank] * (inverse[:, 0] > 0)
    largest = float(S[0])
    residual = float(errors.max())
    following = float(S[rank]) if space.size > rank else 0.0
    gap = float(S[rank - 1]) - following
    converged = residual <= _round_off(m, A.dtype) * largest or float(errors.norm()) <= (
        _GAP_TOLERANCE if tol is None else tol
    ) * max(gap, 0.0)
    evidence = Evidence("krylov", space.size, residual / largest if largest else 0.0, is_tie(S, rank, null))
    if converged and _longest_run_is_full(S, rank, space.block, null):
        raise NotCertified(f"a singular value repeats {space.block} times or more, as often as a block can tell")
    live = int((inverse > 0).sum())
    restore_orthonormality(Uh, S[:rank], live)
    restore_orthonormality(Vh, S[:rank], live)
    return truncate(Uh.mT, S.to(A.dtype), Vh, rank, null), evidence, converged


def _longest_run_is_full(S: Tensor, rank: int, block: int, null: float) -> bool:
    """Whether ``block`` equal values follow each other among (p,) ``S``, beginning in the first ``rank``.

    A block has a share in at most as many copies of a singular value as it has directions.
    """
    ends = S[block - 1 :]
    full = (S[: len(ends)] - ends <= _EQUAL * S[0]) & (ends > null * S[0])
    return bool(full[:rank].any())


def _round_off(size: int, dtype: torch.dtype) -> float:
    """Residual, relative to sigma_1, of LAPACK's own decomposition: measured 5 to 8 eps at 768, growing slowly."""
    return float(torch.finfo(dtype).eps * (4 + size**0.5 / 8))


def _missed(A: Tensor, space: _Space, found: Components, start: Start) -> Tensor | None:
    """Directions that power steps, from outside the space and deflated by the result, raise above sigma_r; else None.

    A triplet that the space has missed is orthogonal to it, up to round-off, and there competes with the small end of
    the spectrum only: two steps single it out.
    """
    m, n = A.shape
    room = min(_PROBES, n - space.size)
    if room == 0:
        return None
    X = start.rows(room, n, A, _PROBE)
    _remove(X, space.V)
    for _ in range(_PROBE_STEPS):
        X = ops.gram_apply(orthonormalize(X), A, A.new_empty(room, m))
        _remove(X, found.Vh)
    X = orthonormalize(X)
    _remove(X, found.Vh)  # what is round-off by now points anywhere, along the result too
    reached = float(torch.linalg.eigvalsh(gram_float64(X @ A.mT))[-1].clamp(min=0).sqrt())
    largest, last = float(found.S[0]), float(found.S[-1])
    return X if reached > (1 + _PROBE_MARGIN) * last + _round_off(m, A.dtype) * largest else None
