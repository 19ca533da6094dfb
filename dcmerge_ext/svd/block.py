"""Orthonormal bases of blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

_WORST_CONDITION = 1e-5
"""Smallest pivot, relative to the largest, of rows that are independent beyond float32's round-off."""


def cholesky_qr(Y: Tensor) -> Tensor | None:
    """L^-1 Y with L L' = Y Y': orthonormal rows of (b, n), or None where rows are too close to dependent.

    In float64 throughout, so that one pass is enough for float32 (CholeskyQR squares the condition of Y).
    """
    wide = Y.double()
    L, failed = torch.linalg.cholesky_ex(wide @ wide.mT)
    smallest, largest = L.diagonal().aminmax()
    if int(failed) or not float(smallest) > _WORST_CONDITION * float(largest):
        return None
    X: Tensor = torch.linalg.solve_triangular(L, wide, upper=False)
    return X.to(Y.dtype, memory_format=torch.contiguous_format)  # LAPACK leaves columns; products of rows cost double


def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal rows that span the rows of (b, n), b <= n; rows that depend on others become arbitrary directions."""
    X = cholesky_qr(Y)
    return torch.linalg.qr(Y.mT).Q.mT.contiguous() if X is None else X


def fill_dependent(Y: Tensor, fresh: Tensor) -> Tensor:
    """Rows of Y made orthonormal; those that depend on rows before them are replaced by rows of ``fresh`` (b, n)."""
    Q, R = torch.linalg.qr(Y.mT)
    pivots = R.diagonal().abs()
    dependent = pivots <= _WORST_CONDITION * pivots.max()
    return torch.where(dependent[:, None], fresh / fresh.shape[-1] ** 0.5, Q.mT)
