"""Which decomposition is cheapest: a small model of measured costs.

The unit is one floating-point operation of a large float32 matrix product, so that the model depends on ratios between
operations (measured on two AVX-512 cores with MKL 2024.2, one thread per problem) and not on a machine's speed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

_BLOCK = 8
_PASS = 0.8
"""Both products of a block of 8 rows in one pass over the matrix, against large products."""
_DOUBLE = 1.75
_LARGEST = 0.85
"""Dimension of a Krylov space, as a part of the short side, up to which one is begun; it may grow half way on to 1."""
_CALL = 6e6
"""One step of small calls: 60 us."""
_CERTIFICATE = 5e7
"""Start, residual and probe beyond their products: half a millisecond."""


class Plan(NamedTuple):
    """The route for one exact decomposition of a float32 matrix, and the size of a Krylov space where it is that."""

    route: str
    """krylov, gram or lapack."""
    cost: float
    """Predicted, in operations of a float32 matrix product."""
    block: int = 0
    dimension: int = 0
    limit: int = 0


def plan(m: int, n: int, rank: int) -> Plan:
    """The cheapest exact route to ``rank`` components of a float32 (m, n)."""
    full = dense(m, n, rank)
    tried = krylov(m, n, rank)
    if tried.dimension > _LARGEST * min(m, n) or tried.cost > full.cost:
        return full
    return tried


def dense(m: int, n: int, rank: int) -> Plan:
    """The cheaper full decomposition."""
    q, long = min(m, n), max(m, n)
    by_lapack = lapack(m, n)
    # symmetric eigensolver in float64: 31 q^3 at q = 256, 17 q^3 at 768 and above
    gram = 2 * _DOUBLE * q * q * long + _eigensolver(q) + 2 * q * long * rank
    return Plan("gram", gram) if gram < by_lapack else Plan("lapack", by_lapack)


def lapack(m: int, n: int) -> float:
    """LAPACK's gesdd: 36 q^3 at q = 256, 23 q^3 at 768, 21 q^3 at 1536, and 10 q^3 for each further q rows."""
    q, long = min(m, n), max(m, n)
    return (20 + 3500 / max(q, 64)) * q**3 + 10 * (long - q) * q**2


def krylov(m: int, n: int, rank: int) -> Plan:
    """A Krylov space of the dimension that full fine-tunes need: measured on spectra j^-0.5, j^-1 and real deltas."""
    q, long = min(m, n), max(m, n)
    dimension = _BLOCK * math.ceil(2.25 * rank / _BLOCK + 8.9)
    steps = dimension / _BLOCK
    products = _PASS * 4 * dimension * m * n
    orthogonalization = _PASS * 2 * dimension**2 * q
    ritz = 2 * _DOUBLE * dimension**2 * long + _eigensolver(dimension) + 2 * rank * (dimension + q) * (m + n)
    cost = products + orthogonalization + ritz + steps * _CALL + _CERTIFICATE
    return Plan("krylov", cost, _BLOCK, dimension, min(q, int((1 + _LARGEST) / 2 * q)))


def workspace(m: int, n: int, rank: int) -> int:
    """Largest number of float32 elements alive during :func:`plan`'s route, beyond the matrix. Measured within 15 %."""
    chosen, q = plan(m, n, rank), min(m, n)
    if chosen.route == "lapack":
        return 3 * m * n + 4 * q * q
    # a Gram matrix in float64, its eigenvectors, and LAPACK's workspace of twice that
    order, space = (q, 0) if chosen.route == "gram" else (chosen.dimension, chosen.dimension * (m + n))
    return space + 8 * order * order + (m + n) * rank


def _eigensolver(order: int) -> float:
    return (15 + 3500 / max(order, 64)) * order**3
