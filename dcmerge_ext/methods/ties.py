"""TIES-Merging with its published, whole-model trimming, streamed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext import ops
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import register
from dcmerge_ext.updates import Updates


@dataclass
class _Selection:
    """Radix selection of one threshold per task, a digit of the magnitude per pass."""

    digits: list[tuple[int, int]]  # (shift, width) still to be counted, leading first
    histograms: list[Tensor]
    prefixes: list[int]
    ranks: list[int] | None  # 1-based rank from the top inside the current prefix; None until the total is known
    dtype: torch.dtype

    def fork(self) -> _Selection:
        return replace(self, histograms=[torch.zeros_like(h) for h in self.histograms])

    def join(self, share: _Selection) -> None:
        for own, other in zip(self.histograms, share.histograms, strict=True):
            own += other


@dataclass
class _Majority:
    """The last pass: the sum of the elected signs over the whole model."""

    thresholds: Tensor
    sign_sum: int = 0

    def fork(self) -> _Majority:
        return _Majority(self.thresholds)

    def join(self, share: _Majority) -> None:
        self.sign_sum += share.sign_sum


@dataclass(frozen=True)
class _Elected:
    thresholds: Tensor
    sign: int


class Ties(Method, frozen=True):
    """Trim each task vector, elect a sign per element, average the entries that agree (TIES-Merging).

    Source: Yadav et al., arXiv 2306.01708, section 4, with the rules of the published code: the whole model is one
    vector per task; the int(N keep) + 1 largest magnitudes of its N entries survive, and all ties; where the trimmed sum
    is exactly zero the majority sign of the whole model decides.

    Exact, without holding any model: the order statistic is found by counting digits of the magnitudes, two passes over
    float32 updates (four over float64), one more pass elects the majority, the last one merges. The result of LowRank
    updates is dense.
    """

    name = "ties"
    paper = "https://arxiv.org/abs/2306.01708"
    scope = "model"
    elementwise = True

    keep: Annotated[
        float,
        Meta(gt=0, le=1, description="fraction of each task vector that survives trimming; the paper's default is 0.2"),
    ] = 0.2
    disjoint: Annotated[
        Literal["mean", "sum"], Meta(description="merge of the agreeing entries; the paper's is the mean")
    ] = "mean"

    def num_surveys(self, dtype: torch.dtype) -> int:
        return 1 if self.keep == 1 else 1 + len(_digits(dtype))

    def begin(self, num_tasks: int, dtype: torch.dtype) -> _Selection | _Majority:
        if self.keep == 1:  # nothing is trimmed
            return _Majority(torch.zeros(num_tasks, dtype=dtype))
        digits = _digits(dtype)
        return _Selection(digits, _histograms(num_tasks, digits[0][1]), [0] * num_tasks, None, dtype)

    def survey(self, key: str, updates: Updates, state: _Selection | _Majority) -> None:
        if isinstance(state, _Majority):
            merged_sign = _elected_sign(_stack(updates, state.thresholds.dtype), state.thresholds)
            state.sign_sum += int(merged_sign.sum(dtype=torch.float64))
            return
        shift, width = state.digits[0]
        for i, spec in enumerate(updates.specs):
            if spec.rank == 0:
                # the zeros of a task that does not touch this tensor: digit 0 of prefix 0
                if state.prefixes[i] == 0:
                    state.histograms[i][0] += _numel(spec.shape)
                continue
            ops.magnitude_histogram(
                _dense(updates[i]).to(state.dtype),
                state.histograms[i],
                shift=shift,
                width=width,
                prefix=state.prefixes[i],
            )

    def finish(self, state: _Selection | _Majority) -> _Selection | _Majority | _Elected:
        if isinstance(state, _Majority):
            return _Elected(state.thresholds, (state.sign_sum > 0) - (state.sign_sum < 0))
        ranks = state.ranks
        if ranks is None:
            # the published code keeps >= the (N - int(N keep))-th smallest magnitude: int(N keep) + 1 entries
            totals = [int(h.sum()) for h in state.histograms]
            ranks = [min(total, int(total * self.keep) + 1) for total in totals]
        width = state.digits[0][1]
        found = [_locate(h, rank) for h, rank in zip(state.histograms, ranks, strict=True)]
        prefixes = [(p << width) | digit for p, (digit, _) in zip(state.prefixes, found, strict=True)]
        if len(state.digits) == 1:
            bits = torch.tensor(prefixes, dtype=torch.int32 if state.dtype == torch.float32 else torch.int64)
            return _Majority(bits.view(state.dtype))
        digits = state.digits[1:]
        return _Selection(digits, _histograms(len(found), digits[0][1]), prefixes, [r for _, r in found], state.dtype)

    def merge(self, updates: Updates, ctx: Context) -> Update:
        elected: _Elected = ctx.state
        stack = _stack(updates, elected.thresholds.dtype)
        # A zero majority selects the negative entries, as the published code does.
        merged = ops.elect(
            stack, elected.thresholds.to(stack.device), zero_sum=elected.sign or -1, reduce=self.disjoint
        )
        return merged.reshape(updates.shape).to(updates.dtype)


ties = register(Ties)


def _digits(dtype: torch.dtype) -> list[tuple[int, int]]:
    return [(15, 16), (0, 15)] if dtype == torch.float32 else [(47, 16), (31, 16), (15, 16), (0, 15)]


def _histograms(num_tasks: int, width: int) -> list[Tensor]:
    return [torch.zeros(1 << width, dtype=torch.int64) for _ in range(num_tasks)]


def _locate(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Bin that holds the rank-th largest, and its rank inside that bin."""
    if rank == 0:  # no entries at all
        return 0, 0
    from_top = histogram.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, rank))
    above = int(from_top[index - 1]) if index else 0
    return len(histogram) - 1 - index, rank - above


def _elected_sign(stack: Tensor, thresholds: Tensor) -> Tensor:
    total = torch.zeros_like(stack[0])
    for task, threshold in zip(stack, thresholds.to(stack.device), strict=True):  # in the order in which ops.elect adds
        total += torch.where(task.abs() >= threshold, task, 0)
    return total.sign()


def _stack(updates: Updates, dtype: torch.dtype) -> Tensor:
    """(T, 1, N)"""
    stack = None
    for i, spec in enumerate(updates.specs):
        if spec.rank == 0:
            continue
        dense = _dense(updates[i])
        if stack is None:
            stack = torch.zeros(len(updates), 1, dense.numel(), dtype=dtype, device=dense.device)
        stack[i, 0] = dense.reshape(-1)
    return torch.zeros(len(updates), 1, _numel(updates.shape), dtype=dtype) if stack is None else stack


def _dense(update: Update) -> Tensor:
    return update.dense() if isinstance(update, LowRank) else update


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
