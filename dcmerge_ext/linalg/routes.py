"""Ways to the polar factors of one (m, n) matrix. Each returns Q, H and the singular values, dropped ones 0.

Measured on two AVX-512 cores, both used, in float32, 768 x 768 of condition 1e3 to 1e5: eigenvectors 57 ms, SVD 88 ms, QR and
SVD 118 ms, iterations of the triangle by QDWH 75 to 96 ms and by Newton-Schulz 99 to 186 ms (``benchmarks/run.py --case 'polar/*'``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dcmerge_ext.errors import ConvergenceError
from dcmerge_ext.linalg.iterations import newton_schulz
from dcmerge_ext.products import symmetric_product
from dcmerge_ext.svd.dense import eigh, svd

_Factors = tuple[Tensor, Tensor, Tensor]

_SMALL = 5e-3
"""Eigenvalues of X'X below this fraction of the largest have lost digits that matter: their directions are redone."""
_TINY = 1e-4
"""Below this fraction (singular values of 1/100) their images lose as much to rounding, and are multiplied in float64."""
_DOUBTFUL = 0.05
"""Below this fraction the images of the eigenvectors are orthogonal to fewer digits than eps, and are corrected."""
_ROWS = 1024
"""Rows converted to float64 at a time: a whole copy would be the largest thing in memory."""
_CHEAP = 256
"""Up to this order all images are corrected: it costs little."""
_WORST_ITERATED = 1e-3
"""Smallest relative singular value, as Frobenius norms bound it, that an iteration at the precision of its data keeps exact."""
_MOST_SMALL = 0.6
"""Above this fraction of such directions (copies of tasks) an SVD is cheaper. Tasks that share directions have 0.3."""


def by_svd(X: Tensor, tolerance: float) -> _Factors:
    """Thin QR X = Q0 R (unless X is square) and the SVD R = W S Z': Q = Q0 W Z', H = Z S Z'. Any shape, any rank.

    Where ``tolerance`` keeps directions that float32's round-off drowns, those are found again in float64:
    X Z_2 - Q_1 (Q_1' X Z_2) = P S_2 Y' as in :func:`by_eigenvectors`.
    """
    square = X.shape[0] == X.shape[1]
    basis, triangle = (None, X) if square else torch.linalg.qr(X)
    W, S, Zh = svd(triangle)
    drowned = 2 * max(X.shape) ** 0.5 * torch.finfo(X.dtype).eps
    sound = int((drowned * S[:1] < S).sum())
    if X.dtype == torch.float64 or tolerance >= drowned or sound == S.numel() or sound == 0:
        kept = S.masked_fill(tolerance * S[:1] >= S, 0)
        factor = W * (kept > 0) @ Zh
        return factor if basis is None else basis @ factor, Zh.mT @ (S[:, None] * Zh), kept
    Q = W[:, :sound] if basis is None else basis @ W[:, :sound]
    image = _image(X, Zh[sound:].mT)
    P, small, Y = _directions(image, image, Q)
    S[sound:], Zh[sound:] = small.flip(0), (Y.mT @ Zh[sound:]).flip(0)
    kept = S.masked_fill(tolerance * S[:1] >= S, 0)
    return Q @ Zh[:sound] + (P.flip(1) * (kept[sound:] > 0)) @ Zh[sound:], Zh.mT @ (S[:, None] * Zh), kept


