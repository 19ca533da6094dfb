"""Floating-point operations of the cheapest classical methods: what a decomposition has to do, whatever does it.

Leading terms of a direct method by way of Gram matrix and symmetric eigensolver (Golub and Van Loan, Matrix Computations,
sections 5.4 and 8.3). What an implementation does beyond that - LAPACK's bidiagonalization, a Krylov space, float64 - lowers
the fraction of the machine's rate that it is said to reach.
"""

from __future__ import annotations


def svd(m: int, n: int, rank: int) -> float:
    """``rank`` singular triplets of m x n, with q = min and p = max of m and n.

    Gram matrix p q^2, tridiagonal form 4/3 q^3, eigenvectors back 2 q^2 r, vectors of the other side 2 p q r.
    """
    q, p = sorted((m, n))
    return p * q**2 + 4 / 3 * q**3 + 2 * q**2 * rank + 2 * p * q * rank


def lowrank_svd(m: int, n: int, rank: int) -> float:
    """SVD of B A from its factors: triangles of two thin QRs 2 (m + n) r^2, singular vectors back 2 (m + n) r^2."""
    return 4 * (m + n) * rank**2


def polar(m: int, k: int) -> float:
    """Polar factor and root of an m x k basis.

    Gram matrix m k^2, tridiagonal form 4/3 k^3, eigenvectors 2 k^3, root and inverse root k^3 each (symmetric), product
    2 m k^2.
    """
    return 3 * m * k**2 + 16 / 3 * k**3
