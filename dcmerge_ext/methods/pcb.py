"""PCB-Merging: each entry weighted by its size in its task and its agreement with the other tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.selection import Selection
from dcmerge_ext.methods.stacks import stack_updates
from dcmerge_ext.updates import Updates

_RUN = 1 << 18
"""Entries of all tasks that are worked on at once on the CPU."""


@dataclass(frozen=True)
class _Bounds:
    """Of the magnitudes of each task, all (T,)."""

    low: Tensor
    high: Tensor

    def to(self, device: torch.device) -> _Bounds:
        return _Bounds(self.low.to(device), self.high.to(device))

    def clamp(self, stack: Tensor) -> tuple[Tensor, Tensor]:
        """Clamped magnitudes (T, N) of a stack (T, N), and the same scaled to 0 .. 1."""
        low, high = self.low[:, None], self.high[:, None]
        clamped, spread = stack.abs().clamp_(min=low, max=high), high - low
        normalized = (clamped - low).div_(torch.where(spread > 0, spread, 1))
        alike = (spread <= 0) & (high > 0)  # all magnitudes: none lags behind
        return clamped, normalized.add_(alike)


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

    def to(self, device: torch.device) -> _Balanced:
        return _Balanced(self.bounds.to(device), self.threshold.to(device), self.largest.to(device))


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
    four over float64), one to merge; the T^2 tanh of an entry by T sums of powers. The result of LowRank updates is dense.

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
        stack = stack_updates(updates, state.largest.dtype)[:, 0]
        if not stack.numel():
            return
        if isinstance(state, _Magnitudes):
            for i, x in enumerate(stack):
                state.low.add(i, x)
                state.high.add(i, x)
            low, high = torch.aminmax(stack, dim=1)
            largest = torch.maximum(low.abs(), high.abs())
        else:
            bounds = state.bounds.to(stack.device)
            found = []
            for run in _runs(stack):
                balances = self._balance(run, bounds)
                for i, b in enumerate(balances):
                    state.positive.add(i, b.clamp(min=0))
                    state.negative.add(i, b.clamp(max=0))
                found.append(balances.amax(1))
            largest = torch.stack(found).amax(0)
        state.largest = torch.maximum(state.largest, largest.cpu())

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
            found = found.to(stack.device)
            stack = torch.cat([self._weighted_mean(run, found) for run in _runs(stack)])
        return stack.reshape(updates.shape).to(updates.dtype)

    def _weighted_mean(self, stack: Tensor, found: _Balanced) -> Tensor:
        """(T, N) -> (N,)"""
        magnitudes, _ = found.bounds.clamp(stack)
        values = stack.sign().mul_(magnitudes)
        threshold, largest = found.threshold[:, None], found.largest[:, None]
        balance, spread = self._balance(stack, found.bounds), largest - threshold
        alike = (spread <= 0) & (balance >= largest) & (values != 0)
        weights = (balance - threshold).clamp_(min=0).div_(torch.where(spread > 0, spread, 1))
        weights = weights.masked_fill_(spread <= 0, 0).add_(alike)
        return _total(values.mul_(weights)) / _total(weights).clamp(min=1e-12)

    def _balance(self, stack: Tensor, bounds: _Bounds) -> Tensor:
        """b (T, N) of a stack (T, N), times exp(-T): threshold and scaling do not see the factor, and nothing overflows."""
        _, normalized = bounds.clamp(stack)
        if self.variant == "standalone":
            across = (stack * _total(stack)).tanh_()
        else:
            across = _agreements(stack.sign().mul_(normalized))
        return across.mul_(normalized.square_().sub_(1).mul_(len(stack)).exp_())


pcb = register(Pcb)


def _runs(stack: Tensor) -> Sequence[Tensor]:
    """Of the columns of (T, N): on the CPU small enough for a dozen of their kind to be in a cache."""
    return torch.split(stack, max(1, (_RUN if stack.is_cpu else _RUN << 10) // len(stack)), dim=1)


def _total(x: Tensor) -> Tensor:
    """(T, N) -> (N,) by halves, in the same order at every place: torch's sum over few rows is ten times slower."""
    while len(x) > 1:
        half = len(x) // 2
        pairs = x[:half] + x[half : 2 * half]
        x = torch.cat([pairs, x[2 * half :]]) if len(x) % 2 else pairs
    return x[0]


def _agreements(z: Tensor) -> Tensor:
    """sum_j tanh(z_i z_j) of z (T, N) within -1 .. 1, to round-off.

    tanh(x) = sum_k c_k x^(2k+1) there, so that the sums over j are those of the powers of z: the cost grows with T rather
    than T^2.
    """
    coefficients, squares = _tanh_series(z.dtype), z.square()
    power, sums = z.clone(), [_total(z)]
    for _ in coefficients[1:]:
        sums.append(_total(power.mul_(squares)))
    found = torch.zeros_like(z)
    for c, total in zip(reversed(coefficients), reversed(sums), strict=True):
        found.mul_(squares).add_(total, alpha=c)
    return found.mul_(z)


@lru_cache
def _tanh_series(dtype: torch.dtype) -> list[float]:
    """c_k: tanh(sqrt(u)) / sqrt(u) at 0 .. 1 as a polynomial in u, interpolated in Chebyshev's points.

    Its terms fall by 11.8 each, for the function's nearest pole is at u = -pi^2 / 4.
    """
    degree = 7 if dtype == torch.float32 else 13

    points = np.sqrt((np.polynomial.chebyshev.chebpts1(degree + 1) + 1) / 2)
    series = np.polynomial.Chebyshev.fit(points**2, np.tanh(points) / points, degree, domain=[0, 1])
    return [float(c) for c in series.convert(kind=np.polynomial.Polynomial).coef]
