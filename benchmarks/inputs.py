"""Synthetic updates to merge, in float32: spectra, LoRA adapters, concatenated bases."""

from __future__ import annotations

import cases  # the generators of the tests
import torch
from torch import Tensor

from dcmerge_ext import LowRank


def full_updates(tasks: int, m: int, n: int, exponent: float) -> list[Tensor]:
    """Full-rank updates (m, n) with singular values j^-exponent and directions that the tasks share in part."""
    updates: list[Tensor] = cases.full_updates(tasks, m, n, exponent=exponent, dtype=torch.float32)
    return updates


def lora_updates(
    tasks: int, m: int, n: int, rank: int, *, movement: float | None = None, seed: int = 0
) -> list[LowRank]:
    """Adapters B A of m x n: A uniform as PEFT initialises it, B normal.

    Args:
        movement: all adapters started from one A and each moved this far from it, relative to its norm. None:
            independent A.
    """
    generator = torch.Generator().manual_seed(seed)

    def initial() -> Tensor:
        return torch.empty(rank, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)

    shared = initial()
    updates = []
    for _ in range(tasks):
        A = initial() if movement is None else shared + movement * initial()
        updates.append(LowRank.from_lora(A, 0.01 * torch.randn(m, rank, generator=generator)))
    return updates


def orthonormal_blocks(m: int, blocks: int, width: int) -> Tensor:
    """(m, blocks * width): independent random orthonormal bases side by side."""
    return torch.cat([cases.orthonormal(m, width, seed) for seed in range(blocks)], 1).float()
