"""The torch.linalg compositions that equal the authors' code (DC-Merge, arXiv 2603.06242), in the dtype of their input.

They are not handicapped: thresholds by ``topk``, the fastest selection torch has; diagonal matrices as broadcasts; the
association of three factors by ``multi_dot``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dcmerge_ext import LowRank

LORA_RANK = 16
"""Hard-coded in the authors' LoRA pipelines."""
KEEP = 1e-3


class Parts(NamedTuple):
    """U (m, r), S (r,), Vh (r, n) of one task."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def full_fine_tunes(updates: Sequence[Tensor]) -> Tensor:
    """T full SVDs truncated to int(q / T), bases padded with zeros to q columns."""
    q = min(updates[0].shape)
    rank = int(q * (1 / len(updates)))
    return merge([full_svd(update, rank) for update in updates], width=q)


def adapters(updates: Sequence[LowRank]) -> Tensor:
    """Dense products B A, T full SVDs truncated to 16, average smoothing; bases padded with zeros to q columns, whitened,
    and then cut to 16 T columns, as the authors have it."""
    parts = [full_svd(update.dense(), LORA_RANK) for update in updates]
    return merge_smoothed(parts, padding=min(updates[0].shape) - LORA_RANK * len(parts))


def llava(updates: Sequence[LowRank]) -> Tensor:
    """Dense products B A, T randomized SVDs of rank 16 with 2 power iterations, average smoothing."""
    return merge_smoothed([randomized_svd(update.dense(), LORA_RANK) for update in updates])


def full_svd(delta: Tensor, rank: int) -> Parts:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Parts(U[:, :rank], S[:rank], Vh[:rank])


def randomized_svd(delta: Tensor, rank: int) -> Parts:
    U, S, V = torch.svd_lowrank(delta, q=rank, niter=2)
    return Parts(U, S, V.T)


def merge_smoothed(parts: Sequence[Parts], padding: int = 0) -> Tensor:
    """Every singular value becomes the mean of its task's."""
    smoothed = [Parts(U, S.mean().expand_as(S), Vh) for U, S, Vh in parts]
    return merge(smoothed, width=sum(len(p.S) for p in parts), padding=max(0, padding))


def merge(parts: Sequence[Parts], width: int, padding: int = 0) -> Tensor:
    """All after the decompositions. ``width``: columns of the bases, the side of the cores and the base of the counts;
    ``padding``: zero columns beyond, whitened, too, and cut off."""
    first, rank = parts[0], len(parts[0].S)
    full = width + padding
    basis_u, basis_v = first.U.new_zeros(len(first.U), full), first.Vh.new_zeros(full, first.Vh.shape[1])
    for i, (U, _, Vh) in enumerate(parts):
        basis_u[:, i * rank : (i + 1) * rank] = U
        basis_v[i * rank : (i + 1) * rank] = Vh
    left, right = polar_by_svd(basis_u)[:, :width], polar_by_svd(basis_v)[:width]
    truncated = [(U * S) @ Vh for U, S, Vh in parts]
    cores = torch.stack([torch.linalg.multi_dot((left.T, delta, right.T)) for delta in truncated])
    core = elect(cores, thresholds(cores, max(1, int(KEEP * width**2))), rank)
    update: Tensor = torch.linalg.multi_dot((left, core, right))
    return update


def polar_by_svd(X: Tensor) -> Tensor:
    P, _, Qh = torch.linalg.svd(X, full_matrices=False)
    factor: Tensor = P @ Qh
    return factor


def polar_by_qr(X: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(X)
    factor: Tensor = Q @ polar_by_svd(R)
    return factor


def thresholds(cores: Tensor, count: int) -> Tensor:
    """The ``count``-th largest magnitude of each of (T, k, k)."""
    return torch.topk(cores.abs().flatten(1), count, sorted=False).values.amin(1)


def elect(cores: Tensor, limits: Tensor, block: int) -> Tensor:
    """Trim, elect a sign, average what agrees with it, and keep the diagonal blocks. (T, k, k), (T,) -> (k, k)."""
    merged = disjoint_mean(cores, limits)
    mask = torch.zeros_like(merged)
    for i in range(len(cores)):
        mask[i * block : (i + 1) * block, i * block : (i + 1) * block] = 1
    return merged * mask


def disjoint_mean(cores: Tensor, limits: Tensor) -> Tensor:
    """Trim, elect a sign, average what agrees with it. (T, k, k), (T,) -> (k, k)."""
    trimmed = cores * (cores.abs() >= limits[:, None, None])
    total = trimmed.sum(0)
    agree = trimmed.sign() == total.sign()
    merged = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    return torch.where(total == 0, 0, merged)
