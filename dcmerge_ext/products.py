"""Products that are symmetric, at the cost of one triangle."""

from __future__ import annotations

import torch
from torch import Tensor

_PARTS = 4
_CHUNK = 1 << 17
"""Elements converted to float64 at a time: 1 MiB, a second-level cache."""


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """left (n, k) @ right (k, n), known to be symmetric: the blocks on and above the diagonal are multiplied, 5/8."""
    n = left.shape[0]
    if n < 64 * _PARTS:
        return left @ right
    out = left.new_empty(n, n)
    step = -(-n // _PARTS)
    for begin in range(0, n, step):
        end = min(begin + step, n)
        torch.mm(left[begin:end], right[:, begin:], out=out[begin:end, begin:])
        out[end:, begin:end] = out[begin:end, end:].mT
    return out


def gram_float64(X: Tensor) -> Tensor:
    """X X' of (p, l) in float64, in pieces that stay in cache. The lower triangle alone is complete."""
    rows, length = X.shape
    half = -(-rows // 2)
    step = max(64, _CHUNK // max(rows, 1))
    total = X.new_zeros(rows, rows, dtype=torch.float64)
    for begin in range(0, length, step):
        piece = X[:, begin : begin + step].double()
        total[:half, :half].addmm_(piece[:half], piece[:half].mT)
        total[half:].addmm_(piece[half:], piece.mT)
    return total
