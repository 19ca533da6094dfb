"""Which decomposition is cheapest: a small model of measured costs.

The unit is one floating-point operation of a large float32 matrix product, so that the model depends on ratios between
operations (measured on two AVX-512 cores with MKL 2024.2, one thread per problem) and not on a machine's speed.
"""

from __future__ import annotations

from typing import NamedTuple

_SKINNY = 1.3
"""Products with 8 to 16 rows against large ones."""
_DOUBLE = 1.75
_CALL = 5e6
"""One step of small torch calls: 50 us."""


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
    if tried.dimension > 0.7 * min(m, n) or tried.cost > full.cost:
        return full
    return tried


def dense(m: int, n: int, rank: int) -> Plan:
    """The cheaper full decomposition."""
    q, long = min(m, n), max(m, n)
    # LAPACK gesdd: 36 q^3 at q = 256, 23 q^3 at 768, 21 q^3 at 1536, and 10 q^3 for each further q rows
    lapack = (20 + 3500 / max(q, 64)) * q**3 + 10 * (long - q) * q**2
    # symmetric eigensolver in float64: 31 q^3 at q = 256, 17 q^3 at 768 and above
    gram = 2 * _DOUBLE * q * q * long + _eigensolver(q) + 2 * q * long * rank
    return Plan("gram", gram) if gram < lapack else Plan("lapack", lapack)


def krylov(m: int, n: int, rank: int) -> Plan:
    """A Krylov space of the dimension that full fine-tunes need: measured on spectra j^-0.5, j^-1 and real deltas."""
    q, long = min(m, n), max(m, n)
    block = 8 if rank < 32 else 12 if rank < 128 else 16
    dimension = block * round(2.4 * rank / block + 8)
    steps = dimension / block
    products = _SKINNY * 4 * dimension * m * n
    orthogonalization = _SKINNY * 2 * dimension**2 * q
    ritz = 2 * _DOUBLE * dimension**2 * long + _eigensolver(dimension) + 2 * rank * (dimension + q) * (m + n)
    cost = products + orthogonalization + ritz + steps * _CALL
    return Plan("krylov", cost, block, dimension, min(q, int(0.75 * q) + block))


def _eigensolver(order: int) -> float:
    return (15 + 3500 / max(order, 64)) * order**3
