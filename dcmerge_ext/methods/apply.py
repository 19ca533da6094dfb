"""Running a method on updates that are held in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.precision import without_autocast
from dcmerge_ext.updates import Updates


@without_autocast
def merge_with(
    method: Method, updates: Mapping[str, Sequence[Update]], weights: Sequence[float] | None
) -> dict[str, Update]:
    """Name -> merged update; the mapping is the scope of a whole-model method. Checks shapes, finiteness, options."""
    checked = {name: Updates.of(sequence, weights, name) for name, sequence in updates.items()}
    sizes = {len(u) for u in checked.values()}
    if len(sizes) > 1:
        raise InputError(f"merge_updates: every tensor needs the same number of tasks, got {sorted(sizes)}")
    if not checked:
        return {}
    num_tasks = sizes.pop()
    for u in checked.values():
        method.check(u.specs, num_tasks)
    dtype = max((u.dtype for u in checked.values()), key=lambda d: d.itemsize)

    def visit(state: Any) -> None:
        for name, u in checked.items():
            method.survey(name, u, state)

    state = survey_model(method, num_tasks, dtype, visit)
    return {name: method.merge(u, Context(num_tasks, name, state)) for name, u in checked.items()}


def survey_model(method: Method, num_tasks: int, dtype: torch.dtype, visit: Callable[[Any], None]) -> Any:
    """Run the survey passes of a model-scope method; ``visit(state)`` must survey every tensor into the state."""
    state = method.begin(num_tasks, dtype)
    for _ in range(method.num_surveys(dtype)):
        visit(state)
        state = method.finish(state)
    return state
