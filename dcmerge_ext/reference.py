"""The operations of :mod:`dcmerge_ext.ops` in plain torch, on any device: oracle, specification and last resort."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kth_magnitude(x: Tensor, counts: Tensor) -> Tensor:
    descending = x.abs().sort(dim=-1, descending=True).values
    return descending.gather(-1, (counts - 1).to(x.device).unsqueeze(-1)).squeeze(-1)


def magnitude_histogram(x: Tensor, out: Tensor, shift: int, width: int, prefix: int) -> None:
    integers = torch.int32 if x.dtype == torch.float32 else torch.int64
    key = x.reshape(-1).view(integers) & torch.iinfo(integers).max
    digits = (key[key >> (shift + width) == prefix] >> shift) & ((1 << width) - 1)
    out += torch.bincount(digits, minlength=1 << width).to(out.device)


def elect(stack: Tensor, thresholds: Tensor | None, blocks: Sequence[int] | None, zero_sum: int, mean: bool) -> Tensor:
    if thresholds is not None:
        stack = torch.where(stack.abs() >= thresholds[..., None, None], stack, 0)
    sign = torch.zeros_like(stack[:, 0])
    for task in stack.unbind(1):  # a plain loop: the order of summation is part of the contract
        sign += task
    sign = torch.where(sign == 0, zero_sum, sign.sign())
    total, votes = torch.zeros_like(sign), torch.zeros_like(sign)
    for task in stack.unbind(1):
        agrees = (task != 0) & (task.sign() == sign)
        total += torch.where(agrees, task, 0)
        votes += agrees
    merged = total / votes.clamp(min=1) if mean else total
    if blocks is not None:
        block = torch.repeat_interleave(
            torch.arange(len(blocks), device=stack.device), torch.tensor(blocks, device=stack.device)
        )
        merged = torch.where(block[:, None] == block, merged, 0)
    return merged
