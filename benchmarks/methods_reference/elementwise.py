"""Averaging, task arithmetic, TIES, DARE, Consensus and PCB-Merging: one entry at a time, but for thresholds.

A list of updates is the whole model. Of adapters the dense products B A are merged, as published.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from reference import thresholds
from torch import Tensor

from dcmerge_ext import LowRank
from dcmerge_ext.lowrank import Update

TIES_KEEP = 0.2
DARE_RATE = 0.1
CONSENSUS_LAMBDA, CONSENSUS_AGREE = 0.4, 2
PCB_RATIO, PCB_QUANTILE = 0.05, 0.01


def stacked(updates: Sequence[Update]) -> Tensor:
    """(T, m, n), adapters multiplied out in one batched product."""
    factors = [u for u in updates if isinstance(u, LowRank)]
    if factors:
        return torch.bmm(torch.stack([u.left for u in factors]), torch.stack([u.right for u in factors]))
    return torch.stack([u for u in updates if isinstance(u, Tensor)])


def task_arithmetic(updates: Sequence[Update]) -> Tensor:
    first, *others = updates
    total = first.dense() if isinstance(first, LowRank) else first.clone()
    for update in others:
        if isinstance(update, LowRank):
            total.addmm_(update.left, update.right)
        else:
            total += update
    return total


def averaging(updates: Sequence[Update]) -> Tensor:
    return task_arithmetic(updates).div_(len(updates))


def ties(updates: Sequence[Update]) -> Tensor:
    x = stacked(updates)
    limits = ties_limits(x)
    return ties_merge(x.masked_fill_(x.abs() < limits[:, None, None], 0))


def ties_limits(x: Tensor) -> Tensor:
    """The int(N keep) + 1-th largest magnitude of each task, (T,)."""
    return thresholds(x, int(x[0].numel() * TIES_KEEP) + 1)


def ties_merge(trimmed: Tensor) -> Tensor:
    """Elect signs and average what agrees: (T, ...) -> (...). Where the sum is 0 the majority of all entries decides."""
    elected = trimmed.sum(0).sign()
    elected = torch.where(elected == 0, elected.sum().sign(), elected)
    return agreeing_mean(trimmed, elected)


def agreeing_mean(trimmed: Tensor, elected: Tensor) -> Tensor:
    agree = (trimmed * elected) > 0
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(updates: Sequence[Update]) -> Tensor:
    """Drop and rescale is what dropout does."""
    first, *others = updates
    total = torch.nn.functional.dropout(_dense(first), DARE_RATE)
    for update in others:
        total += torch.nn.functional.dropout(_dense(update), DARE_RATE)
    return total


def consensus(updates: Sequence[Update]) -> Tensor:
    x = stacked(updates)
    total = x.sum(0)
    return total * (consensus_excess(x, total).gt(0).sum(0) >= CONSENSUS_AGREE)


def consensus_excess(x: Tensor, total: Tensor) -> Tensor:
    """Above 0 where a task relies on the entry of the sum. (T, ...)"""
    return x.abs() - (total - x).abs_().mul_(CONSENSUS_LAMBDA)


def pcb(updates: Sequence[Update]) -> Tensor:
    x = stacked(updates)
    balance, values = pcb_balance(x)
    weights = pcb_weights(balance, *pcb_limits(balance))
    return pcb_mean(weights, values)


def pcb_balance(x: Tensor) -> tuple[Tensor, Tensor]:
    """b and sign(x) a, both (T, ...): the vision code, with all T^2 tanh."""
    tasks, count = len(x), x[0].numel()
    magnitudes = x.abs().flatten(1)
    below, above = int(count * PCB_QUANTILE) + 1, count - int(count * (1 - PCB_QUANTILE) - 1)
    low = magnitudes.topk(below, largest=False, sorted=False).values.amax(1).view(-1, 1, 1)
    high = magnitudes.topk(above, sorted=False).values.amin(1).view(-1, 1, 1)
    clamped = torch.clamp(magnitudes.view_as(x), low, high)
    normalized = (clamped - low) / (high - low)
    signs = x.sign()
    signed = normalized * signs
    across, agreement = torch.zeros_like(x), torch.empty_like(x[0])
    for total, one in zip(across, signed, strict=True):
        for other in signed:
            total += torch.mul(one, other, out=agreement).tanh_()
    return normalized.square_().mul_(tasks).exp_().mul_(across), clamped.mul_(signs)


def pcb_limits(balance: Tensor) -> tuple[Tensor, Tensor]:
    """Of each task, the value that the best PCB_RATIO of its entries reach, and its largest."""
    flat = balance.flatten(1)
    count = flat.shape[1]
    best = flat.topk(count - int(count * (1 - PCB_RATIO)), sorted=False).values
    return best.amin(1).view(-1, 1, 1), best.amax(1).view(-1, 1, 1)


def pcb_weights(balance: Tensor, limit: Tensor, largest: Tensor) -> Tensor:
    return (balance - limit).clamp_(min=0).div_(largest - limit)


def pcb_mean(weights: Tensor, values: Tensor) -> Tensor:
    return (weights * values).sum(0) / weights.sum(0).clamp(min=1e-12)


def _dense(update: Update) -> Tensor:
    return update.dense() if isinstance(update, LowRank) else update
