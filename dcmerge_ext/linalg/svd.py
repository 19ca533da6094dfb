"""Singular value decompositions with the signatures of torch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcmerge_ext.errors import ConvergenceError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.precision import without_autocast
from dcmerge_ext.svd import dense
from dcmerge_ext.svd.start import Start
from dcmerge_ext.svd.subspace import subspace_iteration
from dcmerge_ext.svd.truncated import decompose, truncated_svd
from dcmerge_ext.tracing import traceable

Factors = tuple[Tensor, Tensor, Tensor]

as_torch: Callable[[Factors], Factors] = torch.return_types.linalg_svd  # type: ignore[attr-defined]
"""The named tuple (U, S, Vh) of torch.linalg.svd."""
_torch_svd: Callable[..., Factors] = torch.linalg.svd
_torch_svd_lowrank = torch.svd_lowrank
_WIDE = 1.25
"""Ratio of columns to rows from which on LAPACK takes the transposed matrix faster, 1.3 to 1.9 times."""
SMALL = 1 << 14
"""Entries in all below which nothing is gained that would outweigh a few more calls."""
_OVERSAMPLING = 4
"""Of svd_lowrank: more accurate than torch, and no slower."""


def svd(
    A: Update,
    full_matrices: bool = True,
    *,
    driver: str | None = None,
    out: Any = None,
    rank: int | None = None,
    tol: float | None = None,
) -> Factors:
    """``torch.linalg.svd``, and with ``rank`` its leading part at the cost of that.

    Without ``rank`` every one of the min(m, n) triplets is returned, with orthonormal vectors for null directions, too.
    Batches (side by side) and wide matrices (transposed) on the CPU are decomposed faster than by torch, everything else
    by torch: other single matrices, complex, CUDA, a ``driver`` or ``out``, and input that requires a gradient. With ``rank`` it is
    :func:`~dcmerge_ext.truncated_svd`, exact to round-off.

    Args:
        A: (..., m, n), floating. Half precision is decomposed in float32 (torch refuses it). Or a LowRank, which is
            never made dense; its number of components is at most its rank.
        full_matrices: of the full decomposition: U (..., m, m) and Vh (..., n, n). With ``rank``, and of a LowRank, the
            factors are thin.
        driver, out: as in torch; not with ``rank`` or a LowRank.
        rank: number of components, 1 .. min(m, n); U (..., m, rank), S (..., rank), Vh (..., rank, n). Null components
            keep their slot with S = 0 and zero vectors.
        tol: of ``rank``: accepted residual relative to the gap of singular values at the cut. None: round-off.
    Returns:
        U, S, Vh as ``torch.linalg.svd`` returns them, in float32 or float64 (always for a LowRank).
    Raises:
        torch.linalg.LinAlgError: NaN or Inf.   ValueError: rank or tol out of range, or options that exclude each other.
        TypeError: A is neither.
    """
    if not isinstance(A, (Tensor, LowRank)):
        raise TypeError(f"svd: needs a tensor or a LowRank, got {type(A).__name__}")
    if rank is None and tol is not None:
        raise ValueError("svd: tol belongs to rank")
    apart = driver is not None or out is not None
    if apart and (rank is not None or isinstance(A, LowRank)):
        raise ValueError("svd: driver and out are of the full decomposition of a tensor, not with rank or a LowRank")
    if isinstance(A, LowRank):
        most = min(A.rank, *A.shape[-2:]) if rank is None else rank
        if rank is None and most == 0:
            left, right = A.left.double(), A.right.double()
            return as_torch((left[..., :0], left.new_empty(*left.shape[:-2], 0), right[..., :0, :]))
        return as_torch(truncated_svd(A, most, tol=tol))
    if rank is None:
        if apart or needs_gradient(A):
            return _torch_svd(A, full_matrices, driver=driver, out=out)
        return as_torch(full_svd(A, full_matrices))
    if needs_gradient(A):
        if not 1 <= rank <= min(A.shape[-2:]):
            raise ValueError(f"svd: rank must lie in 1 .. {min(A.shape[-2:])}, got {rank}")
        U, S, Vh = _torch_svd(A, full_matrices=False)
        return as_torch((U[..., :rank], S[..., :rank], Vh[..., :rank, :]))
    return as_torch(truncated_svd(A, rank, tol=tol))


@traceable
@without_autocast
def full_svd(A: Tensor, full_matrices: bool) -> Factors:
    """All singular triplets, by whichever of torch's and our routes is the faster."""
    if A.dtype in (torch.float16, torch.bfloat16):
        A = A.float()
    if not is_faster(A, full_matrices):
        U, S, Vh = _torch_svd(A, full_matrices)
        if not bool(S[..., :1].isfinite().all()):  # where torch does not notice
            raise ConvergenceError("svd: the input holds NaN or Inf, or singular values beyond its dtype")
        return U, S, Vh
    *leading, m, n = A.shape
    matrices = A.reshape(-1, m, n).unbind()
    found = [dense.svd(matrices[0])] if len(matrices) == 1 else side_by_side(dense.full, matrices, each=1)
    U, S, Vh = (torch.stack(parts) for parts in zip(*found, strict=True))
    return U.reshape(*leading, m, -1), S.reshape(*leading, -1), Vh.reshape(*leading, -1, n)


