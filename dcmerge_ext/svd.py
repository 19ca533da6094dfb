"""Truncated singular value decompositions of dense and low-rank updates."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dcmerge_ext.errors import ConvergenceError
from dcmerge_ext.lowrank import LowRank, Update

Accuracy = Literal["exact", "fast"]

_OVERSAMPLING = 16
_POWER_STEPS = 2


class Components(NamedTuple):
    """Knowledge components sigma_j u_j v_j' of an update, largest first.

    A null component (sigma_j at round-off level) keeps its slot with ``S = 0`` and zero vectors, so that shapes are
    static over a batch and nothing arbitrary enters a basis.
    """

    U: Tensor
    """(..., m, r)"""
    S: Tensor
    """(..., r), descending"""
    Vh: Tensor
    """(..., r, n)"""


def truncated_svd(A: Update, rank: int, *, accuracy: Accuracy = "exact", seed: int = 0) -> Components:
    """The ``rank`` largest singular triplets of each matrix.

    "exact" is LAPACK's full decomposition, truncated. "fast" is randomized subspace iteration with 2 power steps and 16
    extra directions (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1): on spectra that are flat around
    the cut - full fine-tunes are - it captures nearly the same squared norm in a different subspace.
    LowRank input is never made dense: thin QR of both factors and the SVD of an r x r matrix, in float64.

    Args:
        A: (..., m, n) tensor or LowRank, finite. Half precision is decomposed in float32.
        rank: 1 .. min(m, n). A LowRank of smaller rank fills the slots beyond with null components.
        accuracy: "exact" or "fast" (dense input only; LowRank is always exact).
        seed: of the random start of "fast"; the global generators are neither read nor changed.
    Returns:
        Components in float32, or float64 for float64 and LowRank input.
    Raises:
        ValueError: a rank outside 1 .. min(m, n).   ConvergenceError: LAPACK did not converge (non-finite input).

    Singular vectors are unique only up to sign, and up to rotation where singular values repeat.
    """
    *_, m, n = A.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"truncated_svd: rank must lie in 1 .. {min(m, n)} for a {m} x {n} matrix, got {rank}")
    if accuracy not in ("exact", "fast"):
        raise ValueError(f"truncated_svd: accuracy must be 'exact' or 'fast', got {accuracy!r}")
    if isinstance(A, LowRank):
        return _lowrank(A, rank)
    A = A if A.dtype == torch.float64 else A.float()
    if accuracy == "fast" and rank + _OVERSAMPLING < min(m, n):
        return _subspace_iteration(A, rank, seed)
    return _truncate(*_lapack(A), rank, _null_tolerance(m, n, A.dtype))


def _lapack(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ConvergenceError(f"SVD of a {A.shape[-2]} x {A.shape[-1]} matrix failed: {error}") from error
    if not bool(S[..., :1].isfinite().all()):
        raise ConvergenceError(
            f"SVD of a {A.shape[-2]} x {A.shape[-1]} matrix failed: not finite, or singular values beyond {A.dtype}"
        )
    return U, S, Vh


def _null_tolerance(m: int, n: int, dtype: torch.dtype) -> float:
    """Relative to the largest singular value: what LAPACK returns for an exact zero stays below it."""
    return float(torch.finfo(dtype).eps * max(m, n) ** 0.5)


def _truncate(U: Tensor, S: Tensor, Vh: Tensor, rank: int, tolerance: float) -> Components:
    null = S[..., :rank] <= tolerance * S[..., :1]
    return Components(
        U[..., :rank].masked_fill(null[..., None, :], 0),
        S[..., :rank].masked_fill(null, 0),
        Vh[..., :rank, :].masked_fill(null[..., :, None], 0),
    )


def _lowrank(A: LowRank, rank: int) -> Components:
    # B A with thin QRs B = Q_B R_B, A' = Q_A R_A: the SVD of R_B R_A' rotates Q_B and Q_A. 4 (m + n) r^2 flops.
    *_, m, n = A.shape
    source = A.dtype if A.dtype == torch.float64 else torch.float32
    tolerance = float(torch.finfo(source).eps * max(A.rank, 1) ** 0.5)  # the factors carry their dtype's round-off
    left_q, left_r = torch.linalg.qr(A.left.double())
    right_q, right_r = torch.linalg.qr(A.right.double().mT)
    u, S, vh = _lapack(left_r @ right_r.mT)
    slots = min(rank, S.shape[-1])
    found = _truncate(left_q @ u, S, vh @ right_q.mT, slots, tolerance) if slots else None
    if slots == rank and found is not None:
        return found
    leading = A.shape[:-2]
    U = left_q.new_zeros(*leading, m, rank)
    S = left_q.new_zeros(*leading, rank)
    Vh = left_q.new_zeros(*leading, rank, n)
    if found is not None:
        U[..., :slots], S[..., :slots], Vh[..., :slots, :] = found
    return Components(U, S, Vh)


def _subspace_iteration(A: Tensor, rank: int, seed: int) -> Components:
    *leading, m, n = A.shape
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(*leading, n, rank + _OVERSAMPLING, generator=generator, dtype=A.dtype).to(A.device)
    basis = torch.linalg.qr(A @ sketch).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(A.mT @ basis).Q
        basis = torch.linalg.qr(A @ basis).Q
    u, S, Vh = _lapack(basis.mT @ A)
    return _truncate(basis @ u, S, Vh, rank, _null_tolerance(m, n, A.dtype))
