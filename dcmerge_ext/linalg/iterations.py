"""Iterations for the orthogonal polar factor that need matrix products or Cholesky factors only.

On a CPU an eigensolver beats them (see :mod:`dcmerge_ext.linalg.routes`); on a device whose matrix products are far
faster than its factorizations, products win. Both need a lower bound on the smallest singular value and full rank.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dcmerge_ext.backends import for_device

_MOST_STEPS = 40
_SLACK = 1e-2
"""Round-off moves singular values out of the interval that a polynomial was made for: it is made for a wider one."""


def newton_schulz(X: Tensor, smallest: float) -> Tensor:
    """Polar factor by odd quintics X <- a X + b X X'X + c X (X'X)^2, each optimal for the interval reached so far.

    Minimax polynomials (Chen and Chow 2014; Polar Express, arXiv 2505.16932): 6, 7 and 9 steps at condition 1e2, 1e3
    and 1e4. Muon's fixed coefficients never converge to an orthonormal basis. 6 n^2 m flops per step. On a device with
    kernels of ours a small square X stays on chip for all steps.

    Args:
        X: (m, n), m >= n, singular values in [smallest, 1], smallest > 0.
    """
    return for_device(X.device).newton_schulz(X, coefficients(smallest, torch.finfo(X.dtype).eps))


def coefficients(smallest: float, eps: float) -> list[tuple[float, float, float]]:
    """(a - 1, b, c) of each step that takes singular values of [smallest, 1] to 1 within ``eps``.

    A step is computed as X + X ((a - 1) I + b G + c G^2), G = X'X: what it adds shrinks, and its round-off with it.
    """
    low, high, error = smallest, 1.0, 1.0
    steps = []
    for _ in range(_MOST_STEPS):
        low, high = low * (1 - _SLACK), high * (1 + _SLACK)
        (a, b, c), error = optimal_quintic(low, high)
        steps.append((a - 1, b, c))
        low, high = 1 - error, 1 + error
        if error < 1e-2:
            break
    error += _SLACK
    while error > eps:  # 1 + e becomes 1 - 3/2 e^2 - 1/2 e^3: cubic steps square what is left
        steps.append((0.5, -0.5, 0.0))
        error = 2 * error**2
    return steps


def optimal_quintic(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """Coefficients (a, b, c) of the odd quintic nearest to 1 on [low, high], and its largest error (Remez)."""
    if high - low < 1e-6:
        return (15 / 8, -10 / 8, 3 / 8), 0.0
    inner, outer = (3 * low + high) / 4, (low + 3 * high) / 4
    a, b, c, error = 0.0, 0.0, 0.0, 1.0
    for _ in range(100):
        points = np.array([low, inner, outer, high])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        system = np.stack([points, points**3, points**5, signs], axis=1)
        previous = error
        a, b, c, error = (float(v) for v in np.linalg.solve(system, np.ones(4)))
        if abs(error - previous) <= 1e-12:
            break
        root = math.sqrt(max(0.0, 9 * b * b - 20 * a * c))
        inner, outer = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
    return (a, b, c), abs(error)


def qdwh(X: Tensor, smallest: float) -> Tensor:
    """Polar factor by dynamically weighted Halley steps (Nakatsukasa, Bai, Gygi, SIAM J. Matrix Anal. Appl. 2010).

    X <- (b / c) X + (a - b / c) X (I + c X'X)^-1, by Cholesky where that is stable (c <= 100), by QR before. At most 6
    steps in double precision; 3 n^2 m flops per Cholesky step.

    Args:
        X: (m, n), m >= n, singular values in [smallest, 1], smallest > 0.
    """
    m, n = X.shape
    low = smallest
    eye = torch.eye(n, dtype=X.dtype, device=X.device)
    for _ in range(_MOST_STEPS):
        d = (4 * (1 - low * low) / low**4) ** (1 / 3)
        a = math.sqrt(1 + d) + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - low * low) / (low * low * math.sqrt(1 + d)))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        if c > 100:
            Q = torch.linalg.qr(torch.cat([math.sqrt(c) * X, eye])).Q
            update = (a - b / c) / math.sqrt(c) * (Q[:m] @ Q[m:].mT)
        else:
            L = torch.linalg.cholesky(torch.addmm(eye, X.mT, X, alpha=c))
            half = torch.linalg.solve_triangular(L, X.mT, upper=False)
            update = (a - b / c) * torch.linalg.solve_triangular(L.mT, half, upper=True).mT
        X = (b / c) * X + update
        low = min(1.0, low * (a + b * low * low) / (1 + c * low * low))
        if 1 - low < torch.finfo(X.dtype).eps:
            break
    return X
