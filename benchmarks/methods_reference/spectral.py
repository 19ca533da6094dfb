"""TSV-M, Iso-C, Iso-CTS, SCORE and ESM: singular value decompositions by torch.linalg, and what follows them.

Each comes in two parts, so that decompositions that take seconds can be timed apart from the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from reference import Parts, full_svd, polar_by_svd
from torch import Tensor

GAMMA = 0.8
DEVIATIONS = 1.96
ENERGY_POWER = 0.15


def tsv_m(parts: Sequence[Parts]) -> Tensor:
    """From the truncated SVDs of the tasks."""
    left, right = whitened(parts)
    return (left * torch.cat([p.S for p in parts])) @ right


def whitened(parts: Sequence[Parts]) -> tuple[Tensor, Tensor]:
    """Polar factors of all left and all right singular vectors side by side: (m, k) and (k, n)."""
    return polar_by_svd(torch.cat([p.U for p in parts], 1)), polar_by_svd(torch.cat([p.Vh for p in parts]))


def iso_c(total: Parts) -> Tensor:
    """From the SVD of the sum, cut off where it has no more singular values: the mean is over those there are."""
    return (total.U * total.S.mean()) @ total.Vh


def iso_cts_sizes(budget: int, tasks: int, *, least: int = 0) -> tuple[int, int]:
    """Common components, and those of each task; ``least``: of the latter."""
    own = max(least, round((budget - int(budget * GAMMA)) / tasks))
    return budget - own * tasks, own


def iso_cts(updates: Sequence[Tensor], budget: int) -> Tensor:
    common, own = iso_cts_sizes(budget, len(updates))
    total = full_svd(torch.stack(list(updates)).sum(0), common)
    return iso_cts_of(total, [full_svd(rest(update, total.U), own) for update in updates])


def rest(update: Tensor, common: Tensor) -> Tensor:
    """What the common left singular vectors leave of an update."""
    return update - common @ (common.mT @ update)


def iso_cts_of(common: Parts, own: Sequence[Parts]) -> Tensor:
    parts = [*own, common]
    left, right = whitened(parts)
    return (left * torch.cat([p.S for p in parts]).mean()) @ right


class Cores(NamedTuple):
    """All tasks in the shared basis of SCORE."""

    left: Tensor
    """(m, k)"""
    right: Tensor
    """(k, n)"""
    diagonals: Tensor
    """(T, k)"""
    off: Tensor
    """(T, k, k), with a diagonal of zeros"""
    limits: Tensor
    """(T,): largest magnitude of ``off`` that is kept"""

    def kept(self) -> Tensor:
        return self.off.abs() <= self.limits[:, None, None]

    def merged_core(self, kept: Tensor) -> Tensor:
        return torch.where(kept, self.off, 0).sum(0) + self.diagonals.sum(0).diag()


def score(parts: Sequence[Parts], updates: Sequence[Tensor]) -> Tensor:
    cores = score_cores(parts, updates)
    merged: Tensor = torch.linalg.multi_dot((cores.left, cores.merged_core(cores.kept()), cores.right))
    return merged


def score_cores(parts: Sequence[Parts], updates: Sequence[Tensor]) -> Cores:
    """The threshold of the paper, centred at 0: at the mean, the result depends on the signs LAPACK happens to return."""
    left, right = whitened(parts)
    off = torch.stack([torch.linalg.multi_dot((left.mT, update, right.mT)) for update in updates])
    diagonals = off.diagonal(dim1=-2, dim2=-1).clone()
    off.diagonal(dim1=-2, dim2=-1).zero_()
    variance = off.square().sum((-2, -1)) / (off[0].numel() - 1)
    return Cores(left, right, diagonals, off, DEVIATIONS * variance.sqrt())


class Shifts(NamedTuple):
    """Principal directions of what an update does to the outputs, (m, k) and singular values (k,)."""

    P: Tensor
    S: Tensor


def output_shifts(inputs: Tensor, update: Tensor, count: int) -> Shifts:
    """From the inputs of a layer, tokens x n."""
    found = full_svd(inputs @ update.mT, count)
    return Shifts(found.Vh.mT, found.S)


def esm(shifts: Sequence[Shifts], updates: Sequence[Tensor]) -> Tensor:
    """The code for CLIP, of one layer: its scaling of layers against each other does nothing."""
    norms = torch.stack([update.norm() for update in updates])
    bases, coordinates = [], []
    for (P, S), update, norm in zip(shifts, updates, norms / norms.mean(), strict=True):
        energies = S ** (2 * ENERGY_POWER)
        energies = energies / energies.mean()
        bases.append(P * energies)
        coordinates.append((P * energies * norm**2).mT @ update)
    A = torch.cat(coordinates)
    columns = A.norm(dim=0)
    A *= (columns / columns.mean()) ** 2
    return 2 * _flat(torch.cat(bases, 1)) @ _flat(A)


def _flat(X: Tensor) -> Tensor:
    """mean(sv(X)) polar(X)"""
    P, S, Qh = torch.linalg.svd(X, full_matrices=False)
    return (P * S.mean()) @ Qh
