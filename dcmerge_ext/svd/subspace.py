"""Randomized subspace iteration: a fixed amount of work, whatever the spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from dcmerge_ext import ops
from dcmerge_ext.svd.block import orthonormalize
from dcmerge_ext.svd.components import Components, Evidence
from dcmerge_ext.svd.dense import gram, lapack
from dcmerge_ext.svd.start import Start

OVERSAMPLING = 16
POWER_STEPS = 2
_MOST_ROWS = 384
"""Up to this many rows there and back in one pass over A takes 0.5 to 0.8 times the two products (float32, two cores)."""


def subspace_iteration(
    A: Tensor, rank: int, start: Start, power_steps: int = POWER_STEPS, oversampling: int = OVERSAMPLING
) -> tuple[Components, Evidence]:
    """Power steps with extra directions (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1)."""
    m, n = A.shape
    if m < n:
        (V, S, Uh), evidence = subspace_iteration(A.mT, rank, start, power_steps, oversampling)
        return Components(Uh.mT, S, V.mT), evidence
    width = rank + oversampling
    one_pass = A.dtype == torch.float32 and width <= _MOST_ROWS
    if one_pass:
        A = A.contiguous()
    basis = start.rows(width, n, A)  # random signs are independent enough for a first step
    for _ in range(power_steps):
        there_and_back = ops.gram_apply(basis, A, basis.new_empty(len(basis), m)) if one_pass else (basis @ A.mT) @ A
        basis = orthonormalize(there_and_back)
    image = orthonormalize(basis @ A.mT)
    (u, S, Vh), _ = (gram if A.dtype == torch.float32 else lapack)(image @ A, rank)
    found = Components(image.mT @ u, S, Vh)
    total = float(torch.linalg.vector_norm(A, dtype=torch.float64)) ** 2
    captured = float((found.S.double() ** 2).sum()) / total if total else 1.0
    return found, Evidence("subspace", width, captured=captured)
