"""Full decompositions of one dense matrix: LAPACK, and the float64 Gram matrix of the short side."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from dcmerge_ext.backends import for_device
from dcmerge_ext.errors import ConvergenceError
from dcmerge_ext.products import gram_float64
from dcmerge_ext.scaling import binary_exponent, scale_by_power
from dcmerge_ext.svd import cost
from dcmerge_ext.svd.block import restore_orthonormality
from dcmerge_ext.svd.components import Components, Evidence, is_tie, null_tolerance, truncate


def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.linalg.svd`` of (..., m, n), reduced, failing with ConvergenceError. LAPACK takes tall matrices twice as fast."""
    if A.shape[-2] < A.shape[-1]:
        V, S, Uh = svd(A.mT)
        return Uh.mT, S, V.mT
    try:
        U, S, Vh = for_device(A.device).svd(A)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        if A.dtype == torch.float64 or not bool(A.isfinite().all()):
            raise ConvergenceError(str(error)) from error
        # gesdd gives up on a few matrices in float32, such as one whose singular values are all alike
        U, S, Vh = (x.to(A.dtype) for x in svd(A.double()))
    if not bool(S[..., :1].isfinite().all()):
        raise ConvergenceError(f"not finite, or singular values beyond {A.dtype}")
    return U, S, Vh


def lapack(A: Tensor, rank: int) -> tuple[Components, Evidence]:
    """Full LAPACK decomposition of (m, n), truncated."""
    m, n = A.shape
    U, S, Vh = svd(A)
    tolerance = null_tolerance(m, n, A.dtype)
    return truncate(U, S, Vh, rank, tolerance), Evidence("lapack", min(m, n), tie=is_tie(S, rank, tolerance))


def gram(A: Tensor, rank: int) -> tuple[Components, Evidence]:
    """Eigendecomposition of A'A (the short side) in float64, for float32 (m, n).

    Squaring costs half the digits of float64, which leaves float32's: errors of sigma_j relative to sigma_1 are
    eps64 (sigma_1 / sigma_j). The vectors of the long side are A v_j / sigma_j. LAPACK's decomposition where the
    eigensolver does not converge.
    """
    m, n = A.shape
    if m < n:
        (V, S, Uh), evidence = gram(A.mT, rank)
        return Components(Uh.mT, S, V.mT), evidence
    try:
        Uh, S, Vh, _ = _by_gram(A, rank)
    except ConvergenceError:  # the eigensolver gives up on one sparse matrix in thousands
        return lapack(A, rank)
    tolerance = null_tolerance(m, n, A.dtype)
    found = truncate(Uh.mT, S.to(A.dtype), Vh, rank, tolerance)
    return found, Evidence("gram", n, tie=is_tie(S, rank, tolerance))


def full(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All min(m, n) triplets of (m, n), as ``torch.linalg.svd`` gives them: null directions have vectors, too."""
    m, n = A.shape
    if m < n:
        V, S, Uh = full(A.mT)
        return Uh.mT, S, V.mT
    if exponent := binary_exponent(A):
        U, S, Vh = full(scale_by_power(A, -exponent))
        return U, scale_by_power(S, exponent), Vh
    if A.dtype == torch.float32 and cost.dense(m, n, n).route == "gram":
        with suppress(ConvergenceError):
            Uh, values, Vh, live = _by_gram(A, n)
            if live < n:
                _complete(Uh, live, Vh[live:] @ A.mT)
            return Uh.mT, values.to(A.dtype), Vh
    return svd(A)


def _complete(Uh: Tensor, live: int, images: Tensor) -> None:
    """Orthonormal rows from ``live`` on, in place: the images A v_j made orthogonal to the rows before them, in their order.

    An image is near zero, and where round-off is all that is left of it, so is the direction arbitrary.
    """
    length = torch.linalg.vector_norm(images, dim=-1, keepdim=True)
    Uh[live:] = images / torch.where(length > 0, length, 1)
    Q, R = torch.linalg.qr(Uh.mT)
    signs = torch.where(R.diagonal() < 0, -1, 1)
    Uh[live:] = (Q * signs).mT[live:]


def _by_gram(A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows U' (rank, m), all singular values in float64, rows V' (rank, n) for float32 (m, n), m >= n.

    The number of components that are not null comes last: rows of U' from there on are zero.
    """
    m, n = A.shape
    values, vectors = eigh(gram_float64(A.mT))
    S = values.flip(0).clamp_(min=0).sqrt_()
    Vh = vectors[:, n - rank :].mT.flip(0).to(A.dtype)
    live = S[:rank] > null_tolerance(m, n, A.dtype) * S[0]
    count = int(live.sum())
    Uh = (Vh @ A.mT).mul_(torch.where(live, 1 / S[:rank], 0).to(A.dtype)[:, None])
    restore_orthonormality(Uh, S[:rank], count)
    return Uh, S, Vh, count


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` of the lower triangle, ascending, failing with ConvergenceError."""
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ConvergenceError(str(error)) from error
    if not bool(values.isfinite().all()):
        raise ConvergenceError(f"not finite, or eigenvalues beyond {symmetric.dtype}")
    return values, vectors
