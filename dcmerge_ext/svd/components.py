"""What a truncated decomposition returns, and what is known about how it was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Accuracy = Literal["exact", "fast"]


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


class Evidence(NamedTuple):
    """How one matrix was decomposed, in plain numbers for the run record."""

    route: str
    """krylov, gram, lapack, factors or subspace."""
    dimension: int
    """Order of the dense problem solved at the end."""
    residual: float | None = None
    """Largest ``|A' u_j - sigma_j v_j| / sigma_1``; None where a full decomposition leaves no doubt."""
    tie: bool = False
    """sigma_r and sigma_(r+1) agree to round-off: the last component is one of several equally good ones."""
    captured: float | None = None
    """Squared norm captured, as a fraction of that of the matrix (approximate routes)."""


def summarize(evidence: Sequence[Evidence]) -> dict[str, Any]:
    """What a run record says of several decompositions: how many took each route, and the worst of the numbers."""
    facts: dict[str, Any] = {
        "routes": dict(sorted(Counter(e.route for e in evidence).items())),
        "dimension": max((e.dimension for e in evidence), default=0),
    }
    residuals = [e.residual for e in evidence if e.residual is not None]
    captured = [e.captured for e in evidence if e.captured is not None]
    if residuals:
        facts["residual"] = max(residuals)
    if captured:
        facts["captured"] = min(captured)
    if ties := sum(e.tie for e in evidence):
        facts["ties"] = ties
    return facts


def truncate(U: Tensor, S: Tensor, Vh: Tensor, rank: int, tolerance: float) -> Components:
    """The first ``rank`` triplets; those at or below ``tolerance * sigma_1`` become null components."""
    null = S[..., :rank] <= tolerance * S[..., :1]
    if not bool(null.any()):
        return Components(U[..., :rank], S[..., :rank], Vh[..., :rank, :])
    return Components(
        U[..., :rank].masked_fill(null[..., None, :], 0),
        S[..., :rank].masked_fill(null, 0),
        Vh[..., :rank, :].masked_fill(null[..., :, None], 0),
    )


def null_tolerance(m: int, n: int, dtype: torch.dtype) -> float:
    """Relative to the largest singular value: what LAPACK returns for an exact zero stays below it."""
    return float(torch.finfo(dtype).eps * max(m, n) ** 0.5)


def is_tie(S: Tensor, rank: int, round_off: float) -> bool:
    """Whether the values of (q,) ``S`` on both sides of the cut agree to ``round_off * sigma_1``; zeros do not count."""
    if rank >= S.shape[-1]:
        return False
    largest, last, following = float(S[0]), float(S[rank - 1]), float(S[rank])
    return following > round_off * largest and last - following <= round_off * largest
