"""The float64 truth of a merge, and how far an answer is from it.

TIES is discontinuous: an entry of a core within round-off of its threshold may fall either way, and a single entry
changes the merged matrix by a percent or so. So an answer is judged by two things: its distance from the float64 merge
that decides such near ties as the answer did, and how many it decided otherwise than float64 does, and how near to the
threshold those are. What the answer decided is read off the answer itself: back in the cover basis, each entry of the
masked core shows which tasks it averages. An entry farther than MARGIN from its threshold that an answer keeps or drops
wrongly stays in the distance, and fails the check.

Joint sign flips of singular vectors turn a core M into S M S; they change no magnitude and cancel in the merged matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from reference import Parts, elect, full_svd, thresholds
from torch import Tensor

from dcmerge_ext import LowRank

MARGIN = 1e-3
"""Relative distance from its threshold within which an entry may be kept or not."""


class Cover(NamedTuple):
    """A merge before trimming."""

    left: Tensor
    """U~ (m, k)"""
    right: Tensor
    """V~ (n, k)"""
    cores: Tensor
    """M_i (T, k, k)"""


class Distance(NamedTuple):
    error: float
    """Relative Frobenius, near ties decided as the answer did."""
    otherwise: int
    """Near ties that float64 decides otherwise, in the blocks that the mask keeps: the others leave no trace."""
    within: float
    """Largest relative distance of those from their thresholds."""


def components(update: Tensor | LowRank, rank: int, *, average: bool = False) -> Parts:
    """Full SVD in float64, truncated; of a LowRank, whose dense product may be large, by way of QRs of its factors."""
    if isinstance(update, LowRank):
        left_q, left_r = torch.linalg.qr(update.left.double())
        right_q, right_r = torch.linalg.qr(update.right.double().mT)
        inner = full_svd(left_r @ right_r.mT, rank)
        found = Parts(left_q @ inner.U, inner.S, inner.Vh @ right_q.mT)
    else:
        found = full_svd(update.double(), rank)
    return found._replace(S=found.S.mean().expand_as(found.S)) if average else found


def cover(parts: Sequence[Parts]) -> Cover:
    """The shared basis and the cores U~' U_i diag(s_i) V_i' V~, in float64."""
    left, root_left = _polar(torch.cat([p.U.double() for p in parts], 1))
    right, root_right = _polar(torch.cat([p.Vh.double().mT for p in parts], 1))
    return Cover(left, right, _cores(root_left, root_right, [p.S.double() for p in parts]))


def merge(truth: Cover, kept: Tensor) -> Tensor:
    """The merged matrix (m, n) that keeps the entries ``kept`` (T, k, k), one diagonal block per task."""
    return truth.left @ _elect(truth.cores * kept) @ truth.right.mT


def keeps(truth: Cover, count: int) -> Tensor:
    """(T, k, k) bool: the ``count`` largest entries of each core."""
    return _excess(truth, count) >= 0


def distance(update: Tensor, truth: Cover, count: int) -> Distance:
    """Of an answer (m, n) where ``count`` entries per core are to be kept."""
    excess = _excess(truth, count)
    kept = excess >= 0
    found = truth.left.mT @ update.double() @ truth.right
    within = []
    for task, row, column in (_blocks(kept) & (excess.abs() <= MARGIN)).nonzero().tolist():
        place = (slice(None), slice(row, row + 1), slice(column, column + 1))
        other = kept[place].clone()
        other[task] ^= True
        misses = [
            float((_elect(truth.cores[place] * choice) - found[row, column]).abs()) for choice in (kept[place], other)
        ]
        if misses[1] < misses[0]:
            kept[place] = other
            within.append(float(excess[task, row, column].abs()))
    return Distance(relative(update, merge(truth, kept)), len(within), max(within, default=0.0))


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius distance over the norm of ``expected``, computed in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def projector_error(basis: Tensor, truth: Tensor) -> float:
    """Relative Frobenius distance of the projectors onto the columns of two (..., n, r); the worst of a batch."""
    found, expected = (x.double() @ x.double().mT for x in (basis, truth))
    errors = (found - expected).norm(dim=(-2, -1)) / expected.norm(dim=(-2, -1))
    return float(errors.amax())


def _polar(X: Tensor) -> tuple[Tensor, Tensor]:
    """X = Q H by QR and SVD."""
    basis, triangle = torch.linalg.qr(X)
    W, S, Zh = torch.linalg.svd(triangle)
    return basis @ (W @ Zh), Zh.mT @ (S[:, None] * Zh)


def _cores(root_left: Tensor, root_right: Tensor, spectra: Sequence[Tensor]) -> Tensor:
    """H_u[:, I_i] diag(s_i) H_v[:, I_i]' for each task i."""
    ranks = [len(S) for S in spectra]
    lefts, rights = torch.split(root_left, ranks, 1), torch.split(root_right, ranks, 1)
    return torch.stack([(u * S) @ v.mT for u, S, v in zip(lefts, spectra, rights, strict=True)])


def _excess(truth: Cover, count: int) -> Tensor:
    """By how much each magnitude exceeds its core's threshold, relative to it."""
    limits = thresholds(truth.cores, count)[:, None, None]
    return (truth.cores.abs() - limits) / limits


def _blocks(cores: Tensor) -> Tensor:
    """(k, k) bool: the T diagonal blocks."""
    side = cores.shape[-1]
    block = torch.arange(side) // (side // len(cores))
    return block[:, None] == block


def _elect(trimmed: Tensor) -> Tensor:
    """(T, k, k), or one entry of each (T, 1, 1)."""
    return elect(trimmed, trimmed.new_zeros(len(trimmed)), max(1, trimmed.shape[-1] // len(trimmed)))
