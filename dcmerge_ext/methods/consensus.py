"""Consensus merging: entries of the merged vector that enough tasks rely on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta

from dcmerge_ext.errors import OptionError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.stacks import dense_update
from dcmerge_ext.methods.sums import sum_updates
from dcmerge_ext.methods.ties import Ties
from dcmerge_ext.updates import Updates, UpdateSpec

_Coefficient = Annotated[float, Meta(ge=0)]


class Consensus(Method, frozen=True):
    """Keep the entries of the summed (or TIES-merged) task vectors that at least two tasks rely on (Consensus merging).

    Source: Wang et al., Localizing Task Information for Improved Model Merging and Compression, arXiv 2405.07813, and its
    code: task t relies on an entry where |Delta_t| > lambda_t |tau - Delta_t|, strictly (its TALL mask), with tau the
    merged vector; entries on which fewer than ``agree`` tasks rely become 0. tau is the sum of the task vectors
    (Consensus TA), or their TIES-Merging with agreeing entries summed (Consensus TIES, trimming 80 %).

    The published code chooses each lambda_t from 0.2, 0.3, 0.4, 0.5, 0.6 by validation accuracy; without an evaluation
    the middle of them serves all tasks. Its scale is searched, too; its configuration trims nothing in TIES unless told.
    The default scale is that of task arithmetic, 0.3, for both.

    Cost: T m n, each task read twice; TIES surveys the whole model first. The result of LowRank updates is dense. Does
    not produce TALL's mask per task, which changes inference. With ``agree=0`` it is task arithmetic (TIES).
    """

    name = "consensus"
    paper = "https://arxiv.org/abs/2405.07813"
    scope = "model"
    elementwise = True

    aggregate: Annotated[
        Literal["sum", "ties"], Meta(description="what the masks apply to: Consensus TA or Consensus TIES")
    ] = "sum"
    mask_lambda: Annotated[
        _Coefficient | tuple[_Coefficient, ...],
        Meta(
            description="lambda_t of the masks, one for all tasks or one per task: larger keeps fewer entries; published: "
            "0.2 to 0.6 by validation"
        ),
    ] = 0.4
    agree: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="tasks that must rely on an entry; 1 drops only what no task relies on. None: the paper's 2, or 1 "
            "for a single task"
        ),
    ] = None
    keep: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="aggregate=ties: fraction of each task vector that survives trimming. None: 0.2, as in TIES"),
    ] = None

    def __post_init__(self) -> None:
        if self.keep is not None and self.aggregate != "ties":
            raise ValueError(f"keep belongs to aggregate='ties', and aggregate is {self.aggregate!r}")

    @property
    def _ties(self) -> Ties:
        return Ties(keep=0.2 if self.keep is None else self.keep, disjoint="sum")

    def default_scale(self, num_tasks: int) -> float:
        return 0.3 if num_tasks > 1 else 1.0

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        if isinstance(self.mask_lambda, tuple) and len(self.mask_lambda) != num_tasks:
            raise OptionError(
                f"mask_lambda has {len(self.mask_lambda)} entries for {num_tasks} tasks; give one per task"
            )
        if self.agree is not None and self.agree > num_tasks:
            raise OptionError(f"agree={self.agree} exceeds the {num_tasks} tasks: nothing would be merged")

    def num_surveys(self, dtype: torch.dtype) -> int:
        return self._ties.num_surveys(dtype) if self.aggregate == "ties" else 0

    def begin(self, num_tasks: int, dtype: torch.dtype) -> Any:
        return self._ties.begin(num_tasks, dtype) if self.aggregate == "ties" else None

    def survey(self, key: str, updates: Updates, state: Any) -> None:
        self._ties.survey(key, updates, state)

    def finish(self, state: Any) -> Any:
        return self._ties.finish(state)

    def merge(self, updates: Updates, ctx: Context) -> Update:
        merged = dense_update(self._ties.merge(updates, ctx) if self.aggregate == "ties" else sum_updates(updates))
        lambdas = self.mask_lambda if isinstance(self.mask_lambda, tuple) else (self.mask_lambda,) * len(updates)
        votes = torch.zeros_like(merged, dtype=torch.int32)
        for i, (spec, coefficient) in enumerate(zip(updates.specs, lambdas, strict=True)):
            if spec.rank == 0:  # |0| > lambda |tau| nowhere
                continue
            own = dense_update(updates[i])
            votes += own.abs() > coefficient * (merged - own).abs()
        agree = min(2, ctx.num_tasks) if self.agree is None else self.agree
        return merged.masked_fill_(votes < agree, 0)


consensus = register(Consensus)