def svd_lowrank(A: Tensor, q: int | None = 6, niter: int = 2, M: Tensor | None = None, *, seed: int = 0) -> Factors:
    """``torch.svd_lowrank``: ``q`` leading components by ``niter`` power steps from random directions.

    4 directions more than ``q`` are followed, so that it is the more accurate of the two, and the exact decomposition is
    taken where that many do not fit in min(m, n). torch decomposes sparse, complex and CUDA input, and input that
    requires a gradient.

    Args:
        A: (..., m, n), floating; half precision is decomposed in float32.
        q: number of components; above min(m, n) as many as there are. None: 6.   niter: power steps, 0 or more.
        M: (..., m, n), broadcast: the matrix of means that is subtracted from A first.
        seed: of the random directions. torch's generator is neither read nor changed.
    Returns:
        U (..., m, q), S (..., q), V (..., n, q): V is not transposed.
    Raises:
        torch.linalg.LinAlgError: NaN or Inf.   ValueError: q or niter negative.
    """
    others = [x for x in (A, M) if x is not None]
    if any(not is_ours(x) or needs_gradient(x) for x in others):
        return _torch_svd_lowrank(A, q, niter, M)
    q, niter = 6 if q is None else operator.index(q), operator.index(niter)
    if q < 0 or niter < 0:
        raise ValueError(f"svd_lowrank: q and niter must be 0 or more, got {q} and {niter}")
    U, S, Vh = lowrank_svd(A if M is None else A - M, min(q, *A.shape[-2:]), niter, seed)
    return U, S, Vh.mT


@traceable
@without_autocast
def lowrank_svd(A: Tensor, rank: int, power_steps: int, seed: int) -> Factors:
    """U, S, Vh of :func:`svd_lowrank`."""
    *leading, m, n = A.shape
    A = A if A.dtype == torch.float64 else A.float()
    if 0 in (rank, A.numel()):
        return A.new_zeros(*leading, m, rank), A.new_zeros(*leading, rank), A.new_zeros(*leading, rank, n)
    if rank + _OVERSAMPLING >= min(m, n):
        (U, S, Vh), _ = decompose(A, rank)
        return U, S, Vh
    matrices = A.reshape(-1, m, n).unbind()
    found = side_by_side(lambda X: subspace_iteration(X, rank, Start(seed), power_steps, _OVERSAMPLING)[0], matrices)
    U, S, Vh = (torch.stack(parts) for parts in zip(*found, strict=True))
    return U.reshape(*leading, m, rank), S.reshape(*leading, rank), Vh.reshape(*leading, rank, n)


def needs_gradient(A: Tensor) -> bool:
    return torch.is_grad_enabled() and A.requires_grad


def is_ours(A: Any) -> bool:
    return isinstance(A, Tensor) and A.ndim >= 2 and A.layout == torch.strided and A.is_floating_point() and A.is_cpu


def is_faster(A: Tensor, full_matrices: bool) -> bool:
    """Whether torch.linalg.svd would take longer."""
    if not is_ours(A) or A.numel() < SMALL:
        return False
    m, n = A.shape[-2:]
    if full_matrices and m != n:
        return False
    return A[..., 0, 0].numel() > 1 or n >= _WIDE * m