def by_eigenvectors(X: Tensor, tolerance: float, round_off: float) -> _Factors | None:
    """Eigenvectors of X'X = Z S^2 Z', with the ill-conditioned ones redone; m >= n. None where those are many.

    Squaring leaves sigma_j with an error of eps sigma_1 / sigma_j, good for all but the few small values of a
    concatenated basis (its spectrum is a quarter circle: 1 in 16 below sigma_1 / 10). For those, with Z_2 their
    eigenvectors and Q_1 = X Z_1 / S_1 the sound part:
        X Z_2 - Q_1 (Q_1' X Z_2) = P S_2 Y'        m x q with q small, in float64
    and Q = [Q_1, P] [Z_1, Z_2 Y]' is orthonormal as if X had been factored without squaring, once its doubtful part
    has had one Newton-Schulz step. ``round_off`` is that of the entries of X: where it is coarser than the dtype's,
    squaring costs nothing that X had, and Q = X (Z S^-1 Z') is one product.
    """
    n = X.shape[1]
    gram = symmetric_product(X.mT, X)
    if not bool((gram.diagonal() > 0).all()):  # null components: MKL's float32 eigensolver may not converge on them
        return None
    try:
        values, Z = eigh(gram)
    except ConvergenceError:
        return None
    del gram
    spare = torch.finfo(X.dtype).eps / round_off
    tiny, count, doubtful = (int((values < spare * part * values[-1]).sum()) for part in (_TINY, _SMALL, _DOUBTFUL))
    if n <= _CHEAP and spare == 1:
        doubtful = n
    if count > max(1, _MOST_SMALL * n) or not float(values[-1]) > 0:
        return None
    S = values.clamp(min=0).sqrt()
    if doubtful == 0:
        kept = tolerance * S[-1] < S
        inverse = symmetric_product(Z * torch.where(kept, 1 / S, 0), Z.mT)
        return X @ inverse, symmetric_product(Z * S, Z.mT), (S * kept).flip(0)
    image = X @ Z
    sound = image[:, count:]
    sound /= S[count:]
    _correct(sound, doubtful - count)
    if count:
        P, small, Y = _directions(image[:, :count], _image(X, Z[:, :tiny]), sound)
        P *= small > tolerance * S[-1]  # round-off must not bend its neighbours
        if X.dtype == torch.float64:  # nothing was wider
            P -= sound @ (sound.mT @ P)
        _correct(P, count)
        S[:count] = small
        Z[:, :count] = Z[:, :count] @ Y
        image[:, :count] = P
    kept = tolerance * S[-1] < S
    return (image * kept) @ Z.mT, symmetric_product(Z * S, Z.mT), (S * kept).flip(0)


def by_iteration(
    X: Tensor, tolerance: float, round_off: float, iterate: Callable[[Tensor, float], Tensor] = newton_schulz
) -> _Factors | None:
    """QR, then an iteration on the triangle: for devices whose products are far faster than their factorizations.

    m >= n. None where X is rank deficient to ``tolerance``, which only singular values can tell apart. The triangle is
    iterated in float64: the errors of an iteration grow with the condition (measured: 60 eps at 3e3), which float64 has
    digits for unless the entries of X are known to ``round_off`` of as many: None for those beyond _WORST_ITERATED.
    """
    basis, triangle = torch.linalg.qr(X)
    triangle = triangle.double()
    largest = float(torch.linalg.matrix_norm(triangle))
    identity = torch.eye(X.shape[1], dtype=triangle.dtype, device=X.device)
    inverse = float(torch.linalg.matrix_norm(torch.linalg.solve_triangular(triangle, identity, upper=True)))
    smallest = 1 / (largest * inverse) if inverse > 0 else 0.0
    if not smallest > max(tolerance, _WORST_ITERATED * torch.finfo(torch.float64).eps / round_off):
        return None
    factor = iterate(triangle / largest, smallest)
    H = factor.mT @ triangle
    H = (H + H.mT) / 2
    values = torch.linalg.eigvalsh(H).flip(0).clamp(min=0)
    return basis @ factor.to(X.dtype), H.to(X.dtype), values.to(X.dtype)


def _image(X: Tensor, Z: Tensor) -> Tensor:
    """X Z in float64."""
    wide = Z.double()
    return torch.cat([rows.double() @ wide for rows in torch.split(X, _ROWS)])


def _directions(image: Tensor, tiny: Tensor, sound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P, s, Y with (I - sound sound') image = P diag(s) Y', s ascending; the first columns of image are ``tiny``.

    The smallest singular values appear only where columns cancel, which takes columns known to more digits than they have
    in float32; what sound directions leave in a column is small next to it, and is removed as precisely in float32.
    """
    image = torch.cat([tiny, image[:, tiny.shape[1] :].double()], dim=1)
    overlap = sound.mT @ image.to(sound.dtype)
    for rows, part in zip(torch.split(sound, _ROWS), torch.split(image, _ROWS), strict=True):
        part -= rows @ overlap
    if sound.dtype == torch.float64:
        P, s, Yh = svd(image)
        return P.flip(1), s.flip(0), Yh.mT.flip(1)
    values, Y = eigh(image.mT @ image)  # squared, but with twice the digits
    s = values.clamp(min=0).sqrt()
    P = (image @ Y) / torch.where(s > 0, s, 1)
    return P.to(sound.dtype), s.to(sound.dtype), Y.to(sound.dtype)


def _correct(Q: Tensor, count: int) -> None:
    """One Newton-Schulz step, Q (3 I - Q'Q) / 2, on what involves the first ``count`` columns, in place."""
    if count == 0:
        return
    overlap = Q[:, :count].mT @ Q
    overlap.diagonal().sub_(1)
    rest = Q[:, :count] @ overlap[:, count:]
    Q[:, :count] -= 0.5 * (Q @ overlap.mT)
    Q[:, count:] -= 0.5 * rest
