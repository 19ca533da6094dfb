"""TIES-Merging with its published, whole-model trimming, streamed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

from dcmerge_ext import ops
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.selection import Selection
from dcmerge_ext.methods.stacks import dense_update, stack_updates
from dcmerge_ext.updates import Updates


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
        return 1 if self.keep == 1 else 1 + Selection.num_passes(dtype)

    def begin(self, num_tasks: int, dtype: torch.dtype) -> Selection | _Majority:
        if self.keep == 1:  # nothing is trimmed
            return _Majority(torch.zeros(num_tasks, dtype=dtype))
        return Selection.begin(num_tasks, dtype)

    def survey(self, key: str, updates: Updates, state: Selection | _Majority) -> None:
        if isinstance(state, _Majority):
            merged_sign = _elected_sign(stack_updates(updates, state.thresholds.dtype), state.thresholds)
            state.sign_sum += int(merged_sign.sum(dtype=torch.float64))
            return
        for i, spec in enumerate(updates.specs):
            if spec.rank == 0:  # a task that does not touch this tensor
                state.add_zeros(i, math.prod(spec.shape))
            else:
                state.add(i, dense_update(updates[i]))

    def finish(self, state: Selection | _Majority) -> Selection | _Majority | _Elected:
        if isinstance(state, _Majority):
            return _Elected(state.thresholds, (state.sign_sum > 0) - (state.sign_sum < 0))
        # the published code keeps >= the (N - int(N keep))-th smallest magnitude: int(N keep) + 1 entries
        found = state.finish(lambda total: int(total * self.keep) + 1)
        return found if isinstance(found, Selection) else _Majority(found)

    def merge(self, updates: Updates, ctx: Context) -> Update:
        elected: _Elected = ctx.state
        stack = stack_updates(updates, elected.thresholds.dtype)
        # A zero majority selects the negative entries, as the published code does.
        merged = ops.elect(
            stack, elected.thresholds.to(stack.device), zero_sum=elected.sign or -1, reduce=self.disjoint
        )
        return merged.reshape(updates.shape).to(updates.dtype)


ties = register(Ties)


def _elected_sign(stack: Tensor, thresholds: Tensor) -> Tensor:
    total = torch.zeros_like(stack[0])
    below = torch.nextafter(thresholds, -torch.ones_like(thresholds)).tolist()  # hardshrink keeps what is greater
    for task, largest in zip(stack, below, strict=True):  # in the order in which ops.elect adds
        total += torch.nn.functional.hardshrink(task, largest)
    return total.sign()
