"""Floating-point operations that the algorithms need: the numerators of the fractions of the GEMM rate.

One yardstick for any implementation: the cheapest classical method, as :mod:`dcmerge_ext.flops` counts a decomposition.
"""

from __future__ import annotations

from dcmerge_ext.flops import lowrank_svd, polar, svd


def subspace_iteration(m: int, n: int, rank: int, power_steps: int = 2, oversampling: int = 16) -> float:
    """Randomized SVD with l = rank + oversampling: 2 s + 2 products, 2 s + 1 orthonormal bases, SVD of l x n, and back."""
    width = rank + oversampling
    products = (2 * power_steps + 2) * 2 * m * n * width
    bases = ((power_steps + 1) * m + power_steps * n) * 2 * width**2
    return products + bases + svd(width, n, rank) + 2 * m * width * rank


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


# --- the other methods -------------------------------------------------------------------------------------------------


def cover_method(m: int, n: int, tasks: int, rank: int, *, factored: bool = False) -> float:
    """TSV-M: ``tasks`` decompositions, two polar factors, product 2 m n k unless the result stays in factors."""
    k = tasks * rank
    each = lowrank_svd(m, n, rank) if factored else svd(m, n, rank)
    return tasks * each + polar(m, k) + polar(n, k) + (0 if factored else 2 * m * n * k)


def iso_cts(m: int, n: int, tasks: int, common: int, own: int) -> float:
    """SVD of the sum, ``tasks`` of what it leaves (4 m n c to find), two polar factors, product."""
    k = common + tasks * own
    decompositions = svd(m, n, common) + tasks * (4 * m * n * common + svd(m, n, own))
    return decompositions + polar(m, k) + polar(n, k) + 2 * m * n * k


def iso_cts_factors(m: int, n: int, tasks: int, rank: int, common: int) -> float:
    """The same of adapters, 4 m r c to find what is left of each."""
    k = tasks * rank
    return lowrank_svd(m, n, k) + tasks * (4 * m * rank * common + lowrank_svd(m, n, rank)) + polar(m, k) + polar(n, k)


def esm(m: int, n: int, tasks: int, rank: int) -> float:
    """Each task: Cholesky factor n^3 / 3, m n^2 for the shifts, their SVD, coordinates 2 m n r. Polar factors, product."""
    k = tasks * rank
    each = n**3 / 3 + m * n**2 + svd(m, n, rank) + 2 * m * n * rank
    return tasks * each + polar(m, k) + polar(n, k) + 2 * m * n * k


def esm_factors(m: int, n: int, tasks: int, rank: int) -> float:
    """Each task: A X'X A' 2 n^2 r, SVD of the factors, coordinates 2 (m + n) r^2. Polar factors."""
    k = tasks * rank
    return tasks * (2 * n**2 * rank + lowrank_svd(m, n, rank) + 2 * (m + n) * rank**2) + polar(m, k) + polar(n, k)


def wudi(m: int, n: int, height: int, iterations: int) -> float:
    """Gram matrices of ``height`` rows in all and their pull 3 h n^2 (m h n, with factors), steps of 2 m n min(n, 2 h)."""
    start = 3 * height * n**2 if height >= n / 2 else 4 * m * n * height
    return start + iterations * 2 * m * n * min(n, 2 * height)


def doge(m: int, n: int, tasks: int, rank: int, directions: int, iterations: int, decomposition: float) -> float:
    """``tasks`` decompositions, one of their bases, steps of 4 m n (T + p)."""
    start = tasks * decomposition + svd(m, tasks * rank, directions)
    return start + iterations * 4 * m * n * (tasks + directions)


def knots(m: int, n: int, tasks: int, rank: int) -> float:
    """Thin QRs 2 m k^2 and 2 T n r^2, SVD k x k, basis 2 m k^2, aligned updates 2 n k^2."""
    k = tasks * rank
    return 4 * m * k**2 + 2 * tasks * n * rank**2 + svd(k, k, k) + 2 * n * k**2


def core_space(m: int, n: int, tasks: int, rank: int) -> float:
    """SVDs of both stacks 4 (m + n) k^2, cores 2 k^2 r and TSV-M of them, polar factor of the result, 2 m k^2 back."""
    k = tasks * rank
    merged = cover_method(k, k, tasks, rank) + polar(k, k)
    return 4 * (m + n) * k**2 + tasks * 2 * k**2 * rank + merged + 2 * min(m, n) * k**2


def elementwise_bytes(m: int, n: int, tasks: int, passes: int, itemsize: int = 4) -> float:
    """``passes`` over all updates, each entry read once (or written, where products of adapters are), the result written."""
    return itemsize * m * n * (tasks * passes + 1)


def factors_bytes(m: int, n: int, rank: int, itemsize: int = 4) -> float:
    """Factors of this rank in all read and written side by side."""
    return 2 * itemsize * (m + n) * rank


def robust_merge_bytes(m: int, n: int, tasks: int, rank: int, itemsize: int = 4) -> float:
    """All factors read to select from them and once more, one adapter written."""
    return itemsize * (m + n) * rank * (2 * tasks + 1)
