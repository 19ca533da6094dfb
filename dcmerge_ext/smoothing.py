"""Energy smoothing of retained singular values (DC-Merge, arXiv 2603.06242, section 3.1).

Energy is the sum of the singular values, as in the paper, not of their squares. Every kind preserves it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dcmerge_ext import reference
from dcmerge_ext.backends import for_device

Smoothing = Literal["none", "average", "linear", "interpolate"]


def smooth_energy(S: Tensor, kind: Smoothing = "average", *, rho: float = 5.0, tau: float = 0.5) -> Tensor:
    """Flatten a spectrum without changing its energy.

    Args:
        S: (..., r), descending, non-negative. Zeros are null components: they stay zero and take no part.
        kind: "none"; "average": every value becomes the mean; "linear": values fall linearly from
            min(rho, s_1 / s_r) to 1, scaled to the energy; "interpolate": tau S + (1 - tau) mean (eq. 41).
        rho: cap of s_1 / s_r, at least 1. rho = 1 is "average".
        tau: 0 .. 1; 1 is "none", 0 is "average".
    Returns:
        (..., r), same dtype. Preserves sum(S), not the Frobenius norm.
    Raises:
        ValueError: an unknown kind, rho < 1 or tau outside 0 .. 1.
    """
    if rho < 1 or not 0 <= tau <= 1:
        raise ValueError(f"smooth_energy: needs rho >= 1 and 0 <= tau <= 1, got rho={rho}, tau={tau}")
    if kind == "none" or S.shape[-1] == 0:
        return S
    parameters = {"average": 0.0, "linear": rho, "interpolate": tau}
    if kind not in parameters:
        raise ValueError(f"smooth_energy: kind must be none, average, linear or interpolate, got {kind!r}")
    compute = S if S.dtype == torch.float64 else S.float()
    # a compiler fuses the few torch operations of the reference as well as any kernel
    backend = reference if torch.compiler.is_compiling() else for_device(S.device)
    return backend.smooth_energy(compute, kind, parameters[kind]).to(S.dtype)
