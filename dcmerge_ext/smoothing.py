"""Energy smoothing of retained singular values (DC-Merge, arXiv 2603.06242, section 3.1).

Energy is the sum of the singular values, as in the paper, not of their squares. Every kind preserves it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

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
    live = S > 0
    count = live.sum(-1, keepdim=True).clamp(min=1)
    energy = S.sum(-1, keepdim=True)
    if kind == "linear":
        last = torch.where(live, S, torch.inf).amin(-1, keepdim=True)
        ratio = (S[..., :1] / last).clamp(max=rho)
        step = torch.arange(S.shape[-1], dtype=S.dtype, device=S.device) / (count - 1).clamp(min=1)
        weight = torch.where(live, ratio + (1 - ratio) * step, 0)
        total = weight.sum(-1, keepdim=True)
        return energy * weight / torch.where(total > 0, total, 1)
    mean = torch.where(live, energy / count, 0)
    if kind == "average":
        return mean
    if kind == "interpolate":
        return tau * S + (1 - tau) * mean
    raise ValueError(f"smooth_energy: kind must be none, average, linear or interpolate, got {kind!r}")
