"""Task arithmetic."""

from __future__ import annotations

from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import register
from dcmerge_ext.methods.sums import sum_updates
from dcmerge_ext.updates import Updates


class TaskArithmetic(Method, frozen=True):
    """Sum of the updates (task vectors), sum_i Delta_i, usually added with a scale well below 1.

    Source: Editing Models with Task Arithmetic (Ilharco et al., arXiv 2212.04089), section 2. Default scale 0.3, the
    paper's choice for 8 tasks; 1.0 for a single task. Reads each task once; T m n additions.
    LowRank updates stay LowRank, with rank the sum of the ranks.
    """

    name = "task_arithmetic"
    paper = "https://arxiv.org/abs/2212.04089"
    elementwise = True
    keeps_rank = True

    def default_scale(self, num_tasks: int) -> float:
        return 0.3 if num_tasks > 1 else 1.0

    def merge(self, updates: Updates, ctx: Context) -> Update:
        return sum_updates(updates)


task_arithmetic = register(TaskArithmetic)
