"""Cases of one factorization: the truncated SVD and the polar decomposition."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import flops
import inputs
import oracle
import reference
import torch
from case import Check, Problem, Rival, Setting
from reference import Parts
from torch import Tensor

import dcmerge_ext as dcm
from dcmerge_ext.linalg.iterations import newton_schulz, qdwh
from dcmerge_ext.linalg.routes import by_iteration

VENDOR = 2.0
"""Our error may be at most this many times LAPACK's in float32."""


def truncated_svd(setting: Setting, n: int, rank: int, *, batch: int | None = None, rivals: bool = False) -> Problem:
    """The ``rank`` largest triplets of n x n with spectrum j^-0.5, flat around the cut as full fine-tunes are.

    Args:
        batch: matrices in a batch; None: one matrix.
        rivals: against iterative methods, too; they have to come within twice the error of the less accurate of LAPACK and ours.
    """
    side = setting.side(n)
    rank = max(1, rank * side // n)
    A = torch.stack(inputs.full_updates(batch or 1, side, side, 0.5))
    A = A if batch else A[0]
    truth = _truncate(torch.linalg.svd(A.double(), full_matrices=False), rank)

    def ours() -> Parts:
        return Parts(*dcm.truncated_svd(A, rank))

    def lapack() -> Parts:
        return _truncate(torch.linalg.svd(A, full_matrices=False), rank)

    def errors(found: Parts) -> tuple[float, float]:
        subspaces = max(oracle.projector_error(found.U, truth.U), oracle.projector_error(found.Vh.mT, truth.Vh.mT))
        return subspaces, float(((found.S.double() - truth.S) / truth.S).abs().amax())

    vendor = errors(lapack())[0]
    same = 2 * max(vendor, errors(ours())[0])

    def check(found: Parts) -> Check:
        subspaces, values = errors(found)
        return Check(subspaces, VENDOR * vendor, {"values": values})

    return Problem(
        ours=ours,
        rivals=[Rival("torch.linalg.svd", [("", lapack)]), *(_iterative(A, rank) if rivals else [])],
        check=check,
        rival_bound=same,
        flops=(batch or 1) * flops.svd(side, side, rank),
        note=f"rivals must reach {same:.1e}" if rivals else "",
    )


def polar(setting: Setting, m: int, blocks: int, width: int) -> Problem:
    """Of ``blocks`` independent orthonormal bases side by side: square, its condition is 1e3 to 1e4."""
    side = setting.side(m)
    width = min(width, setting.side(blocks * width) // blocks)
    X = inputs.orthonormal_blocks(side, blocks, width)
    P, S, Qh = torch.linalg.svd(X.double(), full_matrices=False)
    truth, root = P @ Qh, Qh.mT @ (S[:, None] * Qh)
    vendor = oracle.relative(reference.polar_by_svd(X), truth)

    def check(found: dcm.linalg.Polar | Tensor) -> Check:
        Q, H = (found, None) if isinstance(found, Tensor) else found
        gram = Q.double().mT @ Q.double()
        details = {"Q'Q - I": oracle.relative(gram, torch.eye(len(gram)))}
        if H is not None:
            details["root"] = oracle.relative(H, root)
        return Check(oracle.relative(Q, truth), VENDOR * vendor, details)

    return Problem(
        ours=lambda: dcm.linalg.polar(X),
        rivals=[
            Rival("SVD", [("", lambda: reference.polar_by_svd(X))]),
            Rival("QR + SVD", [("", lambda: reference.polar_by_qr(X))]),
            *(Rival(f"QR + {name}", [("", partial(_iterated, X, iterate))]) for name, iterate in _ITERATIONS.items()),
        ],
        check=check,
        flops=flops.polar(side, blocks * width),
        note="ours returns the root (X'X)^(1/2), too",
    )


_ITERATIONS = {"Newton-Schulz": newton_schulz, "QDWH": qdwh}
"""What the package's own polar factor was chosen from, beside its rivals in torch."""


def _iterated(X: Tensor, iterate: Callable[[Tensor, float], Tensor]) -> dcm.linalg.Polar:
    found = by_iteration(X, 0.0, torch.finfo(torch.float32).eps, iterate)
    assert found is not None
    return dcm.linalg.Polar(found[0], found[1])


def _truncate(found: tuple[Tensor, Tensor, Tensor], rank: int) -> Parts:
    U, S, Vh = found
    return Parts(U[..., :rank], S[..., :rank], Vh[..., :rank, :])


# --- iterative rivals --------------------------------------------------------------------------------------------------


def _iterative(A: Tensor, rank: int) -> list[Rival]:
    rivals = [Rival("torch.svd_lowrank", _lowrank_settings(A, rank))]
    try:
        import scipy.sparse.linalg  # noqa: F401
    except ImportError:
        return rivals
    solvers: dict[str, list[dict[str, Any]]] = {
        "arpack": [{}],
        "lobpcg": [{}, {"maxiter": 100, "tol": 1e-7}],
        "propack": [{}],
    }
    for solver, options in solvers.items():
        settings = [
            (
                ", ".join([dtype, *(f"{name} {value:g}" for name, value in more.items())]),
                _svds(A, rank, solver, dtype, more),
            )
            for dtype in ("float32", "float64")
            for more in options
        ]
        rivals.append(Rival(f"scipy svds {solver}", settings))
    return rivals


def _lowrank_settings(A: Tensor, rank: int) -> list[tuple[str, Callable[[], Parts]]]:
    """Columns of the sketch and power iterations, in the order of their cost: products and the last SVD."""
    widths = [q for q in (rank + 16, 2 * rank, 3 * rank, 4 * rank, 6 * rank) if q < min(A.shape[-2:])]
    grid = [(q, steps) for q in widths for steps in (2, 4, 6, 8, 12, 16, 24, 32, 48)]

    def run(q: int, steps: int) -> Parts:
        U, S, V = torch.svd_lowrank(A, q=q, niter=steps)
        return _truncate((U, S, V.mT), rank)

    grid.sort(key=lambda setting: setting[0] * (setting[1] + 2))
    return [(f"q {q}, niter {steps}", partial(run, q, steps)) for q, steps in grid]


def _svds(A: Tensor, rank: int, solver: str, dtype: str, options: dict[str, Any]) -> Callable[[], Parts]:
    from scipy.sparse.linalg import svds

    matrices = [matrix.numpy().astype(dtype) for matrix in A.reshape(-1, *A.shape[-2:])]

    def run() -> Parts:
        found = []
        for matrix in matrices:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that an accuracy was not reached: the check decides
                u, s, vh = svds(matrix, k=rank, solver=solver, rng=0, **options)
            # smallest first, and with negative strides
            found.append([torch.from_numpy(x.copy()) for x in (u[:, ::-1], s[::-1], vh[::-1])])
        U, S, Vh = (torch.stack(parts) for parts in zip(*found, strict=True))
        return Parts(U, S, Vh) if A.ndim > 2 else Parts(U[0], S[0], Vh[0])

    return run
