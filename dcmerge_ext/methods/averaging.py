"""Weight averaging."""

from __future__ import annotations

from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.sums import mean_updates
from dcmerge_ext.updates import Updates


class Averaging(Method, frozen=True):
    """Mean of the updates, (1/T) sum_i Delta_i; with scale 1 the mean of the fine-tuned weights.

    Source: Model soups (Wortsman et al., arXiv 2203.05482), uniform soup. Reads each task once; T m n additions.
    LowRank updates stay LowRank, with rank the sum of the ranks. A task that does not touch a tensor counts as zero.
    """

    name = "averaging"
    paper = "https://arxiv.org/abs/2203.05482"
    elementwise = True
    keeps_rank = True

    def merge(self, updates: Updates, ctx: Context) -> Update:
        return mean_updates(updates, ctx.num_tasks)


averaging = register(Averaging)
