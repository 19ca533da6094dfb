"""PCB-Merging: each entry weighted by its size in its task and its agreement with the other tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.selection import Selection
from dcmerge_ext.methods.stacks import stack_updates
from dcmerge_ext.updates import Updates


@dataclass(frozen=True)
class _Bounds:
    """Of the magnitudes of each task, all (T,)."""

    low: Tensor
    high: Tensor

    def clamp(self, stack: Tensor) -> tuple[Tensor, Tensor]:
        """Clamped magnitudes (T, N) of a stack (T, N), and the same scaled to 0 .. 1."""
        low, high = self.low.to(stack.device)[:, None], self.high.to(stack.device)[:, None]
        clamped = stack.abs().clamp(min=low, max=high)
        spread = high - low
        flat = (high > 0).to(stack.dtype).expand_as(stack)  # all magnitudes alike: none lags behind
        return clamped, torch.where(spread > 0, (clamped - low) / torch.where(spread > 0, spread, 1), flat)


@dataclass
class _Magnitudes:
    """First passes: the quantiles of the magnitudes."""

    low: Selection
    high: Selection
    largest: Tensor

    def fork(self) -> _Magnitudes:
        return _Magnitudes(self.low.fork(), self.high.fork(), self.largest.clone())

    def join(self, share: _Magnitudes) -> None:
        self.low.join(share.low)
        self.high.join(share.high)
        self.largest = torch.maximum(self.largest, share.largest)


@dataclass
class _Balances:
    """Later passes: the threshold of the balance, which may be negative, and its maximum.

    The digits of a magnitude are counted, so positive and negative parts are selected from side by side.
    """

    bounds: _Bounds
    positive: Selection
    negative: Selection
    largest: Tensor

    def fork(self) -> _Balances:
        return _Balances(self.bounds, self.positive.fork(), self.negative.fork(), self.largest.clone())

    def join(self, share: _Balances) -> None:
        self.positive.join(share.positive)
        self.negative.join(share.negative)
        self.largest = torch.maximum(self.largest, share.largest)


@dataclass(frozen=True)
class _Balanced:
    bounds: _Bounds
    threshold: Tensor
    largest: Tensor


class Pcb(Method, frozen=True):
    """Weight each entry by its size within its task and its agreement across tasks, keep the best few (PCB-Merging).

    Source: Du et al., Parameter Competition Balancing for Model Merging, arXiv 2410.02396, with the rules of the
    published code. Over the whole model as one vector x_t per task: a_t = |x_t| clamped to two quantiles,
    n_t = a_t scaled to 0 .. 1, z_t = sign(x_t) n_t,

        b_t = exp(T n_t^2) sum_j tanh(z_t z_j)                  variant="vision", the code of the vision experiments
        b_t = exp(T n_t^2) tanh(x_t sum_j x_j)                  variant="standalone", the stand-alone file

    s_t = b_t clamped from below to the value that the top ``ratio`` exceed, scaled to 0 .. 1;
    merged = sum_t s_t sign(x_t) a_t / sum_t s_t, 0 where nothing is kept. The vision variant is the default: the other one
    depends on the unit of the weights, and its tanh is linear at the size of real updates, so that a task's weight enters
    its balance as well as its values. Default scale 1.2, the vision code's lambda; its search by validation is not here.

    Exact, without holding any model: two passes over float32 updates for the quantiles, two for the threshold (twice
    four over float64), one to merge; 3 T^2 / 2 tanh per element. The result of LowRank updates is dense.

    Deviations, each where the published code divides 0 by 0 or loses a task: magnitudes that are all alike count as 1;
    where all but the quantile of a task's entries are 0, its largest magnitude takes the place of the upper quantile;
    entries that share the largest balance have weight 1; a single task comes back as it is.
    """

    name = "pcb"
    paper = "https://arxiv.org/abs/2410.02396"
    scope = "model"
    elementwise = True

    ratio: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="fraction of each task's entries that takes part; published: 0.05 in both scripts, 0.1 the function's",
        ),
    ] = 0.05
    variant: Annotated[
        Literal["vision", "standalone"], Meta(description="which of the published balances across tasks")
    ] = "vision"
    quantile: Annotated[
        Annotated[float, Meta(ge=0, lt=0.5)] | None,
        Meta(
            description="clamped at both ends of each task's magnitudes. None: 0.01 for vision, 0.0001 for standalone"
        ),
    ] = None

    def default_scale(self, num_tasks: int) -> float:
        return 1.2 if num_tasks > 1 else 1.0

    def num_surveys(self, dtype: torch.dtype) -> int:
        return 2 * Selection.num_passes(dtype)

    def begin(self, num_tasks: int, dtype: torch.dtype) -> _Magnitudes:
        def selection() -> Selection:
            return Selection.begin(num_tasks, dtype)

        return _Magnitudes(selection(), selection(), torch.zeros(num_tasks, dtype=dtype))

    def survey(self, key: str, updates: Updates, state: _Magnitudes | _Balances) -> None:
        if isinstance(state, _Magnitudes):
            stack = stack_updates(updates, state.largest.dtype)[:, 0]
            for i, x in enumerate(stack):
                state.low.add(i, x)
                state.high.add(i, x)
            largest = stack.abs()
        else:
            stack = stack_updates(updates, state.largest.dtype)[:, 0]
            largest = self._balance(stack, state.bounds)
            for i, b in enumerate(largest):
                state.positive.add(i, b.clamp(min=0))
                state.negative.add(i, b.clamp(max=0))
        if stack.numel():
            state.largest = torch.maximum(state.largest, largest.amax(1).cpu())

    def finish(self, state: _Magnitudes | _Balances) -> _Magnitudes | _Balances | _Balanced:
        if isinstance(state, _Magnitudes):
            q = (0.01 if self.variant == "vision" else 1e-4) if self.quantile is None else self.quantile
            # counted from 0 upwards, the published code takes the entries int(N q) and int(N (1 - q) - 1)
            low = state.low.finish(lambda total: total - int(total * q))
            high = state.high.finish(lambda total: total - int(total * (1 - q) - 1))
            if isinstance(low, Selection) or isinstance(high, Selection):
                assert isinstance(low, Selection)
                assert isinstance(high, Selection)
                return _Magnitudes(low, high, state.largest)
            bounds = _Bounds(low, torch.where(high > 0, high, state.largest))
            tasks, dtype = len(state.largest), state.largest.dtype
            nothing = torch.full_like(state.largest, -torch.inf)
            return _Balances(bounds, Selection.begin(tasks, dtype), Selection.begin(tasks, dtype), nothing)
        # the entry int(N (1 - ratio)), counted from 0 upwards
        positive = state.positive.finish(lambda total: total - int(total * (1 - self.ratio)))
        negative = state.negative.finish(lambda total: 1 + int(total * (1 - self.ratio)))
        if isinstance(positive, Selection) or isinstance(negative, Selection):
            assert isinstance(positive, Selection)
            assert isinstance(negative, Selection)
            return _Balances(state.bounds, positive, negative, state.largest)
        return _Balanced(state.bounds, torch.where(positive > 0, positive, -negative), state.largest)

    def merge(self, updates: Updates, ctx: Context) -> Update:
        found: _Balanced = ctx.state
        stack = stack_updates(updates, found.threshold.dtype)[:, 0]
        if ctx.num_tasks > 1:
            stack = self._weighted_mean(stack, found)
        return stack.reshape(updates.shape).to(updates.dtype)

    def _weighted_mean(self, stack: Tensor, found: _Balanced) -> Tensor:
        """(T, N) -> (N,)"""
        magnitudes, _ = found.bounds.clamp(stack)
        values = stack.sign() * magnitudes
        threshold, largest = (x.to(stack.device)[:, None] for x in (found.threshold, found.largest))
        balance = self._balance(stack, found.bounds)
        spread = largest - threshold
        best = ((balance >= largest) & (values != 0)).to(stack.dtype)
        weights = torch.where(spread > 0, (balance - threshold).clamp(min=0) / torch.where(spread > 0, spread, 1), best)
        return (weights * values).sum(0) / weights.sum(0).clamp(min=1e-12)

    def _balance(self, stack: Tensor, bounds: _Bounds) -> Tensor:
        """b (T, N) of a stack (T, N), times exp(-T): threshold and scaling do not see the factor, and nothing overflows."""
        _, normalized = bounds.clamp(stack)
        within = (len(stack) * (normalized.square() - 1)).exp_()
        if self.variant == "standalone":
            return within * (stack * stack.sum(0)).tanh_()
        signed = stack.sign() * normalized
        across = torch.zeros_like(stack)
        for i, one in enumerate(signed):
            for j in range(i, len(signed)):  # tanh(z_i z_j) serves both
                agreement = (one * signed[j]).tanh_()
                across[i] += agreement
                if j != i:
                    across[j] += agreement
        return within * across


pcb = register(Pcb)
