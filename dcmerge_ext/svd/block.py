"""Orthonormal bases of blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dcmerge_ext import ops

_WORST_PIVOT = 1e-5
"""Smallest pivot, relative to the largest, of rows that are independent beyond float32's round-off."""

_STEEP = 0.1
"""sigma_r / sigma_1 from which on images are orthonormal to round-off as they are."""


def independent_basis(Y: Tensor) -> Tensor | None:
    """Orthonormal rows that span the rows of (b, n), or None where those are too close to dependent."""
    return ops.orthonormalize(Y, worst_pivot=_WORST_PIVOT)


def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal rows that span the rows of (b, n), b <= n; rows that depend on others become arbitrary directions."""
    X = independent_basis(Y)
    return torch.linalg.qr(Y.mT).Q.mT.contiguous() if X is None else X


def restore_orthonormality(rows: Tensor, S: Tensor, live: int) -> None:
    """Orthonormalize the first ``live`` of singular vectors found as images A v_j / sigma_j, in place, in their order.

    u_1 enters u_j as round-off times sigma_1 / sigma_j: only where the values ``S`` (r,) of all rows span more than that
    allows is there anything to do.
    """
    if not S[-1] > _STEEP * S[0]:
        basis = independent_basis(rows[:live])
        if basis is not None:
            rows[:live] = basis


def fill_dependent(Y: Tensor, fresh: Tensor) -> Tensor:
    """Rows of Y made orthonormal, those that depend on rows before them replaced by rows of ``fresh`` (b, n) as they are."""
    Q, R = torch.linalg.qr(Y.mT)
    pivots = R.diagonal().abs()
    dependent = pivots <= _WORST_PIVOT * pivots.max()
    return torch.where(dependent[:, None], fresh / fresh.shape[-1] ** 0.5, Q.mT)
