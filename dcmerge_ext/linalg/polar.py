"""The polar decomposition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dcmerge_ext import flops
from dcmerge_ext.backends import prefers_products
from dcmerge_ext.errors import ConvergenceError
from dcmerge_ext.linalg.routes import by_eigenvectors, by_iteration, by_svd
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.precision import without_autocast
from dcmerge_ext.scaling import binary_exponent, scale_by_power
from dcmerge_ext.stages import Work, staged
from dcmerge_ext.tracing import traceable


class Polar(NamedTuple):
    """X = Q H."""

    Q: Tensor
    """(..., m, n): orthonormal columns, or a partial isometry where X is rank deficient or wide."""
    H: Tensor
    """(..., n, n): (X'X)^(1/2), symmetric positive semidefinite."""


@traceable
def polar(X: Tensor, *, tol: float | None = None) -> Polar:
    """Polar decomposition X = Q H with Q the nearest partial isometry and H = (X'X)^(1/2).

    Q is what DC-Merge (arXiv 2603.06242, section 3.2) and TSV-M (arXiv 2412.00081) call whitening of the concatenated
    singular vectors. Directions with singular values at or below the tolerance are dropped from Q (the minimum-norm
    choice, unique and deterministic), where an SVD would fill them arbitrarily. Q is orthonormal to round-off up to
    conditions near 1/eps. A batch is decomposed side by side.

    Args:
        X: (..., m, n), any shape, floating, finite. Half precision is computed in float32.
        tol: relative to the largest singular value. Default 2 sqrt(max(m, n)) eps.
    Returns:
        Polar(Q, H), float32, or float64 for float64.
    Raises:
        ConvergenceError: LAPACK did not converge (non-finite input).
        TypeError: not a floating tensor (..., m, n).   ValueError: a negative tol.
    """
    Q, H, _ = polar_with_values(X, tol)
    return Polar(Q, H)


@without_autocast
def polar_with_values(
    X: Tensor, tol: float | None = None, *, round_off: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`polar`, and the singular values (..., min(m, n)) in descending order, dropped ones set to 0.

    ``round_off``: relative error of the entries of X, where that is more than its dtype's eps; more orthogonality than
    that is not sought.
    """
    if not isinstance(X, Tensor) or X.ndim < 2 or not X.is_floating_point():
        what = f"{tuple(X.shape)} {X.dtype}" if isinstance(X, Tensor) else type(X).__name__
        raise TypeError(f"polar: needs a floating tensor (..., m, n), got {what}")
    if tol is not None and not tol >= 0:
        raise ValueError(f"polar: tol must be 0 or more, got {tol}")
    X = X.detach()
    X = X if X.dtype == torch.float64 else X.float()
    *leading, m, n = X.shape
    if X.numel() == 0:
        return X.clone(), X.new_zeros(*leading, n, n), X.new_zeros(*leading, min(m, n))
    tolerance = default_tolerance(m, n, X.dtype) if tol is None else tol
    return _polar(X, tolerance, max(round_off or 0.0, float(torch.finfo(X.dtype).eps)))


def _work(X: Tensor, *_: object) -> Work:
    *leading, m, k = X.shape
    return Work(math.prod(leading) * flops.polar(m, k))


@staged("whiten", _work)
def _polar(X: Tensor, tolerance: float, round_off: float) -> tuple[Tensor, Tensor, Tensor]:
    *leading, m, n = X.shape
    if not leading:
        return _one(X, tolerance, round_off)
    matrices = X.reshape(-1, m, n).unbind()
    found = side_by_side(
        lambda matrix: _one(matrix, tolerance, round_off), matrices, at_most=1 if prefers_products(X) else None, each=1
    )
    Q, H, S = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Q.reshape(X.shape), H.reshape(*leading, n, n), S.reshape(*leading, -1)


def _one(X: Tensor, tolerance: float, round_off: float) -> tuple[Tensor, Tensor, Tensor]:
    m, n = X.shape
    if exponent := binary_exponent(X):
        Q, H, S = _one(scale_by_power(X, -exponent), tolerance, round_off)
        return Q, scale_by_power(H, exponent), scale_by_power(S, exponent)
    try:
        found = None
        if m >= n:
            found = (
                by_iteration(X, tolerance, round_off)
                if prefers_products(X)
                else by_eigenvectors(X, tolerance, round_off)
            )
        return found or by_svd(X, tolerance)
    except ConvergenceError as error:
        raise ConvergenceError(f"polar factor of a {m} x {n} matrix failed: {error}") from error


def default_tolerance(m: int, n: int, dtype: torch.dtype) -> float:
    """Singular values of an m x n matrix at or below this fraction of the largest count as round-off.

    Measured in float32 on concatenated singular vectors: exact copies of tasks leave spurious values of at most
    0.8 sqrt(max(m, n)) eps and directions that tasks share 1.3. max(m, n) eps, the usual choice, drops genuine directions
    in 8 % of square concatenations (T r = n) at n = 768 and in most at n = 2048, and dropping one changes the merged
    matrix by 1 / sqrt(n): 4 %. Even this tolerance does in 2 and 7 %, so that what it would drop is looked at again in
    float64 (:func:`polar_decided`).
    """
    return float(2 * max(m, n) ** 0.5 * torch.finfo(dtype).eps)


def polar_decided(
    X: Tensor, tol: float | None, wide: Callable[[], Tensor], *, live: Tensor, round_off: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`polar_with_values`, where float32 cannot tell a weak direction from none decided in float64.

    The smallest singular value of a square matrix of n random columns lies near 0.3 / n of the largest and comes arbitrarily
    close to 0, while what round-off leaves of an exact zero reaches sqrt(n) eps. From the same data in float64 the zero
    comes out at 0.05 eps of float32 (measured: tasks that share a factor; 1e-9 for copies): what is above eps is genuine.

    Args:
        X: (..., m, n).   tol: where given, it decides alone.
        wide: X (..., m, n) again, in float64 from the data that X was computed from. Called where X is float32 and loses
            more directions than it has null columns.
        live: (...) number of columns that are not null.
    """
    found = polar_with_values(X, tol, round_off=round_off)
    rank = (found[2] > 0).sum(-1)
    if tol is not None or X.dtype != torch.float32 or not bool((rank < live.clamp(max=found[2].shape[-1])).any()):
        return found
    Q, H, S = (part.to(X.dtype) for part in polar_with_values(wide(), torch.finfo(X.dtype).eps))
    return Q, H, S
