"""The public truncated SVD: chooses a route, runs batches side by side, escalates."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dcmerge_ext import flops
from dcmerge_ext.backends import prefers_products
from dcmerge_ext.errors import ConvergenceError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.precision import without_autocast
from dcmerge_ext.scaling import binary_exponent, scale_by_power
from dcmerge_ext.stages import Work, staged
from dcmerge_ext.svd import cost
from dcmerge_ext.svd.components import Accuracy, Components, Evidence
from dcmerge_ext.svd.dense import gram, lapack
from dcmerge_ext.svd.factors import factored
from dcmerge_ext.svd.krylov import NotCertified, krylov
from dcmerge_ext.svd.start import Start
from dcmerge_ext.svd.subspace import OVERSAMPLING, subspace_iteration
from dcmerge_ext.tracing import traceable

_DEFAULT = Start()


@traceable
def truncated_svd(
    A: Update, rank: int, *, accuracy: Accuracy = "exact", tol: float | None = None, seed: int = 0
) -> Components:
    """The ``rank`` largest singular triplets of each matrix.

    "exact" agrees with LAPACK's full decomposition to float32 round-off and takes the cheapest route to that by a model
    of measured costs: a certified randomized block Krylov method, the float64 Gram matrix of the short side, or LAPACK.
    An unconverged result is never returned. "fast" is randomized subspace iteration with 2 power steps and 16 extra
    directions: on spectra that are flat around the cut - full fine-tunes are - it captures nearly the same squared norm
    in a different subspace. LowRank input is never made dense: thin QR of both factors and the SVD of an r x r matrix,
    in float64.

    Args:
        A: (..., m, n) tensor or LowRank, finite. Half precision is decomposed in float32, float64 by LAPACK.
        rank: 1 .. min(m, n). A LowRank of smaller rank fills the slots beyond with null components.
        accuracy: "exact" or "fast" (dense input only; LowRank is always exact).
        tol: of "exact", ignored otherwise: accepted residual ``|A' U - V S|`` relative to the gap sigma_r - sigma_(r+1) that it must
            resolve. None: round-off.
        seed: of the random directions; the global generators are neither read nor changed.
    Returns:
        Components in float32, or float64 for float64 and LowRank input.
    Raises:
        ValueError: a rank outside 1 .. min(m, n), tol not positive.   TypeError: not a floating matrix, no int rank.
        ConvergenceError: LAPACK did not converge (non-finite input).

    Singular vectors are unique only up to sign, and up to rotation where singular values repeat. A batch is decomposed
    side by side, and each matrix of it gives the same bytes in any batch.
    """
    return decompose(A, rank, accuracy=accuracy, tol=tol, start=Start(seed))[0]


def _work(A: Update, rank: int, *_: object) -> Work:
    *leading, m, n = A.shape
    one = flops.lowrank_svd(m, n, A.rank) if isinstance(A, LowRank) else flops.svd(m, n, rank)
    return Work(math.prod(leading) * one)


@without_autocast
def decompose(
    A: Update, rank: int, *, accuracy: Accuracy = "exact", tol: float | None = None, start: Start = _DEFAULT
) -> tuple[Components, list[Evidence]]:
    """As :func:`truncated_svd`, with the evidence for each matrix of the batch (one for all of a LowRank)."""
    try:
        rank = operator.index(rank)
    except TypeError:
        raise TypeError(f"truncated_svd: rank must be an int, got {rank!r}") from None
    if len(A.shape) < 2 or not A.dtype.is_floating_point:
        raise TypeError(f"truncated_svd: needs a floating (..., m, n), got {tuple(A.shape)} {A.dtype}")
    m, n = A.shape[-2:]
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"truncated_svd: rank must lie in 1 .. {min(m, n)} for a {m} x {n} matrix, got {rank}")
    if accuracy not in ("exact", "fast"):
        raise ValueError(f"truncated_svd: accuracy must be 'exact' or 'fast', got {accuracy!r}")
    if tol is not None and not tol > 0:
        raise ValueError(f"truncated_svd: tol must be positive, got {tol}")
    return _decompose(A, rank, accuracy, tol, start)


@staged("truncated SVD", _work)
def _decompose(
    A: Update, rank: int, accuracy: Accuracy, tol: float | None, start: Start
) -> tuple[Components, list[Evidence]]:
    *leading, m, n = A.shape
    if isinstance(A, LowRank):
        with _naming(f"a {m} x {n} matrix"):
            components, evidence = factored(A, rank)
        return components, [evidence]
    A = A.detach()
    A = A if A.dtype == torch.float64 else A.float()
    if not leading:
        with _naming(f"a {m} x {n} matrix"):
            components, evidence = _one(A, rank, accuracy, tol, start)
        return components, [evidence]
    matrices = A.reshape(-1, m, n).unbind()

    def work(index: int) -> tuple[Components, Evidence]:
        with _naming(f"matrix {index} of a batch of {m} x {n} matrices"):
            return _one(matrices[index], rank, accuracy, tol, start)

    found = side_by_side(work, range(len(matrices)), at_most=1 if prefers_products(A) else None, each=1)
    return _stack([components for components, _ in found], leading, A, rank), [evidence for _, evidence in found]


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except ConvergenceError as error:
        raise ConvergenceError(f"SVD of {what} failed: {error}") from error


def _one(A: Tensor, rank: int, accuracy: Accuracy, tol: float | None, start: Start) -> tuple[Components, Evidence]:
    """One (m, n) matrix, float32 or float64, rescaled by a power of two where its squares would leave the range."""
    m, n = A.shape
    if exponent := binary_exponent(A):
        (U, S, Vh), evidence = _one(scale_by_power(A, -exponent), rank, accuracy, tol, start)
        S = scale_by_power(S, exponent)
        if not bool(S[0].isfinite()):
            raise ConvergenceError(f"singular values beyond {A.dtype}")
        return Components(U, S, Vh), evidence
    if accuracy == "fast" and rank + OVERSAMPLING < min(m, n):
        return subspace_iteration(A, rank, start)
    chosen = cost.plan(m, n, rank) if A.dtype == torch.float32 else cost.Plan("lapack", 0.0)
    doubt = ""
    if chosen.route == "krylov":
        try:
            return krylov(A, rank, start, block=chosen.block, dimension=chosen.dimension, limit=chosen.limit, tol=tol)
        except (NotCertified, ConvergenceError) as error:
            doubt = f" ({error})"
            chosen = cost.dense(m, n, rank)
    try:
        return gram(A, rank) if chosen.route == "gram" else lapack(A, rank)
    except ConvergenceError as error:
        raise ConvergenceError(f"{error}{doubt}") from error


def _stack(found: Sequence[Components], leading: Sequence[int], A: Tensor, rank: int) -> Components:
    if not found:
        *_, m, n = A.shape
        return Components(A.new_empty(*leading, m, rank), A.new_empty(*leading, rank), A.new_empty(*leading, rank, n))
    U, S, Vh = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Components(*(x.reshape(*leading, *x.shape[1:]) for x in (U, S, Vh)))
