"""DARE: random drop and rescale of each task vector, then task arithmetic or TIES."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import xxhash
from msgspec import Meta
from torch import Tensor

from dcmerge_ext.backends import for_device
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.stacks import dense_update
from dcmerge_ext.methods.sums import sum_updates
from dcmerge_ext.methods.ties import Ties
from dcmerge_ext.updates import Updates, UpdateSpec

_STREAM = 1 << 31
"""Apart from the streams of random directions, which count from 0."""


class Dare(Method, frozen=True):
    """Drop entries of each task vector at random, rescale the rest by 1 / (1 - p), then add or merge by TIES (DARE).

    Source: Yu et al., Language Models are Super Mario, arXiv 2311.03099: delta~ = m o delta / (1 - p) with
    m_e = 0 with probability p, else 1, for each entry by itself; each task's delta~ has the mean delta. The merge that
    follows is task arithmetic (DARE-TA) or TIES-Merging over the whole model (DARE-TIES).

    The masks depend on ``seed``, the tensor's name, the position of the task and the position of the entry in its
    tensor alone: the same on every backend, with any number of threads, however a tensor is split. Hence the order of
    the tasks matters, unlike in other methods; swap ``seed`` to see how much of a result is chance.

    Cost: ten rounds of Philox4x32 for four entries, again in each pass (one, and three more over float32 with TIES).
    The result of LowRank updates is dense. Does not search ``rate``, drops every floating tensor (the published code
    leaves out classifier heads, by name), and has no magnitude-based masks.
    """

    name = "dare"
    paper = "https://arxiv.org/abs/2311.03099"
    scope = "model"
    elementwise = True

    rate: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="p, probability of dropping an entry; the published code's default, 0.1 (the paper shows up to 0.99)",
        ),
    ] = 0.1
    aggregate: Annotated[
        Literal["sum", "ties"], Meta(description="of the rescaled task vectors: DARE-TA or DARE-TIES")
    ] = "sum"
    keep: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(
            description="aggregate=ties: fraction of each task vector that survives trimming, dropped entries counted as "
            "zeros. None: 0.2, as in the published code"
        ),
    ] = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="of the random masks")] = 0

    def __post_init__(self) -> None:
        if self.keep is not None and self.aggregate != "ties":
            raise ValueError(f"keep belongs to aggregate='ties', and aggregate is {self.aggregate!r}")

    @property
    def _ties(self) -> Ties:
        return Ties(keep=0.2 if self.keep is None else self.keep)

    def default_scale(self, num_tasks: int) -> float:
        """Of the merge that follows: 0.3 for task arithmetic, 1 for TIES."""
        return 0.3 if num_tasks > 1 and self.aggregate == "sum" else 1.0

    def num_surveys(self, dtype: torch.dtype) -> int:
        return self._ties.num_surveys(dtype) if self.aggregate == "ties" else 0

    def begin(self, num_tasks: int, dtype: torch.dtype) -> Any:
        return self._ties.begin(num_tasks, dtype) if self.aggregate == "ties" else None

    def survey(self, key: str, updates: Updates, state: Any) -> None:
        self._ties.survey(key, self._dropped(key, updates), state)

    def finish(self, state: Any) -> Any:
        return self._ties.finish(state)

    def merge(self, updates: Updates, ctx: Context) -> Update:
        dropped = self._dropped(ctx.key, updates)
        if self.aggregate == "ties":
            return self._ties.merge(dropped, ctx)
        total = sum_updates(dropped)
        return dense_update(total)  # a LowRank where no task touches the tensor

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        passes = 1 + self.num_surveys(torch.float32)
        # what a product of matrices does in the time of drawing one entry
        return 60.0 * passes * sum(math.prod(spec.shape) for spec in specs if spec.rank != 0)

    def _dropped(self, key: str, updates: Updates) -> Updates:
        """The updates after drop and rescale: dense, but for tasks that do not touch the tensor."""

        def load(i: int) -> Update:
            update = updates[i]
            if updates.specs[i].rank == 0:
                return update
            values = dense_update(update)
            return drop(values, self.rate, seed=self.seed, key=key, task=i, offset=updates.offset)

        specs = [spec if spec.rank == 0 else spec._replace(rank=None) for spec in updates.specs]
        return Updates(specs, load, updates.offset)


dare = register(Dare)


def drop(values: Tensor, rate: float, *, seed: int, key: str, task: int, offset: int = 0) -> Tensor:
    """Drop entries with probability ``rate``, each by itself, and divide the others by 1 - rate.

    Entry e of the tensor in row-major order is dropped where word e mod 4 of Philox4x32-10's block e // 4 lies below
    rate 2^32: integers alone, so that the choice is the same on every device. ``seed`` and ``key`` make Philox's key as in
    :func:`dcmerge_ext.ops.rademacher`, whose streams are others.

    Args:
        values: a tensor, or a run of its entries such as a panel of rows; float32 or float64.
        rate: at least 0, below 1.   seed: 0 .. 2**64-1.   key: the tensor's name.   task: 0 .. 2**32-1.
        offset: entries of the tensor before the first of ``values``.
    """
    hashed = xxhash.xxh3_64_intdigest(key.encode(), seed=seed)
    kept: Tensor = for_device(values.device).drop(values.contiguous(), rate, hashed, task, _STREAM, offset)
    return kept
