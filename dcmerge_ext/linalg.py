"""Matrix functions of merging that torch.linalg lacks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dcmerge_ext.errors import ConvergenceError


class Polar(NamedTuple):
    """X = Q H."""

    Q: Tensor
    """(..., m, n): orthonormal columns, or a partial isometry where X is rank deficient or wide."""
    H: Tensor
    """(..., n, n): (X'X)^(1/2), symmetric positive semidefinite."""


def polar(X: Tensor, *, tol: float | None = None) -> Polar:
    """Polar decomposition X = Q H with Q the nearest partial isometry and H = (X'X)^(1/2).

    Q is what DC-Merge (arXiv 2603.06242, section 3.2) and TSV-M (arXiv 2412.00081) call whitening of the concatenated
    singular vectors. Computed from a thin QR X = Q0 R and the SVD R = W S Z': Q = Q0 W Z', H = Z S Z', which keeps Q
    orthonormal to round-off up to conditions near 1/eps. Directions with singular values at or below the tolerance are
    dropped from Q (the minimum-norm choice, unique and deterministic), where an SVD would fill them arbitrarily.

    Args:
        X: (..., m, n), any shape, floating, finite. Half precision is computed in float32.
        tol: relative to the largest singular value. Default 2 sqrt(max(m, n)) eps.
    Returns:
        Polar(Q, H), float32, or float64 for float64.
    Raises:
        ConvergenceError: LAPACK did not converge (non-finite input).
    """
    Q, H, _ = polar_with_values(X, tol)
    return Polar(Q, H)


def polar_with_values(X: Tensor, tol: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`polar`, and the singular values (..., min(m, n)), dropped ones set to 0."""
    X = X if X.dtype == torch.float64 else X.float()
    *_, m, n = X.shape
    if min(m, n) == 0:
        return X.clone(), X.new_zeros(*X.shape[:-2], n, n), X.new_zeros(*X.shape[:-2], 0)
    basis, triangle = torch.linalg.qr(X)
    try:
        W, S, Zh = torch.linalg.svd(triangle, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ConvergenceError(f"polar factor of a {m} x {n} matrix failed: {error}") from error
    del triangle
    H = Zh.mT @ (S[..., :, None] * Zh)
    relative = default_tolerance(m, n, X.dtype) if tol is None else tol
    kept = S.masked_fill(relative * S[..., :1] >= S, 0)
    W.masked_fill_((kept == 0)[..., None, :], 0)
    return basis @ (W @ Zh), H, kept


def default_tolerance(m: int, n: int, dtype: torch.dtype) -> float:
    """Singular values of an m x n matrix at or below this fraction of the largest count as round-off.

    Measured in float32 on concatenated singular vectors: exact copies of tasks leave spurious values of at most
    0.8 sqrt(max(m, n)) eps, while the smallest genuine value of a square concatenation (T r = n) lies near 0.3 / n.
    max(m, n) eps, the usual choice, drops genuine directions in 8 % of such bases at n = 768 and in most at n = 2048,
    and dropping one changes the merged matrix by 5 to 10 %.
    """
    return float(2 * max(m, n) ** 0.5 * torch.finfo(dtype).eps)
