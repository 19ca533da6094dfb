"""Orthonormal bases of blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dcmerge_ext import ops

_WORST_PIVOT = 1e-5
"""Smallest pivot, relative to the largest, of rows that are independent beyond float32's round-off."""


def independent_basis(Y: Tensor) -> Tensor | None:
    """Orthonormal rows that span the rows of (b, n), or None where those are too close to dependent."""
    return ops.orthonormalize(Y, worst_pivot=_WORST_PIVOT)


def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal rows that span the rows of (b, n), b <= n; rows that depend on others become arbitrary directions."""
    X = independent_basis(Y)
    return torch.linalg.qr(Y.mT).Q.mT.contiguous() if X is None else X


def fill_dependent(Y: Tensor, fresh: Tensor) -> Tensor:
    """Rows of Y made orthonormal; those that depend on rows before them are replaced by rows of ``fresh`` (b, n)."""
    Q, R = torch.linalg.qr(Y.mT)
    pivots = R.diagonal().abs()
    dependent = pivots <= _WORST_PIVOT * pivots.max()
    return torch.where(dependent[:, None], fresh / fresh.shape[-1] ** 0.5, Q.mT)
