"""Products that are symmetric, at the cost of one triangle."""

from __future__ import annotations

import torch
from torch import Tensor

from dcmerge_ext.backends import for_device
from dcmerge_ext.reference import CHUNK

_PARTS = 4
_LITTLE_CANCELS = 16
"""Product of the operands' norms against that of the result, times sqrt(k) for factors that cancel nothing."""


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
    """X X' of float32 (..., p, l) in float64, (..., p, p)."""
    *leading, p, length = X.shape
    backend = for_device(X.device)
    if not leading:
        return backend.gram(X)
    matrices = X.reshape(-1, p, length).unbind()
    return torch.stack([backend.gram(matrix) for matrix in matrices]).reshape(*leading, p, p)


def wide_product(A: Tensor, B: Tensor) -> Tensor:
    """A (..., m, k) @ B (..., k, n) for float64 B, in the dtype of A: float32 A as accurate as a float64 product, nearly.

    In float32 where the norms show that little cancels (16 eps of the result's norm), which takes a third of the time;
    otherwise in float64, in pieces that stay in cache. Each matrix of a batch decides for itself.
    """
    if A.dtype == B.dtype:
        return A @ B
    *leading, m, k = A.shape
    n = B.shape[-1]
    out = A.new_empty(*leading, m, n)
    for rows, right, place in zip(A.reshape(-1, m, k), B.reshape(-1, k, n), out.view(-1, m, n), strict=True):
        torch.mm(rows, right.to(A.dtype), out=place)
        if rows.norm() * right.norm() < _LITTLE_CANCELS * k**0.5 * place.norm():
            continue
        step = max(64, CHUNK // max(k, n, 1))
        for begin in range(0, m, step):
            place[begin : begin + step] = rows[begin : begin + step].double() @ right
    return out
