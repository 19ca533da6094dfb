"""WUDI-Merging and DOGE of one matrix. A step of a rival on 4096 x 4096 takes seconds: one is timed, and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import cases
import flops
import oracle
import torch
from case import Check, Problem, Rival, Setting
from methods_reference import iterative as reference
from methods_reference.elementwise import stacked
from near_ties import INPUT_MARGIN, Decided
from reference import full_svd
from timing import stopwatch
from torch import Tensor

from dcmerge_ext import LowRank, methods
from dcmerge_ext.lowrank import Update
from method_rows.common import (
    LAPACK,
    PLAIN,
    SINGLE,
    adapters,
    components,
    full_updates,
    near_decided,
    single,
    task_svds,
)

_ROWS = 256
"""Of WUDI-Merging whose descent is repeated in float64: they do not depend on each other."""
_CHECKED_STEPS = 20
"""Of DOGE's 400, on adapters: float64 takes a second for each."""


def wudi(setting: Setting, m: int, n: int, tasks: int, *, lora: bool = False) -> Problem:
    """300 steps; of adapters, whose entries are a tenth, steps of a tenth."""
    iterations, lr = 20 if setting.quick else 300, 1e-6 if lora else 1e-5
    updates: Sequence[Update] = (adapters if lora else full_updates)(setting, m, n, tasks)
    rows, columns = updates[0].shape
    chosen = torch.arange(0, rows, max(1, rows // _ROWS)) if lora else torch.arange(rows)
    truth = _wudi_rows(updates, chosen, iterations, lr)

    def check(answer: Update) -> Check:
        return Check(oracle.relative(cases.dense(answer)[chosen], truth), SINGLE)

    stack = stacked(updates)
    if lora:
        rival = Rival(
            PLAIN,
            [],
            once=[(iterations, partial(reference.wudi, stack, 1, lr))],
            note=f"extrapolated: {iterations} x one step, timed once; checked in the row of 768 x 768",
        )
        height = sum(u.rank for u in updates if isinstance(u, LowRank))
    else:
        rival, height = Rival(PLAIN, [("", partial(reference.wudi, stack, iterations, lr))]), tasks * rows
    return Problem(
        ours=partial(methods.wudi, updates, iterations=iterations, lr=lr),
        rivals=[rival],
        check=check,
        flops=flops.wudi(rows, columns, height, iterations),
        note=f"checked on {len(chosen)} rows, which do not depend on the others" if lora else "",
    )


def _wudi_rows(updates: Sequence[Update], rows: Tensor, iterations: int, lr: float) -> Tensor:
    """The descent of some rows in float64, by the gradient 2 sum_i (M - D_i) D_i' D_i / |D_i|^2."""
    lefts, rights, pulls = [], [], []
    total = torch.zeros(len(rows), updates[0].shape[1], dtype=torch.float64)
    for update in updates:
        if isinstance(update, LowRank):
            B, A = update.left.double(), update.right.double()
            own, inner = B[rows] @ A, B.mT @ B
            inner = inner / ((A @ A.mT) * inner).sum()
        else:
            A = update.double()
            own, inner = A[rows], torch.eye(len(A), dtype=A.dtype) / A.square().sum()
        left = A.mT @ inner
        total += own
        pulls.append((own @ left) @ A)
        lefts.append(left)
        rights.append(A)
    left, right = torch.cat(lefts, 1), torch.cat(rights)
    if not isinstance(updates[0], LowRank):
        left, right = left @ right, torch.eye(right.shape[1], dtype=right.dtype)
    pull = torch.stack(pulls).sum(0)
    return _adam(
        total, lambda M: ((M @ left) @ right if len(right) < len(left) else M @ left).sub_(pull).mul_(2), iterations, lr
    )


def doge(setting: Setting, m: int, n: int, tasks: int, *, lora: bool = False) -> Problem:
    """400 steps of 1e-4. Of adapters both sides take 20 of 1e-5 to be checked, and are counted up to 400."""
    steps = 10 if setting.quick else 400
    if lora:
        return _doge_adapters(adapters(setting, m, n, tasks), steps)
    updates = full_updates(setting, m, n, tasks)
    rows, columns = updates[0].shape
    rank = min(rows, columns) // tasks
    exact = reference.doge_start(stacked(updates).double(), [full_svd(u.double(), rank) for u in updates])

    def rival() -> Tensor:
        return reference.doge(stacked(updates), [full_svd(u, rank) for u in updates], steps, 1e-4)

    return Problem(
        ours=partial(methods.doge, updates, iterations=steps),
        rivals=[Rival(PLAIN, [("", rival)])],
        check=near_decided(_doge_decided(exact, _doge_descent(exact, steps, 1e-4)), SINGLE),
        flops=flops.doge(rows, columns, tasks, rank, exact.basis.shape[1], steps, flops.svd(rows, columns, rank)),
    )


def _doge_adapters(factors: Sequence[LowRank], steps: int) -> Problem:
    rows, columns = factors[0].shape
    tasks, rank, lr, few = len(factors), factors[0].rank, 1e-5, min(steps // 2, _CHECKED_STEPS)
    exact_parts = components(factors)
    parts = [single(p) for p in exact_parts]
    stack = stacked(factors)
    exact = reference.doge_start(stacked([u.to(torch.float64) for u in factors]), exact_parts)

    def ours(iterations: int) -> Update:
        return methods.doge(factors, iterations=iterations, lr=lr)

    def whole(call: Callable[[], Update]) -> float:
        """Seconds of all steps: those of a few, and what the same number takes more."""
        twice = stopwatch(partial(ours, 2 * few))
        once = stopwatch(call)
        return once + (steps / few - 1) * max(0.0, twice - once)

    start = reference.doge_start(stack, parts)
    return Problem(
        ours=partial(ours, few),
        rivals=[
            Rival(
                PLAIN,
                [("", lambda: reference.doge(stack, parts, few, lr))],
                once=[task_svds(factors), (steps - few, lambda: reference.doge_descend(start, 1, lr))],
                note=f"extrapolated: {tasks} x one full SVD and {steps - few} x one step, timed once, + {few} steps and the rest",
            )
        ],
        check=near_decided(_doge_decided(exact, _doge_descent(exact, few, lr)), SINGLE),
        rival_bound=LAPACK,
        flops=flops.doge(
            rows, columns, tasks, rank, exact.basis.shape[1], steps, flops.lowrank_svd(rows, columns, rank)
        ),
        clock=whole,
        note=f"dcmerge_ext extrapolated, too: {few} steps, and {steps - few} of what {few} more take; checked after {few}",
    )


def _doge_descent(start: reference.Descent, iterations: int, lr: float) -> Tensor:
    """X in float64, by the gradient -2 l sum_j <D_j, gap_j - l X>_row D_j, less its projection."""
    stack, lambdas, basis = start
    total, share = torch.einsum("t,tmn->mn", lambdas, stack), float(lambdas.sum())
    gaps = torch.stack([(D * (D - total)).sum(-1) for D in stack])

    def gradient(X: Tensor) -> Tensor:
        found = torch.zeros_like(X)
        for D, gap in zip(stack, gaps, strict=True):
            found.addcmul_((share * (D * X).sum(-1) - gap)[:, None], D, value=2 * share)
        return found - basis @ (basis.mT @ found)

    return _adam(torch.zeros_like(stack[0]), gradient, iterations, lr)


def _doge_decided(start: reference.Descent, correction: Tensor) -> Decided:
    """Which entries of each task the mask keeps."""
    limits = reference.doge_limits(start.stack)[:, None, None]
    distance = (start.stack.abs() - limits).div_(limits)
    kept = (distance >= 0).flatten(1)
    near = (distance.abs_() <= INPUT_MARGIN).flatten(1)
    expected = reference.doge_merge(start, correction)

    def values(entries: Tensor, inverted: Tensor) -> Tensor:
        each = start.lambdas[:, None] * (start.stack.flatten(1)[:, entries] + correction.flatten()[entries])
        return (each * (kept[:, entries] ^ inverted)).sum(0)

    return Decided(expected, near, values)


def _adam(start: Tensor, gradient: Callable[[Tensor], Tensor], iterations: int, lr: float) -> Tensor:
    found = torch.nn.Parameter(start)
    adam = torch.optim.Adam([found], lr=lr)
    for _ in range(iterations):
        with torch.no_grad():
            found.grad = gradient(found)
        adam.step()
    return found.detach()
