"""Numbers of one matrix: the updates of its tasks against the merged one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dcmerge_ext.comparison.result import Curve, Matrix, Spectra, TaskInMatrix
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.cover import cover_of
from dcmerge_ext.methods.spectral import component_ranks
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.precision import without_autocast
from dcmerge_ext.similarity import components_of_one, cos_sim, dir_sim, projected_cos_sim, projected_dir_sim
from dcmerge_ext.svd import Components, Start, decompose
from dcmerge_ext.updates import Updates

POINTS = 48
"""Singular values kept of a spectrum, by index on a logarithmic scale."""

Smooth = Callable[[list[Tensor], bool], list[Tensor]]
"""Singular values (..., r_t) of each task, whether all are LowRank -> those that entered the merge."""
_T = TypeVar("_T")


@without_autocast
def measure(
    name: str,
    updates: Updates,
    merged: Update,
    rank: int | None,
    smooth: Smooth | None,
    round_off: float = 0.0,
) -> Matrix:
    """Compare the T updates of a matrix, (..., m, n), with the merged one; numbers of a stack are means over it.

    Each task takes part with its r_t leading components: ``rank``, or the rank of a LowRank, or int(min(m, n) / T) of a
    dense update, at least 1. Tasks that do not touch the matrix, or left it as it was, have rank 0 and no numbers. Directions of the merged update whose
    singular values do not exceed ``round_off`` are no directions.
    """
    tasks, q = len(updates), min(updates.shape[-2:])
    kept = component_ranks(updates.specs, tasks, None if rank is None else min(rank, q))
    if kept is None:  # more tasks than rows or columns
        kept = [1 if spec.rank is None else min(spec.rank, 1) for spec in updates.specs]
    kept = [r if r and bool(_norm(updates[i]).any()) else 0 for i, r in enumerate(kept)]
    touching = [i for i, r in enumerate(kept) if r]
    whole = components_of_one("compare", merged, _slots(merged, min(q, sum(kept))))
    spectrum = _curve(whole.S)
    live = round_off < whole.S
    whole = Components(whole.U * live[..., None, :], whole.S * live, whole.Vh * live[..., None])

    def look(i: int) -> tuple[Components, TaskInMatrix]:
        update = updates[i]
        components = decompose(update, kept[i], start=Start(key=name))[0]
        return components, _task(update, components, merged, whole)

    # large dense updates: two at a time, as in the methods
    found = side_by_side(look, touching, at_most=None if updates.all_lowrank else 2)
    parts = [components for components, _ in found]
    spectra = [c.S for c in parts]
    smoothed = smooth(spectra, updates.all_lowrank) if smooth else None
    blocks, outside = _blocks(parts, merged, updates)
    return Matrix(
        name,
        list(updates.shape),
        kept,
        _spread([numbers for _, numbers in found], touching, tasks),
        _between(dir_sim, parts, touching, tasks),
        _between(cos_sim, parts, touching, tasks),
        _spread([_spread(row, touching, tasks) for row in blocks], touching, tasks, [None] * tasks),
        outside,
        Spectra(
            spectrum,
            _spread([_curve(S) for S in spectra], touching, tasks),
            _spread([_curve(S) for S in smoothed], touching, tasks) if smoothed else None,
        ),
    )


def _task(update: Update, components: Components, merged: Update, whole: Components) -> TaskInMatrix:
    U, S, Vh = (x.double() for x in components)
    norm = _norm(update)
    core = _core(U, merged, Vh.mT)
    inner = (S * core.diagonal(dim1=-2, dim2=-1)).sum(-1)
    # of the whole update with P_t(merged); c >= 0 takes no part where that points the other way
    cosine = _ratio(inner, norm * torch.linalg.matrix_norm(core)).clamp(0, 1)
    captured = _ratio(S.square().sum(-1), norm.square()).clamp(0, 1)
    projected = projected_dir_sim(components, merged)
    return TaskInMatrix(
        norm=_mean(norm),
        dir_sim=_mean(dir_sim(components, whole)),
        cos_sim=_mean(cos_sim(update, merged)),
        projected_dir_sim=_mean(projected),
        projected_cos_sim=_mean(projected_cos_sim(components, merged)),
        lost=_mean((1 - projected).clamp(max=1)),
        error=_mean((1 - cosine.square()).sqrt()),
        truncation_error=_mean((1 - captured).sqrt()),
    )


def _blocks(parts: Sequence[Components], merged: Update, updates: Updates) -> tuple[list[list[float]], float]:
    """Shares of the merged squared norm in the blocks of the cover space, and outside it."""
    total = _norm(merged).square()
    if not parts or not float(total.sum()):
        return [[0.0] * len(parts) for _ in parts], 0.0
    ranks = [c.S.shape[-1] for c in parts]
    round_off = float(torch.finfo(updates.dtype).eps)
    cover = cover_of([Components(*(x.double() for x in c)) for c in parts], torch.float64, None, round_off)
    core = _core(cover.u.basis(), merged, cover.v.basis())
    shares = [
        [_mean(_ratio(block.square().sum((-2, -1)), total)) for block in torch.split(row, ranks, dim=-1)]
        for row in torch.split(core, ranks, dim=-2)
    ]
    return shares, max(0.0, 1 - math.fsum(share for row in shares for share in row))


def _between(
    measure: Callable[[Components, Components], Tensor], parts: Sequence[Components], touching: list[int], tasks: int
) -> list[list[float | None]]:
    found = [[1.0] * len(parts) for _ in parts]
    for i, a in enumerate(parts):
        for j in range(i):
            found[i][j] = found[j][i] = _mean(measure(a, parts[j]))
    return _spread([_spread(row, touching, tasks) for row in found], touching, tasks, [None] * tasks)


def _core(left: Tensor, update: Update, right: Tensor) -> Tensor:
    """left' update right in float64; a dense update is multiplied in its own dtype."""
    if isinstance(update, LowRank):
        return (left.mT @ update.left.double()) @ (update.right.double() @ right)
    return left.mT @ (update @ right.to(update.dtype)).double()


def _slots(update: Update, most: int) -> int:
    return max(1, min(most, update.rank)) if isinstance(update, LowRank) else max(1, most)


def _norm(update: Update) -> Tensor:
    """(...) Frobenius norm in float64."""
    if isinstance(update, LowRank):
        left, right = update.left.double(), update.right.double()
        return ((left.mT @ left) * (right @ right.mT)).sum((-2, -1)).clamp(min=0).sqrt()
    norm: Tensor = torch.linalg.vector_norm(update, dim=(-2, -1), dtype=torch.float64)
    return norm


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def _curve(S: Tensor) -> Curve:
    mean = S.double().reshape(-1, S.shape[-1]).mean(0)
    steps = torch.logspace(0, math.log10(max(1, len(mean))), POINTS, dtype=torch.float64)
    index = sorted({min(round(step), len(mean)) for step in steps.tolist()})
    return Curve(index, [float(mean[i - 1]) for i in index])


def _spread(values: Sequence[_T], touching: Sequence[int], tasks: int, empty: _T | None = None) -> list[_T]:
    """One entry per task, ``empty`` for those that do not touch the matrix."""
    at = dict(zip(touching, values, strict=True))
    return [at.get(i, empty) for i in range(tasks)]  # type: ignore[misc]


def _mean(x: Tensor) -> float:
    return float(x.double().mean())
