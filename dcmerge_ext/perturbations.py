"""Updates perturbed by a prescribed amount, in energy alone or in direction alone (DC-Merge, arXiv 2603.06242, section E.3).

What an accuracy does along either shows which of the two a model depends on; :mod:`dcmerge_ext.metrics` measures both.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from dcmerge_ext import ops
from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.similarity import components_of_one, live_rank
from dcmerge_ext.updates import compute_dtype, count_nonfinite

logger = logging.getLogger(__name__)

_FLAT = 1e-6
"""Sine of the angle between a spectrum and the flat one below which round-off decides where the perturbation points."""
_BITS = 32
"""Random signs that make up one random number."""


def perturb_spectrum(S: Tensor, cos_sim: float) -> Tensor:
    """Singular values turned towards the flat spectrum until their cosine with the old ones is ``cos_sim``.

    s^ = |s| (p a + sqrt(1 - p^2) b) with p the cosine, a = s / |s| and b the unit vector of f - (a . f) a, f flat: the
    Frobenius norm stays. Below the cosine of s with f, the spectrum passes flat and rises; where leading values turn
    negative, their directions flip, and the perturbation is no longer one of energy alone.

    Args:
        S: (..., r), non-negative, floating. Zeros are null components: they stay zero and take no part.
        cos_sim: p, 0 .. 1. 1 changes nothing.
    Returns:
        (..., r), same dtype, in the order of S.
    Raises:
        InputError: p < 1 and a spectrum that is flat already, or zero: there is nothing to turn it towards.
        ValueError: p outside 0 .. 1.   TypeError: not floating.
    """
    if not S.is_floating_point():
        raise TypeError(f"perturb_spectrum: needs a floating dtype, got {S.dtype}")
    if not 0 <= cos_sim <= 1:
        raise ValueError(f"perturb_spectrum: cos_sim must lie in 0 .. 1, got {cos_sim}")
    if cos_sim == 1 or S.numel() == 0:
        return S
    wide = S.double()
    live = wide > 0
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    a = wide / torch.where(norm > 0, norm, 1)
    flat = live / live.sum(-1, keepdim=True).clamp(min=1).sqrt()
    b = flat - (a * flat).sum(-1, keepdim=True) * a
    sine = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    if not bool((sine > _FLAT).all()):
        raise InputError(
            f"perturb_spectrum: a spectrum is flat, has one value, or none, and no perturbation of energy towards the flat "
            f"one takes its cosine to {cos_sim}; leave that update out"
        )
    turned: Tensor = norm * (cos_sim * a + (1 - cos_sim**2) ** 0.5 * b / sine)
    return turned.to(S.dtype)


def perturb_energy(update: Update, cos_sim: float, *, rank: int | None = None) -> Update:
    """An update with the directions of another and a flatter spectrum, of the given CosSim with it.

    U diag(s^) V', s^ by :func:`perturb_spectrum`. DirSim stays 1 while s^ is positive; a warning says where it is not.

    Args:
        update: (..., m, n), tensor or LowRank, floating, finite.
        cos_sim: with the update (as its ``rank`` components), 0 .. 1.
        rank: components kept, 1 .. min(m, n). None: all.
    Returns:
        A LowRank for a LowRank, otherwise a tensor; float32, or float64 for float64.
    Raises:
        InputError: non-finite values; a spectrum that is flat already (all adapters of rank 1 are).
        ValueError: cos_sim or rank out of range.   TypeError: not floating.
    """
    U, S, Vh = _components("perturb_energy", update, rank)
    turned = perturb_spectrum(S, cos_sim)
    if flipped := int((turned < 0).sum()):
        logger.warning(
            "perturb_energy: at cos_sim %g %d of %d singular values turn negative, which flips their directions; "
            "only cos_sim above the cosine of the spectrum with a flat one perturbs energy alone",
            cos_sim,
            flipped,
            int((S > 0).sum()),
        )
    return _assemble(U * turned[..., None, :], Vh, update)


def perturb_directions(
    update: Update, dir_sim: float, *, rank: int | None = None, seed: int = 0, key: str = "", task: int = 0
) -> Update:
    """An update with the singular values of another and turned singular vectors, of the given DirSim with it.

    U(p) = sqrt(p) U + sqrt(1 - p) U_o with U_o random orthonormal columns orthogonal to all of U, likewise V(p), and
    U(p) diag(s) V(p)': DirSim and CosSim both are p, up to round-off.

    Args:
        update: (..., m, n), tensor or LowRank, floating, finite.
        dir_sim: p, with the update (as its ``rank`` components), 0 .. 1.
        rank: components kept, 1 .. min(m, n) / 2. None: all, where there are no more than that.
        seed, key, task: what the random directions depend on, as in :func:`dcmerge_ext.ops.rademacher`; each matrix of a
            batch has its own. torch's generators are neither read nor changed.
    Returns:
        A LowRank for a LowRank, otherwise a tensor; float32, or float64 for float64.
    Raises:
        InputError: non-finite values, or p < 1 and more components than half of min(m, n): no room to turn them.
        ValueError: dir_sim or rank out of range.   TypeError: not floating.
    """
    if not 0 <= dir_sim <= 1:
        raise ValueError(f"perturb_directions: dir_sim must lie in 0 .. 1, got {dir_sim}")
    U, S, Vh = _components("perturb_directions", update, rank)
    count = int(live_rank(S).max()) if S.numel() else 0
    if dir_sim == 1 or count == 0:
        return _assemble(U * S[..., None, :], Vh, update)
    m, n = update.shape[-2:]
    if 2 * count > (q := min(m, n)):
        advice = f"pass rank={q // 2} or less" if q > 1 else "leave such updates out"
        raise InputError(
            f"perturb_directions: {count} components of a {m} x {n} matrix leave no room for as many directions orthogonal "
            f"to them; {advice}"
        )
    # signs of a pair are arbitrary, and the random directions are not: the same update is to be turned the same way
    largest = U.abs().argmax(-2, keepdim=True)
    signs = torch.where(U.gather(-2, largest) < 0, -1.0, 1.0).double()
    U, Vh = U * signs, Vh * signs.mT
    turned = []
    for side, basis in enumerate((U[..., :count], Vh[..., :count, :].mT)):
        other = _complement(basis, seed=seed, key=key, task=task, stream=side * _BITS)
        turned.append(dir_sim**0.5 * basis + (1 - dir_sim) ** 0.5 * other)
    left, right = turned
    return _assemble(left * S[..., None, :count], right.mT, update)


def _complement(basis: Tensor, *, seed: int, key: str, task: int, stream: int) -> Tensor:
    """As many random orthonormal columns, orthogonal to the columns of float64 ``basis`` (..., m, r), r <= m / 2."""
    *leading, m, r = basis.shape
    rows = math.prod(leading) * m
    uniform = torch.zeros(rows, r, dtype=torch.float64)
    for bit in range(_BITS):
        signs = ops.rademacher(rows, r, seed=seed, key=key, task=task, stream=stream + bit, dtype=torch.float64)
        uniform += signs * 2.0 ** -(bit + 1)
    # by the inverse of its distribution function a normal variable: no direction is more likely than another
    columns: Tensor = torch.special.erfinv(uniform).reshape(basis.shape).to(basis.device)
    for _ in range(2):  # the second pass removes what round-off left of the basis
        columns = torch.linalg.qr(columns - basis @ (basis.mT @ columns)).Q
    return columns


def _components(function: str, update: Update, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if not update.dtype.is_floating_point or len(update.shape) < 2:
        raise TypeError(f"{function}: needs a floating update (..., m, n), got {tuple(update.shape)} {update.dtype}")
    if bad := count_nonfinite(update):
        raise InputError(f"{function}: an update of shape {tuple(update.shape)} holds {bad} NaN or Inf values")
    return components_of_one(function, update, rank)


def _assemble(left: Tensor, right: Tensor, like: Update) -> Update:
    dtype = compute_dtype(like.dtype)
    if isinstance(like, LowRank):
        return LowRank(left.to(dtype), right.to(dtype))
    return (left @ right).to(dtype)
