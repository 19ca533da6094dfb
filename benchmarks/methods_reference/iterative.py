"""WUDI-Merging and DOGE: Adam on the updates alone, down the losses of the published code, by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from reference import Parts, full_svd, thresholds
from torch import Tensor

COEFFICIENT = 0.07
DOGE_KEEP = 0.3
SUBSPACE = 6


def wudi(stack: Tensor, iterations: int, lr: float) -> Tensor:
    """Of updates (T, m, n)."""
    norms = stack.square().sum((-2, -1))
    merged = torch.nn.Parameter(stack.sum(0))
    adam = torch.optim.Adam([merged], lr=lr)
    for _ in range(iterations):
        adam.zero_grad()
        interference = torch.bmm(merged - stack, stack.mT)
        (interference.square().sum((-2, -1)) / norms).sum().backward()
        adam.step()
    return merged.detach()


class Descent(NamedTuple):
    """What the steps of DOGE start from."""

    stack: Tensor
    """D_i (T, m, n)"""
    lambdas: Tensor
    """l_i (T,)"""
    basis: Tensor
    """P (m, p): shared directions, which the gradient is projected off"""


def shared_basis(parts: Sequence[Parts]) -> Tensor:
    """Leading left singular vectors of those of all tasks, a SUBSPACE-th of min(m, n), or as many as there are."""
    together = torch.cat([p.U for p in parts], 1)
    rows, columns = parts[0].U.shape[0], parts[0].Vh.shape[1]
    return full_svd(together, min(rows, columns) // SUBSPACE).U


def doge_start(stack: Tensor, parts: Sequence[Parts]) -> Descent:
    return Descent(stack, COEFFICIENT / torch.linalg.matrix_norm(stack), shared_basis(parts))


def doge_descend(start: Descent, iterations: int, lr: float) -> Tensor:
    """X (m, n) after the last step."""
    stack, lambdas, basis = start
    correction = torch.nn.Parameter(torch.zeros_like(stack[0]))
    gaps = stack - torch.einsum("t,tmn->mn", lambdas, stack)
    adam = torch.optim.Adam([correction], lr=lr)
    share = lambdas.sum()
    for _ in range(iterations):
        adam.zero_grad()
        (stack * (gaps - share * correction)).sum(-1).square().sum().backward()
        assert correction.grad is not None
        correction.grad -= basis @ (basis.mT @ correction.grad)
        adam.step()
    return correction.detach()


def doge_limits(stack: Tensor) -> Tensor:
    """The int(N keep) + 1-th largest magnitude of each task, (T,)."""
    return thresholds(stack, int(stack[0].numel() * DOGE_KEEP) + 1)


def doge_merge(start: Descent, correction: Tensor) -> Tensor:
    """sum_i l_i mask_i (D_i + X)"""
    masks = start.stack.abs() >= doge_limits(start.stack)[:, None, None]
    return torch.einsum("t,tmn->mn", start.lambdas, (start.stack + correction) * masks)


def doge(stack: Tensor, parts: Sequence[Parts], iterations: int, lr: float) -> Tensor:
    """From the leading components of the tasks."""
    start = doge_start(stack, parts)
    return doge_merge(start, doge_descend(start, iterations, lr))
