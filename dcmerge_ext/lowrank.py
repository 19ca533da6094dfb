"""Updates kept as two factors: what a LoRA adapter is, and what merging LoRA adapters returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``left @ right``, never formed.

    Args:
        left: (..., m, r).
        right: (..., r, n), same leading dimensions, dtype and device as ``left``. r = 0 is the zero matrix.
    Raises:
        ValueError: the factors do not fit together.   TypeError: not floating point, or two dtypes.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        if left.ndim < 2 or right.ndim < 2 or left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-2]:
            raise ValueError(
                f"LowRank: needs left (..., m, r) and right (..., r, n), got {tuple(left.shape)} and {tuple(right.shape)}"
            )
        if left.dtype != right.dtype or not left.is_floating_point():
            raise TypeError(f"LowRank: needs two factors of one floating dtype, got {left.dtype} and {right.dtype}")
        if left.device != right.device:
            raise ValueError(f"LowRank: factors lie on {left.device} and {right.device}; move one with .to()")

    @classmethod
    def from_lora(cls, A: Tensor, B: Tensor, alpha: float | None = None, rslora: bool = False) -> LowRank:
        """Update of a LoRA adapter, ``scale * B @ A`` (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732).

        Args:
            A: (..., r, in_features).   B: (..., out_features, r).
            alpha: lora_alpha; the scale is alpha / r, or alpha / sqrt(r) with ``rslora``. None: scale 1.
        """
        rank = A.shape[-2]
        scale = 1.0 if alpha is None or rank == 0 else alpha / (rank**0.5 if rslora else rank)
        return cls(B, A) * scale

    @property
    def shape(self) -> torch.Size:
        return self.left.shape[:-1] + self.right.shape[-1:]

    @property
    def rank(self) -> int:
        """Number of columns of ``left``: an upper bound of the numerical rank."""
        return self.left.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def mT(self) -> LowRank:
        """The transposed matrix."""
        return LowRank(self.right.mT, self.left.mT)

    def to(self, *args: Any, **kwargs: Any) -> LowRank:
        """As ``torch.Tensor.to``, for both factors."""
        return LowRank(self.left.to(*args, **kwargs), self.right.to(*args, **kwargs))

    def double(self) -> LowRank:
        """As ``torch.Tensor.double``, for both factors."""
        return self.to(torch.float64)

    def __mul__(self, scalar: float) -> LowRank:
        if scalar == 1:
            return self
        # On the smaller factor, in at least single precision: a scale must not be lost to rounding.
        left, right = _at_least_single(self.left), _at_least_single(self.right)
        if left.numel() <= right.numel():
            return LowRank(left * scalar, right)
        return LowRank(left, right * scalar)

    __rmul__ = __mul__

    def dense(self) -> Tensor:
        """The product (..., m, n), formed in at least single precision, in the dtype of the factors."""
        return (_at_least_single(self.left) @ _at_least_single(self.right)).to(self.dtype)

    def __repr__(self) -> str:
        return f"LowRank(shape={tuple(self.shape)}, rank={self.rank}, dtype={self.dtype}, device='{self.device}')"


def _at_least_single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


Update = Tensor | LowRank
"""What a fine-tune added to one matrix: a tensor (..., m, n) or a LowRank."""


def times(X: Tensor, update: Update) -> Tensor:
    """X (..., p, m) @ update (..., m, n) in the dtype of X; a LowRank is never formed."""
    if isinstance(update, LowRank):
        return (X @ update.left.to(X.dtype)) @ update.right.to(X.dtype)
    return X @ update.to(X.dtype)


def concatenate(updates: list[LowRank]) -> LowRank:
    """The sum of the updates, exactly: factors side by side, rank the sum of the ranks."""
    return LowRank(torch.cat([u.left for u in updates], dim=-1), torch.cat([u.right for u in updates], dim=-2))
