"""Averaging, task arithmetic, TIES, DARE, Consensus and PCB-Merging of one layer, which is their whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import cases
import flops
import torch
from case import Check, Problem, Rival, Setting
from methods_reference import elementwise as reference
from near_ties import INPUT_MARGIN, Decided
from torch import Tensor

from dcmerge_ext import methods
from dcmerge_ext.lowrank import Update
from method_rows.common import PLAIN, ROUNDED, adapters, doubled, full_updates, near, near_decided

_BALANCED = 1e-5
"""PCB-Merging: weights are exponentials, less a threshold that is nearly as large."""
_BALANCE_MARGIN = 1e-4
"""Relative distance of a balance from its threshold within which round-off of its exponential may decide."""
_SAMPLE = 1 << 17
"""Entries of DARE whose every subset of tasks is tried."""

# passes over the updates, not counting the one that writes the products of adapters
_PASSES = {"averaging": 1, "task_arithmetic": 1, "ties": 2, "dare": 1, "consensus": 2, "pcb": 3}

_CHECKED = "every update is searched for NaN and Inf, too, a pass as long as the sum itself"
_NOTES = {
    "averaging": _CHECKED,
    "task_arithmetic": _CHECKED,
    "dare": "masks are Philox's: the same on every device, however a tensor is split; those of the rival depend on both",
}
"""Why a row may lie below 1."""


def elementwise(setting: Setting, method: str, m: int, n: int, tasks: int, *, lora: bool = False) -> Problem:
    """Ours by its public function, with its default options."""
    updates: Sequence[Update] = (adapters if lora else full_updates)(setting, m, n, tasks)
    merge: Callable[[Sequence[Update]], Update] = getattr(methods, method)
    rival: Callable[[Sequence[Update]], Tensor] = getattr(reference, method)
    m, n = updates[0].shape
    note = _NOTES.get(method, "")
    if lora and method in ("averaging", "task_arithmetic"):  # stays in factors
        note = ""
        traffic = flops.factors_bytes(m, n, tasks * updates[0].rank)
    else:
        traffic = flops.elementwise_bytes(m, n, tasks, _PASSES[method] + lora)
    return Problem(
        ours=partial(merge, updates),
        rivals=[Rival(PLAIN, [("", partial(rival, updates))])],
        check=_check(method, updates),
        traffic=traffic,
        note=note,
    )


def _check(method: str, updates: Sequence[Update]) -> Callable[[Update], Check]:
    if method == "dare":
        return partial(_drawn, updates=updates)
    exact = doubled(updates)
    if method == "ties":
        return near_decided(ties_decided(reference.stacked(exact)), ROUNDED)
    if method == "consensus":
        return near_decided(_consensus_decided(reference.stacked(exact)), ROUNDED)
    if method == "pcb":
        return near_decided(_pcb_decided(reference.stacked(exact)), _BALANCED)
    return near(getattr(reference, method)(exact), ROUNDED)


def ties_decided(x: Tensor) -> Decided:
    """TIES of (T, m, n): each task's threshold decides, and the sign of the sum."""
    limits = reference.ties_limits(x)[:, None, None]
    distance = x.abs().sub_(limits).div_(limits)
    kept = distance >= 0
    trimmed = x * kept
    balanced = trimmed.sum(0).abs() <= INPUT_MARGIN * trimmed.abs().sum(0)
    near = torch.cat([distance.abs_() <= INPUT_MARGIN, (balanced & kept.any(0))[None]]).flatten(1)
    expected = reference.ties_merge(trimmed)

    def values(entries: Tensor, inverted: Tensor) -> Tensor:
        *own, sign = inverted
        chosen = x.flatten(1)[:, entries] * (kept.flatten(1)[:, entries] ^ torch.stack(own))
        elected = chosen.sum(0).sign()
        return reference.agreeing_mean(chosen, torch.where(sign, -elected, elected))

    return Decided(expected, near, values)


def _consensus_decided(x: Tensor) -> Decided:
    """Whether a task relies on an entry."""
    total = x.sum(0)
    excess = reference.consensus_excess(x, total)
    near = (excess.abs() <= INPUT_MARGIN * x.abs()).flatten(1)
    relies = (excess > 0).flatten(1)
    flat = total.flatten()

    def values(entries: Tensor, inverted: Tensor) -> Tensor:
        return flat[entries] * ((relies[:, entries] ^ inverted).sum(0) >= reference.CONSENSUS_AGREE)

    return Decided(values(torch.arange(len(flat)), torch.zeros_like(relies)).view_as(total), near, values)


def _pcb_decided(x: Tensor) -> Decided:
    """Whether a task is among the best: just above its threshold it has next to no weight, yet the entry alone."""
    balance, signed = (found.flatten(1) for found in reference.pcb_balance(x))
    limit, largest = (found[:, :, 0] for found in reference.pcb_limits(balance))
    weights = reference.pcb_weights(balance, limit, largest)
    near = (balance - limit).abs() <= _BALANCE_MARGIN * limit.abs()

    def values(entries: Tensor, inverted: Tensor) -> Tensor:
        own = weights[:, entries]
        other = torch.where(own > 0, 0.0, 1e-9)
        return reference.pcb_mean(torch.where(inverted, other, own), signed[:, entries])

    return Decided(reference.pcb_mean(weights, signed).view_as(x[0]), near, values)


def _drawn(answer: Update, updates: Sequence[Update]) -> Check:
    """DARE draws numbers of its own: each entry must be the rescaled sum of some of the tasks' entries.

    Of a sample of entries every subset of the tasks is tried, which also tells how many were dropped; of all entries the
    squared distance from the sum must be what dropping as many makes it.
    """
    rate, found = reference.DARE_RATE, cases.dense(answer).double()
    stack = reference.stacked(doubled(updates))
    x = stack.flatten(1)
    spread = float((found - stack.sum(0)).square().sum() / x.square().sum()) * (1 - rate) / rate
    entries = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))[:_SAMPLE]
    tasks = len(updates)
    subsets = (torch.arange(1 << tasks)[:, None] >> torch.arange(tasks) & 1).double()
    misses, kept = [], []
    for part in entries.split(1 << 12):
        distances = (subsets @ x[:, part] / (1 - rate) - found.flatten()[part]).abs()
        miss, which = distances.min(0)
        misses.append(miss)
        kept.append(subsets[which])
    drops = 1 - torch.cat(kept)
    dropped, together = drops.mean(0), float(drops.sum(1).var())
    error = float(torch.cat(misses).norm() / found.flatten()[entries].norm())
    variance = rate * (1 - rate)
    complaint = ""
    if float((dropped - rate).abs().max()) > 5 * (variance / len(entries)) ** 0.5 or abs(spread - 1) > 0.05:
        complaint = f"drops {[round(p, 4) for p in dropped.tolist()]}, {spread:.3f} times the variance expected"
    # how many tasks drop an entry is binomial: its sample variance, and the deviation of that by the fourth moment
    expected = tasks * variance
    deviation = ((2 + (1 - 6 * variance) / expected) / len(entries)) ** 0.5
    if abs(together / expected - 1) > 5 * deviation:
        complaint = (
            f"the tasks' drops depend on each other: variance {together / expected:.3f} times that of independent ones"
        )
    return Check(error, ROUNDED, {"dropped": float(dropped.mean())}, complaint)
