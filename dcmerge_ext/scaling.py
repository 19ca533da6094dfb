"""Powers of two that bring a matrix near 1, where squares of its entries neither overflow nor vanish."""

from __future__ import annotations

import torch
from torch import Tensor

_SAFE = 30


def binary_exponent(X: Tensor) -> int:
    """e such that the largest magnitude of ``X`` times 2^-e lies in [1/2, 1); 0 where that is not needed, or no help.

    Multiplying by a power of two is exact, so a matrix and its rescaled copy have the same singular vectors, bit by bit.
    """
    if X.numel() == 0:
        return 0
    low, high = X.aminmax()
    largest = max(-float(low), float(high))
    if largest == 0 or not largest < float("inf"):
        return 0
    exponent = int(torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent)
    return 0 if abs(exponent) <= _SAFE else exponent


def scale_by_power(X: Tensor, exponent: int) -> Tensor:
    """X times 2^exponent, in two factors: one alone can leave the range."""
    half = exponent // 2
    return X * 2.0**half * 2.0 ** (exponent - half)
