"""Merging state dicts in memory, through the same plan and executor as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dcmerge_ext.checkpoints.config import build_config
from dcmerge_ext.checkpoints.execute import Executor
from dcmerge_ext.checkpoints.plan import make_plan
from dcmerge_ext.checkpoints.source import StateDict
from dcmerge_ext.checkpoints.tasks import FullTask
from dcmerge_ext.errors import InputError


def merge_state_dicts(
    base: Mapping[str, Tensor],
    tasks: Sequence[Mapping[str, Tensor]],
    method: str = "dc_merge",
    scale: float | None = None,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Merge fine-tuned state dicts of one base.

    Matrices are merged by the method, other floating tensors take the mean of their updates (elementwise methods apply
    to all), integer and boolean tensors and unchanged ones are the base's. Tensors tied in the base stay tied.

    Args:
        base: name -> tensor.   tasks: state dicts with the same names and shapes.
        method, options: as in :func:`dcmerge_ext.merge_updates`.
        scale: coefficient of the merged update; None is the method's default.   weights: one per task, default 1.
    Returns:
        A new state dict, base + scale * merged, in the base's dtypes and on its devices; nothing shared with the inputs.
    Raises:
        InputError: names or shapes that differ, non-finite values, wrong options.
    """
    if isinstance(tasks, Mapping):
        raise InputError("merge_state_dicts: tasks needs a list of state dicts, got one; write [task]")
    if not all(isinstance(state, Mapping) for state in (base, *tasks)):
        raise InputError("merge_state_dicts: needs state dicts; pass model.state_dict(), not the model")
    source = StateDict(base, "base")
    if not source.specs:
        raise InputError("base: holds no tensors")
    models = [StateDict(task, f"task {i}") for i, task in enumerate(tasks)]
    config = build_config(
        {
            "tasks": [model.label for model in models],
            "out": "memory",
            "method": method,
            "scale": scale,
            "weights": None if weights is None else [float(w) for w in weights],
            "options": options,
        },
        "merge_state_dicts",
    )
    plan = make_plan(source, [FullTask(model, source) for model in models], config, in_memory=True)
    executor = Executor(plan, next(iter(base.values())).device)
    merged = {
        t.name: torch.empty_like(base[t.name], requires_grad=False, memory_format=torch.contiguous_format)
        for t in plan.tensors
    }

    def store(name: str, rows: slice | None, values: Tensor) -> None:
        (merged[name] if rows is None else merged[name][rows]).copy_(values)

    executor.run(plan.tensors, lambda tensor: executor.write(tensor, store))
    return {name: merged[source.aliases.get(name, name)] for name in base}
