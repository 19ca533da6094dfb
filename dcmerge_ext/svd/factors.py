"""Decomposition of a LowRank from its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from dcmerge_ext.lowrank import LowRank
from dcmerge_ext.svd.components import Components, Evidence, truncate
from dcmerge_ext.svd.dense import svd

_WORST_PIVOT = 1e-7
"""Smallest pivot of a Cholesky factor in float64, relative to the largest, that two passes of CholeskyQR make good."""


def factored(A: LowRank, rank: int) -> tuple[Components, Evidence]:
    """Thin QRs B = Q_B R_B, A' = Q_A R_A; the SVD of R_B R_A' rotates Q_B and Q_A. In float64, 8 (m + n) r^2 flops."""
    *leading, m, n = A.shape
    source = A.dtype if A.dtype == torch.float64 else torch.float32
    tolerance = float(torch.finfo(source).eps * max(A.rank, 1) ** 0.5)  # the factors carry their dtype's round-off
    left_q, left_r = thin_qr(A.left.double())
    right_q, right_r = thin_qr(A.right.double().mT)
    u, S, vh = svd(left_r @ right_r.mT)
    slots = min(rank, S.shape[-1])
    evidence = Evidence("factors", S.shape[-1])
    found = truncate(left_q @ u, S, vh @ right_q.mT, slots, tolerance) if slots else None
    if slots == rank and found is not None:
        return found, evidence
    U = left_q.new_zeros(*leading, m, rank)
    S = left_q.new_zeros(*leading, rank)
    Vh = left_q.new_zeros(*leading, rank, n)
    if found is not None:
        U[..., :slots], S[..., :slots], Vh[..., :slots, :] = found
    return Components(U, S, Vh), evidence


def thin_qr(X: Tensor) -> tuple[Tensor, Tensor]:
    """Q (..., m, r) and upper triangular R of float64 (..., m, r), by two passes of CholeskyQR over the whole batch.

    Householder's QR, 5 times slower on such shapes, where the columns are nearly dependent or r exceeds m.
    """
    total: Tensor | None = None
    Q = X
    if X.shape[-1] == 0 or X.shape[-1] > X.shape[-2]:
        return tuple(torch.linalg.qr(X))
    for _ in range(2):
        L, failed = torch.linalg.cholesky_ex(Q.mT @ Q)
        pivots = L.diagonal(dim1=-2, dim2=-1)
        if bool(failed.any()) or not bool((pivots.amin(-1) > _WORST_PIVOT * pivots.amax(-1)).all()):
            return tuple(torch.linalg.qr(X))
        Q = Q @ torch.linalg.inv(L).mT
        total = L.mT if total is None else L.mT @ total
    assert total is not None
    return Q, total
