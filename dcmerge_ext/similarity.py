"""How alike two updates are, in energy and in direction (DC-Merge, arXiv 2603.06242, sections 2.3 and D).

Every measure takes tensors (..., m, n), LowRank (never multiplied out) or Components (a decomposition computed once, for
many comparisons), leading dimensions batch, and returns float64. Updates of rank 0 have no direction: they measure 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.products import gram_float64, wide_product
from dcmerge_ext.scaling import binary_exponent, scale_by_power
from dcmerge_ext.svd import Components, decompose
from dcmerge_ext.svd.components import null_tolerance, truncate
from dcmerge_ext.updates import compute_dtype, count_nonfinite


def r_matrix(
    a: Update | Components, b: Update | Components, *, rank: int | None = None, tol: float | None = None
) -> Tensor:
    """R_jk = (u_a^j . u_b^k)(v_a^j . v_b^k), the inner products of the components of two updates.

    R = (U_a' U_b) o (V_a' V_b), entries in [-1, 1]; of an update with itself the identity. The signs of singular vectors
    cancel in it; where singular values repeat, it depends on which vectors were found.

    Args:
        a, b: (..., m, n), tensors, LowRank or Components, floating, finite.
        rank: components kept of each, 1 .. min(m, n). None: all.
        tol: components with singular values at or below this fraction of the largest are null: their rows and columns
            are 0. None: round-off of the dtype; Components are taken as they are.
    Returns:
        (..., p, q) float64, p and q the components (slots) of a and b.
    Raises:
        InputError: shapes that differ, or non-finite values.   ValueError: a rank out of range, a negative tol.
        TypeError: not floating.   ConvergenceError: LAPACK did not converge.
    """
    _check_pair("r_matrix", a, b)
    first, second = (components_of_one("r_matrix", x, rank, tol) for x in (a, b))
    return (first.U.mT @ second.U) * (first.Vh @ second.Vh.mT)


def dir_sim(
    a: Update | Components, b: Update | Components, *, rank: int | None = None, tol: float | None = None
) -> Tensor:
    """DirSim = sum(R) / sqrt(rank_a rank_b): how alike two updates are when every component counts the same.

    The cosine of the two partial isometries, <U_a V_a', U_b V_b'> / sqrt(rank_a rank_b); see :func:`r_matrix` for the
    arguments and errors. Null components do not count: singular vectors of zero singular values are arbitrary.

    Returns:
        (...) float64 in [-1, 1]; 0 where either has no component.
    """
    _check_pair("dir_sim", a, b)
    first, second = (components_of_one("dir_sim", x, rank, tol) for x in (a, b))
    R = (first.U.mT @ second.U) * (first.Vh @ second.Vh.mT)
    return _cosine(R.sum((-2, -1)), live_rank(first.S).double().sqrt(), live_rank(second.S).double().sqrt())


def cos_sim(a: Update | Components, b: Update | Components) -> Tensor:
    """CosSim = <A, B>_F / (|A|_F |B|_F) = s_a' R s_b / (|s_a| |s_b|).

    Args:
        a, b: (..., m, n), tensors, LowRank or Components, floating, finite.
    Returns:
        (...) float64 in [-1, 1]; 0 where either is 0. Tensors are compared entry by entry, without an SVD.
    Raises:
        InputError: shapes that differ, or non-finite values.   TypeError: not floating.
    """
    _check_pair("cos_sim", a, b)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        flat = [_near_one(x.detach().to(dtype)).reshape(*x.shape[:-2], math.prod(x.shape[-2:])) for x in (a, b)]
        rows = torch.stack(flat, dim=-2)
        gram = gram_float64(rows) if dtype == torch.float32 else rows @ rows.mT
        return _cosine(gram[..., 0, 1], gram[..., 0, 0].sqrt(), gram[..., 1, 1].sqrt())
    if isinstance(a, Tensor):
        a, b = b, a
    first = _relative(components_of_one("cos_sim", a))
    if isinstance(b, Tensor):
        b = _near_one(_at_least_single(b))
        image = wide_product(b, (first.S[..., None] * first.Vh).mT)  # B V diag(s)
        norm = torch.linalg.vector_norm(b, dim=(-2, -1), dtype=torch.float64)
        return _cosine((first.U * image).sum((-2, -1)), _norm(first.S), norm)
    second = _relative(components_of_one("cos_sim", b))
    R = (first.U.mT @ second.U) * (first.Vh @ second.Vh.mT)
    return _cosine((first.S[..., None, :] @ R @ second.S[..., None])[..., 0, 0], _norm(first.S), _norm(second.S))


def projected_dir_sim(
    update: Update | Components, merged: Update | Components, *, rank: int | None = None, tol: float | None = None
) -> Tensor:
    """DirSim of a task's update with what a merged update does in the task's space (eq. 6).

    DirSim(Delta_i, U_i U_i' Delta) with Delta_i = U_i diag(s_i) V_i' of r components. With the SVD of the r x n matrix
    U_i' Delta = a diag(b) c' it is sum(a o (V_i' c)) / sqrt(r rank(b)): no m x n matrix is formed or decomposed.
    The paper reports it per task, as the mean over the matrices of a model.

    Args:
        update: Delta_i, (..., m, n), tensor, LowRank or Components, floating, finite.
        merged: Delta, likewise, of the same shape. Its scale does not matter.
        rank: r, components of the update that span the space, 1 .. min(m, n). None: all.
        tol: as in :func:`r_matrix`; for the projection, relative to the largest of its singular values or to the root
            mean square of those of ``merged``, whichever is more: what is round-off of merged is null.
    Returns:
        (...) float64 in [-1, 1]; 0 where the merged update is 0 in the space.
    Raises:
        as :func:`r_matrix`.
    """
    _check_pair("projected_dir_sim", update, merged)
    found = _project("projected_dir_sim", update, merged, rank, tol)
    overlap = found.left * (found.task.Vh @ found.right.mT)
    ranks = (live_rank(values).double().sqrt() for values in (found.task.S, found.values))
    return _cosine(overlap.sum((-2, -1)), *ranks)


def projected_cos_sim(
    update: Update | Components, merged: Update | Components, *, rank: int | None = None, tol: float | None = None
) -> Tensor:
    """CosSim of a task's update, as its ``rank`` components, with what a merged update does in their space.

    CosSim(Delta_i, U_i U_i' Delta) = <diag(s_i) V_i', U_i' Delta> / (|s_i| |U_i' Delta|_F). Arguments, result and errors
    are those of :func:`projected_dir_sim`.
    """
    _check_pair("projected_cos_sim", update, merged)
    found = _project("projected_cos_sim", update, merged, rank, tol)
    overlap = found.left * found.values[..., None, :] * (found.task.S[..., None] * found.task.Vh @ found.right.mT)
    return _cosine(overlap.sum((-2, -1)), _norm(found.task.S), _norm(found.values))


def basis_coefficients(U: Tensor, V: Tensor, update: Update) -> Tensor:
    """sigma(U, V, Delta) = diag(U' Delta V): the coefficients of an update in the dyads u_j v_j' of two bases.

    Where the dyads are orthonormal, sum_j sigma_j u_j v_j' is the best fit of Delta in them, and
    sum(sigma) / (sqrt(k) |Delta|_F) is its cosine with U V'.

    Args:
        U: (..., m, k), floating.   V: (..., n, k), floating: columns, not rows as in ``Vh``.
        update: (..., m, n), tensor or LowRank.
    Returns:
        (..., k) float64.
    Raises:
        InputError: shapes that do not fit, or non-finite values.   TypeError: not floating.
    """
    *leading, m, n = update.shape
    if U.shape[-1:] != V.shape[-1:] or U.shape[:-1] != (*leading, m) or V.shape[:-1] != (*leading, n):
        raise InputError(
            f"basis_coefficients: needs U {(*leading, m)} x k and V {(*leading, n)} x k for an update of shape "
            f"{tuple(update.shape)}, got {tuple(U.shape)} and {tuple(V.shape)}"
        )
    for x in (U, V, update):
        _check_values("basis_coefficients", x)
    U, V = U.detach().double(), V.detach().double()
    if isinstance(update, LowRank):
        update = update.to(torch.float64)
        return ((U.mT @ update.left) * (update.right @ V).mT).sum(-1)
    return (U * wide_product(_at_least_single(update), V)).sum(-2)


def components_of_one(
    function: str, x: Update | Components, rank: int | None = None, tol: float | None = None
) -> Components:
    """Components of one update in float64, null ones 0: all of them, or the ``rank`` largest, cut at ``tol``.

    ``function`` is named in errors.
    """
    if tol is not None and not tol >= 0:
        raise ValueError(f"{function}: tol must be 0 or more, got {tol}")
    if isinstance(x, Components):
        slots = x.S.shape[-1] if rank is None else rank
        if not 1 <= slots <= max(1, x.S.shape[-1]):
            raise ValueError(f"{function}: rank must lie in 1 .. {x.S.shape[-1]}, the components given, got {slots}")
        found = truncate(*x, slots, 0.0)
    else:
        slots = min(x.shape[-2:])
        if isinstance(x, LowRank):
            slots = min(slots, max(1, x.rank))
        found = decompose(x, slots if rank is None else rank)[0]
    found = Components(*(part.double() for part in found))
    return found if tol is None else truncate(*found, found.S.shape[-1], tol)


def live_rank(S: Tensor) -> Tensor:
    """(...) int64: how many of the singular values (..., r) are not null."""
    return (S > 0).sum(-1)


class _Projection(NamedTuple):
    """U_i' Delta = left diag(values) right, for the components U_i of a task; null components 0."""

    task: Components
    left: Tensor
    """(..., r, p)"""
    values: Tensor
    """(..., p)"""
    right: Tensor
    """(..., p, n)"""


def _project(
    function: str, update: Update | Components, merged: Update | Components, rank: int | None, tol: float | None
) -> _Projection:
    task = _relative(components_of_one(function, update, rank, tol))
    m, n = _shape(merged)[-2:]
    if isinstance(merged, Tensor):
        merged = _near_one(_at_least_single(merged))
        norm = torch.linalg.vector_norm(merged, dim=(-2, -1), dtype=torch.float64)
        image: Update = wide_product(merged.mT, task.U).mT
    else:
        whole = _relative(components_of_one(function, merged))
        norm = _norm(whole.S)
        image = LowRank(task.U.mT @ whole.U, whole.S[..., None] * whole.Vh)
    U, S, Vh = components_of_one(function, image)
    source = max((_dtype(x) for x in (update, merged)), key=lambda dtype: torch.finfo(dtype).eps)
    tolerance = null_tolerance(m, n, source) if tol is None else tol
    floor = tolerance * torch.maximum(S[..., 0], norm / min(m, n) ** 0.5)
    live = floor[..., None] < S
    return _Projection(task, U * live[..., None, :], S * live, Vh)


def _cosine(inner: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """inner / (first second), 0 where a norm is 0; round-off does not leave [-1, 1]."""
    norms = first * second
    return torch.where(norms > 0, inner / torch.where(norms > 0, norms, 1), 0).clamp(-1, 1)


def _norm(S: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(S, dim=-1)
    return norm


def _relative(x: Components) -> Components:
    """With singular values as fractions of the largest: their products stay in the range of any dtype."""
    largest = x.S[..., :1]
    return Components(x.U, x.S / torch.where(largest > 0, largest, 1), x.Vh)


def _near_one(x: Tensor) -> Tensor:
    return scale_by_power(x, -exponent) if (exponent := binary_exponent(x)) else x


def _at_least_single(x: Tensor) -> Tensor:
    return x.detach().to(compute_dtype(x.dtype))


def _shape(x: Update | Components) -> torch.Size:
    return x.U.shape[:-1] + x.Vh.shape[-1:] if isinstance(x, Components) else x.shape


def _dtype(x: Update | Components) -> torch.dtype:
    """Of the entries as they are decomposed: half precision in float32."""
    return compute_dtype(x.S.dtype if isinstance(x, Components) else x.dtype)


def _check_pair(function: str, a: Update | Components, b: Update | Components) -> None:
    shapes = [tuple(_shape(x)) for x in (a, b)]
    if shapes[0] != shapes[1] or len(shapes[0]) < 2:
        raise InputError(f"{function}: needs two updates (..., m, n) of one shape, got {shapes[0]} and {shapes[1]}")
    for x in (a, b):
        _check_values(function, x)


def _check_values(function: str, x: Update | Components) -> None:
    dtype = x.S.dtype if isinstance(x, Components) else x.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"{function}: needs a floating dtype, got {dtype}")
    if not isinstance(x, Components) and (bad := count_nonfinite(x)):
        raise InputError(f"{function}: an update of shape {tuple(x.shape)} holds {bad} NaN or Inf values")
