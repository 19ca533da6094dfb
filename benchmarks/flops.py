"""Floating-point operations that the algorithms need: the numerators of the fractions of the GEMM rate.

One yardstick for any implementation: a direct method by way of Gram matrix and symmetric eigensolver, leading terms only
(Golub and Van Loan, Matrix Computations, sections 5.4 and 8.3), the cheapest of the classical ones. What an
implementation does beyond that - LAPACK's bidiagonalization, a Krylov space, float64 - lowers its fraction.
"""

from __future__ import annotations


def svd(m: int, n: int, rank: int) -> float:
    """``rank`` singular triplets of m x n, with q = min and p = max of m and n.

    Gram matrix p q^2, tridiagonal form 4/3 q^3, eigenvectors back 2 q^2 r, vectors of the other side 2 p q r.
    """
    q, p = sorted((m, n))
    return p * q**2 + 4 / 3 * q**3 + 2 * q**2 * rank + 2 * p * q * rank


def subspace_iteration(m: int, n: int, rank: int, power_steps: int = 2, oversampling: int = 16) -> float:
    """Randomized SVD with l = rank + oversampling: 2 s + 2 products, 2 s + 1 orthonormal bases, SVD of l x n, and back."""
    width = rank + oversampling
    products = (2 * power_steps + 2) * 2 * m * n * width
    bases = ((power_steps + 1) * m + power_steps * n) * 2 * width**2
    return products + bases + svd(width, n, rank) + 2 * m * width * rank


def lowrank_svd(m: int, n: int, rank: int) -> float:
    """SVD of B A from its factors: triangles of two thin QRs 2 (m + n) r^2, singular vectors back 2 (m + n) r^2."""
    return 4 * (m + n) * rank**2


def polar(m: int, k: int) -> float:
    """Polar factor and root of an m x k basis.

    Gram matrix m k^2, tridiagonal form 4/3 k^3, eigenvectors 2 k^3, root and inverse root k^3 each (symmetric), product
    2 m k^2.
    """
    return 3 * m * k**2 + 16 / 3 * k**3


def dc_merge(m: int, n: int, tasks: int, rank: int, decomposition: float, *, factored: bool = False) -> float:
    """``tasks`` decompositions, two polar factors, cores 2 T k^2 r, masked core on the left 2 m k r, product 2 m n k.

    Args:
        decomposition: operations of one.   factored: the result stays in factors, without the last product.
    """
    k = tasks * rank
    cores, left, product = 2 * tasks * k**2 * rank, 2 * m * k * rank, 0 if factored else 2 * m * n * k
    return tasks * decomposition + polar(m, k) + polar(n, k) + cores + left + product


def trim_elect_mask_bytes(tasks: int, side: int, block: int, itemsize: int = 4) -> float:
    """Memory traffic: every entry read once to select the thresholds, the diagonal blocks once more, the result written."""
    return itemsize * (tasks * side**2 + tasks * side * block + side**2)
